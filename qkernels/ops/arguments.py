"""Legal arguments of the quantizer's ops: bounds, granularity, and the dtypes that the kernels take."""

import numpy as np
import torch

from .. import layout
from ..annotations import Integer
from ..reference import compute_type

_INT32 = 2**31
_ANY = (-_INT32, _INT32 - 1)
# Where levels of 8 bits are stored, zero points up to here keep the bounds, counted from them, exact in float32.
STORED = (2**8 - 2**24, 2**24 - 2**8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bounds(
    bits: Integer | None, signed: bool, quant_min: int | None, quant_max: int | None
) -> tuple[int, int]:
    """(quant_min, quant_max) from ``bits`` or as given. Errors name what is accepted."""
    if bits is None:
        if quant_min is None or quant_max is None:
            raise ValueError(f"give bits, or both quant_min and quant_max; got {quant_min=}, {quant_max=}")
        if not (isinstance(quant_min, int) and isinstance(quant_max, int)):
            raise TypeError(f"quant_min and quant_max must be ints, got {quant_min!r} and {quant_max!r}")
        if not -_INT32 <= quant_min < quant_max < _INT32:
            raise ValueError(
                f"quant_min must be below quant_max, both within int32, got {quant_min} and {quant_max}"
            )
        return quant_min, quant_max
    if quant_min is not None or quant_max is not None:
        raise ValueError(
            f"give bits or quant_min and quant_max, not both; got {bits=}, {quant_min=}, {quant_max=}"
        )
    if not isinstance(bits, int) or isinstance(bits, bool) or not (2 if signed else 1) <= bits <= 16:
        if isinstance(bits, np.integer):
            return bounds(int(bits), signed, None, None)
        raise ValueError(f"bits must be an int from {2 if signed else 1} to 16, got {bits!r}")
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def granularity(x, scale, axis, group_size) -> int:
    """Check that scale fits x at this granularity; the dimension of the rows, or layout.FLAT."""
    rows = scale.numel()
    if scale.dim() > 1 or (rows == 0 and x.numel() > 0):
        raise ValueError(
            f"scale must have shape (1,) or (rows,) with at least one row, got {tuple(scale.shape)}"
        )
    if axis is not None and group_size is not None:
        raise ValueError(f"give axis or group_size, not both; got {axis=}, {group_size=}")
    for name, value in (("axis", axis), ("group_size", group_size)):
        if value is not None and not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if axis is not None:
        if not -x.dim() <= axis < x.dim():
            raise ValueError(
                f"axis must be in [{-x.dim()}, {x.dim()}) for x of shape {tuple(x.shape)}, got {axis}"
            )
        if rows != x.shape[axis]:
            raise ValueError(f"scale must have {x.shape[axis]} rows (x.shape[{axis}]), got {rows}")
        return axis % x.dim()
    if group_size is not None:
        last = x.shape[-1] if x.dim() else 1
        if group_size < 1 or last % group_size:
            raise ValueError(f"group_size must divide the last dimension, {last}, got {group_size}")
        if rows * group_size != x.numel():
            raise ValueError(
                f"scale must have {x.numel() // group_size} rows (numel / group_size), got {rows}"
            )
        return layout.FLAT
    if rows != 1:
        raise ValueError(f"scale must have one row per tensor, got {rows}; for per-channel scales give axis")
    return layout.FLAT


def _per_row(name, values, scale):
    """offset or zero_point brought to one value per row."""
    if values.numel() not in (1, scale.numel()) or values.dim() > 1:
        raise ValueError(f"{name} must have shape (1,) or ({scale.numel()},), got {tuple(values.shape)}")
    if values.device != scale.device:
        raise ValueError(f"{name} must be on {scale.device} as scale is, got {values.device}")
    return values.reshape(-1).expand(scale.numel()) if values.numel() != scale.numel() else values.reshape(-1)


def prepare(x, scale, offset, zero_point, axis, group_size, zero_points=_ANY):
    """Checked (scale, offset, zero_point tensor, axis) in the dtypes the kernels take."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise not_float("x", x)
    if not isinstance(scale, torch.Tensor) or not scale.is_floating_point():
        got = scale.dtype if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise TypeError(f"scale must be a floating-point tensor of shape (1,) or (rows,), got {got}")
    if scale.device != x.device:
        raise ValueError(f"scale must be on {x.device} as x is, got {scale.device}")
    axis = granularity(x, scale, axis, group_size)
    compute = compute_type(x)
    if scale.dtype != compute:
        scale = scale.to(compute)
    if offset is not None:
        if not isinstance(offset, torch.Tensor) or not offset.is_floating_point():
            got = offset.dtype if isinstance(offset, torch.Tensor) else repr(offset)
            raise TypeError(f"offset must be a floating-point tensor of shape (1,) or (rows,), got {got}")
        offset = _per_row("offset", offset, scale).to(compute)
    if zero_point is not None:
        if not isinstance(zero_point, torch.Tensor) or not _is_integer(zero_point.dtype):
            got = zero_point.dtype if isinstance(zero_point, torch.Tensor) else repr(zero_point)
            raise TypeError(f"zero_point must be an int or an integer tensor, got {got}")
        zero_point = _int32(_per_row("zero_point", zero_point, scale), *zero_points)
    if scale.numel() == 0:  # x is empty as well: one row, for kernels that divide by the rows
        scale, offset, zero_point = (
            None if t is None else t.sum(0, keepdim=True, dtype=t.dtype) for t in (scale, offset, zero_point)
        )
        axis = layout.FLAT
    return scale, offset, zero_point, axis


def not_float(name, x):
    """For what is no tensor of one of DTYPES."""
    got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
    return TypeError(f"{name} must be a float32, bfloat16, float16 or float64 tensor, got {got}")


def _is_integer(dtype):
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _int32(zero_point, lowest, highest):
    """zero_point as the kernels take it. Beyond the limits it saturates where looking would make the host wait."""
    if torch.iinfo(zero_point.dtype).min >= lowest and torch.iinfo(zero_point.dtype).max <= highest:
        return zero_point.to(torch.int32)
    zero_point = zero_point.long()
    saturated = zero_point.clamp(lowest, highest)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if zero_point.device.type == "cpu" and not traced and not torch.equal(saturated, zero_point):
        raise _far(zero_point.tolist(), lowest, highest)
    return saturated.to(torch.int32)


def whole_zero_point(zero_point: int, lowest=_ANY[0], highest=_ANY[1]) -> int:
    """zero_point itself; ValueError beyond the limits."""
    if not lowest <= zero_point <= highest:
        raise _far(zero_point, lowest, highest)
    return zero_point


def _far(zero_point, lowest, highest):
    kept = "int32" if highest == _ANY[1] else f"int32 and, where levels are stored, [{lowest}, {highest}]"
    return ValueError(f"zero_point must lie within {kept}, got {zero_point}")
