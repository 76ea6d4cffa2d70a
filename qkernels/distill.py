"""Distillation from a float teacher: the features of every quantized layer (FPQ's CSD), or the logits."""

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import ops
from .nn import QUANTIZED
from .wrapped import unwrapped


class FeatureDistillation:
    """The distance of a quantized student's features from its float teacher's, each channel standardised (CSD).

    loss = weight * sum over layers and channels of ||t~ - s~||^2 (``ops.standardized_distance``, per layer)

    The layers are the student's quantized convolutions and linears, first and last included; the teacher's modules of
    the same names give the targets. Forward hooks keep the student's outputs from one forward to the next ``loss``;
    statistics are those of the batch at hand (under DistributedDataParallel, of this process).

    Args:
        student: the model being trained; DistributedDataParallel and torch.compile wrappers are looked through.
        teacher: the float model, any wrapper; it runs in eval mode without gradients and stays a separate module.
        reduction: "mean" (each layer divided by its elements per channel; default) or "sum" (eq 17).
        weight: factor of the loss.
        layers: names of student's modules instead of the default; a module that is no convolution has its channels
            in the last axis for a linear, else in axis 1.

    Raises: ValueError (unknown layers, no layer, reduction; in ``loss``: shapes, devices), RuntimeError (``loss``
        without a forward of the student before it, features changed in place), TypeError in a forward (a layer that
        returns something else than a tensor).
    Source: FPQ eqs. 15 to 17 and Algorithm 1.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        reduction: str = "mean",
        weight: float = 1.0,
        layers: Iterable[str] | None = None,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction, self.weight = reduction, weight
        wanted, given = unwrapped(student), unwrapped(teacher)
        if wanted is given:
            raise ValueError("teacher must be another model than student, got the same one")
        both = {id(m) for m in wanted.modules()}
        shared = [name for name, m in given.named_modules() if id(m) in both]
        if shared:
            raise ValueError(
                f"teacher must share no module with student, for it runs in eval mode; got {', '.join(shared)}"
            )
        self.axes = _layers(wanted, layers)
        missing = [name for name in self.axes if name not in dict(given.named_modules())]
        if missing:
            raise ValueError(
                f"teacher must have a module of every layer's name; it lacks {', '.join(missing)}"
            )
        self.teacher, self._asking = teacher.eval(), False
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # graphs that were compiled before would not call the hooks
        # Nothing is kept of the student's evaluation, nor of what the teacher does for others.
        self._student = _Recorder(lambda model: model.training or torch.is_grad_enabled())
        self._teacher = _Recorder(lambda model: self._asking)
        self._student.attach(wanted, self.axes)
        self._teacher.attach(given, self.axes)

    def loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The distance of the features of student's last forward; ``args`` is what that forward was given.

        A scalar with a gradient for the student. The kept features are released.
        """
        features = self._student.take()
        if not features:
            raise RuntimeError(
                "loss needs a forward of the student before it, in training mode or with gradients on"
            )
        _check_device(self.teacher, next(iter(features.values()))[0][0])
        self.teacher.eval()
        self._asking = True
        try:
            with torch.no_grad():
                self.teacher(*args, **kwargs)
        finally:
            self._asking = False
            targets = self._teacher.take()
        total: Any = 0.0
        for name, axis in self.axes.items():
            pairs = features.get(name, []), targets.get(name, [])
            if len(pairs[0]) != len(pairs[1]):
                raise ValueError(
                    f"{name} ran {len(pairs[0])} times in the student, {len(pairs[1])} in the teacher"
                )
            for (s, version), (t, _) in zip(*pairs):
                total = total + self._distance(name, axis, s, version, t)
        return total * self.weight

    def _distance(self, name, axis, s, version, t):
        if version is not None and s._version != version:
            raise RuntimeError(
                f"the output of {name} was changed in place after it: use inplace=False behind it"
            )
        if s.shape != t.shape:
            raise ValueError(
                f"{name}: the student's output has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}"
            )
        dtype = torch.promote_types(s.dtype, t.dtype)
        return ops.standardized_distance(s.to(dtype), t.to(dtype), axis=axis, reduction=self.reduction)

    def remove(self) -> None:
        """Take the hooks away and release the kept features."""
        self._student.remove()
        self._teacher.remove()

    def __enter__(self) -> "FeatureDistillation":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Recorder:
    """The outputs of named modules during the last forward of a model for which ``wanted(model)`` held.

    Between the model's first and last hook only, so that a forward recomputed by activation checkpointing, or a
    module called on its own, leaves nothing behind.
    """

    def __init__(self, wanted=lambda model: False):
        self.wanted, self.running, self.outputs, self.handles = wanted, False, {}, []

    def __reduce__(self):
        return _Recorder, ()  # a copy of the model has nobody who would take its features: it records nothing

    def attach(self, model, names):
        modules = dict(model.named_modules())
        self.handles = [
            model.register_forward_pre_hook(self.start),
            *(modules[name].register_forward_hook(partial(self.keep, name)) for name in names),
            model.register_forward_hook(self.stop, always_call=True),
        ]

    def start(self, module, args):
        self.outputs.clear()
        self.running = self.wanted(module)

    def keep(self, name, module, args, output):
        if self.running:
            if not isinstance(output, torch.Tensor):
                raise TypeError(
                    f"layers: {name} returns a {type(output).__name__}; accepted are modules that return a tensor"
                )
            version = None if torch.compiler.is_compiling() else output._version
            self.outputs.setdefault(name, []).append((output, version))

    def stop(self, module, args, output):
        self.running = False

    def take(self):
        outputs, self.outputs = self.outputs, {}
        return outputs

    def remove(self):
        for handle in self.handles:
            handle.remove()
        self.outputs = {}


def _layers(student, names):
    """{name: channel axis of its output}, in the order of the student's modules or of ``names``."""
    modules = dict(student.named_modules())
    if names is None:
        quantized = tuple(QUANTIZED.values())
        names = [
            n for n, m in modules.items() if isinstance(m, quantized) and isinstance(m, (_ConvNd, nn.Linear))
        ]
        if not names:
            raise ValueError(
                "student has no quantized convolution or linear: quantize it first, or give layers"
            )
    names = list(names)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(
            f"layers must be names of student's modules, got {', '.join(map(repr, unknown)) or 'none'}"
        )
    return {name: _channel_axis(modules[name]) for name in names}


def _channel_axis(module):
    if isinstance(module, _ConvNd):
        return -1 - len(module.kernel_size)  # batched or not
    return -1 if isinstance(module, nn.Linear) else 1


def _check_device(teacher, feature):
    parameter = next(teacher.parameters(), None)
    if parameter is not None and parameter.device != feature.device:
        raise ValueError(f"teacher must be on {feature.device} as student is, got {parameter.device}")


def logit_distillation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.0
) -> torch.Tensor:
    """temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)), the mean over the batch.

    Logits of shape (N, classes), any float dtype, computed in float32 (float64); no gradient for the teacher.
    ValueError for a temperature that is not positive or for unequal shapes. Source: Hinton et al. 2015.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)}, got {tuple(teacher_logits.shape)}"
        raise ValueError(f"teacher_logits must have student_logits' shape {shapes}")
    given, wanted = (
        torch.log_softmax((x.double() if x.dtype == torch.float64 else x.float()) / temperature, -1)
        for x in (student_logits, teacher_logits.detach())
    )
    divergence = nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return temperature**2 * divergence
