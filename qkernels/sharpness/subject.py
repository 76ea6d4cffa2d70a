"""What is perturbed: the weights of a model, and the model evaluated at other values of them without being touched."""

import copy
import math
import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from .. import nn as qnn
from ..candidates import left_in_float
from ..convert import quantizers
from ..quantizers import numbers_of
from ..wrapped import check_parameter, check_whole, unwrapped

WEIGHTS, PARAMETERS = ("latent", "quantized"), ("weights", "all")
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention)


class Subject:
    """The perturbed tensors of a model, in evaluation mode, and what it computes where they have other values.

    ``values`` are detached views of the weights (``weights="latent"``: the quantizers follow the
    perturbation) or the quantized weights (``"quantized"``: the perturbation follows the quantizers). The
    model itself is never changed: all happens on a copy of its structure that shares the storage of its
    parameters.

    Args:
        model: nn.Module. weights: "latent" or "quantized".
        parameters: "weights" (weights and biases of convolutions, linear layers, embeddings and attention)
            or "all" (every parameter but the quantizers' numbers, so also BatchNorm's).
    Raises: ValueError naming the argument, or a quantized layer whose weight is computed from other parameters.
    Warns of other layers with matrices of weights, which "weights" leaves out.
    """

    def __init__(self, model, weights="latent", parameters="weights"):
        check_module(model)
        check_choice("weights", weights, WEIGHTS)
        check_choice("parameters", parameters, PARAMETERS)
        check_whole(model, "a measure")
        self.weights, self.parameters = weights, parameters
        self.model = shadow(model)
        quantizer_of = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, qnn._Quantized) and layer.weight_quantizer is not None:
                check_parameter(layer, name, "a measure")
                quantizer_of[layer] = _detach_quantizer(layer, weights, name)
        own = numbers_of(self.model)
        self.names, self.values, self.uses, places = [], [], [], {}
        for prefix, layer in self.model.named_modules():
            if parameters == "weights" and not isinstance(layer, _LAYERS):
                continue
            # Noise goes by position, so the weight comes first wherever conversion has put it.
            for key, value in sorted(layer._parameters.items(), key=lambda item: item[0] != "weight"):
                if value is None or id(value) in own:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if id(value) not in places:
                    places[id(value)] = len(self.values)
                    self.names.append(name)
                    self.values.append(value.detach())
                self.uses.append(
                    (places[id(value)], name, quantizer_of.get(layer) if key == "weight" else None)
                )
        if parameters == "weights":
            _warn_of_others(self.model)
        if not self.values:
            raise ValueError(
                f"model has nothing to perturb: no {'parameter' if parameters == 'all' else 'layer with weights'}"
            )
        self.device = self.values[0].device
        self.count = sum(w.numel() for w in self.values)
        convolves = any(isinstance(layer, nn.Conv2d) for layer in self.model.modules())
        self.channels_last = convolves and self.device.type == "cpu"

    def effective(self, values):
        """The tensors the network multiplies with, by name, where its weights have these values."""
        return {name: values[i] if q is None else q(values[i]) for i, name, q in self.uses}

    def logits(self, effective, x):
        """What the network makes of images x, in the order of memory its convolutions are fastest with.

        On the CPU channels last is mostly 1.0 to 1.9 times faster, forward alone, and up to 1.6 with the gradient.
        """
        if self.channels_last and x.dim() == 4:
            try:
                return self._call(effective, _channels_last(x))
            except RuntimeError:  # a network that views its features, say: as given, and so from now on
                self.channels_last = False
        return self._call(effective, x)

    def _call(self, effective, x):
        return logits_of(functional_call(self.model, effective, (x,), tie_weights=False))

    def leaves(self):
        """Copies of the values that autograd differentiates with respect to."""
        return [w.clone().requires_grad_() for w in self.values]

    def gradient(self, values, x, target, criterion):
        """(loss, gradients) at these values on one batch; the loss is criterion(logits, target), a detached scalar."""
        leaves = [w.detach().requires_grad_() for w in values]
        loss = criterion(self.logits(self.effective(leaves), x), target)
        return loss.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)


