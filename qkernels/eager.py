"""The short way from Python to the ops and through lists of parameters, in C++ that was built for this very torch.

A small tensor costs Python more than it costs a kernel. The functions here are those of the library `_eager`, in Python
where it is not loaded; its autograd.Functions stand with their ops. QKERNELS_EAGER=0 leaves it out.
"""

import importlib.machinery
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

library: Any = None
why_not = "needs _C_cpu.so"


def load() -> None:
    """Load the library if it is of this torch and this Python; ``why_not`` says what is missing."""
    global library, why_not
    folder = Path(__file__).parent
    path = folder / f"_eager.torch-{torch.__version__}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    others = sorted(folder.glob("_eager.*"))
    if os.environ.get("QKERNELS_EAGER") == "0":
        why_not = "switched off (QKERNELS_EAGER=0)"
    elif not path.exists():
        why_not = f"built for another torch or Python: {others[0].name}" if others else "was not built"
    else:
        try:
            spec = importlib.util.spec_from_file_location("qkernels._eager", path)
            assert spec and spec.loader, "the suffix is one of this Python's"
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
            found.set_python_backward(_gradients)
            library, why_not = found, ""
        except ImportError as error:
            why_not = f"does not load: {error}"


def _gradients(*inputs):
    from .ops.quantizer import gradients

    return gradients(*inputs)


def with_gradients(params: list) -> tuple[list, list, bool]:
    """The parameters that have a gradient, their gradients, and whether one of these is sparse."""
    if library is not None:
        return library.with_gradients(params if isinstance(params, list) else list(params))
    kept = [p for p in params if p.grad is not None]
    gradients = [p.grad for p in kept]
    return kept, gradients, any(g.is_sparse for g in gradients)


def clear_gradients(params: list) -> None:
    """p.grad = None for each."""
    if library is not None:
        return library.clear_gradients(params)
    for p in params:
        p.grad = None


def set_data(params: list, tensors: list) -> None:
    """p.data = t for each pair."""
    if library is not None:
        return library.set_data(params, tensors)
    for p, t in zip(params, tensors, strict=True):
        p.data = t


def climb(
    copies: list, params: list, directions: list, originals: list, rho: float, eta: float | None
) -> bool:
    """``ops.multi_climb`` without the dispatcher, for lists of dense CPU tensors over the memory of ``originals``.

    Returns: False, with nothing written, where it does not serve.
    """
    return library is not None and library.climb(copies, params, directions, originals, rho, eta)
