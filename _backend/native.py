"""Compiles csrc/ into qkernels/: which compilers, which flags, which files.

The sources become up to four libraries: `_C_cpu.so` and `_C_cuda.so` (LibTorch stable ABI, no Python symbol, one file
for every torch from MINIMUM_TORCH on), `_elements` (pybind11, no torch), and `_eager` (the short way from Python to the
ops, for the torch and the Python of this build alone, whose versions are in its name). Environment variables:

    QKERNELS_CPU     1 (default) or 0: compile nothing at all, a pure-Python install
    QKERNELS_CUDA    auto (default): the CUDA library where nvcc is (12.1 or later) and compiles it; 1: it must be
                     there; 0: never
    QKERNELS_CUDA_ARCHS   e.g. "80;90": GPU architectures; the last one is also kept as PTX
    CXX, CUDA_HOME, MAX_JOBS   host compiler, CUDA toolkit, number of parallel compilations
"""

import contextlib
import fcntl
import filecmp
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "native"
MINIMUM_TORCH = "2.10"
MINIMUM_NVCC = (12, 1)  # kernels take up to 32764 bytes of parameters
DEFAULT_ARCHS = "75;80;90;100"  # T4; A100 and its kin; H100; B200 and, from its PTX, what follows
SONAME = "qkernels"  # before the name of a file: the loader tells libraries of one process apart by it
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ELEMENTS = "_elements" + EXT_SUFFIX

# No contraction and no fast-math: every backend rounds each operation alike. Giving up traps and errno
# changes no result and lets g++ vectorise comparisons and rint.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", f"-I{CSRC}"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", f"-I{CSRC}"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
TORCH_LIBRARIES = ["torch_cpu", "torch", "c10"]
TORCH_CUDA_LIBRARIES = ["torch_cuda", "c10_cuda"]
TORCH_PYTHON_LIBRARIES = ["torch_python"]

WITHOUT = {
    "_eager": "calls from Python take longer",
    "_C_cuda": "GPUs are left to Triton (QKERNELS_CUDA=1 would have stopped here)",
}

NINJA_RULES = """\
rule compile
  command = $cmd
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = $cmd
  description = link $out"""


class BuildError(SystemExit):
    """Ends the build; its text is the last line the user sees."""


class Step(NamedTuple):
    """One command: `output` from `inputs`; a compilation also writes `output`.d, the headers it read.

    optional: the library without which there is still a build, where this or another of its steps fails.
    """

    output: Path
    inputs: list
    command: list
    compiles: bool = True
    optional: str = ""


def say(text):
    print(f"qkernels: {text}", flush=True)


def setting(name, default, accepted):
    value = os.environ.get(name, "") or default
    if value not in accepted:
        raise BuildError(f"{name}={value!r}: accepted are {', '.join(accepted)}")
    return value


def wanted():
    return setting("QKERNELS_CPU", "1", ("1", "0")) == "1"


def find_torch():
    """(include folder, version) of a torch >= MINIMUM_TORCH, or None; torch is not imported."""
    roots = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    roots += site.getsitepackages([sys.prefix, sys.base_prefix])
    roots += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    for package in (Path(root or ".") / "torch" for root in roots):
        if (package / "include/torch/csrc/stable/library.h").exists() and (package / "version.py").exists():
            version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (package / "version.py").read_text())
            if version and tuple(map(int, version.groups()[1:])) >= tuple(map(int, MINIMUM_TORCH.split("."))):
                return package / "include", version[1]
    return None


