"""The fake quantizer: schema, fake, autograd.Function and public function together."""

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from .. import backend, layout
from .. import noise as noises
from ..annotations import Integer
from ..reference import quantizer as reference
from .arguments import bounds, prepare, whole_zero_point

_NOISE = "int noise, float a, float b, Tensor? seed, int stream"
GRID = "Tensor scale, Tensor? offset, Tensor? zero_point, int axis, int quant_min, int quant_max"


def _fake_like(x, scale, offset, zero_point, axis, *rest):
    return torch.empty_like(layout.ordered(x, scale.numel(), axis))


def _fake_backward(grad, x, scale, offset, zero_point, axis, *rest):
    rows = scale.numel()
    dx = torch.empty_like(layout.ordered(x, rows, axis))
    return dx, scale.new_empty(rows), scale.new_empty(0 if offset is None else rows)


backend.define(
    "fake_quantize",
    f"(Tensor x, {GRID}, {_NOISE}, Tensor? shift, Tensor? shift_scale) -> Tensor",
    _fake_like,
)
backend.define(
    "fake_quantize_backward",
    f"(Tensor grad, Tensor x, {GRID}, float grad_scale, bool clip_only, float ewgs, {_NOISE})"
    " -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _serving(name, x, noise):
    """Who computes an op: what ``backend`` says, but in a graph that is compiled for the CPU the formula itself.

    A compiler puts it into the loops before and behind it: a step of resnet20 takes 0.7 of the time. Not in 16 bits,
    whose rounding between these loops is lost, not on CUDA, where compiled divisions are not exact, and not with noise,
    whose integers make long loops.
    """
    if (
        torch.compiler.is_compiling()
        and not noises.draws(noise)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and backend.forced() is None
        and not torch.compiler._is_exporting_flag  # is_exporting() is always True in a graph of torch 2.10 and 2.11
    ):
        return getattr(reference, name)
    return backend.op(name)


class FakeQuantize(torch.autograd.Function):
    """Remembers its inputs, nothing else."""

    forward_mode: "type[ForwardMode]"

    @staticmethod
    def forward(x, scale, offset, zero_point, seed, shift, shift_scale, axis, quant_min, quant_max, grad_scale,
                clip_only, ewgs, noise, a, b, stream):  # fmt: skip
        run = _serving("fake_quantize", x, noise)
        y = run(x, scale, offset, zero_point, axis, quant_min, quant_max, noise, a, b, seed, stream, shift,
                shift_scale)  # fmt: skip
        if axis == layout.FLAT and scale.numel() > 1:  # rows in logical order: y is contiguous, whatever x is
            y = layout.aligned(y, layout.dense(x))
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.settings = inputs[7:]

    @staticmethod
    def backward(ctx, grad):
        dx, dscale, doffset = gradients(grad, *ctx.saved_tensors, *ctx.settings)
        return (dx, dscale, doffset if ctx.needs_input_grad[2] else None, *[None] * 14)

    @staticmethod
    def inside_compile(x, scale, offset, zero_point, seed, shift, shift_scale, *settings):
        """The values, and a zero with the surrogate's derivatives, for transforms that differentiate what is here."""
        axis, quant_min, quant_max, _, _, ewgs, noise, a, b, stream = settings
        if ewgs != 0 or noises.draws(noise):
            raise NotImplementedError(
                "fake_quantize with noise or ewgs cannot be in a torch.func transform inside torch.compile: put "
                "the transform outside, as in vmap(torch.compile(f))"
            )
        numbers = [None if t is None else t.detach() for t in (x, scale, offset, zero_point)]
        y = reference.values(
            *numbers, axis, quant_min, quant_max, noise, a, b, seed, stream, shift, shift_scale
        )
        y = y.to(x.dtype).reshape(x.shape)
        zeros = [None if t is None else t - t.detach() for t in (x, scale, offset)]
        return y + _tangent(_slopes((*numbers, seed), settings), *numbers[:2], settings, *zeros, None)

    @staticmethod
    def vmap(info, dims, x, scale, offset, zero_point, seed, shift, shift_scale, axis, *rest):
        if dims[6] is not None:
            raise RuntimeError(
                "fake_quantize under vmap takes one shift_scale for the batch, got a batched shift_scale"
            )
        batch = _Batch(info, dims, x, scale, axis, seed_dim=dims[4])
        y = backend.apply_function(FakeQuantize)(
            batch.elements(x, dims[0]), batch.rows(scale, dims[1]), batch.rows(offset, dims[2]),
            batch.rows(zero_point, dims[3]), seed, batch.elements(shift, dims[5]), shift_scale, batch.axis, *rest
        )  # fmt: skip
        return batch.split(y), 0


def gradients(*inputs):
    """(dx, dscale, doffset), to be differentiated again where that is asked for."""
    run = FakeQuantizeBackward.forward
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        run = backend.apply_function(FakeQuantizeBackward)
    return run(*inputs)


class FakeQuantizeBackward(torch.autograd.Function):
    """The gradient as a function of its own, linear in grad, so that second derivatives are the surrogate's."""

    forward_mode: "type[BackwardForwardMode]"

    @staticmethod
    def forward(grad, x, scale, offset, zero_point, seed, axis, quant_min, quant_max, grad_scale, clip_only, ewgs,
                noise, a, b, stream):  # fmt: skip
        run = _serving("fake_quantize_backward", x, noises.backward_kind(noise))
        return run(grad, x, scale, offset, zero_point, axis, quant_min, quant_max, grad_scale, clip_only, ewgs, noise,
                   a, b, seed, stream)  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.settings = inputs[6:]

    @staticmethod
    def backward(ctx, ddx, ddscale, ddoffset):
        grad, x, scale, *rest = ctx.saved_tensors
        slopes = _slopes((x, scale, *rest), ctx.settings)
        dgrad = _tangent(slopes, x, scale, ctx.settings, ddx, ddscale, ddoffset, grad)
        return (dgrad, *[None] * 15)

    @staticmethod
    def vmap(info, dims, grad, x, scale, offset, zero_point, seed, axis, *rest):
        batch = _Batch(info, dims[1:], x, scale, axis, seed_dim=dims[5])
        dx, dscale, doffset = backend.apply_function(FakeQuantizeBackward)(
            batch.elements(grad, dims[0]), batch.elements(x, dims[1]), batch.rows(scale, dims[2]),
            batch.rows(offset, dims[3]), batch.rows(zero_point, dims[4]), seed, batch.axis, *rest
        )  # fmt: skip
        size = info.batch_size
        return (batch.split(dx), dscale.reshape(size, -1), doffset.reshape(size, -1)), (0, 0, 0)


class ForwardMode(FakeQuantize):
    """FakeQuantize with a jvp; the surrogate's, as its gradient is."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        FakeQuantize.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5])
        ctx.set_materialize_grads(False)  # a tangent that is not there is None, not zeros

    @staticmethod
    def backward(ctx, grad):
        return (None,) * 17 if grad is None else FakeQuantize.backward(ctx, grad)

    @staticmethod
    def jvp(ctx, x_t, scale_t, offset_t, zero_point_t, seed_t, shift_t, shift_scale_t, *rest):
        saved, ewgs = ctx.saved_tensors, ctx.settings[5]
        if shift_t is not None or shift_scale_t is not None:
            raise _constant("shift" if shift_t is not None else "shift_scale")
        if ewgs != 0:
            raise NotImplementedError(
                f"fake_quantize with ewgs={ewgs} has no forward-mode derivative: EWGS scales by the sign of the "
                "gradient, which only reverse mode knows"
            )
        return _tangent(_slopes(saved, ctx.settings), *saved[:2], ctx.settings, x_t, scale_t, offset_t, None)


class BackwardForwardMode(FakeQuantizeBackward):
    """FakeQuantizeBackward with a jvp: linear in grad (EWGS: where it keeps its sign), constant in the rest."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        FakeQuantizeBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6])

    @staticmethod
    def jvp(ctx, grad_t, *rest):
        grad, *saved = ctx.saved_tensors
        dx, dscale, doffset = backend.apply_function(FakeQuantizeBackward)(grad_t, *saved, *ctx.settings)
        if ctx.settings[5] != 0:
            slopes = _slopes(saved, ctx.settings)
            dx = _tangent(slopes, *saved[:2], ctx.settings, grad_t, None, None, grad)
        return dx, dscale, doffset


FakeQuantize.forward_mode = ForwardMode
FakeQuantizeBackward.forward_mode = BackwardForwardMode


def _slopes(saved, settings):
    x, scale, offset, zero_point, seed = saved
    axis, quant_min, quant_max, _, clip_only, _, noise, a, _, stream = settings
    kind = noises.backward_kind(noise)
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        return reference.slopes(x, scale, offset, zero_point, axis, quant_min, quant_max, clip_only, kind, a, seed,
                                stream)  # fmt: skip


def _tangent(slopes, x, scale, settings, x_t, scale_t, offset_t, grad):
    """x_t where inside (times EWGS's factor, of grad's sign) + scale_t * term + offset_t where outside."""
    axis, _, _, grad_scale, _, ewgs, *_ = settings
    outside, term, error = slopes
    rows = scale.numel()
    total = 0.0
    if x_t is not None:
        passed = reference._compute(layout.rowwise(layout.ordered(x_t, rows, axis), rows, axis))
        passed = torch.where(outside, 0.0, passed)
        if ewgs != 0:
            sign = reference._compute(layout.rowwise(layout.ordered(grad, rows, axis), rows, axis)).sign()
            passed = passed * (1.0 - ewgs * sign * error)
        total = total + passed
    if scale_t is not None:
        along = (scale_t * reference._sign(scale) * grad_scale).reshape(-1)
        total = total + layout.per_element(outside, along, axis) * term
    if offset_t is not None and offset_t.numel():
        along = (offset_t * grad_scale).reshape(-1)
        total = total + layout.per_element(outside, along, axis) * outside.to(term.dtype)
    return total.to(x.dtype).reshape(x.shape)


class _Batch:
    """A vmapped call as one call: the samples' rows become rows, so every sample may have scales of its own."""

    def __init__(self, info, dims, x, scale, axis, seed_dim):
        if seed_dim is not None:
            raise RuntimeError("fake_quantize under vmap takes one seed for the batch, got a batched seed")
        self.size = info.batch_size
        shape = list(x.shape)
        if dims[0] is not None:
            shape.pop(dims[0])
        rows = scale.numel() // (self.size if dims[1] is not None else 1)
        self.channel = axis if axis != layout.FLAT and rows > 1 else None
        self.shape, self.axis = shape, layout.FLAT if self.channel is None else 0

    def elements(self, t, dim):
        if t is None:
            return None
        t = t.movedim(dim, 0) if dim is not None else t.expand(self.size, *t.shape)
        if self.channel is None:
            return t.contiguous()
        t = t.movedim(self.channel + 1, 1)
        return t.reshape(self.size * t.shape[1], *t.shape[2:]).contiguous()

    def rows(self, t, dim):
        if t is None:
            return None
        t = t.movedim(dim, 0) if dim is not None else t.expand(self.size, *t.shape)
        return t.reshape(-1).contiguous()

    def split(self, y):
        if self.channel is None:
            return y.reshape(self.size, *self.shape)
        kept = [s for d, s in enumerate(self.shape) if d != self.channel]
        return y.reshape(self.size, self.shape[self.channel], *kept).movedim(1, self.channel + 1)


def _constant(name):
    return ValueError(f"{name} is a constant, without a derivative; got one that asks for it: detach it")


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, *, bits: Integer | None = None, signed: bool = True,
                  quant_min: int | None = None, quant_max: int | None = None, axis: int | None = None,
                  group_size: int | None = None, offset: torch.Tensor | None = None,
                  zero_point: int | torch.Tensor | None = None, grad_scale: float = 1.0,
                  noise: noises.Noise | None = None, seed: torch.Tensor | None = None, stream: int = 0,
                  clip_only: bool = False, ewgs: float = 0.0, shift: torch.Tensor | None = None,
                  shift_scale: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Quantize and dequantize x in one pass, with a straight-through gradient for x, scale and offset.

    y = clip(rint((x - offset) / scale), quant_min - zero_point, quant_max - zero_point) * scale + offset

    Args:
        x: float32, bfloat16, float16 or float64 of any shape; strides of a dense layout are kept.
        scale: floating point, shape (1,) or (rows,); |scale| is floored at 2**-126, non-finite gives NaN.
        bits, signed: [-2**(bits-1), 2**(bits-1) - 1], or [0, 2**bits - 1] where signed is False; or
        quant_min, quant_max: the integer bounds themselves.
        axis: per channel along this dimension (rows = x.shape[axis]); group_size: per group along the last
            dimension (rows = numel / group_size; the last dimension's size is per token); neither: per tensor.
        offset: learned real offset (LSQ+), shape (1,) or (rows,). zero_point: fixed int or integer tensor.
        grad_scale: factor of the gradients of scale and offset (LSQ: 1 / sqrt(N * quant_max)).
        noise: one of qk.noise; seed: int64 tensor of shape (1,); stream: int, one per layer.
        clip_only: the scale learns from clipped elements alone (PACT). ewgs: EWGS's delta (no forward mode).
        shift, shift_scale: y + shift_scale * shift, constants: shift like x, shift_scale float32 (1,) (SAQ, case 3).

    Returns: y, the shape, dtype and strides of x. Only x (and scale, offset) is kept for backward.
    Raises: TypeError (dtypes), ValueError (shapes, bounds, devices), each naming the argument and what is accepted.
    Source: LSQ (Esser et al. 2020) eqs. 1 to 3; LSQ+ (Bhalgat et al. 2020); FPQ eqs. 4, 5.
    """
    quant_min, quant_max = bounds(bits, signed, quant_min, quant_max)
    if isinstance(zero_point, int):
        zero_point = whole_zero_point(zero_point)
        quant_min, quant_max, zero_point = quant_min - zero_point, quant_max - zero_point, None
    scale, offset, zero_point, axis = prepare(x, scale, offset, zero_point, axis, group_size)
    kind, a, b = noises.PLAIN, 0.0, 0.0
    if noise is not None:
        if not isinstance(noise, noises.KINDS):
            raise TypeError(
                f"noise must be one of qk.noise (Tempering, FeaturePerturbation, ...), got {noise!r}"
            )
        kind, a, b = noise.code()
        if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"noise needs seed, an int64 tensor of shape (1,), got {seed!r}")
        if seed.device != x.device:
            raise ValueError(f"seed must be on {x.device} as x is, got {seed.device}")
        if not isinstance(stream, int) or not -(2**63) <= stream < 2**63:
            raise ValueError(f"stream must be an int within int64, got {stream!r}")
        if shift is not None:
            raise ValueError(f"give shift or noise, not both; got noise={noise!r}")
        seed = seed.reshape(1)
    elif shift is not None:
        if not isinstance(shift, torch.Tensor):
            raise TypeError(f"shift must be a tensor of x's shape and dtype, got {shift!r}")
        if shift.shape != x.shape or shift.dtype != x.dtype:
            raise ValueError(f"shift must have x's shape and dtype, got {tuple(shift.shape)} {shift.dtype}")
        if (
            not isinstance(shift_scale, torch.Tensor)
            or shift_scale.numel() != 1
            or shift_scale.dtype != torch.float32
        ):
            raise ValueError(f"shift needs shift_scale, a float32 tensor of shape (1,), got {shift_scale!r}")
        for name, t in (("shift", shift), ("shift_scale", shift_scale)):
            if t.device != x.device:
                raise ValueError(f"{name} must be on {x.device} as x is, got {t.device}")
            if t.requires_grad and torch.is_grad_enabled():
                raise _constant(name)
        kind, seed = noises.SHIFT, None
    else:
        seed = None
    # Python brings the output of rows in logical order back to x's, and hears subclasses that override functions.
    by_python = axis == layout.FLAT and scale.numel() > 1 and not x.is_contiguous()
    by_python = by_python or has_torch_function((x, scale, offset, shift))
    run = backend.apply_function(FakeQuantize, None if by_python else "fake_quantize")
    return run(x, scale, offset, zero_point, seed, shift, shift_scale, axis, quant_min, quant_max,
                              float(grad_scale), bool(clip_only), float(ewgs), kind, a, b, int(stream))  # fmt: skip


# One int64 tensor (1,) from torch's generator of x's device. The tag keeps compilers from merging or freezing draws.
backend.library.define("draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
backend.library.impl(
    "draw_seed",
    lambda like: torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "qkernels::draw_seed", lambda like: like.new_empty(1, dtype=torch.int64), lib=backend.library
)
