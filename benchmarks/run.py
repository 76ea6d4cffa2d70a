"""`python benchmarks/run.py --suite kernels ...` is `qkernels bench` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from qkernels import cli  # noqa: E402

if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
