"""Re-estimation of BatchNorm statistics after quantization-aware training."""

import itertools

import torch


@torch.no_grad()
def bn_reestimate(model, loader, iterations=10):
    """Replaces the running statistics of every BatchNorm by their mean over `iterations` batches (SAQ, appendix A).

    Only the BatchNorm layers are put in training mode, so noise and dropout stay off; modes, momenta and parameters are
    as before afterwards. Returns `model`.

    Raises:
        ValueError: `iterations` < 1, or `loader` is empty.
    """
    if iterations < 1:
        raise ValueError(f"iterations: {iterations} is not a positive number of batches")
    if next(iter(loader), None) is None:
        raise ValueError("loader: it yields no batch")
    layers = [
        m
        for m in model.modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in layers]
    device = next(model.parameters()).device
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    try:
        for x, _ in itertools.islice(loader, iterations):
            model(x.to(device))
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return model
