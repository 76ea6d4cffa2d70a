"""The quantizers: thin parametrisations of one op. Each says which numbers it learns, how they start, and its grid.

A weight quantizer starts from the weight itself; an activation quantizer from statistics (``qk.calibrate``, or its
first training batch), agreed between processes.
"""

import math
import warnings

import torch
from torch import nn

from . import noise as noises
from . import ops
from .observe import Statistics, several
from .seeds import draw
from .wrapped import local


class Quantizer(nn.Module):
    """What all quantizers share: bits, granularity, sign, noise, perturbation, calibration.

    Args:
        bits: levels are 2**bits. role: "weight" or "activation".
        axis, rows: per channel along ``axis`` with ``rows`` scales; None and 1 for per tensor.
        group_size: that many neighbours along the last dimension share one of the ``rows`` scales; axis is None then.
        signed: True, False, or None to decide from the data (activations only).
        noise: one of qk.noise, drawn in training only. count: N of LSQ's gradient scale 1/sqrt(N * quant_max):
            "features" (elements that share a scale, without the batch) or "numel" (all elements).

    ``shift`` and ``shift_scale``: the next outputs are y + shift_scale * shift (SAQ's perturbation of Q(w)).
    ``listeners`` are called with every output. Attributes, not hooks: torch.compile guards on attributes, and compiles
    again when they change.
    """

    learned: tuple[str, ...] = ()  # names of the parameters
    decayed = False  # whether weight decay applies to them (PACT)
    own_sign: bool | None = None  # the grid's sign where the method fixes it

    def __init__(
        self, bits, role, axis=None, rows=1, signed=None, noise=None, count="features", group_size=None
    ):
        super().__init__()
        if count not in ("features", "numel"):
            raise ValueError(f"grad_scale_count must be 'features' or 'numel', got {count!r}")
        self.bits, self.role, self.axis, self.rows = bits, role, axis, rows
        self.group_size, self.noise, self.count = group_size, noise, count
        self.signed = self.own_sign if self.own_sign is not None else (True if role == "weight" else signed)
        self.data_decides = self.signed is None
        for name in self.learned:
            self.register_parameter(name, nn.Parameter(torch.ones(rows)))
        # What _code makes of bits and sign, 0 before the start. A tensor, so that checkpoints carry it.
        self.register_buffer("state", torch.zeros(1, dtype=torch.uint8))
        self.started, self.statistics, self.off = False, None, False
        self.seeds, self.stream, self.layer = None, 0, ""
        self.shift, self.shift_scale, self.listeners = None, None, []

    def __getstate__(self):
        return {**self.__dict__, "off": False}  # a copy made inside qk.disabled is no part of the block

    def _apply(self, fn, recurse=True):
        """model.bfloat16() and model.half() leave the grid in float32: a step of 1e-3 of it would round away.

        fully_shard wants parameters of one dtype: shard the float32 model with a MixedPrecisionPolicy.
        """
        return super()._apply(lambda t: at_least_float32(fn, t), recurse)

    def bounds(self):
        """(quant_min, quant_max) of the grid."""
        return ops.bounds(self.bits, bool(self.signed), None, None)

    def grid(self):
        """Arguments of fake_quantize that place the grid: scale, and offset, zero_point, ... where there are any."""
        raise NotImplementedError

    def start(self, statistics):
        """Set the learned numbers from statistics of the data (one value per row)."""
        raise NotImplementedError

    def prepare(self, x):
        """What is quantized in place of x (weight normalisation, tanh)."""
        return x

    def estimator(self):
        """Arguments of fake_quantize that change the gradient."""
        return {}

    def grad_scale(self, x):
        """1 / sqrt(N * quant_max), the gradient scale of LSQ (section 2.2)."""
        if self.count == "numel":
            n = x.numel()
        else:
            n = x.numel() // self.rows if self.role == "weight" else x.numel() // max(x.shape[0], 1)
        return float(max(n, 1) * self.bounds()[1]) ** -0.5

    def forward(self, x):
        if self.statistics is not None:  # of activations, during qk.calibrate
            self.statistics.update(x)
            return x
        if self.off:
            y = x.view_as(x) if self.listeners else x  # of their own, for listeners put hooks on outputs
            return self._heard(y if self.shift is None else self._shifted(y))
        if not self.started:
            if x.numel() == 0 and self.role == "activation" and not several():
                return x  # an expert without a token, say
            self._start_from_batch(x)
        x = self.prepare(x)
        quant_min, quant_max = self.bounds()
        noise, shift = self._noise(x), {}
        if self.shift is not None:
            shift = {"shift": self.shift, "shift_scale": self.shift_scale}
        y = ops.fake_quantize(
            x, axis=self.axis, group_size=self.group_size, quant_min=quant_min, quant_max=quant_max,
            grad_scale=self.grad_scale(x), **(noise or shift), **self.grid(), **self.estimator(),
        )  # fmt: skip
        if noise and shift:  # the pass has room for one addition
            y = self._shifted(y)
        return self._heard(y)

    def _shifted(self, y):
        return y + self.shift_scale.to(y.dtype) * self.shift

    def _heard(self, y):
        for listener in self.listeners:
            listener(y)
        return y

    def integers(self, x):
        """The stored levels of x with the grid's numbers: dequantize(**) of them equals the evaluation output."""
        if not self.started:
            self._start_from_batch(x)
        quant_min, quant_max = self.bounds()
        grid = {name: value.detach() for name, value in self.grid().items()}
        x = self.prepare(x).detach()
        where = {"axis": self.axis, "group_size": self.group_size}
        return ops.quantize(x, quant_min=quant_min, quant_max=quant_max, **where, **grid), grid

    @torch.no_grad()
    def start_from(self, statistics):
        """Fix the sign if the data decides it, set the learned numbers, and remember that it is done."""
        if self.data_decides:
            self.signed = bool((statistics.minimum < 0).any())
        self.start(statistics)
        self.state.fill_(_code(self.bits, self.signed))
        self.started = True

    def start_on(self, x):
        """Start from x: a weight, or what the processes agree on for their parts of a batch.

        Nothing happens where there are no numbers, as on the meta device: the first use starts the quantizer.
        """
        if x.is_meta or x.numel() == 0 and self.role == "weight":
            return
        statistics = Statistics(self.axis, self.group_size)
        statistics.update(x)
        if self.role == "activation":
            if x.numel() == 0 and several():
                statistics.clear(x.device)  # the other processes wait for this one
            statistics.agreed()
        elif self.rows != statistics.sums.shape[1]:
            raise ValueError(
                f"{self._description()} has {self.rows} step sizes, its weight needs {statistics.sums.shape[1]}: "
                "change a layer's size before quantize_"
            )
        else:
            statistics.fill(x[:1].numel() ** -0.5)
        self.start_from(statistics)

    def _start_from_batch(self, x):
        if torch.compiler.is_compiling():
            # What follows looks at data, which breaks the graph; with fullgraph the reason is shown.
            torch._dynamo.graph_break(
                "a quantizer has no step size yet: call qk.calibrate(model, loader) first"
            )
        self._adopt(loaded=False)
        if self.started:
            return
        if getattr(self, "_is_fsdp_managed_module", False):  # torch's own mark
            raise RuntimeError(
                f"{self._description()} has no step size yet, and what the first batch would set is lost in a sharded "
                "model: call qk.calibrate(model, loader) before fully_shard"
            )
        if self.role == "activation" and not self.training:
            raise RuntimeError(
                f"{self._description()} has no step size yet: call qk.calibrate(model, loader), train, or load "
                "a checkpoint"
            )
        self.start_on(x)

    def _description(self):
        return f"the {self.role} quantizer ({type(self).__name__})" + (
            f" of layer {self.layer!r}" if self.layer else ""
        )

    def _noise(self, x):
        if self.noise is None or not self.training:
            return {}
        seed = self.seeds.current(x) if self.seeds is not None else draw(x)
        return {"noise": self.noise, "seed": seed, "stream": self.stream}

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "state" in state_dict:
            self._adopt()

    def _adopt(self, loaded=True):
        """What the buffer says: a checkpoint, or a copy of another model's buffers, sets that alone.

        Where nothing was loaded it may be memory that nothing was written to, as after to_empty.
        """
        if self.state.is_meta:
            return
        bits, signed = _decoded(int(self.state))
        if not loaded and not all(_plausible(local(p)) for p in self.parameters()):
            bits = signed = None
        other, mine = "", self._description()
        if bits not in (None, self.bits):
            other = f"step sizes of {bits} bit were loaded where {self.bits} bit are asked for, for {mine}"
        elif signed is not None and not self.data_decides and signed != self.signed:
            given, own = ("a signed" if sign else "an unsigned" for sign in (signed, self.signed))
            other = (
                f"step sizes of {given} grid were loaded for {mine}, whose method or setting has {own} one"
            )
        if other:
            warnings.warn(f"{other}: they start anew", stacklevel=2)
            self.state.zero_()
            signed = None
        self.started = signed is not None
        if self.started:
            self.signed = signed

    def extra_repr(self):
        where = f"axis={self.axis}" if self.group_size is None else f"group_size={self.group_size}"
        rows = f", {where}, rows={self.rows}" if self.rows > 1 else ""
        sign = {True: ", signed", False: ", unsigned", None: ""}[self.signed]
        return f"bits={self.bits}{sign}{rows}" + (f", noise={self.noise}" if self.noise else "")


