"""Which cases prove an op, and which are timed? One table of ops, read by the tests and by the benchmarks.

A new op is one ``Op`` row: how a case's arguments are made, which outputs are exact, which bytes must move.
Inputs sit on the discontinuities: ties, both clip edges and their neighbours, +-inf, -0, huge; "special" adds NaN.
"""

import importlib
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import layout, noise, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int8, torch.uint8)
GRANULARITIES = ("tensor", "axis0", "axis1", "token", "group")
MEMORIES = ("contiguous", "channels_last", "transposed", "expanded", "strided", "misaligned")
GROUP = 8
SHAPE = (4, 5, 7, 24)
# Nothing at all, single elements, tails, several blocks of every walk over the memory.
EDGES = {(): ("tensor",), (1,): ("tensor", "axis0"), (0,): ("tensor",), (257,): ("axis0", "token"),
         (0, 3): ("tensor", "axis1"), (3, 1): ("axis0",), (70001,): ("tensor",), (2, 33000): ("token",),
         (3, 2, 37, 41): ("axis1",), (61, 1033): ("axis0", "axis1"), (9000, 3): ("axis0", "axis1"),
         (40, 41, 3): ("axis1", "token"), (5, 4096): ("group",)}  # fmt: skip
# The shapes benchmarks time, with their granularities.
TIMED = {
    "activation": {(64, 64, 28, 28): ("tensor",), (64, 64, 56, 56): ("tensor", "axis1")},
    "weight": {(64, 64, 3, 3): ("axis0",), (512, 512, 3, 3): ("axis0",)},
    "linear": {(1024, 1024): ("axis0", "group"), (4096, 4096): ("axis0", "token")},
}
SEED, STREAM = -7046029254386353131, (5 << 33) + 2

# What an option changes; settings it does not name keep the defaults given where they are read.
OPTIONS = {
    "plain": {}, "special": {"special": True}, "odd_scale": {"odd_scale": True}, "offset": {"offset": True},
    "zero_point": {"zero_point": True}, "unsigned": {"bounds": (0, 255)}, "one_bit": {"bounds": (0, 1)},
    "tempering": {"noise": (noise.TEMPERING, 0.3, 5.0)},
    "tempering_offset": {"noise": (noise.TEMPERING, 0.2, 50.0), "offset": True, "special": True},
    "after": {"noise": (noise.AFTER, 1.0, 0.0)}, "after_off": {"noise": (noise.AFTER, 0.0, 0.0)},
    "before": {"noise": (noise.BEFORE, 1.0, 0.0), "zero_point": True},
    "pseudo": {"noise": (noise.PSEUDO, 0.0, 0.0), "special": True},
    "pseudo_normal": {"noise": (noise.PSEUDO_NORMAL, 0.0, 0.0), "offset": True},
    "stochastic": {"noise": (noise.STOCHASTIC, 0.0, 0.0), "zero_point": True},
    "shift": {"noise": (noise.SHIFT, 0.0, 0.0)},
    "clip_only": {"clip_only": True, "special": True}, "ewgs": {"ewgs": 0.2}, "grad_scale": {"grad_scale": 0.37},
    "bits2": {"bits": 2}, "bits4": {"bits": 4}, "bits8": {"bits": 8},
}  # fmt: skip
_GRID = ("plain", "special", "odd_scale", "offset", "zero_point", "unsigned")
_NOISES = tuple(name for name, option in OPTIONS.items() if "noise" in option)


@dataclass(frozen=True)
class Op:
    """One op of torch.ops.qkernels; its first option is crossed with everything, the others with a share of it."""

    name: str
    make: Callable  # (case, device) -> the op's arguments
    exact: tuple[bool, ...]  # of each output: equal to the reference, or a sum within its bound
    traffic: Callable  # args -> bytes that must move
    options: tuple[str, ...]
    magnitude: Callable = lambda args, output: 0.0  # largest |term| of an inexact output's sums
    terms: Callable = lambda args, output: args[0].numel() // max(output.numel(), 1)  # terms of one sum
    dtypes: tuple[torch.dtype, ...] = FLOATS
    granularities: tuple[str, ...] = GRANULARITIES
    memories: tuple[str, ...] = MEMORIES


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    granularity: str
    memory: str = "contiguous"
    option: str = "plain"

    def id(self, backend: str) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{backend}-{shape}-{dtype}-{self.granularity}-{self.memory}-{self.option}"

    def args(self, device="cpu") -> tuple:
        return OPS[self.op].make(self, torch.device(device))

    def rows_axis(self) -> tuple[int, int]:
        """(rows, axis) as the ops take them."""
        if self.granularity.startswith("axis"):
            axis = int(self.granularity[4:])
            return self.shape[axis], axis
        per_row = {"tensor": math.prod(self.shape), "token": (self.shape or (1,))[-1], "group": GROUP}[
            self.granularity
        ]
        return max(math.prod(self.shape) // max(per_row, 1), 1), layout.FLAT

    def bounds(self) -> tuple[int, int]:
        return OPTIONS[self.option].get("bounds", (-8, 7))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.id("").encode()))


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


