"""QConfig: how a model is quantized, checked, and the quantizers of one layer by it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from . import candidates
from . import nn as qnn
from . import noise as noises
from . import quantizers as q


@dataclass(frozen=True)
class QConfig:
    """How a model is quantized.

    Args:
        method: "lsq" "lsq+" "asymmetric" "saq" "pact" "dorefa" "noise_tempering" "diffq" "ewgs".
        weight_bits, act_bits: 2 to 8; None leaves weights or activations in floating point.
        weight_axis: 0 per output channel, None per tensor.
        weight_group_size: so many neighbours of a row share a step size, in Linear and Embedding layers, whose weights'
            last dimension it must divide; convolutions keep weight_axis. None: no groups.
        first_last_bits: bits of weights and activations of the first and last layer, in the order in which the model
            holds them (``model.named_modules()``); None: as the others.
        act_signed: None decides per layer from the data. act_offset: method "saq" learns an offset for each layer's
            activations, as "lsq+" always does. exclude: names of modules (and all below) left alone.
        grad_scale_count: N of LSQ's gradient scale, "features" (paper) or "numel" (most public code).
        weight_norm: "detach", "full" or "none", SAQ's standardisation of convolution weights.
        weight_noise, act_noise: one of qk.noise; the method's own where it has one ("noise_tempering", "diffq").
            A layer that runs several times in one forward draws the same numbers each time.
        ewgs_delta: of method "ewgs".
        overrides: settings of single layers (mixed precision), {"layer4": {"weight_bits": 8}, ...}: of the module of
            that name and all below. The longest name counts; bits that are given here go before first_last_bits.

    Raises: ValueError naming the argument and what is accepted.
    """

    method: str = "lsq"
    weight_bits: int | None = 4
    act_bits: int | None = 4
    weight_axis: int | None = 0
    weight_group_size: int | None = None
    first_last_bits: int | None = 8
    act_signed: bool | None = None
    act_offset: bool = False
    exclude: Sequence[str] = field(default=())
    grad_scale_count: str = "features"
    weight_norm: str = "detach"
    weight_noise: noises.Noise | None = None
    act_noise: noises.Noise | None = None
    ewgs_delta: float = 1e-3
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
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
        size = self.weight_group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"weight_group_size must be an int >= 1 or None, got {size!r}")
        if self.weight_bits is None and self.act_bits is None:
            raise ValueError("weight_bits and act_bits are both None: nothing would be quantized")
        if self.act_signed not in (True, False, None):
            raise ValueError(f"act_signed must be True, False or None, got {self.act_signed!r}")
        if self.act_offset not in (True, False) or (self.act_offset and self.method != "saq"):
            raise ValueError(
                f"act_offset must be False, or True for method 'saq'; got {self.act_offset!r} for {self.method!r}"
            )
        if self.act_signed and (self.act_offset or self.method in ("lsq+", "asymmetric")):
            raise ValueError(
                f"act_signed must not be True for method {self.method!r}, whose grid of activations has an offset"
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
        known = {f.name for f in fields(self)} - {"exclude", "overrides", "first_last_bits"}
        for name, settings in self.overrides.items():
            if not isinstance(settings, dict) or settings.keys() - known:
                raise ValueError(
                    f"overrides[{name!r}] must be a dict of {', '.join(sorted(known))}; got {settings!r}"
                )
            try:
                self.of(name)
            except ValueError as error:
                raise ValueError(f"overrides[{name!r}]: {error}") from None

    def of(self, *names: str, at_end: bool = False) -> "QConfig":
        """The settings of the layer of that name (a shared one: names); ``at_end``: it is the first or the last."""
        found = (key for key in self.overrides if any(candidates.within(name, key) for name in names))
        own = max(found, key=len, default=None)
        ends = [key for key in ("weight_bits", "act_bits") if at_end and getattr(self, key) is not None]
        settings: dict[str, Any] = dict.fromkeys(ends, self.first_last_bits)
        if own is not None:
            settings |= self.overrides[own]
        return replace(self, exclude=(), overrides={}, **settings)

    def weight_quantizer(self, layer_type: type[nn.Module], weight: torch.Tensor) -> q.Quantizer:
        """The quantizer of one weight, started from it."""
        conv = layer_type not in (nn.Linear, nn.Embedding)
        group = None if conv else self.weight_group_size
        axis = None if group or self.weight_axis is None else qnn.QUANTIZED[layer_type].channel_axis
        rows = 1 if axis is None else weight.shape[axis]
        if group:
            if weight.shape[-1] % group:
                raise ValueError(
                    f"weight_group_size must divide the last dimension of a weight, {tuple(weight.shape)}; got {group}"
                )
            rows = weight.numel() // group
        options = self._options(weight_norm=self.weight_norm if conv else "none")
        quantizer = q.WEIGHT[self.method](
            self.weight_bits, "weight", axis=axis, rows=rows, group_size=group,
            noise=self.weight_noise or q.WEIGHT_NOISE.get(self.method), count=self.grad_scale_count, **options,
        )  # fmt: skip
        quantizer.to(weight.device)
        quantizer.start_on(weight)
        return quantizer

    def activation_quantizer(self) -> q.Quantizer:
        return q.ACTIVATION[self.method](
            self.act_bits, "activation", signed=self.act_signed, noise=self.act_noise, count=self.grad_scale_count,
            **self._options(offset=self.act_offset),
        )  # fmt: skip

    def _options(self, **of_saq: Any) -> dict[str, Any]:
        """What the quantizers of one method take beyond the others'."""
        return {"ewgs": {"ewgs": self.ewgs_delta}, "saq": of_saq}.get(self.method, {})
