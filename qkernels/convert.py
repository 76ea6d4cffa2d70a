"""A float model into a quantized one and on to integers."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import data

from . import backend, candidates
from . import nn as qnn
from . import quantizers as q
from .annotations import Model
from .observe import Statistics, run_first, several, share_reached
from .qconfig import QConfig
from .seeds import SeedSource
from .tabulate import columns
from .wrapped import check_unflattened, check_whole, refresh, settle, unwrapped


def quantize_(model: Model, config: QConfig | None = None, **settings: Any) -> Model:
    """Swap every Linear, Conv1d, Conv2d, ConvTranspose2d and Embedding of the model for its quantized form, in place.
    qk.nn's layers that were made by hand get their quantizers.

    Parameters are shared, so state dict keys stay valid; an optimizer made before has the weights, but not the step
    sizes: make it after, of ``param_groups``. Weight step sizes start from the weights, activation step sizes from
    ``calibrate`` or the first training batch. Returns the model (a new module only where the model itself is a layer).
    One warning names the layers with weights that stay in floating point and are not excluded. ValueError: nothing to
    quantize, already quantized, in DistributedDataParallel or FSDP1 already, an unknown name in exclude or overrides.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, QConfig | None):
        got = f"{type(model).__name__} and {type(config).__name__}"
        raise TypeError(f"model must be an nn.Module and config a QConfig or None, got {got}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is in DistributedDataParallel already, which would not know the step sizes: quantize_, then wrap"
        )
    check_unflattened(model, "quantize_")
    if config is not None and settings:
        raise ValueError(f"give config or settings, not both; got {config} and {', '.join(settings)}")
    config = config or QConfig(**settings)
    names = dict(model.named_modules(remove_duplicate=False))
    unknown = [e for e in config.exclude if e not in names]
    if unknown:
        raise ValueError(f"exclude names no module: {', '.join(unknown)}")
    if any(isinstance(m, (q.Quantizer, qnn.IntegerWeight)) for m in names.values()):
        raise ValueError(
            "model is already quantized; a layer that was put in since is quantized alone: "
            "model.fc = qk.quantize_(model.fc)"
        )
    layers = candidates.quantizable(model, config.exclude)
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in qnn.QUANTIZED)
        left = candidates.describe_left(model, config.exclude)
        raise ValueError(f"model has no layer to quantize ({kinds})" + (f"; it has {left}" if left else ""))
    for key in config.overrides:
        if not any(candidates.within(name, key) for name, _ in layers):
            raise ValueError(f"overrides names no layer that would be quantized: {key!r}")
    seeds, swapped = SeedSource(), _forms(layers, config)
    for name, layer in layers:
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
    left = candidates.describe_left(model, config.exclude)
    if left:
        warnings.warn(
            f"left in floating point: {left} (name them in QConfig(exclude=...) to silence this)",
            stacklevel=2,
        )
    return model


def _forms(layers, config):
    """{id of a layer: its quantized form}; all before the first takes its place, so that a refusal changes no model."""
    keys = [id(layer._parameters.get("weight", layer)) for _, layer in layers]  # of tied layers the same
    ends = {keys[0], keys[-1]} if config.first_last_bits is not None else set()
    forms = {}
    for key, (name, layer) in zip(keys, layers):
        if id(layer) not in forms:
            aliases = [alias for alias, other in layers if other is layer]
            try:
                forms[id(layer)] = _quantized(layer, config.of(*aliases, at_end=key in ends))
            except ValueError as error:
                raise ValueError(f"{name or type(layer).__name__}: {error}") from None
            for quantizer in quantizers(forms[id(layer)]):
                quantizer.layer = name
    return forms


def _quantized(layer, config):
    kind = next(kind for kind, form in qnn.QUANTIZED.items() if type(layer) in (kind, form))
    if getattr(layer, "sparse", False):
        raise ValueError(
            "an Embedding with sparse=True cannot be quantized: its gradient would be dense; use sparse=False"
        )
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            "an Embedding with max_norm cannot be quantized: it changes the table that was quantized, not the weight"
        )
    weight = None if config.weight_bits is None else config.weight_quantizer(kind, layer.weight)
    takes_floats = config.act_bits is not None and kind is not nn.Embedding
    return qnn.QUANTIZED[kind].wrap(layer, weight, config.activation_quantizer() if takes_floats else None)


