"""How stable a network is: output variance, gradient norms, cosine of gradients, Hessian trace along training."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import nn as qnn
from ..annotations import Criterion, Model, Progress
from ..convert import param_groups, quantizers
from ..noise import FeaturePerturbation
from ..optim import SAM, SAQ, lists
from ..perturbation import weights as learned_weights
from ..quantizers import Quantizer
from ..random import normal
from ..seeds import SeedSource
from ..training import build, checkpoint, distributed, start
from ..training.config import starts_from_float
from .curvature import hessian
from .data import Data
from .pictures import GradientCosine, GradientNorms, OutputVariance, TraceAlong
from .subject import check_at_least, check_module, check_positive, logits_of, shadow

_TRACED = (nn.modules.conv._ConvNd, nn.Linear)
Epochs = TypeVar("Epochs", bound=Iterable[tuple[int, nn.Module]])


@torch.no_grad()
def output_variance(model: nn.Module | dict[str, Model], loader: Iterable[Any],
                    levels: Iterable[float] = (0.01, 0.03, 0.1, 0.3), *, samples: int = 10,
                    batches: int | None = None, seed: int = 0,
                    progress: Progress | None = None) -> OutputVariance:  # fmt: skip
    """Variance of the network's and of every layer's output under Gaussian noise on the images.

    V(sigma) = mean over images and output elements of Var_n[f(x + sigma n)], n ~ N(0, 1), unbiased over
    ``samples`` draws; the same n for every level, layer and model. The model is left as it is, in
    evaluation mode throughout.

    Args:
        model: nn.Module, compared with itself without its quantizers if it has some; or {name: module} to
            be compared, such as a quantized network and the float one it started from.
        levels: sigma, in units of the network's input. samples: >= 2.
        progress: called with (what, done, of).

    Returns: OutputVariance; layers are convolutions and linear layers, "output" the network's output.
    Raises: ValueError naming the argument. Source: FPQ, fig. 1.
    """
    levels = list(levels)
    if not levels or not all(isinstance(s, (int, float)) and 0 < s < math.inf for s in levels):
        raise ValueError(f"levels must be positive numbers, got {levels!r}")
    check_at_least(samples=samples)
    if samples < 2:
        raise ValueError(f"samples must be an int >= 2, got {samples}")
    models = _compared(model)
    data = Data(loader, next(next(iter(models.values())).parameters()).device, batches)
    traces = {name: _Outputs(m) for name, m in models.items()}
    # Per layer: variance at each level; sum, squares, count of the clean output.
    sums: dict[str, dict[str, torch.Tensor]] = {name: {} for name in models}
    first = 0
    for done, (x, _) in enumerate(data):
        noises = [_input_noise(x, seed, k, first) for k in range(samples)]
        for name, trace in traces.items():
            _add_variances(sums[name], trace, x, noises, levels)
        first += x.numel()
        if progress is not None:
            progress("output variance", done + 1, len(data.targets))
    variance, relative, spread = {}, {}, {}
    for name, layers in sums.items():
        found = {key: (entry / entry[-1]).tolist() for key, entry in layers.items()}
        variance[name] = {key: v[: len(levels)] for key, v in found.items()}
        spread[name] = {key: v[-2] - v[-3] ** 2 for key, v in found.items()}
        relative[name] = {
            key: [v / max(spread[name][key], 1e-30) for v in variance[name][key]] for key in found
        }
    settings = {"samples": samples, "images": data.size, "seed": seed}
    return OutputVariance(levels, variance, relative, spread, settings)


def gradient_norms(model: nn.Module, loader: Iterable[Any], criterion: Criterion = F.cross_entropy, *,
                   samples: int = 4, training: bool = True, batches: int | None = None, seed: int = 0,
                   progress: Progress | None = None) -> GradientNorms:  # fmt: skip
    """||grad_w L|| of each batch without noise, with noise on the weights, and with noise on the features.

    The noise is delta ~ U[-s/2, s/2), s the quantizer's own step: added to the quantized weight of every
    layer ("weights"), or to the quantized input of every layer ("features", FPQ eq. 9). The gradient goes
    straight through the quantizers to the latent weights, of which it is the L2 norm over the whole network.
    A copy of the model is used; the quantizers' own training noise is off.

    Args:
        criterion: criterion(logits, target) -> mean loss of a batch. samples: draws per batch.
        training: BatchNorm uses the batch's statistics (and dropout is on), as while training.
        progress: called with (what, done, of).

    Returns: GradientNorms; "weights" or "features" is absent where the model has no such quantizers.
    Raises: ValueError naming the argument. Source: FPQ, fig. 2 and section 3.2.
    """
    check_at_least(samples=samples)
    model = _private(model, training)
    kinds: dict[str, list[Quantizer]] = {"none": []}
    for name, role in (("weights", "weight"), ("features", "activation")):
        members = [q for q in quantizers(model) if q.role == role]
        if members:
            kinds[name] = members
    if len(kinds) == 1:
        raise ValueError("model has no quantizers, whose steps are the noise: call qk.quantize_(model) first")
    params = learned_weights(model)
    data = Data(loader, params[0].device, batches)
    draws: dict[str, list[list[float]]] = {name: [] for name in kinds}
    generator = torch.Generator().manual_seed(seed)
    with _own_randomness(seed, params[0].device):
        for done, (x, target) in enumerate(data):
            for name, noisy in kinds.items():
                values = []
                for _ in range(samples if noisy else 1):
                    _set_noise(model, noisy, torch.randint(2**62, (1,), generator=generator).to(x.device))
                    loss = criterion(logits_of(model(x)), target)
                    gradients = torch.autograd.grad(loss, params, materialize_grads=True)
                    values.append(lists.norm([g.contiguous() for g in gradients]).item())
                draws[name].append(values)
            if progress is not None:
                progress("gradient norms", done + 1, len(data.targets))
    norms: dict[str, list[float | None]] = {
        name: [sum(v) / len(v) for v in values] for name, values in draws.items()
    }
    every = {name: _moments([v for values in rows for v in values]) for name, rows in draws.items()}
    settings = {"samples": samples, "training": training, "images": data.size, "seed": seed}
    mean, deviation = ({name: e[i] for name, e in every.items()} for i in (0, 1))
    return GradientNorms(norms, mean, deviation, settings)


def cosine_of_gradients(model: nn.Module, loader: Iterable[Any], criterion: Criterion = F.cross_entropy,
                        rho: float = 0.3, case: int | None = 3, *, training: bool = True, batches: int | None = None,
                        seed: int = 0, progress: Progress | None = None) -> GradientCosine:  # fmt: skip
    """Cosine between the gradients of the perturbed and of the vanilla loss, batch by batch.

    g_s = grad_u L(w + eps_q + e), g = grad_u L(Q(w)), u everything that learns, step sizes and clip levels
    too; e as in ``qk.optim.SAQ``. A copy of the model is used, at fixed weights.

    Args:
        criterion: criterion(logits, target) -> mean loss of a batch. rho: radius, > 0.
        case: SAQ's 1, 2 or 3; None: SAM on the weights, which also serves a float model.
        training: BatchNorm uses the batch's statistics and the quantizers draw their noise, as in a step.
        progress: called with (what, done, of).

    Returns: GradientCosine. Raises: ValueError naming the argument. Source: SAQ, fig. 4 and eq. 15.
    """
    check_positive(rho=rho)
    model = _private(model, training)
    base = torch.optim.SGD(param_groups(model, lr=0.0), lr=0.0)
    if case is None:
        optimizer = SAM(model, base, rho)
    else:
        optimizer = SAQ(model, base, rho, case=case, every=1, vanilla_loss=False)
    data = Data(loader, next(model.parameters()).device, batches)
    cosines, ratios = [], []
    with _own_randomness(seed, data.device):
        for done, (x, target) in enumerate(data):
            optimizer.zero_grad()
            criterion(logits_of(model(x)), target).backward()
            vanilla = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
            vanilla = [(p, g) for p, g in vanilla if g is not None]
            optimizer.first_step()
            criterion(logits_of(model(x)), target).backward()
            perturbed = [torch.zeros_like(g) if p.grad is None else p.grad for p, g in vanilla]
            dot, ss, gg = lists.dot(perturbed, [g for _, g in vanilla]).tolist()
            optimizer.restore()
            cosines.append(dot / math.sqrt(ss) / math.sqrt(gg) if ss > 0 and gg > 0 else None)
            ratios.append(math.sqrt(ss / gg) if gg > 0 else None)
            if progress is not None:
                progress("cosine of gradients", done + 1, len(data.targets))
    settings = {"rho": rho, "case": case, "training": training, "images": data.size, "seed": seed}
    mean, deviation = _moments(cosines)
    return GradientCosine(cosines, ratios, mean, deviation, settings)


def hessian_trace_along(epochs: Epochs | dict[str, Epochs], loader: Iterable[Any],
                        criterion: Criterion = F.cross_entropy, trace_samples: int = 16, *, weights: str = "latent",
                        batches: int | None = None, seed: int = 0,
                        progress: Callable[[str, int, None], object] | None = None) -> TraceAlong:  # fmt: skip
    """The Hessian's trace at each of a run's models, with the same random vectors for all of them.

    Args:
        epochs: iterable of (epoch, model), such as ``training_epochs(config)`` or a list of loaded
            checkpoints; each model is measured before the next is asked for. Or {name: such an iterable}.
        criterion, trace_samples, weights, batches, seed: as in ``hessian``.
        progress: called with (run's name, models done, None).

    Returns: TraceAlong. Raises: ValueError naming the argument. Source: FPQ, fig. 5.
    """
    check_at_least(trace_samples=trace_samples)
    runs: dict[str, dict[str, list[Any]]] = {}
    for name, models in (epochs if isinstance(epochs, dict) else {"run": epochs}).items():
        run = runs[name] = {"epochs": [], "trace": [], "stderr": []}
        for epoch, model in models:
            found = hessian(
                model, loader, criterion, 0, trace_samples, weights=weights, batches=batches, seed=seed
            )
            for key, value in zip(run, (epoch, found.trace, found.trace_stderr), strict=True):
                run[key].append(value)
            if progress is not None:
                progress(name, len(run["epochs"]), None)
        if not run["epochs"]:
            raise ValueError(f"epochs gave no (epoch, model) for {name!r}")
    return TraceAlong(runs, {"trace_samples": trace_samples, "weights": weights, "seed": seed})


def training_epochs(
    config: dict[str, Any], device: str | torch.device = "cpu", *, workers: int = 4
) -> Iterator[tuple[int, nn.Module]]:
    """Train as ``config`` says and give (0, model) at the start and (e, model) after epoch e; writes nothing.

    The weights are those of ``qkernels.training.train`` with the same config, whatever is measured in
    between; what train does after the last epoch (selection, BatchNorm re-estimation) is left out. The
    model is the one that is trained on: measure it before asking for the next, and do not change it.

    Args: config: of ``qkernels.training.make_config``; a quantized run that starts from a float one needs
        its ``init``. Raises: ValueError naming the setting.
    """
    if starts_from_float(config):
        raise ValueError(
            "config: init must be the folder or file of the float weights to start from, got None"
        )
    device = distributed.find_device(str(device))
    data = start.data_of(config, device=device, workers=workers)
    start.seed_all(config["seed"])
    trainer = start.new_trainer(config, build.float_model(config, data), data, config["init"], device)
    while True:
        state = checkpoint.random_state()
        yield trainer.epoch, trainer.model
        checkpoint.set_random_state(state)
        if trainer.epoch == trainer.epochs:
            return
        trainer.train_epoch()


class _Outputs:
    """A model that returns the outputs of its layers by name, its own as "output"."""

    def __init__(self, model):
        self.model, self.found = model, {}
        for name, layer in model.named_modules():
            if isinstance(layer, _TRACED):
                layer.register_forward_hook(self._keep(name))

    def _keep(self, name):
        def keep(layer, args, y):
            self.found[name] = y

        return keep

    def __call__(self, x):
        self.found = {}
        y = logits_of(self.model(x))
        return {**self.found, "output": y}


def _add_variances(sums, trace, x, noises, levels):
    """Adds a batch to ``sums``: per layer the variances, and of the clean output the sum, squares and count."""
    clean = trace(x)
    found = {key: [] for key in clean}
    for level in levels:
        # Deviations from the clean output, so that small variances are not differences of large numbers.
        total = {key: torch.zeros_like(y) for key, y in clean.items()}
        squares = {key: torch.zeros_like(y) for key, y in clean.items()}
        for n in noises:
            for key, y in trace(x + level * n).items():
                d = y - clean[key]
                total[key] += d
                squares[key] += d * d
        for key, values in found.items():
            scatter = squares[key] - total[key] * total[key] / len(noises)
            values.append(scatter.clamp_(min=0).double().sum() / (len(noises) - 1))
    for key, y in clean.items():
        y = y.double()
        entry = torch.stack([*found[key], y.sum(), y.square().sum(), torch.tensor(y.numel()).to(y)]).cpu()
        sums[key] = sums.get(key, 0) + entry


def _compared(model):
    """{name: model in evaluation mode}; what is given stays untouched."""
    if isinstance(model, dict):
        if not model:
            raise ValueError("model must be a module or a dict of modules, got an empty dict")
        for m in model.values():
            check_module(m)
        return {name: shadow(m) for name, m in model.items()}
    check_module(model)
    layers = [m for m in model.modules() if isinstance(m, qnn._Quantized)]
    if not layers:
        return {"float": shadow(model)}
    if any(isinstance(m.weight_quantizer, qnn.IntegerWeight) for m in layers):
        return {"quantized": shadow(model)}
    return {"quantized": shadow(model), "without quantizers": _without_quantizers(model)}


def _without_quantizers(model):
    """The network on its latent weights, standardised where the quantizer does that first."""
    model = shadow(model)
    for layer in model.modules():
        if not isinstance(layer, qnn._Quantized):
            continue
        quantizer, layer.weight_quantizer, layer.input_quantizer = layer.weight_quantizer, None, None
        if isinstance(quantizer, Quantizer):
            layer._parameters["weight"] = nn.Parameter(quantizer.prepare(layer.weight), requires_grad=False)
    return model


def _private(model, training):
    """A copy to differentiate and perturb."""
    check_module(model)
    if not learned_weights(model):
        raise ValueError("model has no weights that learn: all have requires_grad=False")
    return copy.deepcopy(model).train(training)


def _set_noise(model, noisy, seed):
    """Noise of one step in the quantizers ``noisy`` and in no other."""
    source = SeedSource(seed)
    for quantizer in quantizers(model):
        quantizer.noise = None
    for quantizer in noisy:
        quantizer.noise, quantizer.seeds = FeaturePerturbation(p=1.0), source
        quantizer.train()


def _input_noise(x, seed, k, first):
    """Draw k for a batch whose elements begin at number ``first``."""
    return normal(torch.tensor([seed], device=x.device), k, x.numel(), first).view(x.shape).to(x)


@contextlib.contextmanager
def _own_randomness(seed, device):
    """Inside, torch's generators start from the seed; outside, nothing of it is seen."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _moments(values):
    """(mean, standard deviation) of the values that there are; None where they are too few."""
    t = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    return t.mean().item() if len(t) else None, t.std().item() if len(t) > 1 else None