class LSQ(Quantizer):
    """Learned step size. scale starts at 2 * mean|x| / sqrt(quant_max). Source: Esser et al. 2020.

    ``ewgs``: delta of element-wise gradient scaling, dx = g * (1 + delta * sign(g) * (v - rint(v))) (Lee et al. 2021).
    """

    learned = ("scale",)

    def __init__(self, *args, ewgs=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.ewgs = float(ewgs)

    def grid(self):
        return {"scale": self.scale}

    def estimator(self):
        return {"ewgs": self.ewgs} if self.ewgs else {}

    def start(self, statistics):
        self.scale.copy_(_positive(2 * statistics.mean_abs / math.sqrt(self.bounds()[1])))


class LSQPlus(Quantizer):
    """LSQ with a learned real offset for activations. Source: Bhalgat et al. 2020.

    Weights: symmetric, scale = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2**(bits - 1). Activations: (scale, offset) of
    least squared error on the calibration data.
    """

    def __init__(self, bits, role, *args, **kwargs):
        self.learned = ("scale",) if role == "weight" else ("scale", "offset")
        self.own_sign = role == "weight"
        super().__init__(bits, role, *args, **kwargs)

    def grid(self):
        return (
            {"scale": self.scale} if self.role == "weight" else {"scale": self.scale, "offset": self.offset}
        )

    def start(self, statistics):
        if self.role == "weight":
            mean, deviation = statistics.mean, 3 * statistics.deviation
            widest = torch.maximum((mean - deviation).abs(), (mean + deviation).abs())
            self.scale.copy_(_positive(widest / 2 ** (self.bits - 1)))
            return
        scale, offset = statistics.least_squares_range(self.bounds()[1])
        self.scale.copy_(_positive(scale))
        self.offset.copy_(offset)


class Asymmetric(Quantizer):
    """Learned scale, zero point fixed by calibration. Source: FPQ, eqs. 4 and 5.

    scale = (max - min) / quant_max, zero_point = rint(quant_max - max / scale), with 0 always inside of [min, max],
    so that it is a level (beyond the equations, for zeros are what convolutions pad with); 0 where all data are 0.
    """

    learned, own_sign = ("scale",), False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("zero_point", torch.zeros(self.rows))  # whole; averages of integers are cut off

    def grid(self):
        return {"scale": self.scale, "zero_point": self.zero_point.round().to(torch.int32)}

    def start(self, statistics):
        low, high = statistics.minimum.clamp(max=0), statistics.maximum.clamp(min=0)
        top = self.bounds()[1]
        self.scale.copy_(_positive((high - low) / top))
        # By the range itself: around zero it is a tie, which the rounding of scale would decide. A NaN range shows in
        # the scale; it has no integer.
        point = (top * (1 - high / _positive(high - low))).round().clamp(0, top).nan_to_num()
        self.zero_point.copy_(torch.where(high == low, torch.zeros_like(point), point))


class ClipWeight(Quantizer):
    """SAQ's weight quantizer: 2**bits levels on [-clip, clip] without zero, on standardised weights.

    weight_norm: "detach" (statistics of the layer are constants), "full" (gradient through them), or "none".
    clip starts at 1 with weight normalisation, else at 0.8 * max|w|. Source: SAQ, eq. 1.
    """

    learned, own_sign = ("clip",), False

    def __init__(self, *args, weight_norm="detach", **kwargs):
        super().__init__(*args, **kwargs)
        if weight_norm not in ("detach", "full", "none"):
            raise ValueError(f"weight_norm must be 'detach', 'full' or 'none', got {weight_norm!r}")
        self.weight_norm = weight_norm

    def prepare(self, x):
        if self.weight_norm == "none" or x.numel() < 2:  # one number has no deviation
            return x
        deviation, mean = torch.std_mean(x.detach() if self.weight_norm == "detach" else x)
        return (x - mean) / _nonzero(deviation)

    def grid(self):
        clip = self.clip.abs()
        return {"scale": clip * (2 / self.bounds()[1]), "offset": -clip}

    def start(self, statistics):
        self.clip.copy_(
            torch.ones_like(self.clip) if self.weight_norm != "none" else _positive(0.8 * statistics.peak)
        )

    def grad_scale(self, x):
        return 1.0


class ClipActivation(Quantizer):
    """SAQ's activation quantizer: [0, clip] in 2**bits - 1 steps; clip starts at 1. Source: SAQ, section 3.1.

    Data with negative values gets the signed grid of the same clip, starting at 0.8 * max|x|; with ``offset`` all
    data get [offset, offset + clip], both learned, starting as LSQ+'s do (SAQ, appendix A, for MobileNetV2).
    """

    initial = 1.0

    def __init__(self, *args, offset=False, **kwargs):
        self.learned = ("clip", "offset") if offset else ("clip",)
        self.own_sign = False if offset else None
        super().__init__(*args, **kwargs)

    def grid(self):
        scale = self.clip.abs() / self.bounds()[1]
        return {"scale": scale, "offset": self.offset} if "offset" in self.learned else {"scale": scale}

    def start(self, statistics):
        if "offset" in self.learned:
            scale, offset = statistics.least_squares_range(self.bounds()[1])
            self.clip.copy_(_positive(scale * self.bounds()[1]))
            self.offset.copy_(offset)
            return
        self.clip.copy_(
            _positive(0.8 * statistics.peak) if self.signed else torch.full_like(self.clip, self.initial)
        )

    def grad_scale(self, x):
        return 1.0


class PACT(ClipActivation):
    """Parameterised clipping: as SAQ's activations, but the clip learns from clipped elements alone; starts at 6.

    Weight decay applies to the clip. Source: Choi et al. 2018, eqs. 1 to 3.
    """

    initial, decayed = 6.0, True

    def estimator(self):
        return {"clip_only": True}


class DoReFaWeight(Quantizer):
    """tanh(w) / max|tanh(w)| on 2**bits levels of [-1, 1]; nothing is learned. Source: Zhou et al. 2016, eq. 9."""

    own_sign = False

    def prepare(self, x):
        squashed = x.tanh()
        return squashed / _nonzero(squashed.abs().max().detach())

    def grid(self):
        ones = torch.ones(self.rows, device=self.state.device)
        return {"scale": ones * (2 / self.bounds()[1]), "offset": -ones}

    def start(self, statistics):
        pass


class DoReFaActivation(Quantizer):
    """[0, 1] in 2**bits - 1 steps, or the signed grid on [-1, 1]. Source: Zhou et al. 2016, eq. 11."""

    def grid(self):
        return {"scale": torch.full((self.rows,), 1 / self.bounds()[1], device=self.state.device)}

    def start(self, statistics):
        pass


def numbers_of(model):
    """The ids of what a model's quantizers learn."""
    return {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}


def at_least_float32(fn, t):
    """fn(t) of Module._apply, but float32 where that would be of fewer bits."""
    moved = fn(t)
    return t.to(moved.device, torch.float32) if moved.dtype in (torch.bfloat16, torch.float16) else moved


def _code(bits, signed):
    """Three numbers stand for one, so that averages of equal codes, which torch cuts off, stay the same."""
    return 3 * (4 * bits + (2 if signed else 1)) + 1


def _decoded(code):
    """(bits, signed); bits None in checkpoints that have the sign alone, signed None for anything else."""
    if code in (1, 2):
        return None, code == 2
    bits, sign = divmod(code // 3, 4)
    return (bits, sign == 2) if 2 <= bits <= 8 and sign in (1, 2) else (None, None)


def _plausible(numbers):
    """Whether these can be step sizes, clips or offsets."""
    sizes = numbers.detach().abs()
    return bool(((sizes == 0) | (sizes > 1e-30) & (sizes < 1e30)).all())


def _positive(scale):
    """A usable step size also for constant data; NaN stays, so that the output shows it."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _nonzero(divisor):
    """A divisor of zero weights, which then stay zero."""
    return divisor.clamp(min=torch.finfo(divisor.dtype).tiny)


WEIGHT = {
    "lsq": LSQ, "lsq+": LSQPlus, "asymmetric": Asymmetric, "saq": ClipWeight, "pact": DoReFaWeight,
    "dorefa": DoReFaWeight, "noise_tempering": LSQ, "diffq": LSQ, "ewgs": LSQ,
}  # fmt: skip
ACTIVATION = {
    "lsq": LSQ, "lsq+": LSQPlus, "asymmetric": Asymmetric, "saq": ClipActivation, "pact": PACT,
    "dorefa": DoReFaActivation, "noise_tempering": LSQ, "diffq": LSQ, "ewgs": LSQ,
}  # fmt: skip
WEIGHT_NOISE = {"noise_tempering": noises.Tempering(), "diffq": noises.Pseudo()}
