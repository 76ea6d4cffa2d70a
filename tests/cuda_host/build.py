"""Compiles csrc/cuda/*.cu with the host compiler: a launch becomes a call of the emulator, nothing else changes."""

import ctypes
import fcntl
import hashlib
import importlib.util
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "cuda_host"
LAUNCH = re.compile(r"([\w:]+(?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.DOTALL)
# Few blocks, so that small inputs reach the strides over the grid; locals that nothing wrote hold garbage.
MAX_BLOCKS = 3
FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC", "-ffp-contract=off", "-fsanitize=alignment", "-U_FORTIFY_SOURCE"]
FLAGS += ["-ftrivial-auto-var-init=pattern", f"-DQK_MAX_BLOCKS={MAX_BLOCKS}"]
# -Bsymbolic, or else cudaGetLastError would be the one that a CUDA build of torch brings.
LINK = ["-shared", "-Wl,-Bsymbolic"]


def native():
    """_backend/native.py, which knows the compilers."""
    spec = importlib.util.spec_from_file_location("native", ROOT / "_backend" / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing():
    """Why the kernels cannot be compiled here, or an empty string."""
    try:
        tools = native()
        nvcc, cxx = tools.find_nvcc(), tools.find_cxx()
        if nvcc:
            tools.cuda_include(nvcc)
    except SystemExit as error:
        return str(error)
    return "" if nvcc and cxx else f"no {'CUDA toolkit' if cxx else 'C++ compiler'}"


def emulated(text):
    """The source with its launches as calls."""
    return LAUNCH.sub(r"emulate(\2, [&] { \1(\3); });", text)


def compile_object(command, name, text, headers):
    """The object of one translation unit, compiled unless one of the same contents is there."""
    digest = hashlib.sha256("\0".join([*command, text, headers]).encode()).hexdigest()[:16]
    output = WORK / f"{name}-{digest}.o"
    if not output.exists():
        for old in WORK.glob(f"{name}-*"):
            old.unlink()
        source = output.with_suffix(".cpp")
        source.write_text(text)
        subprocess.run([*command, "-c", str(source), "-o", f"{output}.tmp"], check=True)
        Path(f"{output}.tmp").rename(output)
    return output


def library():
    """The emulated launchers, built where they are out of date."""
    tools = native()
    include = tools.cuda_include(tools.find_nvcc())
    cxx = tools.find_cxx()
    folders = [f"-I{HERE}", f"-I{WORK}/include", f"-I{CSRC}", "-isystem", str(include)]
    command = [*cxx, *FLAGS, *folders, "-include", "cuda_host.h"]
    headers = [*CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*.cuh"), *CSRC.glob("math/*.h"), HERE / "cuda_host.h"]
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    read = version + "\0".join(path.read_text() for path in sorted(headers))
    units = {
        path.stem: path.read_text()
        for path in [*CSRC.glob("cuda/*.cu"), *HERE.glob("*.cpp"), *HERE.glob("*.cu")]
    }
    texts = {name: emulated(text) for name, text in units.items()}
    (WORK / "include" / "cuda").mkdir(parents=True, exist_ok=True)
    with open(WORK / "lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        # Several test processes may come here at once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in CSRC.glob("cuda/*.cuh"):
            (WORK / "include" / "cuda" / path.name).write_text(emulated(path.read_text()))
        # The longest first.
        names = sorted(texts, key=lambda name: (name in ("entry", "emulator"), -len(texts[name])))
        objects = list(pool.map(lambda name: compile_object(command, name, texts[name], read), names))
        digest = hashlib.sha256(" ".join([*LINK, *(path.name for path in objects)]).encode()).hexdigest()[:16]
        output = WORK / f"libkernels-{digest}.so"
        if not output.exists():
            for old in WORK.glob("libkernels-*"):
                old.unlink()
            subprocess.run([*cxx, *LINK, *map(str, objects), "-o", f"{output}.tmp"], check=True)
            Path(f"{output}.tmp").rename(output)
    return ctypes.CDLL(str(output))
