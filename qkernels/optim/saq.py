"""SAQ: sharpness-aware minimisation of a quantized model, perturbed where the quantizer leaves the weight."""

import weakref

import torch
from torch import nn

from .. import nn as qnn
from .. import quantizers
from ..wrapped import check_parameter
from . import lists
from .sam import SAM


class SAQ(SAM):
    """Sharpness-aware quantization: minimise L(w + eps_q + e) + L(Q(w)), eps_q = Q(w) - w, e = rho g / ||g||.

    case  perturbed loss         gradient in e
    1     L(Q(w) + e(w))         with respect to the latent weight
    2     L(Q(w + e(w)))         with respect to the latent weight (SAM on it)
    3     L(Q(w) + e(Q(w)))      with respect to the quantized weight

    In cases 1 and 3 e is added inside the quantizer's own pass, after de-quantisation and unclipped; the gradient goes
    straight through to the weight and the scale. ||g|| is one norm over everything that is perturbed: quantized
    weights, biases, BatchNorm's affine parameters, and clip levels with ``perturb_scales``.

    Args:
        model: a model with quantized layers (qk.quantize_). base: the optimizer that steps.
        rho: radius; the paper's for ImageNet (table A): ResNet-18 0.30 / 0.65, ResNet-34 0.65 / 0.90, ResNet-50
            0.65 / 0.95 at 2 / 4 bit, MobileNetV2 0.40, ViT 0.01.
        every: tau, the second pass runs in steps tau, 2 tau, ...; 1 for every step. beta: size of g_v between.
        vanilla_loss: the second term of the objective (eq. 15).
        further: as ``SAM``, whose methods these are.

    Case 3 captures gradients by hooks on tensors, which torch.compile takes without ``fullgraph`` alone.

    Raises: as ``SAM``; ValueError for another case, and in cases 1 and 3 for a model with no quantized weight, or with
    one that is computed from other parameters (pruning, weight_norm).
    Source: SAQ, eqs. 9, 12, 14, 15 and Algorithm 1; where the first tau - 1 steps have no g_v yet, g_s = g.
    """

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.3, *, case: int = 3,
                 every: int = 4, beta: float = 0.7, vanilla_loss: bool = True, perturb_scales: bool = False,
                 sync_perturbation: bool = False, max_norm: float | None = None) -> None:  # fmt: skip
        if case not in (1, 2, 3):
            raise ValueError(f"case must be 1, 2 or 3, got {case!r}")
        self._captures = {}
        super().__init__(model, base, rho, every=every, beta=beta, vanilla_loss=vanilla_loss, max_norm=max_norm,
                         perturb_scales=perturb_scales, sync_perturbation=sync_perturbation)  # fmt: skip
        self.case = case
        if case != 2 and not self._quantized():
            raise ValueError(f"case {case} needs a model with quantized weights{self._why_none()}")
        if case == 3:
            # Of frozen layers as well, which may learn later.
            self._captures = {layer: _Capture() for layer in self._quantized(frozen=True)}
            for layer, capture in self._captures.items():
                layer.weight_quantizer.listeners.append(capture)
                weakref.finalize(self, _unsubscribe, weakref.ref(layer.weight_quantizer), capture)
        self._ready()

    def _why_none(self):
        if self._quantized(frozen=True):
            return " that learn: all are frozen"
        layers = [m for m in self.model.modules() if isinstance(m, qnn._Quantized)]
        if any(isinstance(m.weight_quantizer, qnn.IntegerWeight) for m in layers):
            return ": convert_ has made integers of them"
        if any(m.input_quantizer is not None for m in layers):
            return ": only its activations are (weight_bits=None)"
        return ": call qk.quantize_(model) first"

    def _quantized(self, frozen=False):
        """The layers whose quantized weight is perturbed; ``frozen``: also those that do not learn."""
        found = []
        for name, m in self.model.named_modules():
            if isinstance(getattr(m, "weight_quantizer", None), quantizers.Quantizer):
                check_parameter(m, name, f"SAQ's case {self.case}")
                if frozen or m.weight.requires_grad:
                    found.append(m)
        return found

    def _ready(self):
        """Forget what was captured; capture in the pass to come if the step needs it."""
        for capture in self._captures.values():
            capture.gradient, capture.on = None, self._stage == "first" and self._due()

    def _perturb(self):
        if self.case == 2:
            return super()._perturb()
        rho = {id(p): group["rho"] for group in self.param_groups for p in group["params"]}
        layers = [m for m in self._quantized() if rho.get(id(m.weight), 0) > 0]
        found = [(m, self._gradient(m)) for m in layers]
        found = [(m, g) for m, g in found if g is not None]
        parts = self._parts(without=[id(m.weight) for m in self._quantized()])
        gradients = [g for _, g in found] + [g for _, members in parts.values() for g in members]
        if not gradients:
            raise RuntimeError(
                "nothing to perturb has a gradient: does the backward reach the quantized layers?"
            )
        norm = lists.norm(gradients)
        self._ascend(parts, norm)
        for m, g in found:
            self._shift(
                m.weight_quantizer, g, torch.nan_to_num(rho[id(m.weight)] / norm, 0.0, 0.0, 0.0).float()
            )

    def _gradient(self, layer):
        """The gradient of the latent (case 1) or quantized weight (case 3), whole, or None."""
        if self.case == 1:
            g = layer.weight.grad
            return g.full_tensor() if hasattr(g, "full_tensor") else g
        if layer not in self._captures:
            raise RuntimeError("model has quantized layers that it had not when SAQ was made: make SAQ anew")
        g = self._captures[layer].gradient
        self._captures[layer].on = False
        if g is not None:
            for group in lists.groups(layer.weight):
                lists.mean_([g], group)
            if self.sync_perturbation and hasattr(self.model, "process_group"):
                lists.mean_([g], self.model.process_group)
        return g

    def _shift(self, quantizer, gradient, size):
        """The quantizer adds size * gradient to its output until ``restore``."""
        quantizer.shift, quantizer.shift_scale = gradient, size
        self._undo.callback(setattr, quantizer, "shift", None)
        self._undo.callback(setattr, quantizer, "shift_scale", None)


def _unsubscribe(quantizer, capture):
    if quantizer() is not None and capture in quantizer().listeners:
        quantizer().listeners.remove(capture)


class _Capture:
    """A listener that sums the gradients of a quantizer's outputs, over all backwards of a pass."""

    def __init__(self):
        self.on, self.gradient = False, None

    def __reduce__(self):
        return _Capture, ()  # a copy of the model has no optimizer that would read or empty it: off for ever

    def __call__(self, y):
        if self.on and y.requires_grad:
            y.register_hook(self.add)

    def add(self, g):
        self.gradient = g if self.gradient is None else self.gradient + g
