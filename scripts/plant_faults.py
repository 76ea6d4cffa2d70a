"""Shows that the tests see faults: plants one at a time in the arithmetic of a copy, rebuilds it, runs the tests there.

python scripts/plant_faults.py [name ...]        exit status 1 if a fault is not caught
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "qkernels", "_backend", "tests", "pyproject.toml", "setup.py")
TESTS = ("tests/test_parity.py", "tests/test_layout.py", "tests/test_contract.py", "tests/test_random.py",
         "tests/test_eager.py")  # fmt: skip
# Optimisation changes no value, only the time a rebuild takes. Faults in csrc/math are looked for without the loops per
# instruction set, which write some of it once more.
BUILD = """
import sys; sys.path.insert(0, "_backend")
import native
native.CXX_FLAGS[:] = ["-O1" if flag == "-O3" else flag for flag in native.CXX_FLAGS] + sys.argv[1:]
native.build(native.ROOT / "qkernels")
"""


class Fault(NamedTuple):
    name: str
    header: str
    old: str
    new: str


FAULTS = (
    Fault("half-up rounding", "math/quantize.h", "return rintf(v);", "return floorf(v + 0.5f);"),
    Fault("rounding after the zero point", "math/quantize.h",
          "const T q = level<kPlain>(position<kPlain>(x, grid, T(0)), grid, T(0));",
          "const T v = position<kPlain>(x, grid, T(0)), z = T(zero_point);"
          "const T q = clip(round_even(v + z) - z, grid.lo, grid.hi);"),
    Fault("clip edges outside", "math/quantize.h", "v < grid.lo || v > grid.hi", "v <= grid.lo || v >= grid.hi"),
    Fault("scale gradient of the wrong sign", "math/quantize.h", "n : q - v;", "n : v - q;"),
    Fault("swapped bounds", "math/quantize.h", "v = v < lo ? lo : v;", "v = v < lo ? hi : v;"),
    Fault("sign of the scale ignored", "math/quantize.h", "return scale < T(0) ? T(-1) : T(1);", "return T(1);"),
    Fault("infinite scale accepted", "math/quantize.h", "if (!(s < T(INFINITY))) return T(NAN);", ""),
    Fault("tiny scale not floored", "math/quantize.h", "s < T(0x1p-126) ? T(0x1p-126) : s", "s"),
    Fault("quotient not corrected", "math/reciprocal.h", "return fmaf(fmaf(-w, scale, x), inverse, w);", "return w;"),
    Fault("end of the grid not rounded inward", "math/reciprocal.h", "? neighbour(x, !above) : x", "? x : x"),
    Fault("wrong row of a run", "cpu/walk.h", "if (++row == walk.rows) row = 0;", "if (row + 1 == walk.rows) row = 0;"),
    Fault("wrong row of a tile", "cpu/walk.h", "row(column / walk.inner),", "row(0),"),
    Fault("uniform off by half a step", "math/noise.h", "return float(int32_t(word >> 8)) *",
          "return (float(int32_t(word >> 8)) + 0.5f) *"),
    Fault("nine rounds of Philox", "math/noise.h", "round < 10", "round < 9"),
    Fault("sine and cosine exchanged", "math/noise.h", "return {r * turn.second, r * turn.first};",
          "return {r * turn.first, r * turn.second};"),
    Fault("tempering without its root", "math/noise.h", "* sqrtf(near);", "* near;"),
    Fault("adaptive step with |w| once", "math/perturb.h", "return k.a * (t * t);", "return k.a * t;"),
    Fault("slope of the distance halved", "math/moments.h", "q = -2.0 * factor * r_s * r_t", "q = -factor * r_s * r_t"),
    Fault("no sign extension", "math/pack.h", "is_signed && (field >> (bits - 1)) ? field | ~mask : field", "field"),
    Fault("AVX-512: strict edge", "cpu/avx512.h", "at, quotient.last, _CMP_NGT_UQ", "at, quotient.last, _CMP_NGE_UQ"),
    Fault("AVX-512: offset added first", "cpu/avx512.h",
          "_mm512_add_ps(_mm512_mul_ps(q, scale), offsets ?", "_mm512_fmadd_ps(q, scale, offsets ?"),
    Fault("AVX-512: tail without gradient", "cpu/avx512.h", "__builtin_memcpy(tail.grad, grad + i, tail.bytes);", ""),
    Fault("AVX-512: bits of a NaN kept", "cpu/avx512.h",
          "grid.offset == grid.offset ? grid.offset : NAN", "grid.offset"),
    Fault("eager: numbers of a node exchanged", "eager/fake_quantize.cpp", "bits(a),   bits(b)", "bits(b),   bits(a)"),
    Fault("eager: memory that has moved", "eager/lists.cpp",
          "if (w.const_data_ptr() != item(lists[3], i).const_data_ptr()) Py_RETURN_FALSE;", ""),
)  # fmt: skip


def run(command, folder, **environment):
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "QKERNELS_CUDA": "0", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def verdict(folder, header=""):
    """The name of the first test that fails in the copy, or None. RuntimeError if it does not build or run."""
    flags = [] if header.startswith("cpu") else ["-DQK_NO_CLONES"]
    built = run([sys.executable, "-c", BUILD, *flags], folder)
    if built.returncode:
        raise RuntimeError(f"the copy does not build:\n{built.stdout[-2000:]}{built.stderr[-2000:]}")
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    tested = run([sys.executable, "-m", "pytest", *flags, *TESTS], folder)
    if tested.returncode not in (0, 1):
        raise RuntimeError(f"pytest did not run:\n{tested.stdout[-2000:]}{tested.stderr[-2000:]}")
    failed = re.search(r"^FAILED (\S+)", tested.stdout, re.MULTILINE)
    return failed[1] if failed else None


def planted(folder, fault):
    """The first test that fails with the fault in place; the header is put back."""
    header = folder / "csrc" / fault.header
    text = header.read_text()
    if text.count(fault.old) != 1:
        raise RuntimeError(
            f"{fault.name}: {fault.header} must hold {fault.old!r} once, not {text.count(fault.old)} times"
        )
    header.write_text(text.replace(fault.old, fault.new))
    try:
        return verdict(folder, fault.header)
    finally:
        header.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of the faults to plant, by default all")
    names = parser.parse_args().names
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(fault.name for fault in FAULTS)}"
        )
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="qkernels-faults-") as temporary:
        folder = Path(temporary)
        for part in PARTS:
            source = ROOT / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / part)
        already = verdict(folder)
        if already:
            sys.exit(f"without any fault {already} fails: nothing can be said")
        for fault in chosen:
            start = time.monotonic()
            found = planted(folder, fault)
            missed += found is None
            what = f"caught by {found}" if found else "NOT caught"
            print(f"{fault.name}: {what} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
