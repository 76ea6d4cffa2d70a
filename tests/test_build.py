"""What is compiled, how, and what a user without a compiler, ninja or pybind11 gets."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qkernels"


@pytest.fixture
def native(monkeypatch):
    """_backend/native.py, fresh, without the settings of the caller's environment."""
    for name in ("QKERNELS_CPU", "QKERNELS_CUDA", "QKERNELS_CUDA_ARCHS", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("native", ROOT / "_backend" / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(native, monkeypatch, tmp_path):
    """A tiny csrc/ in place of the real one: builds in a second, and may be broken."""
    root = tmp_path / "a tree"
    (root / "csrc/cpu").mkdir(parents=True)
    (root / "csrc/number.h").write_text("inline int number() { return 1; }\n")
    (root / "csrc/cpu/one.cpp").write_text('#include "number.h"\nextern "C" int one() { return number(); }\n')
    monkeypatch.setattr(native, "ROOT", root)
    monkeypatch.setattr(native, "CSRC", root / "csrc")
    monkeypatch.setattr(native, "WORK", root / "build/native")
    monkeypatch.setattr(native, "CXX_FLAGS", ["-std=c++20", "-fPIC", f"-I{root / 'csrc'}"])
    monkeypatch.setenv("QKERNELS_CUDA", "0")
    if not native.find_cxx():
        pytest.skip("no C++ compiler")
    return root


def python(code, **environment):
    command = [sys.executable, "-c", code]
    folder = environment.pop("cwd", ROOT)
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dynamic(library, *flags):
    return subprocess.run(
        ["readelf", "-W", *flags, str(library)], capture_output=True, text=True, check=True
    ).stdout


def needed(library):
    return {
        line.split("[")[1].rstrip("]") for line in dynamic(library, "-d").splitlines() if "(NEEDED)" in line
    }


def built(name):
    library = PACKAGE / name
    if not library.exists():
        pytest.skip(f"{name} is not built here")
    return library


def test_cpu_library_needs_torch_and_no_python():
    library = built("_C_cpu.so")
    assert {"libtorch_cpu.so", "libtorch.so", "libc10.so"} <= needed(library)
    assert not any("python" in name or "cuda" in name for name in needed(library))
    undefined = [line.split()[-1] for line in dynamic(library, "--dyn-syms").splitlines() if " UND " in line]
    assert any(name.startswith("aoti_torch_") or name.startswith("torch_") for name in undefined)
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    # The stable ABI is a C interface: a C++ symbol of torch would tie the file to one release.
    assert not [name for name in undefined if name.startswith("_Z") and ("3c10" in name or "2at" in name)]


def test_cuda_library_needs_torchs_cuda_and_no_runtime_of_its_own():
    libraries = needed(built("_C_cuda.so"))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= libraries
    assert not any(name.startswith("libcudart") for name in libraries)


def test_import_starts_no_process_writes_no_file_and_leaves_cuda_alone():
    code = """
import sys
events = []
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        events.append((event, arguments))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        if not str(arguments[0]).startswith("/dev/") and "__pycache__" not in str(arguments[0]):
            events.append((event, arguments))
import torch
sys.addaudithook(hook)
before = set(sys.modules)
import qkernels
assert not events, events
assert not torch.cuda.is_initialized()
extras = {"matplotlib", "sklearn", "scipy", "tqdm", "PIL", "tensorboard", "safetensors", "onnx"}
assert not extras & (set(sys.modules) - before), extras & (set(sys.modules) - before)
"""
    python(code, PYTHONDONTWRITEBYTECODE="1")


def test_package_without_libraries_computes_with_the_reference(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "qkernels", ignore=ignore)
    code = f"""
import torch, qkernels as qk
assert qk.__file__.startswith({str(tmp_path)!r}), qk.__file__
x = torch.tensor([0.26, -5.0, 0.04], requires_grad=True)
y = qk.fake_quantize(x, torch.tensor([0.1]), bits=4, signed=True)
y.sum().backward()
assert torch.equal(y, torch.tensor([3.0, -8.0, 0.0]) * torch.tensor(0.1)), y
assert x.grad.tolist() == [1.0, 0.0, 1.0], x.grad
"""
    python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))


