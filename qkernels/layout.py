"""Which scale does element i use? Element i of the dense memory uses row ``(i // inner) % rows``.

``axis`` names the granularity everywhere below the public functions: ``FLAT`` (per tensor, per token, per group: the
memory is cut into ``rows`` equal runs) or a dimension (per channel, whatever the memory format).
"""

import torch

FLAT = -1


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where its elements fill one stretch of memory without gaps or overlap, else a contiguous copy."""
    if x.is_contiguous():
        return x
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(x.stride(), x.shape, strict=True) if sz != 1):
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def ordered(x: torch.Tensor, rows: int, axis: int) -> torch.Tensor:
    """x as a kernel walks it: dense, and in logical order where a flat granularity has several rows."""
    return x.contiguous() if axis == FLAT and rows > 1 else dense(x)


def aligned(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t in the memory order of the dense tensor x.

    Not by ``copy_``, behind which compiled graphs of torch 2.10 and 2.11 have no gradient.
    """
    if t.stride() == x.stride():
        return t
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return t.permute(order).contiguous().as_strided(x.shape, x.stride())


def rows_inner(x: torch.Tensor, rows: int, axis: int) -> tuple[int, int]:
    """(rows, inner) of a dense x."""
    if axis == FLAT or rows == 1:
        return rows, max(x.numel() // max(rows, 1), 1)
    return rows, max(x.stride(axis), 1)


def per_element(x: torch.Tensor, values: torch.Tensor, axis: int) -> torch.Tensor:
    """One value per row, shaped to broadcast against ``rowwise(x)``."""
    rows = values.numel()
    if rows == 1:
        return values.reshape(())
    if axis == FLAT:
        return values.reshape(rows, 1)
    return values.reshape([rows if d == axis else 1 for d in range(x.dim())])


def rowwise(x: torch.Tensor, rows: int, axis: int) -> torch.Tensor:
    """x in the shape in which its rows broadcast: (rows, inner) for a flat granularity, else as it is."""
    return x.reshape(rows, -1) if axis == FLAT and rows > 1 else x


def sum_rows(terms: torch.Tensor, rows: int, axis: int) -> torch.Tensor:
    """Sum of ``rowwise`` terms over everything but the row, in float64, shape (rows,)."""
    terms = terms.double()
    if rows == 1:
        return terms.sum().reshape(1)
    return terms.movedim(0 if axis == FLAT else axis, 0).reshape(rows, -1).sum(1)


def from_memory(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A flat tensor in dense memory order, seen in the shape and order of the dense tensor x."""
    return flat.as_strided(x.shape, x.stride()) if x.numel() else flat.reshape(x.shape)