def quantizers(model: nn.Module) -> list[q.Quantizer]:
    """The quantizers of a model, in its order."""
    return [m for m in model.modules() if isinstance(m, q.Quantizer)]


def layers(model: nn.Module) -> list[tuple[str, qnn._Quantized]]:
    """(name, layer) of the quantized layers, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, qnn._Quantized)]


@contextlib.contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Inside the block the quantizers pass on what they get: all, or those of the modules of these names and below.

    For a layer's share of the loss in accuracy, say, or some epochs in floating point first. SAQ's and DoReFa's
    weights are then those before their normalisation. ValueError for a name without quantizers, or with weights that
    are converted to integers.
    """
    found, model = [], unwrapped(model)
    for wanted in names or ("",):
        own = [layer for name, layer in layers(model) if wanted == "" or candidates.within(name, wanted)]
        of = [m for layer in own for m in quantizers(layer)]
        if not of:
            raise ValueError(f"{wanted or 'model'} has no quantizers that could be disabled")
        if any(isinstance(layer.weight_quantizer, qnn.IntegerWeight) for layer in own):
            raise ValueError(f"{wanted or 'model'} has integer weights (convert_), which cannot be disabled")
        found += [m for m in of if not m.off]
    try:
        for quantizer in found:
            quantizer.off = True
        yield
    finally:
        for quantizer in found:
            quantizer.off = False


@torch.no_grad()
def calibrate(
    model: Model, loader: Iterable[Any], batches: int = 8, forward: Callable[[Model, Any], Any] = run_first
) -> Model:
    """Set every step size: weights' from the weights, activations' from up to ``batches`` batches of ``loader``.

    No gradients. BatchNorm normalises by the batch and keeps its statistics, unless it is frozen (in evaluation mode
    in a model that trains); all other modules are in evaluation mode.
    Batches are tensors or (input, ...) tuples; for models of other inputs ``forward(model, batch)`` runs one, as in
    ``forward=lambda model, batch: model(**batch)``. Processes of a torch.distributed group agree. Returns the model.
    One warning names the layers that no batch reached; they keep the step sizes they had, if any. A module that reads
    such a layer's weight itself (F.linear(x, self.qkv.weight)) gets it unquantized.
    Raises: ValueError where the model has no quantizer, the loader no batch or a layer's inputs are not finite;
    TypeError for a batch that is neither a tensor nor begins with one, or a loader that gives single samples;
    RuntimeError where batches reached no layer.
    """
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
        raise ValueError(f"batches must be an int >= 1, got {batches!r}")
    samples = isinstance(loader, data.Dataset) and not isinstance(loader, data.IterableDataset)
    if forward is run_first and (samples or isinstance(loader, torch.Tensor)):
        raise TypeError(
            f"loader must give batches, as a DataLoader or [x] does; a {type(loader).__name__} gives single samples"
        )
    found = quantizers(model)
    if not found:
        raise ValueError("model has no quantizer: call qk.quantize_ first")
    check_whole(model, "calibrate")
    modes = [(m, m.training) for m in model.modules()]
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.track_running_stats
        and (m.training or not model.training)
    ]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    observed = [m for m in found if m.role == "activation"]
    device = next(model.parameters()).device
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for _, m in layers(model)]
    model.eval()
    try:
        for _, layer in layers(model):
            if isinstance(layer.weight_quantizer, q.Quantizer):
                refresh(layer)
                layer.weight_quantizer.start_on(layer.weight)
        for norm in norms:
            norm.train()
        for quantizer in observed:
            quantizer.statistics = Statistics(quantizer.axis)
        seen = 0
        for batch in itertools.islice(loader, batches):
            forward(model, batch)
            seen += 1
        if seen == 0:
            raise ValueError("loader gave no batch")
        share_reached([quantizer.statistics for quantizer in observed], device)
        reached = _reached(model, observed, called)
        statistics = [quantizer.statistics.agreed() for quantizer in reached]
        broken = [a for a, seen in zip(reached, statistics, strict=True) if not seen.sums.isfinite().all()]
        if broken:
            raise ValueError(f"loader: its batches give NaN or infinite inputs to {_of(model, broken)}")
        for quantizer, seen in zip(reached, statistics, strict=True):
            quantizer.start_from(seen)
    finally:
        for hook in hooks:
            hook.remove()
        for quantizer in observed:
            quantizer.statistics = None
        for buffer, before in kept:
            buffer.copy_(before)
        for module, training in modes:
            module.training = training
    return model


