"""From the table of cases (qkernels.testing) to what is timed: inputs, variants, and the parity each shows first."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .. import backend, layout, noise, ops, reference, testing
from . import measure, variants

RIVALS = ("eager", "fn", "compile", "torch", "foreach", "pytorch_optimizer")
OURS = backend.BACKENDS
BASELINES = ("float", "plain")  # what a row of ours is an addition to: no quantizer, no noise, no sharpness
PASSES = "passes"  # our two ops alone: what autograd adds is the difference
RIVAL_SHARE = 0.05  # of the elements of y and dx that a rival may compute otherwise
NOISE_SPREAD = 0.1  # relative difference of a rival's noise, in mean magnitude

_NOISES = {
    noise.TEMPERING: noise.Tempering,
    noise.AFTER: lambda p, _: noise.FeaturePerturbation(p, "after"),
    noise.BEFORE: lambda p, _: noise.FeaturePerturbation(p, "before"),
    noise.PSEUDO: lambda *_: noise.Pseudo("uniform"),
    noise.PSEUDO_NORMAL: lambda *_: noise.Pseudo("normal"),
    noise.STOCHASTIC: lambda *_: noise.StochasticRounding(),
}


class Refused(Exception):
    """A variant that is not timed; the text says why."""


@dataclass
class Row:
    """One line of the results for every backend: what is timed, on which inputs, against which bytes."""

    op: str
    case: str
    dtype: str
    nbytes: int | None  # that must move
    make: Callable  # () -> a new set of inputs
    variants: Callable  # (backends) -> list of measure.Variant
    check: Callable  # (variant) -> its parity as text; raises Refused
    sets: int  # of inputs that rotate
    threads: Callable = list  # which of the numbers of threads

    @property
    def name(self):
        return f"{self.op} {self.case} {self.dtype}"

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Problem:
    """The settings of one fake_quantize row as plain numbers."""

    quant_min: int
    quant_max: int
    grad_scale: float
    axis: int | None
    rows: int
    grouped: bool  # rows are runs of the last dimension
    view: tuple[int, ...]  # in which a rival's scale broadcasts
    noise: object | None


def on(choose, build, device):
    """The rows of ``build``, each on ``choose`` of the numbers of threads alone."""
    for row in build(device):
        row.threads = lambda counts: [choose(counts)]
        yield row


def describe(case):
    """ "64x64x28x28 tensor", with the option where it is not the op's first."""
    shape = "x".join(map(str, case.shape)) or "scalar"
    first = testing.OPS[case.op].options[0]
    return f"{shape} {case.granularity}" + ("" if case.option == first else f" {case.option}")


def quantizer_row(case, device):
    """Forward and backward of fake_quantize through autograd, as a layer calls it."""
    forward, backward = testing.OPS["fake_quantize"], testing.OPS["fake_quantize_backward"]
    problem = _problem(case)
    # The bytes follow from shape and dtype alone, so they are asked for on tensors without memory.
    x = torch.empty(case.shape, dtype=case.dtype, device="meta")
    nbytes = forward.traffic((x,)) + backward.traffic((x, x))
    return Row(
        op="fake_quantize", case=f"{describe(case)} fwd+bwd", dtype=dtype_name(case.dtype), nbytes=nbytes,
        make=functools.partial(_training_inputs, case, problem, device),
        variants=functools.partial(_quantizer_variants, case, problem, device),
        check=functools.partial(_check_quantizer, case, problem, device),
        sets=measure.pool_size(2 * x.numel() * x.element_size()),
    )  # fmt: skip


