"""setuptools glue: the compiling itself stands in _backend/native.py, the metadata in pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_backend"))

import native  # noqa: E402


class BuildNative(build_ext):
    """Compiles into the source tree (editable, --inplace) or into build_lib."""

    def run(self):
        here = self.inplace or self.editable_mode
        self.libraries_built = native.build((ROOT if here else Path(self.build_lib)) / "qkernels")

    def get_outputs(self):
        return [str(path) for path in getattr(self, "libraries_built", [])]

    def get_output_mapping(self):
        return {}


class BuildPython(build_py):
    """Empties build_lib first: a module or library deleted since the last build must not reach the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "qkernels", ignore_errors=True)
        super().run()


setup(
    # Marks the wheel as one of this platform and Python; BuildNative takes its sources from csrc/ itself.
    ext_modules=[Extension("qkernels._C_cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