def _reached(model, observed, called):
    """The quantizers that some data came to; a warning names the layers of the others, and those never called."""
    reached = [a for a in observed if a.statistics.sums is not None]
    if observed and not reached:
        raise RuntimeError(f"loader: its batches reached no quantized layer: {_of(model, observed)}")
    names = _of(model, set(observed) - set(reached))
    if names:
        warnings.warn(f"no batch of loader reached {names}: their input step sizes are not set", stacklevel=4)
    weights_alone = [m for _, m in layers(model) if m not in called and m.input_quantizer is None]
    if weights_alone and not several():  # another process may have reached them
        names = _names(model, weights_alone)
        warnings.warn(
            f"no batch of loader reached {names}: a module that reads their weights itself gets them unquantized",
            stacklevel=4,
        )
    return reached


def _of(model, quantizers):
    """Names of the layers that have these input quantizers."""
    return _names(model, [m for _, m in layers(model) if m.input_quantizer in quantizers])


def _names(model, found):
    return ", ".join(name or "(model)" for name, m in layers(model) if m in found)


@torch.no_grad()
def convert_(model: Model) -> Model:
    """Replace every quantized weight by packed integers, in place; evaluation outputs stay the same, bit for bit.

    The model is left in evaluation mode; these weights cannot be trained further. Pruning, weight_norm and
    parametrizations of them are made permanent first. ``layer.weight`` gives their values, anew at each reading.
    ValueError where nothing is quantized, or it is converted already.
    """
    weights = [(layer, layer.weight_quantizer) for _, layer in layers(model)]
    if any(layer.converted for layer, _ in weights):
        raise ValueError("model is already converted")
    found = [(layer, quantizer) for layer, quantizer in weights if isinstance(quantizer, q.Quantizer)]
    if not found:
        raise ValueError("model has no quantized layer to convert: call qk.quantize_ first")
    check_whole(model, "convert_")
    model.eval()
    for layer, _ in found:
        settle(layer)
    for layer, quantizer in found:
        layer.weight_quantizer = qnn.IntegerWeight(quantizer, layer.weight)
        del layer.weight
    return model


def param_groups(
    model: nn.Module,
    lr: float | torch.Tensor,
    weight_decay: float = 0.0,
    scale_lr: float | torch.Tensor | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights and the rest, and the quantizers' numbers without weight decay.

    lr: of all; scale_lr (default lr): of step sizes, offsets, clips. PACT's clip keeps weight decay, as in its paper.
    """
    learned: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
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


def summary(model: nn.Module) -> str:
    """A table of the quantized layers: name, kind, weight and activation grid, granularity, step sizes, backend.

    Layers with weights that stay in floating point follow below.
    """
    check_whole(model, "summary")
    rows = [("layer", "kind", "weight", "rows", "weight step", "input", "input step", "backend")]
    for name, layer in layers(model):
        weight, act = layer.weight_quantizer, layer.input_quantizer
        device = next(itertools.chain(layer.parameters(), layer.buffers())).device
        what = name or "(model)", type(layer).__name__
        of_weight = _describe(weight), "-" if weight is None else str(weight.rows), _steps(weight)
        served = backend.serves("fake_quantize", device.type)
        rows.append((*what, *of_weight, _describe(act), _steps(act), served))
    if len(rows) == 1:
        return "no quantized layer"
    for name, layer, _ in candidates.left_in_float(model):
        rows.append((name, type(layer).__name__, "float", "-", "-", "float", "-", "-"))
    return "\n".join(columns(rows))


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
    low, high = (f"{end.item():.4g}" for end in quantizer.grid()["scale"].detach().abs().aminmax())
    return low if low == high else f"{low} to {high}"