def test_second_build_is_incremental_and_follows_headers(native, project):
    target = project / "package"
    assert native.build(target) == [target / "_C_cpu.so"]
    assert needed(target / "_C_cpu.so") >= {"libtorch_cpu.so"}
    objects = project / "build/native/cpu/one.cpp.o"
    first, library = objects.stat().st_mtime_ns, (target / "_C_cpu.so").stat().st_ino
    native.build(target)
    assert objects.stat().st_mtime_ns == first and (target / "_C_cpu.so").stat().st_ino == library
    (project / "csrc/number.h").write_text("inline int number() { return 2; }\n")
    native.build(target)
    assert objects.stat().st_mtime_ns > first and (target / "_C_cpu.so").stat().st_ino != library


def test_ninja_file_records_the_headers_of_every_compilation(native, project):
    native.build(project / "package")
    lines = (project / "build/native/build.ninja").read_text().splitlines()
    assert "  depfile = $out.d" in lines and "  deps = gcc" in lines
    compilations = [at for at, line in enumerate(lines) if ": compile " in line]
    assert len(compilations) == 1
    assert all("-MD -MF" in lines[at + 1] for at in compilations)


def test_compile_error_fails_the_build_with_the_compilers_message(native, project, capfd):
    (project / "csrc/cpu/one.cpp").write_text("int one() { return undeclared; }\n")
    with pytest.raises(SystemExit, match="build failed"):
        native.build(project / "package")
    assert "undeclared" in capfd.readouterr().out


def test_build_without_ninja_compiles_all_the_same(native, project, monkeypatch, capfd):
    which = shutil.which
    monkeypatch.setattr(
        native.shutil, "which", lambda name, path=None: None if name == "ninja" else which(name)
    )
    assert native.build(project / "package") == [project / "package/_C_cpu.so"]
    assert "no ninja" in capfd.readouterr().out
    (project / "csrc/cpu/one.cpp").write_text("int one() { return undeclared; }\n")
    with pytest.raises(SystemExit, match="undeclared"):
        native.build(project / "package")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [("QKERNELS_CPU", "0", "QKERNELS_CPU=0"), ("CXX", "/nonexistent/g++", "no C++20 compiler")],
)
def test_without_compiler_one_line_and_stale_libraries_go(
    native, project, monkeypatch, capsys, name, value, line
):
    target = project / "package"
    target.mkdir()
    for stale in ("_C_cpu.so", "_C_cuda.so", native.ELEMENTS, f"_eager.torch-2.9.0{native.EXT_SUFFIX}"):
        (target / stale).touch()
    (target / "kept.so").touch()
    monkeypatch.setenv(name, value)
    assert native.build(target) == []
    out = capsys.readouterr().out
    assert line in out and out.count("\n") == 1
    assert [path.name for path in target.iterdir()] == ["kept.so"]


def script(path, lines):
    path.write_text("#!/bin/sh\n" + lines)
    path.chmod(0o755)
    return str(path)


def test_a_compiler_before_cxx20_counts_as_none(native, project, monkeypatch, capsys, tmp_path):
    old = script(tmp_path / "g++-9", 'case "$*" in *c++20*) exit 1; esac\n')
    monkeypatch.setenv("CXX", old)
    assert native.build(project / "package") == []
    out = capsys.readouterr().out
    assert "no C++20 compiler" in out and out.count("\n") == 1


