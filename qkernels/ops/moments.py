"""The standardised distance of student and teacher: legal arguments, schema, fake, gradient, public function."""

import torch

from .. import backend, layout
from ..reference import compute_type
from ..reference import moments as reference
from .arguments import DTYPES, not_float

_SETTINGS = "int axis, float eps, bool mean"


def _fake_distance(student, teacher, axis, eps, mean):
    channels = student.shape[axis]
    return student.new_empty(channels, dtype=compute_type(student)), student.new_empty(
        (5, channels), dtype=torch.float64
    )


def _fake_backward(grad, student, teacher, moments, axis, eps, mean):
    return torch.empty_like(layout.dense(student))


backend.define(
    "standardized_distance",
    f"(Tensor student, Tensor teacher, {_SETTINGS}) -> (Tensor, Tensor)",
    _fake_distance,
)
backend.define(
    "standardized_distance_backward",
    f"(Tensor grad, Tensor student, Tensor teacher, Tensor moments, {_SETTINGS}) -> Tensor",
    _fake_backward,
)


class StandardizedDistance(torch.autograd.Function):
    """Keeps student, teacher and five numbers per channel; the teacher is a constant."""

    inside_compile = staticmethod(reference.standardized_distance)  # its own derivative is right

    @staticmethod
    def forward(student, teacher, axis, eps, mean):
        return backend.op("standardized_distance")(student, teacher, axis, eps, mean)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.settings = inputs[2:]

    @staticmethod
    def backward(ctx, grad, _):
        again = torch.is_grad_enabled()
        run = StandardizedDistanceBackward.apply if again else StandardizedDistanceBackward.forward
        return (run(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 4)

    @staticmethod
    def vmap(info, dims, student, teacher, axis, eps, mean):
        pair = _fold(info, axis, (student, dims[0]), (teacher, dims[1]))
        distance, moments = StandardizedDistance.apply(*pair, 0, eps, mean)
        size = info.batch_size
        return (distance.reshape(size, -1), moments.reshape(5, size, -1)), (0, 1)


class StandardizedDistanceBackward(torch.autograd.Function):
    """The gradient as a function of its own; its derivatives are those of the definition, never silently 0."""

    @staticmethod
    def forward(grad, student, teacher, moments, axis, eps, mean):
        return backend.op("standardized_distance_backward")(grad, student, teacher, moments, axis, eps, mean)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx, direction):
        grad, student, teacher = ctx.saved_tensors
        return (*_along(grad, student, teacher, direction, *ctx.settings), *[None] * 5)

    @staticmethod
    def vmap(info, dims, grad, student, teacher, moments, axis, eps, mean):
        size = info.batch_size
        pair = _fold(info, axis, (student, dims[1]), (teacher, dims[2]))
        grad = grad.movedim(dims[0], 0) if dims[0] is not None else grad.expand(size, *grad.shape)
        if dims[3] is None:
            moments = moments.unsqueeze(1).expand(5, size, moments.shape[1])
        else:
            moments = moments.movedim(dims[3], 1)
        ds = StandardizedDistanceBackward.apply(grad.reshape(-1), *pair, moments.reshape(5, -1), 0, eps, mean)
        channels = grad.shape[1]
        return ds.reshape(size, channels, *ds.shape[1:]).movedim(1, axis + 1), 0


def _fold(info, axis, *batched):
    """The samples of a vmapped call as channels of one call: (samples * channels, ...)."""
    for t, dim in batched:
        t = t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
        yield t.movedim(axis + 1, 1).flatten(0, 1).contiguous()


def _along(grad, student, teacher, v, axis, eps, mean):
    """(directional derivative of each channel's distance, grad times second derivative) along v.

    With s' = s - mean_s and so on, <,> the mean over the channel, and the gradient p s' + q t':

        D v = n (p <s', v> + q <t', v>),    H v = p v' + dp s' + dq t'

    Plain differentiable PyTorch, so that third derivatives are right as well.
    """
    others, compute = [d for d in range(student.dim()) if d != axis], compute_type(student)
    n = student.numel() // student.shape[axis]
    each = 1.0 / n if mean else 1.0

    def over(x):
        return x.mean(others, keepdim=True)

    s, t, v = (x.to(compute) - over(x.to(compute)) for x in (student, teacher, v))
    var_s, cov = over(s * s), over(s * t)
    r_s, r_t = (var_s + eps).rsqrt(), (over(t * t) + eps).rsqrt()
    p, q = 2.0 * (eps * r_s**4 + cov * r_t * r_s**3), -2.0 * r_s * r_t
    sv, tv = over(s * v), over(t * v)
    # var_s moves by 2 <s', v>, cov by <t', v>.
    dp = 2.0 * r_t * r_s**3 * tv - (8.0 * eps * r_s**6 + 6.0 * cov * r_t * r_s**5) * sv
    dq = 2.0 * r_t * r_s**3 * sv
    first = (n * each) * (p * sv + q * tv)
    second = (grad.reshape(first.shape) * each) * (p * v + dp * s + dq * t)
    return first.reshape(-1).to(grad.dtype), second.to(student.dtype)


def standardized_distance(
    student: torch.Tensor, teacher: torch.Tensor, *, axis: int = 1, eps: float = 1e-5, reduction: str = "mean"
) -> torch.Tensor:
    """How far student is from teacher once every channel of both is standardised (FPQ's CSD of one layer).

    sum over channels of ||t~ - s~||^2,  s~ = (s - mean(s)) / sqrt(var(s) + eps) over all axes but ``axis``

    Args:
        student, teacher: float32, bfloat16, float16 or float64 of one shape, dtype and device; any memory format
            (the teacher is brought to the student's). Only the student gets a gradient.
        axis: the channels: 1 for (N, C) and (N, C, H, W), -1 for (N, L, C).
        eps: added to the variance, positive. Variances divide by n, the elements of a channel.
        reduction: "sum" (eq 17) or "mean": divided by n, so that the value does not follow batch and image size.

    Returns: a scalar, float32 (float64 beside float64 inputs). Sums are in float64, the same bits for any thread count.
    Raises: TypeError (dtypes), ValueError (shapes, devices, axis, eps, reduction, no element).
    Source: FPQ eqs. 15 to 17.
    """
    _check(student, teacher, axis, eps, reduction)
    axis = axis % student.dim()
    run = backend.apply_function(StandardizedDistance)
    return run(student, teacher.detach(), axis, float(eps), reduction == "mean")[0].sum()


def _check(student, teacher, axis, eps, reduction):
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
            raise not_float(name, x)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must have student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if teacher.dtype != student.dtype:
        raise TypeError(f"teacher must have student's dtype {student.dtype}, got {teacher.dtype}")
    if teacher.device != student.device:
        raise ValueError(f"teacher must be on {student.device} as student is, got {teacher.device}")
    if student.dim() < 2:
        raise ValueError(
            f"student must have two dimensions or more, channels and samples, got {tuple(student.shape)}"
        )
    if not -student.dim() <= axis < student.dim():
        raise ValueError(f"axis must be in [{-student.dim()}, {student.dim()}), got {axis}")
    if student.numel() == 0:
        raise ValueError(f"student must have an element in every channel, got shape {tuple(student.shape)}")
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
