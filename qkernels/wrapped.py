"""What torch wraps: models (DistributedDataParallel, torch.compile), tensors of which a process has parts, and weights
that are computed from other parameters (pruning, weight_norm, spectral_norm, parametrizations)."""

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_WHOLE = {torch.Tensor, nn.Parameter}


def whole(tensors):
    """Whether all tensors are this process's alone."""
    return set(map(type, tensors)) <= _WHOLE or all(local(t) is t for t in tensors)


def local(t):
    """This process's part of a sharded tensor, else the tensor itself."""
    return t if type(t) in _WHOLE or not hasattr(t, "to_local") else t.to_local()


def groups(t):
    """The process groups over which a tensor's parts are spread; empty for a whole tensor."""
    if local(t) is t:
        return []
    return [t.device_mesh.get_group(i) for i, place in enumerate(t.placements) if place.is_shard()]


def check_whole(model, name):
    """ValueError where the model's parameters are parts; ``name`` is what needs them whole."""
    check_unflattened(model, name)
    if not whole(list(model.parameters())):
        raise ValueError(
            f"{name} needs whole parameters, got a model of shards (fully_shard): call it before sharding, or on an "
            "unsharded model that has loaded the full state dict"
        )


def check_unflattened(model, name):
    """ValueError in torch's first FSDP, which makes one flat parameter of many."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(
            f"{name} cannot tell weights apart in FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2)"
        )


def computed(layer):
    """Whether the layer's weight is computed from other parameters; asking computes nothing."""
    return parametrize.is_parametrized(layer, "weight") or vars(layer).get("weight") is not None


def refresh(layer):
    """Compute the weight anew where torch does so in a hook before each forward alone, so that it may be old."""
    with torch.no_grad():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, (prune.BasePruningMethod, WeightNorm)):
                hook(layer, None)
            elif isinstance(hook, SpectralNorm):
                setattr(layer, hook.name, hook.compute_weight(layer, do_power_iteration=False))


def settle(layer):
    """Make a computed weight a parameter of the layer again, with its present value."""
    if parametrize.is_parametrized(layer, "weight"):
        # torch's remove_parametrizations would take it out of the class, which copies of the layer share.
        kind, weight = type(layer), nn.Parameter(layer.weight.detach())
        del layer.parametrizations["weight"]
        rest = {name: value for name, value in vars(kind).items() if name != "weight"}
        layer.__class__ = type(kind.__name__, kind.__bases__, rest)
        if not layer.parametrizations:
            del layer.parametrizations
            layer.__class__ = kind.__bases__[0]
        layer.weight = weight
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            prune.remove(layer, "weight")
        elif isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight":
            (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(layer)


def check_parameter(layer, name, what):
    """ValueError where the layer's weight is computed; ``what`` needs it to be a parameter."""
    if computed(layer):
        raise ValueError(
            f"{what} needs weights that are parameters; that of {name} is computed (pruning, weight_norm, a "
            "parametrization): make it one by torch's prune.remove, remove_weight_norm or remove_parametrizations"
        )


def unwrapped(model):
    """The user's module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