def find_cxx():
    """The host compiler of C++20 as a list of words, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    words = [shlex.split(name) for name in names]
    return next((word for word in words if shutil.which(word[0]) and knows_cxx20(word)), None)


def knows_cxx20(cxx):
    probe = [*cxx, CXX_FLAGS[0], "-fsyntax-only", "-x", "c++", "/dev/null"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def cuda_wanted():
    return setting("QKERNELS_CUDA", "auto", ("auto", "1", "0"))


def find_nvcc():
    """The path of an nvcc that is new enough, or None; QKERNELS_CUDA=1 makes its absence an error."""
    want = cuda_wanted()
    if want == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    tries = ([f"{home}/bin/nvcc"] if home else []) + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    found = next((path for path in tries if path and os.access(path, os.X_OK)), None)
    if want == "1" and not found:
        raise BuildError("QKERNELS_CUDA=1 but no nvcc on CUDA_HOME, PATH or /usr/local/cuda: set CUDA_HOME")
    version = nvcc_version(found) if found else None
    if version and version < MINIMUM_NVCC:
        old, needed = (".".join(map(str, numbers)) for numbers in (version, MINIMUM_NVCC))
        if want == "1":
            raise BuildError(f"QKERNELS_CUDA=1 but {found} is version {old}: {needed} or later is needed")
        say(f"{found} is version {old}, {needed} or later is needed: the CUDA library is left out")
        return None
    if version and torch_cuda() not in (None, version[0]):
        # The library carries nvcc's runtime, which a driver for torch's may be too old for.
        differ = f"{found} is version {version[0]}, torch is built for CUDA {torch_cuda()}"
        if want != "1":
            say(
                f"{differ}: the CUDA library is left out (set CUDA_HOME, or QKERNELS_CUDA=1 to build it all the same)"
            )
            return None
        say(f"{differ}: the library needs a driver for the newer one")
    return found


def torch_cuda():
    """The major version of CUDA that the installed torch is built for, or None."""
    found = find_torch()
    text = (found[0].parent / "version.py").read_text() if found else ""
    told = re.search(r"^cuda\b.*= '(\d+)\.", text, re.MULTILINE)
    return int(told[1]) if told else None


def nvcc_version(nvcc):
    """(major, minor), or None: a wrapper that does not tell counts as new enough."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    return tuple(map(int, release.groups())) if release else None


def cuda_include(nvcc):
    """The folder of cuda_runtime.h, asked of nvcc itself: the one on PATH may be a wrapper or a link."""
    asked = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", asked, re.MULTILINE)
    home = Path(top[1] if top else nvcc).resolve()
    for path in [home, *sorted(home.glob("targets/*"))]:
        if (path / "include/cuda_runtime.h").exists():
            return path / "include"
    raise BuildError(
        f"no cuda_runtime.h under {home}: set CUDA_HOME, or QKERNELS_CUDA=0 to build without CUDA"
    )


def cuda_archs(nvcc):
    """The chosen architectures; of the default ones, those that this nvcc knows."""
    chosen = os.environ.get("QKERNELS_CUDA_ARCHS")
    archs = (chosen or DEFAULT_ARCHS).replace(",", ";").replace(" ", ";").split(";")
    archs = [arch.replace(".", "") for arch in archs if arch]
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs) or not archs:
        raise BuildError(f"QKERNELS_CUDA_ARCHS={chosen!r}: accepted is a list such as 80;90;100")
    if chosen:
        return archs
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [arch for arch in archs if f"compute_{arch}" in known]


