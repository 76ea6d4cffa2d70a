"""A float model into a quantized one and on to integers."""

import warnings
from dataclasses import dataclass, field, fields, replace
from itertools import islice

import numpy as np
import torch
from torch import nn

from . import backend, candidates
from . import nn as qnn
from . import noise as noises
from . import quantizers as q
from .observe import Statistics, run_first, share_reached
from .seeds import SeedSource
from .wrapped import check_whole


@dataclass(frozen=True)
class QConfig:
    """How a model is quantized.

    Args:
        method: "lsq" "lsq+" "asymmetric" "saq" "pact" "dorefa" "noise_tempering" "diffq" "ewgs".
        weight_bits, act_bits: 2 to 8; None leaves weights or activations in floating point.
        weight_axis: 0 per output channel, None per tensor.
        first_last_bits: bits of weights and activations of the first and last layer, in the order in which the model
            holds them (``model.named_modules()``); None: as the others.
        act_signed: None decides per layer from the data. act_offset: method "saq" learns an offset for each layer's
            activations, as "lsq+" always does. exclude: names of modules (and all below) left alone.
        grad_scale_count: N of LSQ's gradient scale, "features" (paper) or "numel" (most public code).
        weight_norm: "detach", "full" or "none", SAQ's standardisation of convolution weights.
        weight_noise, act_noise: one of qk.noise; the method's own where it has one ("noise_tempering", "diffq").
        ewgs_delta: of method "ewgs".
        overrides: settings of single layers (mixed precision), {"layer4": {"weight_bits": 8}, ...}: of the module of
            that name and all below. The longest name counts; bits that are given here go before first_last_bits.

    Raises: ValueError naming the argument and what is accepted.
    """

    method: str = "lsq"
    weight_bits: int | None = 4
    act_bits: int | None = 4
    weight_axis: int | None = 0
    first_last_bits: int | None = 8
    act_signed: bool | None = None
    act_offset: bool = False
    exclude: tuple[str, ...] = field(default=())
    grad_scale_count: str = "features"
    weight_norm: str = "detach"
    weight_noise: noises.Noise | None = None
    act_noise: noises.Noise | None = None
    ewgs_delta: float = 1e-3
    overrides: dict[str, dict] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.method not in q.WEIGHT:
            raise ValueError(f"method must be one of {', '.join(q.WEIGHT)}; got {self.method!r}")
        for name in ("weight_bits", "act_bits", "first_last_bits"):
            bits = getattr(self, name)
            if isinstance(bits, np.integer):
                bits = int(bits)
                object.__setattr__(self, name, bits)
            if bits is not None and (not isinstance(bits, int) or not 2 <= bits <= 8):
                raise ValueError(f"{name} must be an int from 2 to 8 or None, got {bits!r}")
        if self.weight_axis not in (0, None):
            raise ValueError(
                f"weight_axis must be 0 (per output channel) or None (per tensor), got {self.weight_axis!r}"
            )
        if self.weight_bits is None and self.act_bits is None:
            raise ValueError("weight_bits and act_bits are both None: nothing would be quantized")
        if self.act_signed not in (True, False, None):
            raise ValueError(f"act_signed must be True, False or None, got {self.act_signed!r}")
        if self.act_offset not in (True, False) or (self.act_offset and self.method != "saq"):
            raise ValueError(
                f"act_offset must be False, or True for method 'saq'; got {self.act_offset!r} for {self.method!r}"
            )
        if isinstance(self.exclude, str):
            raise ValueError(f"exclude must be a sequence of module names, got {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for name in ("weight_noise", "act_noise"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, noises.Noise):
                raise ValueError(f"{name} must be one of qk.noise (Tempering, ...) or None, got {value!r}")
        if not (isinstance(self.ewgs_delta, (int, float)) and self.ewgs_delta >= 0):
            raise ValueError(f"ewgs_delta must be a number of at least 0, got {self.ewgs_delta!r}")
        for name, accepted in (
            ("grad_scale_count", ("features", "numel")),
            ("weight_norm", ("detach", "full", "none")),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}")

        if not isinstance(self.overrides, dict):
            raise ValueError(
                f"overrides must be a dict, name of a module -> settings, got {self.overrides!r}"
            )
        accepted = {f.name for f in fields(self)} - {"exclude", "overrides", "first_last_bits"}
        for name, settings in self.overrides.items():
            if not isinstance(settings, dict) or settings.keys() - accepted:
                raise ValueError(
                    f"overrides[{name!r}] must be a dict of {', '.join(sorted(accepted))}; got {settings!r}"
                )
            try:
                self.of(name)
            except ValueError as error:
                raise ValueError(f"overrides[{name!r}]: {error}") from None

    def of(self, *names, at_end=False):
        """The settings of the layer of that name (a shared one: names); ``at_end``: it is the first or the last."""
        found = (key for key in self.overrides if any(candidates.within(name, key) for name in names))
        own = max(found, key=len, default=None)
        ends = [key for key in ("weight_bits", "act_bits") if at_end and getattr(self, key) is not None]
        settings = {**dict.fromkeys(ends, self.first_last_bits), **self.overrides.get(own, {})}
        return replace(self, exclude=(), overrides={}, **settings)

    def weight_quantizer(self, layer_type, weight):
        """The quantizer of one weight, started from it."""
        axis = None if self.weight_axis is None else qnn.QUANTIZED[layer_type].channel_axis
        options = {"ewgs": self.ewgs_delta} if self.method == "ewgs" else {}
        if self.method == "saq":
            conv = layer_type not in (nn.Linear, nn.Embedding)
            options = {"weight_norm": self.weight_norm if conv else "none"}
        quantizer = q.WEIGHT[self.method](
            self.weight_bits, "weight", axis=axis, rows=1 if axis is None else weight.shape[axis],
            noise=self.weight_noise or q.WEIGHT_NOISE.get(self.method), count=self.grad_scale_count, **options,
        )  # fmt: skip
        quantizer.to(weight.device)
        quantizer.start_on(weight)
        return quantizer

    def activation_quantizer(self):
        options = {"ewgs": self.ewgs_delta} if self.method == "ewgs" else {}
        if self.method == "saq":
            options = {"offset": self.act_offset}
        return q.ACTIVATION[self.method](
            self.act_bits,
            "activation",
            signed=self.act_signed,
            noise=self.act_noise,
            count=self.grad_scale_count,
            **options,
        )


def quantize_(model, config=None, **settings):
    """Swap every Linear, Conv1d, Conv2d, ConvTranspose2d and Embedding of the model for its quantized form, in place.

    Parameters are shared, so optimizers and state dict keys stay valid; weight step sizes start from the weights,
    activation step sizes from ``calibrate`` or the first training batch. Returns the model (a new module only where
    the model itself is a layer). One warning names the layers with weights that stay in floating point and are not
    excluded. ValueError: nothing to quantize, already quantized, an unknown name in exclude or overrides.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, QConfig | None):
        got = f"{type(model).__name__} and {type(config).__name__}"
        raise TypeError(f"model must be an nn.Module and config a QConfig or None, got {got}")
    if config is not None and settings:
        raise ValueError(f"give config or settings, not both; got {config} and {', '.join(settings)}")
    config = config or QConfig(**settings)
    names = dict(model.named_modules(remove_duplicate=False))
    unknown = [e for e in config.exclude if e not in names]
    if unknown:
        raise ValueError(f"exclude names no module: {', '.join(unknown)}")
    if any(isinstance(m, (qnn._Quantized, qnn.IntegerWeight)) for m in names.values()):
        raise ValueError("model is already quantized")
    layers = candidates.quantizable(model, config.exclude)
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in qnn.QUANTIZED)
        left = candidates.said(model, config.exclude)
        raise ValueError(f"model has no layer to quantize ({kinds})" + (f"; it has {left}" if left else ""))
    for key in config.overrides:
        if not any(candidates.within(name, key) for name, _ in layers):
            raise ValueError(f"overrides names no layer that would be quantized: {key!r}")
    order = list(dict.fromkeys(id(layer) for _, layer in layers))
    ends = {order[0], order[-1]} if config.first_last_bits is not None else set()
    seeds, swapped = SeedSource(), {}
    for name, layer in layers:
        if id(layer) not in swapped:
            aliases = [alias for alias, other in layers if other is layer]
            swapped[id(layer)] = _quantized(layer, config.of(*aliases, at_end=id(layer) in ends))
            for quantizer in quantizers(swapped[id(layer)]):
                quantizer.layer = name
        if name == "":
            model = swapped[id(layer)]
        else:
            parent, _, child = name.rpartition(".")
            setattr(names[parent], child, swapped[id(layer)])
    for module in names.values():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # they serve the path that reads weights past the quantizers
    noisy = False
    for stream, quantizer in enumerate(quantizers(model)):
        quantizer.seeds, quantizer.stream = seeds, stream
        noisy = noisy or quantizer.noise is not None
    if noisy:
        model.register_forward_pre_hook(seeds.begin)
        model.register_forward_hook(seeds.end, always_call=True)
    left = candidates.said(model, config.exclude)
    if left:
        warnings.warn(f"left in floating point: {left} (silent for those in exclude)", stacklevel=2)
    return model


def _quantized(layer, config):
    kind = type(layer)
    if getattr(layer, "sparse", False):
        raise ValueError(
            "an Embedding with sparse=True cannot be quantized: its gradient would be dense; use sparse=False"
        )
    weight = None if config.weight_bits is None else config.weight_quantizer(kind, layer.weight)
    takes_floats = config.act_bits is not None and kind is not nn.Embedding
    return qnn.QUANTIZED[kind].wrap(layer, weight, config.activation_quantizer() if takes_floats else None)


def quantizers(model):
    """The quantizers of a model, in its order."""
    return [m for m in model.modules() if isinstance(m, q.Quantizer)]


def layers(model):
    """(name, layer) of the quantized layers, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, qnn._Quantized)]


