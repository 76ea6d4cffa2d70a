"""Triton chooses between its CPU interpreter and the GPU when it is imported: the choice is made here, before."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before tests/triton and has no GPU here: "
            "run these tests on their own, TRITON_INTERPRET=1 python -m pytest tests/triton"
        )
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="triton is not installed (pip install qkernels[triton])")


@pytest.fixture(scope="session")
def device():
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