def test_an_old_nvcc_leaves_out_the_cuda_library_alone(native, project, monkeypatch, capfd, tmp_path):
    (project / "csrc/cuda").mkdir()
    (project / "csrc/cuda/one.cu").write_text("#error must not be compiled\n")
    (tmp_path / "bin").mkdir()
    release = "echo Cuda compilation tools, release %s, V0\n"
    nvcc = script(tmp_path / "bin/nvcc", release % "11.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("QKERNELS_CUDA", "auto")
    assert native.build(project / "package") == [project / "package/_C_cpu.so"]
    assert f"{nvcc} is version 11.8, 12.1 or later is needed" in capfd.readouterr().out
    monkeypatch.setenv("QKERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="version 11.8: 12.1 or later"):
        native.find_nvcc()
    for text in (release % "12.1", "echo a wrapper\n"):
        script(tmp_path / "bin/nvcc", text)
        assert native.find_nvcc() == nvcc


def test_an_nvcc_of_another_cuda_than_torchs_is_left_out_unless_it_is_asked_for(
    native, monkeypatch, capsys, tmp_path
):
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.setattr(native, "find_torch", lambda: (torch / "include", "2.13.0"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for release, asked, found in (("13.0", "auto", False), ("13.0", "1", True), ("12.9", "auto", True)):
        nvcc = script(tmp_path / "bin/nvcc", f"echo Cuda compilation tools, release {release}, V0\n")
        monkeypatch.setenv("QKERNELS_CUDA", asked)
        assert native.find_nvcc() == (nvcc if found else None)
        told = capsys.readouterr().out
        assert ("is version 13, torch is built for CUDA 12" in told) == (release == "13.0")
    (torch / "version.py").write_text("cuda: Optional[str] = None\n")
    assert native.torch_cuda() is None


@pytest.mark.parametrize(("version", "clones"), [(11, False), (12, True)])
def test_only_a_g_plus_plus_that_names_the_levels_of_x86_64_compiles_for_them(native, version, clones):
    cxx = native.find_cxx()
    if not cxx or "__x86_64__" not in macros(cxx) or "__clang__" in macros(cxx):
        pytest.skip("no g++ for x86-64 here")
    flags = ["-U__GNUC__", f"-D__GNUC__={version}", "-UQK_NO_CLONES"]
    defined = macros(cxx, *native.CXX_FLAGS, *flags, str(ROOT / "csrc/cpu/types.h"))
    assert ("QK_X86_CLONES" in defined) == clones and "QK_CLONES" in defined


def macros(cxx, *arguments):
    """The names of the macros at the end of a file, or of none."""
    command = [*cxx, "-E", "-dM", "-x", "c++", *(arguments or ["/dev/null"])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[1].split("(")[0] for line in text.splitlines()}


def test_without_pybind11_only_the_elements_are_left_out(native, project, monkeypatch, capfd):
    (project / "csrc/elements.cpp").write_text("#error must not be compiled\n")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert native.build(project / "package") == [project / "package/_C_cpu.so"]
    assert "no pybind11" in capfd.readouterr().out


@pytest.mark.parametrize("ninja", [True, False])
def test_a_torch_with_which_eager_does_not_compile_builds_without_it(
    native, project, monkeypatch, capfd, ninja
):
    if not ninja:
        monkeypatch.setattr(native.shutil, "which", lambda name, path=None: None if name == "ninja" else name)
        monkeypatch.setattr(native, "find_cxx", lambda: ["g++"])
    (project / "csrc/eager").mkdir()
    source = project / "csrc/eager/one.cpp"
    source.write_text("#error no such thing in this torch\n")
    assert native.build(project / "package") == [project / "package/_C_cpu.so"]
    out = capfd.readouterr().out
    assert "going on without _eager" in out and "no such thing in this torch" in out
    source.write_text('extern "C" int one();\nint two() { return one(); }\n')
    library = f"_eager.torch-{native.find_torch()[1]}{native.EXT_SUFFIX}"
    assert [path.name for path in native.build(project / "package")] == ["_C_cpu.so", library]
    assert {"qkernels_C_cpu.so", "libtorch_python.so"} <= needed(project / "package" / library)


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_an_nvcc_that_fails_costs_the_cuda_library_alone_unless_it_is_asked_for(
    native, project, monkeypatch, capfd, wanted
):
    monkeypatch.setenv("QKERNELS_CUDA", wanted)
    nvcc, folder = project / "nvcc", project / "csrc/cuda"
    nvcc.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    nvcc.chmod(0o755)
    folder.mkdir()
    (folder / "one.cu").write_text("")
    (project / "csrc/eager").mkdir()
    (project / "csrc/eager/one.cpp").write_text("int two() { return 2; }\n")
    monkeypatch.setattr(native, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(native, "cuda_archs", lambda nvcc: ["80"])
    monkeypatch.setattr(native, "cuda_include", lambda nvcc: folder)
    if wanted == "1":
        with pytest.raises(SystemExit, match="the build failed"):
            native.build(project / "package")
        return
    assert [path.name[:6] for path in native.build(project / "package")] == ["_C_cpu", "_eager"]
    out = capfd.readouterr().out
    assert "unsupported GNU version" in out and "going on without _C_cuda: GPUs are left to Triton" in out


def test_without_python_h_only_what_python_imports_is_left_out(native, project, monkeypatch, capfd, tmp_path):
    (project / "csrc/elements.cpp").write_text("#error must not be compiled\n")
    (project / "csrc/eager").mkdir()
    (project / "csrc/eager/one.cpp").write_text("#error must not be compiled\n")
    paths = native.sysconfig.get_path
    monkeypatch.setattr(
        native.sysconfig, "get_path", lambda name: str(tmp_path) if name == "include" else paths(name)
    )
    assert native.build(project / "package") == [project / "package/_C_cpu.so"]
    assert f"no Python.h in {tmp_path}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"QKERNELS_CUDA": "yes"}, "QKERNELS_CUDA='yes': accepted are auto, 1, 0"),
        ({"QKERNELS_CPU": "no"}, "QKERNELS_CPU='no': accepted are 1, 0"),
        ({"QKERNELS_CUDA": "1", "CXX": "/nonexistent/g++"}, "QKERNELS_CUDA=1 but no C\\+\\+20 compiler"),
    ],
)
def test_bad_settings_are_refused(native, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        native.plan()


def test_a_number_of_jobs_that_is_none_is_refused(native, project, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS='many': accepted is a number"):
        native.build(project / "package")


def test_required_nvcc_that_is_missing_is_an_error(native, monkeypatch):
    monkeypatch.setenv("QKERNELS_CUDA", "1")
    monkeypatch.setattr(native.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="no nvcc"):
        native.find_nvcc()


def test_archs_keep_ptx_of_the_last_and_refuse_words(native, monkeypatch):
    monkeypatch.setenv("QKERNELS_CUDA_ARCHS", "8.0, 90")
    assert native.cuda_archs("nvcc") == ["80", "90"]
    codes = native.gencode(["80", "90"])
    assert codes[-1] == "-gencode=arch=compute_90,code=compute_90" and len(codes) == 3
    monkeypatch.setenv("QKERNELS_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="'hopper': accepted is a list"):
        native.cuda_archs("nvcc")


@pytest.mark.parametrize(("version", "accepted"), [("2.9.1", False), ("2.10.0+cu128", True), ("3.0.0", True)])
def test_hook_asks_for_torch_only_where_none_is_new_enough(native, monkeypatch, tmp_path, version, accepted):
    torch = tmp_path / "torch"
    (torch / "include/torch/csrc/stable").mkdir(parents=True)
    (torch / "include/torch/csrc/stable/library.h").touch()
    (torch / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(native.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(native.site, "getsitepackages", lambda prefixes: [])
    monkeypatch.setattr(native.site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(native.sys, "path", [])
    assert native.find_torch() == ((torch / "include", version) if accepted else None)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "native", native)
    spec = importlib.util.spec_from_file_location("qk_build", ROOT / "_backend" / "qk_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.setattr(native, "find_torch", lambda: accepted or None)
    assert hook._torch() == ([] if accepted else ["torch>=2.10"])


def test_wheel_contents_are_declared():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    settings = toml.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["dependencies"] == ["torch>=2.10", "numpy"]
    packages = {str(path.parent.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    bare = [folder for folder in packages if not (ROOT / folder / "__init__.py").exists()]
    assert not bare, f"folders without __init__.py do not reach the wheel: {bare}"
    manifest = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    # Without this file type checkers take nothing from an installed package.
    assert (PACKAGE / "py.typed").is_file() and any("py.typed" in line for line in manifest)
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["qkernels"]
    grafted = [folder for command, folder, *_ in manifest if command == "graft"]
    assert grafted and [folder for folder in grafted if not (ROOT / folder).is_dir()] == []
    # setuptools reads a literal without importing torch, which an isolated build does not have.
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assignments = [node for node in body if isinstance(node, ast.Assign)]
    versions = [node.value for node in assignments if ast.unparse(node.targets[0]) == "__version__"]
    assert len(versions) == 1 and isinstance(versions[0], ast.Constant)


def test_the_fallback_says_so_once(tmp_path):
    """Without kernels everything runs, some ten times slower: nobody should find out by a profile."""
    shutil.copytree(PACKAGE, tmp_path / "qkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import warnings, torch, qkernels as qk\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): qk.fake_quantize(torch.ones(4), torch.ones(1), bits=4)\n"
        "print(*(w.message for w in found), sep='|')\n"
    )
    said = python(code, cwd=tmp_path).strip()
    assert said == (
        "qkernels runs as plain PyTorch here, slowly: _C_cpu.so was not built (no compiler at install time, or it was "
        "switched off); see `qkernels doctor`"
    )
    silent = python(code, cwd=tmp_path, QKERNELS_BACKEND="reference")
    assert silent.strip() == ""