@torch.no_grad()
def calibrate(model, loader, batches=8, forward=run_first):
    """Set every step size: weights' from the weights, activations' from up to ``batches`` batches of ``loader``.

    No gradients; BatchNorm normalises by the batch and keeps its statistics; other modules are in evaluation mode.
    Batches are tensors or (input, ...) tuples; for models of other inputs ``forward(model, batch)`` runs one, as in
    ``forward=lambda model, batch: model(**batch)``. Processes of a torch.distributed group agree. Returns the model.
    One warning names the layers that no batch reached; they keep the step sizes they had, if any.
    Raises: ValueError where the model has no quantizer, the loader no batch or a layer's inputs are not finite;
    TypeError where a batch is neither; RuntimeError where batches reached no layer at all.
    """
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches must be an int of at least 1, got {batches!r}")
    found = quantizers(model)
    if not found:
        raise ValueError("model has no quantizer: call qk.quantize_ first")
    check_whole(model, "calibrate")
    for _, layer in layers(model):
        if isinstance(layer.weight_quantizer, q.Quantizer):
            layer.weight_quantizer.start_on(layer.weight)
    modes = [(m, m.training) for m in model.modules()]
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    observed = [m for m in found if m.role == "activation"]
    device = next(model.parameters()).device
    model.eval()
    try:
        for norm in norms:
            norm.train()
        for quantizer in observed:
            quantizer.statistics = Statistics(quantizer.axis)
        seen = 0
        for batch in islice(loader, batches):
            forward(model, batch)
            seen += 1
        if seen == 0:
            raise ValueError("loader gave no batch")
        share_reached([quantizer.statistics for quantizer in observed], device)
        reached = _reached(model, observed)
        statistics = [quantizer.statistics.agreed() for quantizer in reached]
        broken = [a for a, seen in zip(reached, statistics, strict=True) if not seen.sums.isfinite().all()]
        if broken:
            raise ValueError(f"loader: its batches give NaN or infinite inputs to {_of(model, broken)}")
        for quantizer, seen in zip(reached, statistics, strict=True):
            quantizer.start_from(seen)
    finally:
        for quantizer in observed:
            quantizer.statistics = None
        for buffer, before in kept:
            buffer.copy_(before)
        for module, training in modes:
            module.training = training
    return model


