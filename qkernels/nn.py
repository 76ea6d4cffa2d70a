"""Quantized layers, drop-in for torch.nn's: same constructor and state dict, and two quantizers beside the weight."""

import warnings
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .quantizers import Quantizer, at_least_float32
from .wrapped import whole

Wrapped = TypeVar("Wrapped", bound="_Quantized")


def _is_called(module, args):
    """Does nothing; without any hook torch's encoder layers read the weights themselves, past ``forward``."""


class _Quantized(nn.Module):
    """A layer whose weight and input pass through quantizers; either may be None (then that tensor stays as it is)."""

    channel_axis = 0  # of the weight: its output channels
    weight: torch.Tensor
    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None

    def __init__(
        self,
        *args: Any,
        weight_quantizer: nn.Module | None = None,
        input_quantizer: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.register_forward_pre_hook(_is_called)

    @classmethod
    def wrap(
        cls: type[Wrapped],
        layer: nn.Module,
        weight_quantizer: nn.Module | None = None,
        input_quantizer: nn.Module | None = None,
    ) -> Wrapped:
        """The quantized form of a torch.nn layer: shares its parameters, buffers, hooks and training mode."""
        wrapped = cls.__new__(cls)
        wrapped.__dict__ = dict(layer.__dict__)
        wrapped._modules = dict(layer._modules)
        wrapped.weight_quantizer, wrapped.input_quantizer = weight_quantizer, input_quantizer
        for quantizer in (weight_quantizer, input_quantizer):
            if quantizer is not None:
                quantizer.train(layer.training).to(wrapped.weight.device)
        wrapped.register_forward_pre_hook(_is_called)
        return wrapped

    def __getattr__(self, name: str) -> Any:
        """``weight`` of a converted layer: its values, for code that reads them, or their dtype or device, itself."""
        if name == "weight" and self.converted:
            quantizer: Any = self.weight_quantizer
            return quantizer()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A converted layer keeps its integers; tying it to the same values again does nothing."""
        if name == "weight" and self.converted:
            own = self.weight
            if not isinstance(value, torch.Tensor) or value.shape != own.shape or not torch.equal(value, own):
                raise ValueError("weight of a converted layer is of integers: set it before qk.convert_")
            return
        super().__setattr__(name, value)

    @property
    def converted(self) -> bool:
        """Whether the weight is of integers, which the quantizer's place holds.

        Asked of the class, for attributes are the user's; also before ``__init__`` has ended, and in copies.
        """
        quantizer = self.__dict__.get("_modules", {}).get("weight_quantizer")
        return getattr(type(quantizer), "holds_weight", False)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """A weight that comes without its quantizer's numbers, of a float model, starts them."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        given, numbers = state_dict.get(prefix + "weight"), prefix + "weight_quantizer."
        ours = self.weight_quantizer is None or isinstance(self.weight_quantizer, Quantizer)
        if (given is not None) if self.converted else (ours and numbers + "packed" in state_dict):
            when, errors = "before" if self.converted else "after", rest[-1]
            errors.append(f"{prefix}weight: the state dict is that of a model {when} qk.convert_")
        if given is None or not isinstance(self.weight_quantizer, Quantizer):
            return
        own = self.weight
        if given.shape != own.shape or any(name.startswith(numbers) for name in state_dict):
            return
        if not whole([own]):
            warnings.warn(
                "float weights in a sharded model: step sizes stay; load before fully_shard", stacklevel=2
            )
            return
        self.weight_quantizer.start_on(own)

    def quantized_weight(self) -> torch.Tensor:
        if self.weight_quantizer is None or self.converted:
            return self.weight
        return self.weight_quantizer(self.weight)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QuantLinear(_Quantized, nn.Linear):
    """nn.Linear on quantized input and weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1d(_Quantized, nn.Conv1d):
    """nn.Conv1d on quantized input and weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv2d(_Quantized, nn.Conv2d):
    """nn.Conv2d on quantized input and weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConvTranspose2d(_Quantized, nn.ConvTranspose2d):
    """nn.ConvTranspose2d on quantized input and weight; its output channels are the weight's axis 1."""

    channel_axis = 1
    padding: tuple[int, ...]  # words are for convolutions that are not transposed

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        x = self.quantized_input(input)
        # torch annotates the call with TorchScript's lists, where its own attributes are tuples.
        settings: Any = (self.stride, self.padding, self.kernel_size, 2, self.dilation)
        padding = self._output_padding(x, output_size, *settings)
        settings = (self.stride, self.padding, padding, self.groups, self.dilation)
        return F.conv_transpose2d(x, self.quantized_weight(), self.bias, *settings)


class QuantEmbedding(_Quantized, nn.Embedding):
    """nn.Embedding with a quantized table; the indices are not quantized.

    Grids without zero (methods saq, pact, dorefa) move a padding row of zeros too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(
            input, self.quantized_weight(), self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq,
            self.sparse,
        )  # fmt: skip


QUANTIZED: dict[type[nn.Module], type[_Quantized]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Embedding: QuantEmbedding,
}


class IntegerWeight(nn.Module):
    """A frozen weight as packed integers with its grid; calling it gives the values fake_quantize gave, bit for bit.

    packed: uint8 bytes; scale (rows,), offset, zero_point as the grid had them. Stored with 2, 4 or 8 bits per level.
    The values keep the weight's order of memory, for it is what a convolution chooses its algorithm by.
    """

    holds_weight = True

    packed: torch.Tensor

    def __init__(self, quantizer: Quantizer, weight: torch.Tensor) -> None:
        super().__init__()
        levels, grid = quantizer.integers(weight)
        self.shape, self.axis, self.dtype = tuple(weight.shape), quantizer.axis, weight.dtype
        self.strides = torch.empty_like(weight).stride()
        self.rows, self.group_size = quantizer.rows, quantizer.group_size
        self.bits = next(b for b in (2, 4, 8) if b >= quantizer.bits)
        self.signed = levels.dtype == torch.int8
        # Levels of an unsigned 2-bit grid use the field's whole range; packing keeps the low bits of either sign.
        self.signed = self.signed and quantizer.bounds()[0] < 0
        self.register_buffer("packed", ops.pack(levels.contiguous(), self.bits))
        self.grid_names = tuple(grid)
        for name, value in grid.items():
            self.register_buffer(name, value.clone())

    def grid(self) -> dict[str, Any]:
        """Arguments of dequantize: scale, and offset, zero_point where the quantizer's grid had them."""
        return {name: getattr(self, name) for name in self.grid_names}

    def integers(self) -> torch.Tensor:
        """The levels, int8 or uint8, in the weight's shape and order of memory."""
        levels = ops.unpack(self.packed, self.bits, self.shape, self.signed)
        if levels.stride() == self.strides:
            return levels
        return levels.new_empty_strided(self.shape, self.strides).copy_(levels)

    def _apply(self, fn, recurse=True):
        # model.to(dtype, memory_format) is for the values too, though no parameter holds them.
        values = fn(
            torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.packed.device)
        )
        self.dtype, self.strides = values.dtype, values.stride()
        return super()._apply(lambda t: at_least_float32(fn, t), recurse)

    def forward(self, _: object = None) -> torch.Tensor:
        where = {"axis": self.axis, "group_size": self.group_size}
        return ops.dequantize(self.integers(), dtype=self.dtype, **where, **self.grid())

    def extra_repr(self) -> str:
        return f"shape={self.shape}, bits={self.bits}"