def initial_values(model, state, subject):
    """The subject's tensors in ``state`` (state dict or module), where a run started; quantized as the subject is.

    Quantizers take their numbers from the state where it has them, else from the model. Raises: ValueError
    naming the entry that is missing or of another shape.
    """
    if state is None:
        raise ValueError("initial must be the state dict at initialisation (or a module), got None")
    state = unwrapped(state).state_dict() if isinstance(state, nn.Module) else dict(state)
    for name, value in zip(subject.names, subject.values, strict=True):
        shape = tuple(state[name].shape) if name in state else None
        if shape != tuple(value.shape):
            raise ValueError(f"initial must hold {name} of shape {tuple(value.shape)}, got {shape}")
    start = shadow(model)
    for p in start.parameters():
        p.data = p.data.clone()
    own = start.state_dict()
    start.load_state_dict(own | {k: v for k, v in state.items() if k in own and v.shape == own[k].shape})
    values = Subject(start, subject.weights, subject.parameters).values
    frozen = {
        f"{name}.weight"
        for name, m in unwrapped(model).named_modules()
        if isinstance(getattr(m, "weight_quantizer", None), qnn.IntegerWeight)
    }
    return [
        state[name].to(value) if name in frozen else value
        for name, value in zip(subject.names, values, strict=True)
    ]


def _channels_last(x):
    if x.shape[1] == 1:  # in either order then, but convolutions go by the strides, and so do their outputs
        n, _, h, w = x.shape
        return x.reshape(n, h, w, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


class Copies:
    """Perturbed models, evaluated batch by batch: one functional call per copy, or all in one under vmap.

    how: "loop", "vmap", or "auto": the loop on the CPU (1.3 to 1.8 times faster than vmap for ten copies of a
    small convolutional net, resnet20 and vit_tiny), vmap on CUDA, where small nets wait for launches.
    """

    def __init__(self, subject, copies, how="auto"):
        check_choice("how", how, ("auto", "loop", "vmap"))
        self.subject, self.num = subject, len(copies)
        self.how = ("vmap" if subject.device.type == "cuda" else "loop") if how == "auto" else how
        with torch.no_grad():  # weights are quantized once per copy, not once per batch
            self.effective = [subject.effective(values) for values in copies]
        if self.how == "vmap":
            first = self.effective[0]
            self.effective = {name: torch.stack([e[name] for e in self.effective]) for name in first}

    @torch.no_grad()
    def logits(self, x, own=False):
        """(copies, images, classes); own: copy k sees images x[k], not all the same x."""
        if self.how == "vmap":
            return torch.func.vmap(self.subject.logits, in_dims=(0, 0 if own else None))(self.effective, x)
        each = x if own else [x] * self.num
        return torch.stack([self.subject.logits(e, x) for e, x in zip(self.effective, each, strict=True)])


def check_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_choice(name, value, accepted):
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def check_criterion(criterion):
    """ValueError for one of torch's losses that does not give the mean of a batch."""
    reduction = getattr(criterion, "reduction", "mean")
    if isinstance(criterion, nn.modules.loss._Loss) and reduction in ("sum", "none"):
        raise ValueError(
            f"criterion must give the mean loss of a batch, got one with reduction={reduction!r}"
        )


def check_at_least(**given):
    """Integers that must be at least 1: ValueError naming the first that is not."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def check_positive(**given):
    """Numbers that must be positive and finite: ValueError naming the first that is not."""
    for name, value in given.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def logits_of(output):
    """The logits in what a network returns: a tensor, or an entry or attribute ``logits``."""
    if isinstance(output, torch.Tensor):
        return output
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(held, torch.Tensor):
        return held
    raise TypeError(
        f"model must return a tensor of logits, or a mapping or object with one as 'logits', got "
        f"{type(output).__name__}: wrap it in a module that returns the logits"
    )


def _warn_of_others(model):
    """Layers of other kinds, and those whose weight is computed from other parameters."""
    names = [
        f"{name or '(model)'} ({type(layer).__name__})"
        for name, layer, _ in left_in_float(model)
        if not isinstance(layer, _LAYERS) or is_parametrized(layer, "weight")
    ]
    if names:
        warnings.warn(
            f"parameters='weights' leaves the weights of {', '.join(names)} as they are: "
            "parameters='all' perturbs them too",
            stacklevel=4,
        )


def shadow(model):
    """The model's structure, its parameters' storage (as constants), buffers of its own; in evaluation mode."""
    model, memo = unwrapped(model), {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value.detach()
        for p in module._parameters.values():
            if p is not None:
                memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    shadow = copy.deepcopy(model, memo).eval()
    for mine, its in zip(quantizers(shadow), quantizers(model), strict=True):
        mine.off = its.off  # inside qk.disabled the network that is measured is the one without them
    return shadow


def _detach_quantizer(layer, weights, name):
    """Takes the weight quantizer out of a layer of the shadow; returns it if it follows the perturbation."""
    quantizer = layer.weight_quantizer
    if weights == "latent":
        if layer.converted:
            raise ValueError(
                f"weights='latent': layer {name} is converted to integers; accepted: 'quantized'"
            )
        layer.weight_quantizer = None
        return quantizer
    with torch.no_grad():
        values = layer.quantized_weight()
    layer.weight_quantizer = None
    layer.__dict__.pop("weight", None)
    layer._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    return None