def _reached(model, observed):
    """The quantizers that some data came to; a warning names the layers of the others."""
    reached = [a for a in observed if a.statistics.sums is not None]
    if len(reached) < len(observed):
        names = _of(model, [a for a in observed if a.statistics.sums is None])
        if not reached:
            raise RuntimeError(f"loader: its batches reached no quantized layer: {names}")
        warnings.warn(f"no batch of loader reached {names}: their input step sizes are not set", stacklevel=4)
    return reached


def _of(model, quantizers):
    """Names of the layers that have these input quantizers."""
    wanted = set(map(id, quantizers))
    return ", ".join(name or "(model)" for name, m in layers(model) if id(m.input_quantizer) in wanted)


@torch.no_grad()
def convert_(model):
    """Replace every quantized weight by packed integers, in place; evaluation outputs stay the same, bit for bit.

    The model is left in evaluation mode and cannot be trained further. ValueError where nothing is quantized, or
    it is converted already.
    """
    quantized = [layer.weight_quantizer for _, layer in layers(model)]
    if any(isinstance(weight, qnn.IntegerWeight) for weight in quantized):
        raise ValueError("model is already converted")
    found = [
        (name, layer) for name, layer in layers(model) if isinstance(layer.weight_quantizer, q.Quantizer)
    ]
    if not found:
        raise ValueError("model has no quantized layer to convert: call qk.quantize_ first")
    check_whole(model, "convert_")
    model.eval()
    for _, layer in found:
        integer = qnn.IntegerWeight(layer.weight_quantizer, layer.weight)
        layer._parameters.pop("weight", None)  # torch.nn.utils.weight_norm keeps it elsewhere
        layer.weight = None
        layer.weight_quantizer = integer
    return model


