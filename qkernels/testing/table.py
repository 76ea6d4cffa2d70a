"""Which cases prove an op, and which are timed? One table of ops, read by the tests and by the benchmarks.

A new op is one ``Op`` row: how a case's arguments are made, which outputs are exact, which bytes must move.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import layout, noise
from ..reference import perturb as moves
from . import moments, perturb, quantizer

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
TIMED: dict[str, dict[tuple[int, ...], tuple[str, ...]]] = {
    "activation": {(64, 64, 28, 28): ("tensor", "axis1"), (64, 64, 56, 56): ("tensor", "axis1")},
    "weight": {(64, 64, 3, 3): ("tensor", "axis0"), (512, 512, 3, 3): ("tensor", "axis0")},
    "linear": {(1024, 1024): ("axis0", "axis1", "group"), (4096, 4096): ("axis0", "token")},
    "noise": {(512, 512, 3, 3): ("tensor",), (64, 64, 28, 28): ("tensor",)},
    "distance": {(64, 256, 14, 14): ("axis1",)},
}
# The models whose parameters are timed as lists: (classes, image size).
LISTS = {"resnet20": (10, 32), "resnet18": (1000, 224), "resnet50": (1000, 224)}

_ZEROS = (3, -2, 0, 1)
_WITHOUT_ZERO = (-12, 9, 16_776_960, -16_776_959)  # the farthest at which levels are stored
_FAR = (100_000_001, -(2**31), 16_777_219, 2**31 - 1)  # bounds that no float32, or no int32, holds
# What an option changes; settings it does not name keep the defaults given where they are read.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "special": {"special": True}, "odd_scale": {"odd_scale": True}, "offset": {"offset": True},
    "zero_point": {"zero_point": _ZEROS}, "without_zero": {"zero_point": _WITHOUT_ZERO, "special": True},
    "far_zero_point": {"zero_point": _FAR},
    "unsigned": {"bounds": (0, 255)}, "one_bit": {"bounds": (0, 1)},
    "tempering": {"noise": (noise.TEMPERING, 0.3, 5.0)},
    "tempering_offset": {"noise": (noise.TEMPERING, 0.2, 50.0), "offset": True, "special": True},
    "after": {"noise": (noise.AFTER, 1.0, 0.0)}, "after_off": {"noise": (noise.AFTER, 0.0, 0.0)},
    "before": {"noise": (noise.BEFORE, 1.0, 0.0), "zero_point": _ZEROS},
    "pseudo": {"noise": (noise.PSEUDO, 0.0, 0.0), "special": True},
    "pseudo_normal": {"noise": (noise.PSEUDO_NORMAL, 0.0, 0.0), "offset": True},
    "stochastic": {"noise": (noise.STOCHASTIC, 0.0, 0.0), "zero_point": _ZEROS},
    "shift": {"noise": (noise.SHIFT, 0.0, 0.0)},
    "clip_only": {"clip_only": True, "special": True}, "ewgs": {"ewgs": 0.2}, "grad_scale": {"grad_scale": 0.37},
    "bits2": {"bits": 2}, "bits4": {"bits": 4}, "bits8": {"bits": 8},
    "sum": {"sum": True}, "far": {"far": True}, "same": {"same": True}, "one_grad": {"one_grad": True},
    "weighted": {"weighted": True},
    "along": {"move": moves.ALONG}, "along_points": {"move": moves.ALONG, "points": True},
    "adaptive": {"move": moves.ADAPTIVE}, "normal": {"move": moves.NORMAL}, "magnitude": {"move": moves.MAGNITUDE},
    "uniform": {"move": moves.UNIFORM}, "ascend": {"move": moves.ASCEND},
    "ascend_points": {"move": moves.ASCEND, "points": True}, "ascend_sign": {"move": moves.ASCEND_SIGN},
}  # fmt: skip
_GRID = ("plain", "special", "odd_scale", "offset", "zero_point", "without_zero", "unsigned")
_MOVES = tuple(name for name, option in OPTIONS.items() if "move" in option)
_NOISES = tuple(name for name, option in OPTIONS.items() if "noise" in option)


@dataclass(frozen=True)
class Op:
    """One op of torch.ops.qkernels; its first option is crossed with everything, the others with a share of it."""

    name: str
    make: Callable  # (case, device) -> the op's arguments
    # Of each output (one for all alike): equal to the reference, or a sum within its bound.
    exact: tuple[bool, ...]
    traffic: Callable  # args -> bytes that must move
    options: tuple[str, ...]
    # The largest |term| (of each channel) of an inexact output's sums.
    magnitude: Callable = lambda args, output: 0.0
    terms: Callable = lambda args, output: args[0].numel() // max(output.numel(), 1)  # terms of one sum
    dtypes: tuple[torch.dtype, ...] = FLOATS
    granularities: tuple[str, ...] = GRANULARITIES
    memories: tuple[str, ...] = MEMORIES
    # In which dtype an inexact output's terms are rounded, if not its own.
    rounding: Callable = lambda args: None
    legal: Callable = lambda case: True
    writes: bool = False  # the op returns nothing and writes into the tensors of its first argument


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
        numel = math.prod(self.shape)
        per_row = {"tensor": numel, "token": (self.shape or (1,))[-1], "group": GROUP}[self.granularity]
        return max(numel // max(per_row, 1), 1), layout.FLAT

    @property
    def settings(self) -> dict:
        return OPTIONS[self.option]

    def bounds(self) -> tuple[int, int]:
        return self.settings.get("bounds", (-8, 7))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.id("").encode()))


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


_FLAT_MEMORY = ("contiguous", "misaligned")
_BITS: dict[str, Any] = {
    "options": ("bits4", "bits2", "bits8"),
    "dtypes": INTEGERS,
    "granularities": ("tensor",),
}
_CHANNELS: dict[str, Any] = {"granularities": ("axis0", "axis1"), "legal": moments.legal}
_LIST: dict[str, Any] = {"granularities": ("tensor",)}
OPS = {
    op.name: op
    for op in (
        Op("fake_quantize", quantizer.fake_quantize, (True,), lambda args: 2 * _bytes(args[0]),
           (*_GRID, "far_zero_point", "one_bit", *_NOISES)),
        Op("fake_quantize_backward", quantizer.fake_quantize_backward, (True, False, False),
           lambda args: 3 * _bytes(args[0]), (*_GRID, "clip_only", "ewgs", "grad_scale", *_NOISES),
           quantizer.backward_magnitude),
        Op("quantize", quantizer.quantize, (True,), lambda args: _bytes(args[0]) + args[0].numel(),
           (*_GRID, "one_bit")),
        Op("dequantize", quantizer.dequantize, (True,), lambda args: args[0].numel() * (1 + args[5].itemsize),
           _GRID),
        Op("pack", quantizer.pack, (True,), lambda args: args[0].numel() * (8 + args[1]) // 8, **_BITS),
        Op("unpack", quantizer.unpack, (True,), lambda args: args[2] * (8 + args[1]) // 8, **_BITS,
           memories=_FLAT_MEMORY),
        Op("standardized_distance", moments.distance, (False, False), lambda args: 2 * _bytes(args[0]),
           ("plain", "sum", "special", "far", "same"), moments.magnitude, moments.terms,
           rounding=moments.compute_type, **_CHANNELS),
        Op("standardized_distance_backward", moments.backward, (True,), lambda args: 3 * _bytes(args[1]),
           ("plain", "sum", "special", "far", "one_grad"), **_CHANNELS),
        Op("multi_norm", perturb.norm, (False, False), lambda args: _bytes(*args[0], *args[1]),
           ("plain", "weighted", "special"), perturb.magnitude, perturb.terms, **_LIST),
        Op("multi_dot", perturb.dot, (False,), lambda args: _bytes(*args[0], *args[1]), ("plain", "special"),
           perturb.magnitude, perturb.terms, **_LIST),
        Op("multi_perturb", perturb.copies, (True,), lambda args: _bytes(*args[0], *args[1], *args[2], *args[3]),
           _MOVES, legal=perturb.legal, writes=True, **_LIST),
        Op("multi_climb", perturb.climb, (True,), lambda args: _bytes(*args[0], *args[1], *args[2], *args[2]),
           ("along", "adaptive"), writes=True, **_LIST),
    )
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every case that parity is shown on."""
    for op in OPS.values():
        yield from filter(op.legal, _cases(op))


def _cases(op):
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


def model_of_list(name: str, device="meta") -> torch.nn.Module:
    """One of the models in LISTS, whose parameters are a list that benchmarks time."""
    from .. import models

    classes, size = LISTS[name]
    with torch.device(device):
        return models.build_model(name, classes, image_size=size)
