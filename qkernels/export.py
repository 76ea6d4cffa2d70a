"""Trained models for other programs: an ONNX QDQ graph, a torch.export program, packed integers by name."""

import copy
import logging
import math
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from . import convert, layout, noise, ops
from . import nn as qnn
from .annotations import StrPath
from .files import whole
from .quantizers import Quantizer
from .reference.quantizer import safe_scale
from .wrapped import refresh

FORMATS = ("onnx", "torch")
CHECKED_IMAGES = 64


def add_arguments(parser):
    """Declares the arguments of `qkernels export`."""
    flag = parser.add_argument
    flag("folder", metavar="RUN_DIR", help="a folder that `qkernels train` wrote")
    flag(
        "--format", choices=FORMATS, required=True, help="an ONNX QDQ graph, or a torch.export program (.pt2)"
    )
    flag("--out", required=True, metavar="FILE", help="the file to write; its folder must exist")
    flag("--which", choices=("checkpoint", "best"), default="checkpoint", help="the last weights or the best")


def main(args):
    """Runs `qkernels export`: writes the file and compares it with the model on test images; returns the exit code."""
    from .training import load_run

    _file(args.out)
    model, data, _ = load_run(args.folder, batch_size=CHECKED_IMAGES, which=args.which)
    x = next(iter(data.test))[0]
    if args.format == "onnx":
        what = f"ONNX, opset {export_onnx(model, x, args.out)}"
        run = _onnx_session(args.out)
    else:
        program = export_torch(model, x, args.out)
        what, run = "torch.export", program.module()
    print(f"{args.out}: {what}, {os.path.getsize(args.out) / 1024:.1f} KiB")
    if run is None:
        print("not checked: onnxruntime is not installed (pip install qkernels[onnx])")
        return 0
    with torch.no_grad():
        want, got = model(x), run(x)
    same = int((want.argmax(1) == got.argmax(1)).sum())
    print(
        f"largest difference from the model {(want - got).abs().max().item():.2g}, the same class for {same} of "
        f"{len(x)} test images"
    )
    return 0


def _onnx_session(path):
    """The file in ONNX Runtime, node by node as written, as a function of tensors; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *x: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in zip(names, x)})[0])


class Grid(nn.Module):
    """A quantizer's grid as constants: buffers scale (rows,), and offset, zero_point where the grid has them."""

    def __init__(self, grid, axis):
        super().__init__()
        self.axis = layout.FLAT if axis is None else axis
        for name in ("scale", "offset", "zero_point"):
            value = grid.get(name)
            self.register_buffer(name, None if value is None else value.detach().clone().reshape(-1))
        self.scale = safe_scale(self.scale)


class ActivationGrid(Grid):
    """An activation quantizer in evaluation."""

    def __init__(self, quantizer):
        super().__init__(quantizer.grid(), quantizer.axis)
        self.quant_min, self.quant_max = quantizer.bounds()

    def forward(self, x):
        return torch.ops.qkernels.fake_quantize(
            x, self.scale, self.offset, self.zero_point, self.axis, self.quant_min, self.quant_max, noise.PLAIN,
            0.0, 0.0, None, 0, None, None,
        )  # fmt: skip


class WeightGrid(Grid):
    """A converted weight with its levels in its shape, int8 or uint8: what a DequantizeLinear node reads."""

    holds_weight = True

    def __init__(self, weight):
        super().__init__(weight.grid(), weight.axis)
        self.bits, self.signed = weight.bits, weight.signed
        self.register_buffer("levels", weight.integers())

    def forward(self, _=None):
        return torch.ops.qkernels.dequantize(
            self.levels, self.scale, self.offset, self.zero_point, self.axis, torch.float32
        )


def export_torch(
    model: nn.Module, x: torch.Tensor | tuple[torch.Tensor, ...], path: StrPath
) -> torch.export.ExportedProgram:
    """Write the model as a torch.export program (.pt2) with integer weights; the first dimension of x is dynamic.

    Evaluation outputs equal the model's, bit for bit. ``torch.export.load(path).module()(x)`` runs it, in a program
    that imported qkernels.

    Args:
        model: float or quantized, converted or not; it stays as it is.
        x: example input, a tensor or a tuple of tensors with the batch first, on the model's device.
        path: the file to write; whole or not at all.

    Returns: the torch.export.ExportedProgram. Raises: RuntimeError (a quantizer without step size), TypeError (x),
    FileNotFoundError (the folder of path).
    """
    path, x = _file(path), _example(x)
    program = _trace(_integer_copy(model), x)
    with whole(path) as part:
        torch.export.save(program, part)
    return program


