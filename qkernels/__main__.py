"""`python -m qkernels` is the `qkernels` command."""

import sys

from qkernels.cli import main

sys.exit(main())
