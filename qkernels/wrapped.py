"""What torch wraps: models (DistributedDataParallel, torch.compile), and tensors of which a process has parts."""

import torch
from torch import nn

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
    if not whole(list(model.parameters())):
        raise ValueError(
            f"{name} needs whole parameters, got a model of shards (fully_shard): call it before sharding, or on an "
            "unsharded model that has loaded the full state dict"
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
