"""Compile every CUDA and Triton kernel without a GPU and read back registers, stack and spills.

Each csrc/cuda/*.cu and each kernel of qkernels.triton is compiled for ARCHS; the CUDA library is linked and
its undefined symbols are looked up. Exits with 1 where a kernel spills or does not compile, or a symbol is
unknown.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "_backend")]

import native  # noqa: E402

ARCHS = ("80", "90", "100")


class Usage(NamedTuple):
    """What one kernel needs on one architecture: registers per thread, bytes of stack and of spills."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spill: int


def demangled(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def ptxas_usage(text):
    """The kernels in ptxas' verbose output, in its order."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, text, re.DOTALL)
    names = [name.replace("(anonymous namespace)::", "") for name in demangled([row[0] for row in found])]
    return [
        Usage(name, arch, int(registers), int(stack), int(stores) + int(loads))
        for name, (_, arch, stack, stores, loads, registers) in zip(names, found)
    ]


def unknown_symbols(library):
    """Undefined symbols that neither the system nor the installed torch defines, CUDA entry points aside."""
    nm = ["nm", "-D", "--format=posix"]
    undefined = subprocess.run([*nm, "-u", str(library)], capture_output=True, text=True, check=True).stdout
    # A version suffix (name@GLIBC_2.14) marks a system library; weak symbols (w) may stay undefined.
    names = {line.split()[0] for line in undefined.splitlines() if "@" not in line and line.split()[1] == "U"}
    folder = native.find_torch()[0].parent / "lib"
    for path in (folder / "libtorch_cpu.so", folder / "libc10.so"):
        defined = subprocess.run(
            [*nm, "--defined-only", str(path)], capture_output=True, text=True, check=True
        )
        names -= {line.split()[0] for line in defined.stdout.splitlines()}
    return sorted(name for name in names if "cuda" not in name)


def check_cuda(jobs):
    """Compile and link csrc/cuda; returns its kernels' usage and the faults found."""
    nvcc, cxx = native.find_nvcc(), native.find_cxx()
    if not nvcc or not cxx:
        print("CUDA: no nvcc here, csrc/cuda is not compiled" if cxx else "CUDA: no C++ compiler here")
        return [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        steps = native.cuda_steps(cxx, nvcc, ARCHS, work, extra=["-Xptxas", "-v"])
        texts = native.run_all(steps, jobs)
        library = work / "lib/_C_cuda.so"
        print(f"CUDA: compiled and linked {library.name}, {library.stat().st_size / 1e6:.1f} MB")
        faults = [f"{library.name}: unknown symbol {name}" for name in unknown_symbols(library)]
    return [usage for text in texts for usage in ptxas_usage(text)], faults


def triton_usage(name, fn, signature, constexprs, aligned, num_warps):
    """Compile one Triton kernel for each of ARCHS; LOCAL and STACK above 0 are spills there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qkernels.triton.walk import EXACT

    arguments = list(fn.arg_names)
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs={(arguments.index(key),): value for key, value in constexprs.items()},
        attrs={(arguments.index(key),): [["tt.divisibility", 16]] for key in aligned},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for arch in ARCHS:
        options = {"num_warps": num_warps, **EXACT}
        kernel = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)
        inexact = re.search(r"^.*(\.ftz|\.approx|\bfma\.).*\.f(32|64).*$", kernel.asm["ptx"], re.MULTILINE)
        if inexact:
            raise ValueError(f"sm_{arch} rounds otherwise: {inexact[0].strip()}")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(tool), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (
            int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")
        )
        yield Usage(name, arch, registers, stack, stack + local)


def check_triton():
    """Compile every kernel that qkernels.triton lists; returns their usage and the faults found."""
    if importlib.util.find_spec("triton") is None:
        print("Triton: not installed, its kernels are not compiled (pip install qkernels[triton])")
        return [], []
    from qkernels.triton import aot_specs

    usages, faults = [], []
    for spec in aot_specs():
        try:
            usages += triton_usage(*spec)
        except Exception as error:
            faults.append(f"{spec[0]}: {type(error).__name__}: {error}")
    return usages, faults


def print_table(title, usages, every):
    """A row per kernel: the worst of its instances per architecture, or each instance with `every`."""
    rows = {}
    for usage in usages:
        name = usage.kernel if every else re.sub(r"^void |[<(].*", "", usage.kernel)
        rows.setdefault(name, []).append(usage)
    width = max(map(len, rows), default=0) + 2
    print(
        f"\n{title:{width}}{'variants':>9}"
        + "".join(f"{f'sm_{arch}':>8}" for arch in ARCHS)
        + "   stack   spill"
    )
    for name, group in sorted(rows.items()):
        registers = [max((u.registers for u in group if u.arch == arch), default=0) for arch in ARCHS]
        cells = [*registers, max(u.stack for u in group), max(u.spill for u in group)]
        print(f"{name:{width}}{len(group) // len(ARCHS):>9}" + "".join(f"{cell:>8}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="a row per template instance, not the worst of a kernel"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel compilations")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    faults = []
    for title, check in (
        ("CUDA kernel", lambda: check_cuda(arguments.jobs)),
        ("Triton kernel", check_triton),
    ):
        usages, found = check()
        if usages:
            print_table(title, usages, arguments.all)
        faults += found + [f"{u.kernel} on sm_{u.arch}: {u.spill} bytes spilled" for u in usages if u.spill]
    print("\n" + ("\n".join(faults) or "no spill"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