def export_onnx(model: nn.Module, x: torch.Tensor | tuple[torch.Tensor, ...], path: StrPath) -> int:
    """Write the model as an ONNX QDQ graph; the first dimension of x is dynamic.

    Activations: QuantizeLinear and DequantizeLinear; of 8, 4 or 2 bits, others in 8 after a Clip. Weights: packed
    integer initializers, the smallest of these types that holds the grid, and DequantizeLinear, per channel along the
    weight's axis or in blocks, where they have groups. Types are INT8, INT4 and INT2 or their unsigned forms. A real
    offset (LSQ+ activations, SAQ and DoReFa weights) stands beside them as explicit arithmetic: (x - offset) before
    QuantizeLinear, + offset after DequantizeLinear. Opset 21; 25 with 2-bit types.

    The graph computes what the model computes in evaluation, up to the order of float sums (and a step where that moves
    a value over a tie). It is exact, not fast: BatchNorm stays a node, behind which ONNX Runtime multiplies in float.
    Do not fuse BatchNorm into quantized layers (torch.nn.utils.fusion): their step sizes would not follow the weights.
    TensorRT asks for signed activations, QConfig(act_signed=True). Biases are added in nodes of their own, because ONNX
    Runtime would round them to integers. ONNX Runtime 1.31 builds an invalid graph from 2-bit zero points
    ("asymmetric"), unless its session option session.disable_quant_qdq is "1".

    Args, as ``export_torch``. Returns: the opset version. Raises: ImportError naming qkernels[onnx]; otherwise as
    ``export_torch``, and ValueError where the model is not float32 or holds a grid that ONNX has no type for.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX export needs onnx and onnxscript: pip install qkernels[onnx]") from error
    path, x = _file(path), _example(x)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"model must be float32 for ONNX, {name} is {tensor.dtype}: call model.float()")
    frozen, x = _integer_copy(model).cpu(), tuple(t.cpu() for t in x)
    for _, layer in convert.layers(frozen):
        if isinstance(layer.weight_quantizer, qnn.IntegerWeight):
            layer.weight_quantizer = WeightGrid(layer.weight_quantizer)
            _bias_after(layer)
        if layer.input_quantizer is not None:
            layer.input_quantizer = ActivationGrid(layer.input_quantizer)
    types = _grid_types(frozen)
    traced = _trace(frozen, x)
    used = {bits for bits, _ in types.values()} | _activation_bits(traced, types)
    opset = 25 if 2 in used else 21
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # torch warns about torchvision at every export
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced, custom_translation_table=_translations(), opset_version=opset, optimize=False,
                verbose=False, dynamic_shapes=tuple({0: "batch"} for _ in x),
            )  # fmt: skip
        assert program is not None, "torch's former exporter alone returns nothing"
    finally:
        log.setLevel(level)
    _narrow(program.model, types)
    program.optimize()
    for node in program.model.graph:  # paths of this machine's source files
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    with whole(path) as part:
        program.save(part, external_data=False)
    return opset


def integer_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that evaluation needs, as plain tensors by name; safetensors can hold it.

    A quantized weight NAME.weight (levels q of ``shape``, dequantized as (q - zero_point) * scale + offset):
        NAME.weight.packed   uint8, ``qk.pack``'s layout; NAME.weight.bits 2, 4 or 8; NAME.weight.signed 0 or 1
        NAME.weight.shape    int64; NAME.weight.axis int64, -1 for per tensor, and for groups: several rows, each of
                             numel / rows neighbours along the last dimension
        NAME.weight.scale    positive, float (rows,); NAME.weight.offset, NAME.weight.zero_point where the grid has them
    A quantized input: NAME.input.scale, .offset, .zero_point and .bounds, int64 (quant_min, quant_max).
    Everything else (biases, normalisation, float weights) under its name in the state dict.

    Raises: ValueError where the model has no quantized layer; RuntimeError where a quantizer has no step size.
    """
    frozen = _integer_copy(model)
    if not convert.layers(frozen):
        raise ValueError("model has no quantized layer: call qk.quantize_ first")
    for name, layer in convert.layers(frozen):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if not isinstance(quantizer, qnn.IntegerWeight | Quantizer | None):
                raise ValueError(
                    f"{name or 'model'} has a {type(quantizer).__name__}, whose integers are not known"
                )
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in convert.layers(frozen):
        prefix = name + "." if name else ""
        weight, act = layer.weight_quantizer, layer.input_quantizer
        if isinstance(weight, qnn.IntegerWeight):
            axis = layout.FLAT if weight.axis is None else weight.axis
            found = {"packed": weight.packed, **weight.grid()}
            # Training may turn its sign, of which the ops take no notice.
            found["scale"] = safe_scale(found["scale"])
            numbers = {"bits": [weight.bits], "signed": [int(weight.signed)], "axis": [axis]}
            found |= {key: torch.tensor(value) for key, value in {**numbers, "shape": weight.shape}.items()}
            tensors |= {f"{prefix}weight.{key}": value for key, value in found.items()}
        if isinstance(act, Quantizer):
            grid = act.grid()
            found = {**grid, "scale": safe_scale(grid["scale"]), "bounds": torch.tensor(act.bounds())}
            tensors |= {f"{prefix}input.{key}": value for key, value in found.items()}
        layer.weight_quantizer = layer.input_quantizer = None
    tensors |= frozen.state_dict()
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _integer_copy(model):
    """An evaluation copy with integer weights; RuntimeError where a quantizer has no step size."""
    for name, layer in convert.layers(model):
        for role, quantizer in (("weight", layer.weight_quantizer), ("input", layer.input_quantizer)):
            if isinstance(quantizer, Quantizer) and not quantizer.started:
                raise RuntimeError(
                    f"the {role} of {name or 'the model'} has no step size yet: call qk.calibrate(model, loader), "
                    "train, or load a checkpoint"
                )
        refresh(layer)  # else it may hold a weight with a graph, which has no copy
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    if any(isinstance(layer.weight_quantizer, Quantizer) for _, layer in convert.layers(copied)):
        convert.convert_(copied)
    return copied


