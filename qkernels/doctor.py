"""`qkernels doctor`: versions, what was built, what serves each op on each device, and why not otherwise."""

import importlib.metadata
import platform
import shutil
from pathlib import Path


def add_arguments(parser):
    pass


def main(args):
    print(report())
    return 0


def report():
    """The page `qkernels doctor` prints."""
    import torch

    import qkernels
    from qkernels import backend, eager

    folder = Path(qkernels.__file__).parent
    lines = [
        f"qkernels {qkernels.__version__}  ({folder})",
        f"python {platform.python_version()}  torch {torch.__version__}",
        f"triton {_version('triton')}  numpy {_version('numpy')}",
        f"compilers: g++ {_found('g++')}, nvcc {_found('nvcc')}",
        f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"CUDA: {_cuda(torch)}",
        "",
    ]
    for device, file in backend.LIBRARIES.items():
        state = backend.why_not.get(device, "loaded")
        lines.append(f"{file}: {state}")
    elements = any(folder.glob("_elements*.so"))
    lines.append(
        f"_elements (NumPy): {'built' if elements else 'not built (pybind11 or a compiler was missing)'}"
    )
    lines.append(f"_eager (less time from Python to an op): {eager.why_not or 'loaded'}")
    devices = ("cpu", "cuda")
    lines += ["", f"{'op':<32}" + "".join(f"{d:<12}" for d in devices)]
    for name in sorted(backend.SCHEMAS):
        served = [backend.serves(name, d) if d == "cpu" or torch.version.cuda else "-" for d in devices]
        lines.append(f"{name:<32}" + "".join(f"{who:<12}" for who in served))
    forced = backend.forced()
    lines += ["", f"backend: {forced} for every op" if forced else "backend: chosen by the dispatcher"]
    if "cuda" in backend.why_not and not backend.has_triton():
        lines.append(
            "CUDA tensors run the reference: install qkernels[triton], or build with nvcc (QKERNELS_CUDA=1)"
        )
    return "\n".join(lines)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _found(tool):
    return shutil.which(tool) or "not found"


def _cuda(torch):
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if not torch.cuda.is_available():
        return f"torch for CUDA {torch.version.cuda}, no GPU to use"
    return f"{torch.cuda.get_device_name()} (torch for CUDA {torch.version.cuda})"
