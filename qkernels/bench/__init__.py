"""What the kernels cost beside their rivals: rows of `qkernels.testing`, timed only where parity holds."""