def param_groups(model, lr, weight_decay=0.0, scale_lr=None):
    """Parameter groups for an optimizer: weights and the rest, and the quantizers' numbers without weight decay.

    lr: of all; scale_lr (default lr): of step sizes, offsets, clips. PACT's clip keeps weight decay, as in its paper.
    """
    learned, decayed = [], []
    for quantizer in quantizers(model):
        trainable = [p for p in quantizer.parameters(recurse=False) if p.requires_grad]
        (decayed if quantizer.decayed else learned).extend(trainable)
    own = {id(p) for p in (*learned, *decayed)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    scale_lr = lr if scale_lr is None else scale_lr
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": learned, "lr": scale_lr, "weight_decay": 0.0},
        {"params": decayed, "lr": scale_lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def summary(model):
    """A table of the quantized layers: name, kind, weight and activation grid, granularity, step sizes, backend.

    Layers with weights that stay in floating point follow below.
    """
    check_whole(model, "summary")
    rows = [("layer", "kind", "weight", "rows", "weight step", "input", "input step", "backend")]
    for name, layer in layers(model):
        weight, act = layer.weight_quantizer, layer.input_quantizer
        tensor = layer.weight if layer.weight is not None else weight.packed
        rows.append(
            (
                name or "(model)",
                type(layer).__name__,
                _describe(weight),
                "-" if weight is None else str(weight.rows),
                _steps(weight),
                _describe(act),
                _steps(act),
                backend.serves("fake_quantize", tensor.device.type),
            )
        )
    if len(rows) == 1:
        return "no quantized layer"
    for name, layer, _ in candidates.left_in_float(model):
        rows.append((name, type(layer).__name__, "float", "-", "-", "float", "-", "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _describe(quantizer):
    if quantizer is None:
        return "float"
    if isinstance(quantizer, qnn.IntegerWeight):
        return f"int{quantizer.bits}"
    if quantizer.signed is None:
        return f"{quantizer.bits} bit"
    low, high = quantizer.bounds()
    return f"{quantizer.bits} bit [{low}, {high}]"


def _steps(quantizer):
    if quantizer is None:
        return "-"
    if isinstance(quantizer, q.Quantizer) and not quantizer.started:
        return "not calibrated"
    scale = quantizer.scale if isinstance(quantizer, qnn.IntegerWeight) else quantizer.grid()["scale"]
    scale = scale.detach().abs()
    return (
        f"{scale.item():.4g}"
        if scale.numel() == 1
        else f"{scale.min().item():.3g} to {scale.max().item():.3g}"
    )
