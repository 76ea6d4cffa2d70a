"""The rivals of fake_quantize: how learned-step quantization is usually written in PyTorch, and PyTorch's own op.

Each maker takes a problem (rows.Problem) and gives f(x, scale) -> y, which autograd differentiates. The settings are
captured as plain numbers, so that a compiled form checks as little as it can at each call.
"""

import torch

from .. import noise as noises

NOISES = (noises.Tempering, noises.FeaturePerturbation)  # those that are written out below


def view(axis, dims):
    """The shape in which one scale per row broadcasts."""
    return (1,) if axis is None else tuple(-1 if d == axis else 1 for d in range(dims))


def formula(problem):
    """y = ste(clamp(x / s)) * s with s = scale whose gradient is multiplied by grad_scale: LSQ by detach."""
    low, high, factor, view = problem.quant_min, problem.quant_max, problem.grad_scale, problem.view
    noise = _noise(problem.noise)

    def lsq(x, scale):
        small = scale * factor
        s = ((scale - small).detach() + small).to(x.dtype).reshape(view)
        v = torch.clamp(x / s, low, high)
        y = ((v.round() - v).detach() + v) * s
        return noise(x, y, s)

    return lsq


def _noise(noise):
    """f(x, y, s) -> y with the noise added, outside the gradient."""
    if noise is None:
        return lambda x, y, s: y
    if isinstance(noise, noises.Tempering):
        c, k = noise.c, noise.k

        def tempering(x, y, s):
            d = (y - x).detach().abs()
            return y + c * torch.exp(-k * d) * d.sqrt() * torch.randn_like(x)

        return tempering
    p, outside = noise.p, noise.where == "after"
    if not outside:
        raise ValueError("feature perturbation before the rounding has no rival")

    def perturbation(x, y, s):
        switch = (torch.rand(1, device=x.device) < p).to(x.dtype)
        return y + switch * s.detach() * (torch.rand_like(x) - 0.5)

    return perturbation


class _Function(torch.autograd.Function):
    """LSQ with its gradients written out, saving x and scale."""

    @staticmethod
    def forward(ctx, x, scale, factor, low, high, view):
        ctx.save_for_backward(x, scale)
        ctx.settings = factor, low, high, view
        s = scale.to(x.dtype).reshape(view)
        return (x / s).round().clamp(low, high) * s

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        factor, low, high, view = ctx.settings
        v = x / scale.to(x.dtype).reshape(view)
        below, above = (v < low).to(x.dtype), (v > high).to(x.dtype)
        inside = 1.0 - below - above
        slope = below * low + above * high + inside * (v.round() - v)
        summed = [d for d in range(x.dim()) if len(view) == 1 or view[d] == 1]
        dscale = (grad * slope * factor).sum(summed, dtype=scale.dtype).reshape(scale.shape)
        return grad * inside, dscale, None, None, None, None


def function(problem):
    """LSQ as the widely used autograd.Function."""
    settings = problem.grad_scale, problem.quant_min, problem.quant_max, problem.view
    noise, view = _noise(problem.noise), problem.view

    def lsq(x, scale):
        return noise(x, _Function.apply(x, scale, *settings), scale.to(x.dtype).reshape(view))

    return lsq


def native_op(problem):
    """PyTorch's learnable fake-quantize, with a zero point of 0 that is not learned."""
    low, high, factor, axis = problem.quant_min, problem.quant_max, problem.grad_scale, problem.axis

    def lsq(x, scale):
        zero_point = torch.zeros_like(scale)
        if axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, low, high, factor)
        return torch._fake_quantize_learnable_per_channel_affine(
            x, scale, zero_point, axis, low, high, factor
        )

    return lsq


def rivals(problem):
    """[(backend, form, f)]; several forms of one backend are all timed, and the fastest is its row.

    With noise, torch.compile is also given PyTorch's generator: its own is scalar code on a CPU.
    """
    plain = problem.noise is None
    if not (plain or isinstance(problem.noise, NOISES)):
        return []
    forms = [("formula", formula(problem)), ("autograd.Function", function(problem))]
    found = [("eager", *forms[0]), ("fn", *forms[1])]
    if plain:
        found.append(("torch", "native learnable op", native_op(problem)))
    for name, rival in forms:
        found.append(("compile", name, torch.compile(rival, dynamic=False)))
        if not plain:
            options = {"fallback_random": True}
            found.append(
                ("compile", f"{name}, fallback_random", torch.compile(rival, dynamic=False, options=options))
            )
    return found
