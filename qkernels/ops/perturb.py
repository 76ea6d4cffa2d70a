"""The multi-tensor ops: norms, dot products and perturbed copies of a whole list of tensors in one call each."""

import torch

from .. import backend, layout, reference
from .arguments import DTYPES, not_float


def _fake_norm(tensors, weights, eta):
    like = tensors[0]
    return like.new_empty(1, dtype=torch.float64), like.new_empty(len(tensors), dtype=torch.float64)


def _fake_dot(a, b):
    return a[0].new_empty(3, dtype=torch.float64)


def _fake_perturb(out, params, directions, points, move, coefficients, seed, first_copy):
    return None


def _fake_climb(out, params, directions, norm, rho, eta):
    return None


def _composed_climb(*args):
    """By the other two ops, whoever serves them."""
    reference.multi_climb(*args, norm_of=backend.op("multi_norm"), perturb=backend.op("multi_perturb"))


backend.define(
    "multi_norm", "(Tensor[] tensors, Tensor[] weights, float eta) -> (Tensor, Tensor)", _fake_norm
)
backend.define("multi_dot", "(Tensor[] a, Tensor[] b) -> Tensor", _fake_dot)
backend.define(
    "multi_perturb",
    "(Tensor(a!)[] out, Tensor[] params, Tensor[] directions, Tensor[] points, int move, Tensor coefficients, "
    "Tensor? seed, int first_copy) -> ()",
    _fake_perturb,
)
backend.define(
    "multi_climb",
    "(Tensor(a!)[] out, Tensor[] params, Tensor[] directions, Tensor? norm, float rho, float? eta) -> ()",
    _fake_climb,
)
# Launches are what counts on a GPU, and it is three of them either way.
backend.library.impl("multi_climb", _composed_climb, "CUDA")


def check_list(name, tensors, like=None):
    """A non-empty list of floating-point tensors on one device; with ``like``, of its shapes and dtypes too."""
    if not isinstance(tensors, (list, tuple)) or not tensors:
        got = "an empty list" if isinstance(tensors, (list, tuple)) else type(tensors).__name__
        raise ValueError(f"{name} must be a non-empty list of tensors, got {got}")
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor) or t.dtype not in DTYPES:
            raise not_float(f"{name}[{i}]", t)
        if t.device != tensors[0].device:
            raise ValueError(
                f"{name} must be on one device, got {tensors[0].device} and {t.device} ({name}[{i}])"
            )
    if like is None:
        return
    if len(tensors) != len(like):
        raise ValueError(f"{name} must have {len(like)} tensors, one per parameter, got {len(tensors)}")
    for i, (t, w) in enumerate(zip(tensors, like)):
        if t.shape != w.shape or t.dtype != w.dtype or t.device != w.device:
            raise ValueError(
                f"{name}[{i}] must be {w.dtype} of shape {tuple(w.shape)} on {w.device}, as its parameter is, "
                f"got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
            )


@torch.no_grad()
def multi_norm(tensors, weights=None, eta=0.0):
    """Global L2 norm of a list and the norm of each tensor, in one pass; both stay on the device.

    norm = sqrt(sum over all elements of t^2), or of ((|w| + eta) t)^2 where ``weights`` are given.

    Args:
        tensors: non-empty list of floating-point tensors, any shapes and dtypes, one device.
        weights: a list like ``tensors``; eta: added to |w|.

    Returns: (norm, norms), float64 of shapes (1,) and (len(tensors),), the same bits for any number of threads.
    Raises: ValueError (empty list, shapes, devices), TypeError (dtypes).
    """
    check_list("tensors", tensors)
    if weights is not None:
        check_list("weights", weights, tensors)
    return backend.op("multi_norm")(tensors, weights or [], float(eta))


@torch.no_grad()
def multi_dot(a, b):
    """The sums a.b, a.a and b.b over two lists of tensors, in one pass: float64 of shape (3,), on the device.

    Raises: ValueError (empty list, shapes, devices), TypeError (dtypes).
    """
    check_list("a", a)
    check_list("b", b, a)
    return backend.op("multi_dot")(a, b)


@torch.no_grad()
def multi_perturb(out, params, move, coefficients, directions=None, points=None, seed=None, first_copy=0):
    """Write perturbed copies of all parameters, one per row of ``coefficients``, in one call.

    ``out``: len(coefficients) * len(params) tensors, copy after copy, each in the dtype and memory order of its
    parameter; a single copy may be ``params`` or ``directions`` itself. The rest as in ``reference.multi_perturb``;
    arguments are those of ``qk.perturb``, which checks them.
    """
    if coefficients.shape[0] > 1:
        read = {t.data_ptr() for group in (params, directions, points) for t in group or () if t.numel()}
        if any(t.data_ptr() in read for t in out):
            raise ValueError(
                "out must not be params, directions or points themselves where there are several copies"
            )
    backend.op("multi_perturb")(
        out, params, directions or [], points or [], move, coefficients, seed, first_copy
    )
    torch.autograd.graph.increment_version(out)


@torch.no_grad()
def multi_climb(out, params, directions, norm, rho, eta=None):
    """SAM's step uphill in one call: w + rho d / ||d|| to ``out``, or ASAM's where ``eta`` is given.

    ``norm``: float64 (1,), where the list is a part of what is perturbed; None for the norm of ``directions``.
    Raises: RuntimeError, and nothing is written, where ``out`` is not laid out as ``empty_copies(params)`` is.
    """
    backend.op("multi_climb")(out, params, directions, norm, rho, eta)
    torch.autograd.graph.increment_version(out)


def empty_copies(params, num=1):
    """Uninitialised copies for ``multi_perturb``: num * len(params) tensors, dense, in the order of the parameters."""
    return [torch.empty_like(layout.dense(w.detach())) for _ in range(num) for w in params]
