"""Inputs of the quantizer's ops, on its discontinuities: ties, both clip edges and their neighbours, +-inf, -0, huge.

The option "special" adds NaN.
"""

import math

import torch

from .. import layout, noise, reference

SEED, STREAM = -7046029254386353131, (5 << 33) + 2


def row_index(shape, rows: int, axis: int) -> torch.Tensor:
    """The row of every element of a tensor, straight from the definition of the granularities."""
    if axis != layout.FLAT:
        return torch.arange(rows).reshape([rows if d == axis else 1 for d in range(len(shape))]).expand(shape)
    numel = math.prod(shape)
    return (torch.arange(numel) // max(numel // rows, 1)).reshape(shape)


def arrange(x: torch.Tensor, memory: str) -> torch.Tensor:
    """The values of x in another memory format ("expanded" repeats its first slice)."""
    if memory == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if memory == "expanded":
        return x[:1].contiguous().expand(x.shape)
    if memory == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if memory == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.contiguous()


def grid_of(case, device) -> tuple:
    """(scale, offset, zero_point, axis, quant_min, quant_max) of a case."""
    option, (rows, axis) = case.settings, case.rows_axis()

    def cycle(values, dtype):
        return torch.tensor([values[r % len(values)] for r in range(rows)], dtype=dtype, device=device)

    compute = reference.compute_type(case)
    odd = (-0.3, 1e-40, math.inf, 0.25, math.nan, -0.5, 0.0, -math.inf)
    scale = cycle(odd if option.get("odd_scale") else (0.25, 0.3, 0.5, 0.125, 1.0), compute)
    offset = cycle((0.1, -0.25, 0.0, 1.5), compute) if option.get("offset") else None
    zero_point = cycle(option["zero_point"], torch.int32) if "zero_point" in option else None
    return scale, offset, zero_point, axis, *case.bounds()


def values(case, device) -> torch.Tensor:
    """x on and around the discontinuities of the case's quantizer."""
    scale, offset, zero_point, axis, quant_min, quant_max = grid_of(case, "cpu")
    index, random = row_index(case.shape, scale.numel(), axis), case.generator()
    s = reference.quantizer.safe_scale(scale).double().nan_to_num(nan=1.0)[index]
    zero = 0 if zero_point is None else zero_point[index].long()
    lo, hi = (torch.as_tensor(bound - zero).expand(case.shape) for bound in (quant_min, quant_max))
    pick = torch.randint(0, 10, case.shape, generator=random)
    level = lo - 2 + torch.rand(case.shape, generator=random, dtype=torch.float64) * (hi - lo + 4)
    tie = level.floor() + 0.5
    edge = torch.where(torch.rand(case.shape, generator=random) < 0.5, lo, hi)
    past = edge + torch.where(edge == lo, -0.5, 0.5)
    v = torch.where(pick < 3, level, torch.where(pick < 6, tie, torch.where(pick < 9, edge, past)))
    x = (v * s + (0.0 if offset is None else offset.double()[index])).to(case.dtype)
    neighbour = torch.nextafter(
        x.float(), torch.tensor(math.inf) * torch.randn(case.shape, generator=random).sign()
    )
    x = torch.where(pick == 7, neighbour.to(case.dtype), x)
    big, small = torch.finfo(case.dtype).max, torch.finfo(case.dtype).smallest_normal
    special = [math.inf, -math.inf, -0.0, 0.0, big, -big, small, -small]
    special += [math.nan, math.nan] if case.settings.get("special") else []
    if x.numel() > 4 * len(special):
        # Every 13th element, so that all rows meet some.
        at = torch.arange(5, x.numel(), max(13, x.numel() // 40))
        x.view(-1)[at] = torch.tensor(special, dtype=case.dtype)[torch.arange(len(at)) % len(special)]
    return arrange(x.to(device), case.memory)


def like_x(case, device) -> torch.Tensor:
    """A second tensor of x's shape: in its memory format for the first option, else contiguous."""
    t = torch.randn(case.shape, generator=case.generator()).to(case.dtype).to(device)
    return arrange(t, case.memory if case.option == "plain" else "contiguous")


def _noise(case, device) -> tuple:
    kind, a, b = case.settings.get("noise", (noise.PLAIN, 0.0, 0.0))
    return kind, a, b, torch.tensor([SEED], device=device), STREAM


def fake_quantize(case, device):
    shift = like_x(case, device), torch.tensor([0.37], device=device)
    return (values(case, device), *grid_of(case, device), *_noise(case, device),
            *(shift if case.option == "shift" else (None, None)))  # fmt: skip


def fake_quantize_backward(case, device):
    get = case.settings.get
    estimator = get("grad_scale", 1.0), get("clip_only", False), get("ewgs", 0.0)
    return (
        like_x(case, device),
        values(case, device),
        *grid_of(case, device),
        *estimator,
        *_noise(case, device),
    )


def backward_magnitude(args, output):
    grad, zero_point, quant_min, quant_max, grad_scale = args[0], args[4], args[6], args[7], args[8]
    zero = 0 if zero_point is None else int(zero_point.abs().max())
    # A term is at most g times a bound of the grid, plus the tail of a normal variate.
    largest = float(grad.abs().max()) if grad.numel() else 0.0
    return largest * (max(abs(quant_min), abs(quant_max)) + zero + 3) * abs(grad_scale)


def quantize(case, device):
    return values(case, device), *grid_of(case, device)


def dequantize(case, device):
    q = reference.quantize(*quantize(case, "cpu")).to(device)
    return arrange(q, case.memory), *grid_of(case, device)[:4], case.dtype


def _levels(case, device):
    bits, signed = case.settings["bits"], case.dtype == torch.int8
    low = -(1 << bits - 1) if signed else 0
    return torch.randint(low, low + (1 << bits), case.shape, generator=case.generator()).to(
        device, case.dtype
    )


def pack(case, device):
    return arrange(_levels(case, device), case.memory), case.settings["bits"]


def unpack(case, device):
    q, bits = _levels(case, device), case.settings["bits"]
    return arrange(reference.pack(q, bits), case.memory), bits, q.numel(), case.dtype == torch.int8