def _bias_after(layer):
    """Add the layer's bias in a node of its own: ONNX Runtime rounds that of a quantized Conv or Gemm to integers."""
    if getattr(layer, "bias", None) is None:
        return
    bias = layer.bias.detach().clone().reshape(-1, *[1] * (layer.weight_quantizer.levels.dim() - 2))
    layer.bias = None
    layer.register_buffer("float_bias", bias)
    layer.register_forward_hook(lambda module, args, y: y + module.float_bias, prepend=True)


def _example(x):
    x = x if isinstance(x, tuple) else (x,)
    for tensor in x:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or tensor.shape[0] == 0:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"x must be a tensor with the batch first, or a tuple of them; got {got}")
    # A batch of one would be taken for a constant.
    return tuple(torch.cat([t, t]) if t.shape[0] == 1 else t for t in x)


def _trace(model, x):
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return torch.export.export(model, x, dynamic_shapes=tuple({0: batch} for _ in x))


def _file(path):
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file")
    return path


def _activation_bits(traced, types):
    """The bits of the types that the calls of fake_quantize take; ValueError where ONNX has no form for one."""
    placeholders = {p for p, name in traced.graph_signature.inputs_to_buffers.items() if name in types}
    found = set()
    for node in traced.graph.nodes:
        if node.target is not torch.ops.qkernels.fake_quantize.default:
            continue
        _, scale, _, zero_point, axis, quant_min, quant_max, kind, *_ = node.args
        if axis == layout.FLAT and scale.meta["val"].numel() != 1:
            raise ValueError(
                "ONNX export takes per-tensor and per-channel grids; the model calls one with groups"
            )
        if zero_point is not None and zero_point.name not in placeholders:
            raise ValueError(
                "ONNX export takes a zero_point as an int; the model calls fake_quantize with a tensor"
            )
        if kind != noise.PLAIN:
            raise ValueError(
                "ONNX export takes no noise and no shift; the model calls fake_quantize with one"
            )
        found.add(_onnx_type(quant_min, quant_max)[0])
    return found


def _onnx_type(quant_min, quant_max):
    """(bits, signed) of the ONNX integer type for activations with these bounds: theirs, else one of 8 bits.

    Not 4 bits for 3-bit bounds: ONNX Runtime 1.31 refuses a Clip before a 4-bit QuantizeLinear.
    """
    for bits in (2, 4, 8):
        for signed in (False, True):
            low, high = ops.bounds(bits, signed, None, None)
            if (low, high) == (quant_min, quant_max) or bits == 8 and low <= quant_min and quant_max <= high:
                return bits, signed
    raise ValueError(
        f"ONNX export takes bounds within 8 bits, [-128, 127] or [0, 255]; the model has [{quant_min}, {quant_max}]"
    )