def grid_of(case: Case, device) -> tuple:
    """(scale, offset, zero_point, axis, quant_min, quant_max) of a case."""
    option, (rows, axis) = OPTIONS[case.option], case.rows_axis()

    def cycle(values, dtype):
        return torch.tensor([values[r % len(values)] for r in range(rows)], dtype=dtype, device=device)

    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    odd = (-0.3, 1e-40, math.inf, 0.25, math.nan, -0.5, 0.0, -math.inf)
    scale = cycle(odd if option.get("odd_scale") else (0.25, 0.3, 0.5, 0.125, 1.0), compute)
    offset = cycle((0.1, -0.25, 0.0, 1.5), compute) if option.get("offset") else None
    zero_point = cycle((3, -2, 0, 1), torch.int32) if option.get("zero_point") else None
    return scale, offset, zero_point, axis, *case.bounds()


def values(case: Case, device) -> torch.Tensor:
    """x on and around the discontinuities of the case's quantizer."""
    scale, offset, zero_point, axis, quant_min, quant_max = grid_of(case, "cpu")
    index, random = row_index(case.shape, scale.numel(), axis), case.generator()
    s = reference.quantizer.safe_scale(scale).double().nan_to_num(nan=1.0)[index]
    zero = 0 if zero_point is None else zero_point[index]
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
    special += [math.nan, math.nan] if OPTIONS[case.option].get("special") else []
    if x.numel() > 4 * len(special):
        # Every 13th element, so that all rows meet some.
        at = torch.arange(5, x.numel(), max(13, x.numel() // 40))
        x.view(-1)[at] = torch.tensor(special, dtype=case.dtype)[torch.arange(len(at)) % len(special)]
    return arrange(x.to(device), case.memory)


def _like_x(case: Case, device) -> torch.Tensor:
    """A second tensor of x's shape: in its memory format for the first option, else contiguous."""
    t = torch.randn(case.shape, generator=case.generator()).to(case.dtype).to(device)
    return arrange(t, case.memory if case.option == "plain" else "contiguous")


def _noise(case: Case, device) -> tuple:
    kind, a, b = OPTIONS[case.option].get("noise", (noise.PLAIN, 0.0, 0.0))
    return kind, a, b, torch.tensor([SEED], device=device), STREAM


def _fake_quantize(case, device):
    shift = _like_x(case, device), torch.tensor([0.37], device=device)
    return (values(case, device), *grid_of(case, device), *_noise(case, device),
            *(shift if case.option == "shift" else (None, None)))  # fmt: skip


def _fake_quantize_backward(case, device):
    get = OPTIONS[case.option].get
    estimator = get("grad_scale", 1.0), get("clip_only", False), get("ewgs", 0.0)
    return (
        _like_x(case, device),
        values(case, device),
        *grid_of(case, device),
        *estimator,
        *_noise(case, device),
    )


def _backward_magnitude(args, output):
    grad, zero_point, quant_min, quant_max, grad_scale = args[0], args[4], args[6], args[7], args[8]
    zero = 0 if zero_point is None else int(zero_point.abs().max())
    # A term is at most g times a bound of the grid, plus the tail of a normal variate.
    largest = float(grad.abs().max()) if grad.numel() else 0.0
    return largest * (max(abs(quant_min), abs(quant_max)) + zero + 3) * abs(grad_scale)


def _quantize(case, device):
    return values(case, device), *grid_of(case, device)


def _dequantize(case, device):
    scale, offset, zero_point, axis, *bounds = grid_of(case, device)
    q = reference.quantize(values(case, device), scale, offset, zero_point, axis, *bounds)
    return arrange(q, case.memory), scale, offset, zero_point, axis, case.dtype


def _levels(case, device):
    bits, signed = OPTIONS[case.option]["bits"], case.dtype == torch.int8
    low = -(1 << bits - 1) if signed else 0
    return torch.randint(low, low + (1 << bits), case.shape, generator=case.generator()).to(
        device, case.dtype
    )


def _pack(case, device):
    return arrange(_levels(case, device), case.memory), OPTIONS[case.option]["bits"]


def _unpack(case, device):
    q, bits = _levels(case, device), OPTIONS[case.option]["bits"]
    return arrange(reference.pack(q, bits), case.memory), bits, q.numel(), case.dtype == torch.int8


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


_FLAT_MEMORY = ("contiguous", "misaligned")
_BITS = {"options": ("bits4", "bits2", "bits8"), "dtypes": INTEGERS, "granularities": ("tensor",)}
OPS = {
    op.name: op
    for op in (
        Op("fake_quantize", _fake_quantize, (True,), lambda args: 2 * _bytes(args[0]), (*_GRID, "one_bit", *_NOISES)),
        Op("fake_quantize_backward", _fake_quantize_backward, (True, False, False), lambda args: 3 * _bytes(args[0]),
           (*_GRID, "clip_only", "ewgs", "grad_scale", *_NOISES), _backward_magnitude),
        Op("quantize", _quantize, (True,), lambda args: _bytes(args[0]) + args[0].numel(), (*_GRID, "one_bit")),
        Op("dequantize", _dequantize, (True,), lambda args: args[0].numel() * (1 + args[5].itemsize), _GRID),
        Op("pack", _pack, (True,), lambda args: args[0].numel() * (8 + args[1]) // 8, **_BITS),
        Op("unpack", _unpack, (True,), lambda args: args[2] * (8 + args[1]) // 8, **_BITS, memories=_FLAT_MEMORY),
    )
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every case that parity is shown on."""
    for op in OPS.values():
        for d, dtype in enumerate(op.dtypes):
            for g, granularity in enumerate(op.granularities):
                for o, option in enumerate(op.options):
                    turn = op.memories[(d + g + o) % len(op.memories)]
                    for memory in op.memories if o == 0 else (turn,):
                        yield Case(op.name, SHAPE, dtype, granularity, memory, option)
        for shape, granularities in EDGES.items():
            for granularity in granularities:
                if granularity in op.granularities:
                    yield Case(op.name, shape, op.dtypes[0], granularity, "contiguous", op.options[0])


def timed(suite: str, op: str, dtypes=(torch.float32, torch.bfloat16)) -> Iterator[Case]:
    """The cases of one named set of TIMED shapes that a benchmark times for an op."""
    for shape, granularities in TIMED[suite].items():
        for granularity in granularities:
            for dtype in dtypes:
                yield Case(op, shape, dtype, granularity, "contiguous", OPS[op].options[0])


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def backends(op: str, device="cpu") -> dict[str, Callable]:
    """The implementations of an op that can be called directly on a device, by name."""
    device, found = torch.device(device).type, {"reference": getattr(reference, op)}
    triton_answers = False
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        try:
            launcher = getattr(importlib.import_module("qkernels.triton"), op, None)
        except ImportError:
            launcher = None
        if launcher is not None:
            found["triton"], triton_answers = launcher, True
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", device.upper())
    from . import backend

    if registered and not (device == "cuda" and triton_answers and "cuda" in backend.why_not):
        found["native"] = getattr(torch.ops.qkernels, op).default
    return found


def sum_bound(dtype: torch.dtype, terms: int, magnitude: float, want: torch.Tensor) -> torch.Tensor:
    """How far a sum of ``terms`` rounded terms of at most ``magnitude`` may lie from the float64 one."""
    return torch.finfo(dtype).eps * (4 * math.sqrt(terms) * magnitude + want.double().abs())


def compare(case: Case, args: tuple, got, want) -> None:
    """AssertionError unless every output has want's dtype, shape, strides and values (sums: within their bound)."""
    op = OPS[case.op]
    got, want = ((t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (got, want))
    assert len(got) == len(want) == len(op.exact)
    for number, (g, w, exact) in enumerate(zip(got, want, op.exact)):
        where = f"output {number} of {case.id('')}"
        assert (g.dtype, g.shape) == (w.dtype, w.shape), (
            f"{where}: {g.dtype} {g.shape}, not {w.dtype} {w.shape}"
        )
        assert g.numel() == 0 or g.stride() == w.stride(), f"{where}: strides {g.stride()}, not {w.stride()}"
        wrong = g.isnan() != w.isnan()
        if exact:
            wrong |= ((g != w) | (g.signbit() != w.signbit())) & ~w.isnan()
        elif g.numel():
            bound = sum_bound(g.dtype, op.terms(args, g), op.magnitude(args, g), w)
            wrong |= ((g.double() - w.double()).abs() > bound) & ~w.isnan()
        if wrong.any():
            first = tuple(int(i) for i in wrong.nonzero()[0])
            raise AssertionError(f"{where}: {int(wrong.sum())} of {g.numel()} differ, first at {first}: "
                                 f"got {g[first].item()!r}, want {w[first].item()!r}")  # fmt: skip
