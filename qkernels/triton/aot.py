"""What to compile to know that every kernel builds, and at what cost, on a machine without a GPU."""

import itertools

from .. import noise
from . import moments, perturb
from .integer import BYTES, dequantize_kernel, pack_kernel, quantize_kernel, unpack_kernel
from .quantizer import fake_quantize_backward_kernel, fake_quantize_kernel, sum_rows_kernel

_STORAGES = ("fp32", "bf16", "fp16")
_SCALARS = {"quant_min": "i64", "quant_max": "i64", "stream": "i64", "factor": "fp64"} | dict.fromkeys(
    ("a", "b", "ewgs"), "fp32"
)
_TABLES = ("addresses_ptr", "blocks_ptr", "index_ptr")
_FLOATS = ("scale_ptr", "offset_ptr", "shift_scale_ptr", "dscale_ptr", "doffset_ptr", "sign_ptr", "out_ptr",
           "partial_ptr")  # fmt: skip
_POINTERS = {
    "zero_point_ptr": "*i32", "seed_ptr": "*i64", "p_ptr": "*u8", "q_ptr": "*i8", "coefficients_ptr": "*fp64",
    **dict.fromkeys(_TABLES, "*i64"), **dict.fromkeys(_FLOATS, "*fp32"),
}  # fmt: skip
# Sums over lists and over channels are float64.
_SUMS = _POINTERS | dict.fromkeys(("partial_ptr", "sums_ptr", "moments_ptr"), "*fp64") | {
    "ends_ptr": "*i64", "grad_ptr": "*fp32", "distance_ptr": "*fp32", "eta": "fp64", "n": "fp64", "times": "fp64",
    "eps": "fp64", "each": "fp64",
}  # fmt: skip
# One block of each way of walking: a run, short runs, columns; the last without quads of Philox.
_WALKS = {
    "run": {"BY_COLUMN": False, "QUADS": True, "R": 1, "W": 2048},
    "short": {"BY_COLUMN": False, "QUADS": False, "R": 16, "W": 64},
    "columns": {"BY_COLUMN": True, "QUADS": True, "R": 8, "W": 256},
}


def _spec(name, kernel, storage, constants, absent=(), types=_POINTERS, warps=None):
    """One entry of aot_specs: the types follow from the arguments' names; ``absent`` pointers are None."""
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names} | dict.fromkeys(absent)
    signature = {
        arg: "constexpr" if arg in constants
        else types.get(arg, f"*{storage}") if arg.endswith("_ptr")
        else types.get(arg, _SCALARS.get(arg, "i32"))
        for arg in kernel.arg_names
    }  # fmt: skip
    aligned = [
        a for a, kind in signature.items() if kind[0] == "*" or a in ("width", "stride", "numel", "size")
    ]
    heavy = kernel is fake_quantize_backward_kernel or noise.draws(constants.get("KIND", noise.PLAIN))
    return name, kernel, signature, constants, aligned, warps or (8 if heavy else 4)


def aot_specs() -> list:
    """(name, fn, signature, constexprs, 16-byte aligned arguments, num_warps) of every kernel's main variants."""
    specs = []
    for storage, (way, blocks) in itertools.product(_STORAGES, _WALKS.items()):
        for kind in range(8):
            shift = () if kind == noise.SHIFT else ("shift_ptr", "shift_scale_ptr")
            seed = () if noise.draws(kind) else ("seed_ptr",)
            wide, plain = kind == noise.PLAIN, {"KIND": kind} | blocks
            absent = (*shift, *seed) + (() if wide else ("zero_point_ptr",))
            specs.append(_spec(f"fake_quantize {kind} {storage} {way}", fake_quantize_kernel, storage,
                               plain | {"WIDE": wide}, absent))  # fmt: skip
            if noise.backward_kind(kind) != kind:
                continue
            absent = (*seed, "zero_point_ptr") + (
                ("offset_ptr", "doffset_ptr") if kind == noise.PLAIN else ()
            )
            estimator = {"CLIP_ONLY": False, "EWGS": kind == noise.BEFORE, "WIDE": False}
            specs.append(_spec(f"fake_quantize_backward {kind} {storage} {way}", fake_quantize_backward_kernel,
                               storage, plain | estimator, absent))  # fmt: skip
        specs.append(_spec(f"quantize {storage} {way}", quantize_kernel, storage, {"WIDE": True} | blocks))
        specs.append(_spec(f"dequantize {storage} {way}", dequantize_kernel, storage, blocks))
    for storage in _STORAGES:
        for move in range(7):
            blocks = {"MOVE": move, "POINTS": move in (0, 5, 6), "BLOCK": perturb.BLOCK}
            specs.append(_spec(f"perturb {move} {storage}", perturb.perturb_kernel, storage, blocks))
        for dot, weighted in ((True, False), (False, False), (False, True)):
            which = {"DOT": dot, "WEIGHTED": weighted, "BLOCK": perturb.BLOCK}
            specs.append(_spec(f"products {dot} {weighted} {storage}", perturb.products_kernel, storage, which,
                               types=_SUMS, warps=8))  # fmt: skip
        for way in ("run", "columns"):
            blocks, warps = _WALKS[way], 8 if way == "columns" else 4
            specs.append(_spec(f"moments {storage} {way}", moments.moments_kernel, storage, blocks, types=_SUMS,
                               warps=warps))  # fmt: skip
            specs.append(_spec(f"standardized_distance_backward {storage} {way}",
                               moments.standardized_distance_backward_kernel, storage, blocks,
                               types=_SUMS))  # fmt: skip
        specs.append(
            _spec(f"distance {storage}", moments.finish_kernel, storage, {"R": 1, "W": 256}, types=_SUMS)
        )
    specs.append(_spec("sums", perturb.finish_kernel, "fp64", {"W": perturb.SUMS}, types=_SUMS))
    for R, W in ((1, 1024), (1024, 1)):
        specs.append(_spec(f"sum_rows {R}x{W}", sum_rows_kernel, "fp32", {"R": R, "W": W}))
    for bits in (2, 4, 8):
        packing = {"BITS": bits, "BLOCK": BYTES, "SIGNED": True}
        specs.append(_spec(f"pack {bits}", pack_kernel, "i8", packing))
        specs.append(_spec(f"unpack {bits}", unpack_kernel, "i8", packing))
    return specs