def _grid_types(frozen):
    """(bits, signed) of each buffer that the graph must hold as a small integer, by its name."""
    types = {}
    for name, module in frozen.named_modules():
        if isinstance(module, WeightGrid):
            types[f"{name}.levels"] = types[f"{name}.zero_point"] = module.bits, module.signed
        elif isinstance(module, ActivationGrid):
            types[f"{name}.zero_point"] = _onnx_type(module.quant_min, module.quant_max)
    return types


def _element_type(bits, signed):
    import onnx_ir

    return onnx_ir.DataType[f"{'' if signed else 'U'}INT{bits}"]


def _narrow(model, types):
    """Give the integer initializers, which torch holds as int8, uint8 and int32, their ONNX types."""
    import onnx_ir

    for name, (bits, signed) in types.items():
        value = model.graph.initializers.get(name)
        if value is None:
            continue
        element = _element_type(bits, signed)
        array = value.const_value.numpy().astype(element.numpy())
        value.const_value = onnx_ir.Tensor(array, dtype=element, name=name)
        value.dtype = element


def _translations():
    """How the two ops that an exported model calls are written in ONNX."""
    from onnxscript import opset21 as op

    def per_row(values, axis):
        """Per tensor: ONNX wants a scalar."""
        return values if values is None or axis != layout.FLAT else op.Squeeze(values)

    def dequantize_groups(q, scale, offset, zero_point):
        rows, shape = scale.shape[0], tuple(q.shape)
        size = math.prod(shape) // rows
        blocks = [*shape[:-1], shape[-1] // size]  # a scale for each block along the last dimension
        operands = [op.Reshape(value, blocks) for value in (scale, zero_point) if value is not None]
        y = op.DequantizeLinear(q, *operands, axis=len(shape) - 1, block_size=size)
        if offset is None:
            return y
        y = op.Add(op.Reshape(y, [rows, size]), op.Reshape(offset, [rows, 1]))
        return op.Reshape(y, list(shape))

    def broadcast(values, axis, rank):
        return (
            op.Squeeze(values) if axis == layout.FLAT else op.Reshape(values, [-1] + [1] * (rank - axis - 1))
        )

    def fake_quantize(x, scale, offset, zero_point, axis, quant_min, quant_max, *rest):
        bits, signed = _onnx_type(quant_min, quant_max)
        scale = op.Abs(scale)
        rank = len(x.shape)
        if offset is not None:
            offset = broadcast(offset, axis, rank)
            x = op.Sub(x, offset)
        if (quant_min, quant_max) != ops.bounds(bits, signed, None, None):
            low, high = (op.Constant(value_float=float(bound)) for bound in (quant_min, quant_max))
            if zero_point is not None:
                shift = op.Cast(broadcast(zero_point, axis, rank), to=1)
                low, high = op.Sub(low, shift), op.Sub(high, shift)
            step = broadcast(scale, axis, rank)
            # Clip takes scalars only; Max and Min broadcast.
            x = op.Min(op.Max(x, op.Mul(low, step)), op.Mul(high, step))
        along = {} if axis == layout.FLAT else {"axis": axis}
        scale, zero_point = per_row(scale, axis), per_row(zero_point, axis)
        if zero_point is None:
            levels = op.QuantizeLinear(x, scale, output_dtype=int(_element_type(bits, signed)), **along)
            y = op.DequantizeLinear(levels, scale, **along)
        else:
            y = op.DequantizeLinear(
                op.QuantizeLinear(x, scale, zero_point, **along), scale, zero_point, **along
            )
        return y if offset is None else op.Add(y, offset)

    def dequantize(q, scale, offset, zero_point, axis, dtype):
        if axis == layout.FLAT and scale.shape[0] != 1:
            return dequantize_groups(q, scale, offset, zero_point)
        along = {} if axis == layout.FLAT else {"axis": axis}
        operands = [per_row(value, axis) for value in (scale, zero_point) if value is not None]
        y = op.DequantizeLinear(q, *operands, **along)
        return y if offset is None else op.Add(y, broadcast(offset, axis, len(q.shape)))

    return {
        torch.ops.qkernels.fake_quantize.default: fake_quantize,
        torch.ops.qkernels.dequantize.default: dequantize,
    }