def gencode(archs):
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def torch_flags(stable=True):
    found = find_torch()
    if not found:
        raise BuildError(
            f"no torch >= {MINIMUM_TORCH} in {sys.prefix}: install it first, or set QKERNELS_CPU=0"
        )
    include, _ = found
    major, minor = map(int, MINIMUM_TORCH.split("."))
    target = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"] if stable else []
    return [*target, "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]


def python_flags():
    """Where Python.h is, or None with a word: distributions keep it in a package of its own."""
    include = Path(sysconfig.get_path("include"))
    if (include / "Python.h").exists():
        return ["-isystem", str(include)]
    say(f"no Python.h in {include} (python3-dev has it): _eager and _elements are left out")
    return None


def compile_step(compiler, flags, source, work):
    output = work / source.relative_to(CSRC).with_suffix(source.suffix + ".o")
    dependencies = ["-MD", "-MF", f"{output}.d"]
    return Step(output, [source], [*compiler, *flags, *dependencies, "-c", str(source), "-o", str(output)])


def link_steps(linker, objects, output, libraries, cxx, flag="-Wl,"):
    """Link against empty libraries with torch's names: the loader needs the names, the linker no symbol."""
    stubs, folder = [], output.parent.parent / "stubs"
    empty = ["-shared", "-fPIC", "-x", "c++", "/dev/null"]
    for name in libraries:
        stub = folder / f"lib{name}.so"
        command = [*cxx, *empty, f"-Wl,-soname,{stub.name}", "-o", str(stub)]
        stubs.append(Step(stub, [], command, compiles=False))
    needed = [f"{flag}--no-as-needed", f"-L{folder}", *(f"-l{name}" for name in libraries)]
    soname = f"{flag}-soname={SONAME}{output.name}"
    command = [*linker, "-shared", soname, *map(str, objects), *(needed if stubs else []), "-o", str(output)]
    return [*stubs, Step(output, [*objects, *(stub.output for stub in stubs)], command, compiles=False)]


def optional(steps, library):
    """All but the empty libraries, which other libraries are linked against too."""
    return [s if s.output.parent.name == "stubs" else s._replace(optional=library) for s in steps]


def cpu_steps(cxx, work):
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    if not sources:
        raise BuildError(f"no source in {CSRC / 'cpu'}")
    steps = [compile_step(cxx, CXX_FLAGS + torch_flags(), source, work) for source in sources]
    objects = [step.output for step in steps]
    return steps + link_steps(cxx, objects, work / "lib/_C_cpu.so", TORCH_LIBRARIES, cxx)


def cuda_steps(cxx, nvcc, archs, work, extra):
    """Kernels through nvcc without a torch header; bind*.cpp, through the host compiler, see torch."""
    host = ["-ccbin", cxx[0]] if len(cxx) == 1 else []
    flags = [*NVCC_FLAGS, *host, *gencode(archs), *extra]
    steps = [compile_step([nvcc], flags, source, work) for source in sorted((CSRC / "cuda").glob("*.cu"))]
    bind_flags = [*CXX_FLAGS, *torch_flags(), "-isystem", str(cuda_include(nvcc))]
    steps += [compile_step(cxx, bind_flags, source, work) for source in sorted((CSRC / "cuda").glob("*.cpp"))]
    objects = [step.output for step in steps]
    linker = [nvcc, "-cudart=static", *host]
    output, libraries = work / "lib/_C_cuda.so", TORCH_LIBRARIES + TORCH_CUDA_LIBRARIES
    steps += link_steps(linker, objects, output, libraries, cxx, flag="-Xlinker=")
    if cuda_wanted() == "1":
        return steps
    return optional(steps, "_C_cuda")


def eager_steps(cxx, work, python):
    """Needs _C_cpu.so, whose loops it calls, to be loaded. Other torches may not have all it asks of this one."""
    sources, flags = sorted((CSRC / "eager").glob("*.cpp")), [*CXX_FLAGS, *torch_flags(stable=False), *python]
    if not sources:
        return []
    steps = [compile_step(cxx, flags, source, work) for source in sources]
    objects = [*(step.output for step in steps), work / "lib/_C_cpu.so"]
    output = work / "lib" / f"_eager.torch-{find_torch()[1]}{EXT_SUFFIX}"
    steps += link_steps(cxx, objects, output, [*TORCH_LIBRARIES, *TORCH_PYTHON_LIBRARIES], cxx)
    return optional(steps, "_eager")


def elements_steps(cxx, work, python):
    source = CSRC / "elements.cpp"
    try:
        import pybind11
    except ImportError:
        say("no pybind11: qkernels._elements (the element functions for NumPy) is left out")
        return []
    if not source.exists():
        return []
    flags = [*CXX_FLAGS, "-isystem", pybind11.get_include(), *python]
    step = compile_step(cxx, flags, source, work)
    return [step, *link_steps(cxx, [step.output], work / "lib" / ELEMENTS, [], cxx)]


def plan():
    """All the steps of this machine, none where nothing can or shall be compiled."""
    if not wanted():
        say("QKERNELS_CPU=0: pure Python, nothing is compiled")
        return []
    cxx = find_cxx()
    if not cxx:
        if cuda_wanted() == "1":
            raise BuildError("QKERNELS_CUDA=1 but no C++20 compiler: install g++ or set CXX")
        say(
            "no C++20 compiler: pure Python, the ops run on plain PyTorch and Triton (install g++, or set CXX)"
        )
        return []
    nvcc, python = find_nvcc(), python_flags()
    steps = cpu_steps(cxx, WORK)
    if python:
        steps += [*eager_steps(cxx, WORK, python), *elements_steps(cxx, WORK, python)]
    if nvcc and any((CSRC / "cuda").glob("*.cu")):
        steps += cuda_steps(cxx, nvcc, cuda_archs(nvcc), WORK, extra=["-t", "2"])
    # The two torch libraries share stubs.
    return list({step.output: step for step in steps}.values())


def write_ninja(steps, path):
    """A build.ninja whose commands stand in full: a changed flag rebuilds what it touches."""

    def escaped(words):
        return " ".join(re.sub(r"([$ :])", r"$\1", str(word)) for word in words)

    lines = [f"builddir = {escaped([path.parent])}", NINJA_RULES]
    for step in steps:
        rule = "compile" if step.compiles else "link"
        lines.append(f"build {escaped([step.output])}: {rule} {escaped(step.inputs)}")
        lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
    path.write_text("\n".join(lines) + "\n")


def run_ninja(steps, done=()):
    """Run what is out of date; without ninja, all but what is ``done``. The compiler's messages go to the terminal."""
    path = WORK / "build.ninja"
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    if not jobs.isdigit() or int(jobs) < 1:
        raise BuildError(f"MAX_JOBS={jobs!r}: accepted is a number of compilations at a time")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if not ninja:
        say("no ninja: compiling everything again")
        return run_all([step for step in steps if step not in done], int(jobs))
    write_ninja(steps, path)
    if subprocess.run([ninja, "-C", str(ROOT), "-f", str(path), "-j", jobs]).returncode:
        raise BuildError("qkernels: the build failed; the compiler's message stands above")


def run_all(steps, jobs):
    """Run every step after those that make its inputs; returns what each printed."""

    def run(step):
        step.output.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(step.command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{shlex.join(step.command)}\n{done.stderr}qkernels: the build failed")
        return done.stdout + done.stderr

    printed, waiting = [], list(steps)
    with ThreadPoolExecutor(jobs) as pool:
        while waiting:
            outputs = {step.output for step in waiting}
            ready = [step for step in waiting if not outputs.intersection(step.inputs)]
            printed += pool.map(run, ready)
            waiting = [step for step in waiting if step not in ready]
    return printed


def run_possible(steps):
    """Run all steps at once; where that fails, those that must not fail and then each optional library's.

    Returns those that ran.
    """
    done = [step for step in steps if not step.optional]
    if done != steps:
        with contextlib.suppress(BuildError):
            run_ninja(steps)
            return steps
    run_ninja(done)
    for name in dict.fromkeys(step.optional for step in steps if step.optional):
        more = done + [step for step in steps if step.optional == name]
        try:
            run_ninja(more, done)
            done = more
        except BuildError as error:
            say(f"{error}\nqkernels: going on without {name}: {WITHOUT[name]}")
    return done


def build(package):
    """Compile, put the libraries into the folder `package`, delete stale ones there; returns their paths."""
    steps = plan()
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "lock", "w") as lock:
        # Two builds at once, from two terminals, would write the same files.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if steps:
            steps = run_possible(steps)
        return install([step.output for step in steps if step.output.parent == WORK / "lib"], package)


def install(libraries, package):
    package.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in libraries}
    for old in [*package.glob("_C_*.so"), *package.glob("_elements*.so"), *package.glob("_eager*.so")]:
        if old.name not in names:
            old.unlink()
    for path in libraries:
        target = package / path.name
        if not target.exists() or not filecmp.cmp(path, target, shallow=False):
            # A running process may have the old file mapped: replace the name, never the contents.
            shutil.copy2(path, target.with_suffix(".tmp"))
            os.replace(target.with_suffix(".tmp"), target)
    return [package / name for name in sorted(names)]


if __name__ == "__main__":
    for library in build(ROOT / "qkernels"):
        say(f"built {library.relative_to(ROOT)}")