def _problem(case):
    rows, axis = case.rows_axis()
    low, high = case.bounds()
    kind, a, b = testing.OPTIONS[case.option].get("noise", (noise.PLAIN, 0.0, 0.0))
    grouped = axis == layout.FLAT and rows > 1
    axis = None if rows == 1 else 0 if grouped else axis
    dims = 2 if grouped else len(case.shape)
    numel = torch.Size(case.shape).numel()
    return Problem(
        low, high, float(numel // rows * max(high, 1)) ** -0.5, axis, rows, grouped, variants.view(axis, dims),
        None if kind == noise.PLAIN else _NOISES[kind](a, b),
    )  # fmt: skip


def _training_inputs(case, problem, device):
    """(x, scale, upstream gradient) as in training: normal values, a share of them clipped."""
    x = torch.randn(case.shape, device=device).to(case.dtype).requires_grad_()
    scale = torch.full((problem.rows,), 2.5 / max(problem.quant_max, 1), device=device).requires_grad_()
    return x, scale, torch.randn(case.shape, device=device).to(case.dtype)


def _through_autograd(f):
    def step(inputs):
        x, scale, grad = inputs
        y = f(x, scale)
        return y, *torch.autograd.grad(y, (x, scale), grad)

    return step


def _fake_quantize(case, problem, device):
    """The public function with the settings of a problem."""
    settings = {
        "quant_min": problem.quant_min,
        "quant_max": problem.quant_max,
        "grad_scale": problem.grad_scale,
    }
    if problem.grouped:
        settings["group_size"] = torch.Size(case.shape).numel() // problem.rows
    elif problem.axis is not None:
        settings["axis"] = problem.axis
    if problem.noise is not None:
        seed = torch.tensor([testing.SEED], device=device)
        settings |= {"noise": problem.noise, "seed": seed, "stream": testing.STREAM}
    return lambda x, scale: ops.fake_quantize(x, scale, **settings)


def _quantizer_variants(case, problem, device, backends):
    step = _through_autograd(_fake_quantize(case, problem, device))
    found = [ours(name, step) for name in backends if name in OURS]
    if problem.noise is None:
        found += [measure.Variant(PASSES, _passes(case, problem), active=v.active) for v in found[:1]]
    else:
        found += plain(found, _through_autograd(_fake_quantize(case, replace(problem, noise=None), device)))
    if any(name in RIVALS for name in backends):
        for name, form, f in variants.rivals(problem):
            if name in backends:
                found.append(measure.Variant(name, _through_autograd(_regrouped(f, problem)), form))
    return found


def _passes(case, problem):
    """Both ops without autograd: each call frees its outputs before the next, which finds the same memory."""
    settings = None, None, case.rows_axis()[1], problem.quant_min, problem.quant_max
    estimator, quiet = (problem.grad_scale, False, 0.0), (noise.PLAIN, 0.0, 0.0, None, 0)

    def step(inputs):
        x, scale, grad = inputs
        with torch.no_grad():
            y = backend.op("fake_quantize")(x, scale, *settings, *quiet, None, None)
            return y, *backend.op("fake_quantize_backward")(grad, x, scale, *settings, *estimator, *quiet)[:2]

    return step


def _regrouped(f, problem):
    """A rival on runs of the last dimension: one run per row of a matrix."""
    if not problem.grouped:
        return f
    return lambda x, scale: f(x.reshape(problem.rows, -1), scale).reshape(x.shape)


def ours(name, step):
    """A variant that runs on one of our backends."""
    return measure.Variant(name, step, active=functools.partial(backend.use_backend, name))


def plain(found, step):
    """The baseline: ``step`` on the first of our backends, if there is one."""
    return [measure.Variant("plain", step, active=v.active) for v in found[:1]]


def equal(case, args, got, want):
    """Refused unless `testing.compare` finds them equal."""
    try:
        testing.compare(case, args, got, want)
    except AssertionError as error:
        raise Refused(f"differs from the reference: {error}") from None


def check_serves(variant, names, device):
    """Refused unless the backend of that name answers all of these ops."""
    with variant.active():
        for op in names:
            who = backend.serves(op, device)
            if who != variant.backend:
                raise Refused(f"{op} on {device} is answered by {who}")


def _check_quantizer(case, problem, device, variant):
    """Ours: the table's inputs, all its equalities and bounds. A rival: a share of differing elements."""
    if variant.backend in BASELINES:
        return ""
    if variant.backend not in (*OURS, PASSES):
        return _check_rival(case, problem, device, variant)
    both = case, replace(case, op="fake_quantize_backward")
    if variant.backend in OURS:
        check_serves(variant, [c.op for c in both], device)
    backward = list(both[1].args(device))
    backward[8] = problem.grad_scale
    grad, x, scale = backward[:3]
    kind_to_stream = backward[11:]
    forward = (x, *backward[2:8], *kind_to_stream, None, None)
    with variant.active():
        y, dx, dscale = variant.step((x.requires_grad_(), scale.requires_grad_(), grad))
    x.requires_grad_(False), scale.requires_grad_(False)
    equal(both[0], forward, y.detach(), reference.fake_quantize(*forward))
    want = reference.fake_quantize_backward(*backward)
    equal(both[1], tuple(backward), (dx, dscale, want[2]), want)
    return "equal"


def _check_rival(case, problem, device, variant):
    torch.manual_seed(0)
    inputs = _training_inputs(case, problem, device)
    got = variant.step(inputs)
    quiet = _through_autograd(_fake_quantize(case, replace(problem, noise=None), device))
    with backend.use_backend("reference"):
        want = quiet(inputs)
    if problem.noise is not None:
        with backend.use_backend("reference"):
            noisy = _fake_quantize(case, problem, device)(*inputs[:2])
        return _check_noise(got[0] - want[0], noisy - want[0], _share(got[1], want[1]))
    return _within_share({"y": _share(got[0], want[0]), "dx": _share(got[1], want[1])})


def _within_share(shares):
    text = ", ".join(f"{name} {share:.2%}" for name, share in shares.items()) + " differ"
    if max(shares.values()) > RIVAL_SHARE:
        raise Refused(f"{text}, at most {RIVAL_SHARE:.0%} may")
    return text


def _share(got, want):
    """The share of elements that are not the same up to rounding."""
    tolerance = 4 * torch.finfo(want.dtype).eps if want.dtype.is_floating_point else 0.0
    got, want = got.detach().float(), want.detach().float()
    far = (
        ~((got - want).abs() <= tolerance * (1 + want.abs())) & ~(got.isnan() & want.isnan()) & (got != want)
    )
    return float(far.float().mean())


def _check_noise(got, want, dx_share):
    """Both noises are drawn, so their mean magnitudes may also differ by four standard errors, at most 1 / sqrt(n)."""
    allowed = NOISE_SPREAD + 4 * want.numel() ** -0.5
    got, want = float(got.detach().float().abs().mean()), float(want.detach().float().abs().mean())
    text = f"noise {got / want - 1:+.1%}, dx {dx_share:.2%} differ"
    if not abs(got / want - 1) <= allowed or dx_share > RIVAL_SHARE:
        raise Refused(f"{text}, at most {allowed:.0%} and {RIVAL_SHARE:.0%} may")
    return text


def op_row(case, device):
    """One op of torch.ops.qkernels as it is; its rivals are its reference, eager and compiled."""
    op = testing.OPS[case.op]
    args = case.args(device)
    tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
    return Row(
        op=case.op, case=describe(case), dtype=dtype_name(case.dtype), nbytes=op.traffic(args),
        make=lambda: torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args),
        variants=functools.partial(_op_variants, case),
        check=functools.partial(_check_op, case, args, device),
        sets=measure.pool_size(sum(t.numel() * t.element_size() for t in tensors)),
    )  # fmt: skip


def _op_variants(case, backends):
    formula = getattr(reference, case.op)
    found = [ours(name, lambda args: backend.op(case.op)(*args)) for name in backends if name in OURS]
    if "eager" in backends:
        found.append(measure.Variant("eager", lambda args: formula(*args), "reference"))
    if "compile" in backends:
        compiled = torch.compile(formula, dynamic=False)
        found.append(measure.Variant("compile", lambda args: compiled(*args), "reference"))
    return found


def _check_op(case, args, device, variant):
    want = getattr(reference, case.op)(*args)
    if variant.backend not in OURS:
        got, want = (torch.utils._pytree.tree_leaves(t) for t in (variant.step(args), want))
        return _within_share({f"output {i}": _share(g, w) for i, (g, w) in enumerate(zip(got, want))})
    check_serves(variant, [case.op], device)
    with variant.active():
        got = variant.step(args)
    equal(case, args, got, want)
    return "equal"


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")
