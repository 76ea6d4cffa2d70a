"""Re-estimation of BatchNorm statistics after quantization-aware training."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..annotations import Model
from ..observe import run_first


@torch.no_grad()
def bn_reestimate(
    model: Model,
    loader: Iterable[Any],
    iterations: int = 10,
    forward: Callable[[Model, Any], Any] = run_first,
) -> Model:
    """Replaces the running statistics of every BatchNorm by their mean over `iterations` batches (SAQ, appendix A).

    Only the BatchNorm layers are put in training mode, so noise and dropout stay off; modes, momenta and parameters are
    as before afterwards. Batches are tensors or (input, ...) tuples; for others `forward(model, batch)` runs one.
    Returns `model`.

    Raises:
        ValueError: `iterations` < 1, or `loader` is empty. After any error the statistics are those from before.
    """
    if iterations < 1:
        raise ValueError(f"iterations: {iterations} is not a positive number of batches")
    layers = [
        m
        for m in model.modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in layers]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    seen = 0
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    try:
        for batch in itertools.islice(loader, iterations):
            forward(model, batch)
            seen += 1
        if seen == 0:
            raise ValueError("loader: it yields no batch")
    except BaseException:
        for buffer, before in kept:
            buffer.copy_(before)
        raise
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return model
