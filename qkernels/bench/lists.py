"""Whole parameter lists: SAM's perturbation and its restoration, and many perturbed copies at once."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import optim, perturbation, reference, testing
from . import measure
from .rows import OURS, Refused, Row, check_serves, ours

RHO, STD, FLOOR, COPIES, SEED = 0.05, 0.05, 1e-3, 10, 5
COPIED = "resnet18"
PROVEN = 6  # tensors of a copy that are compared with the reference, which is slow
SPREAD = 1e-4  # of a perturbed weight's move, relative


@dataclass
class Move:
    """One implementation of SAM's two halves, as a step."""

    subject: Callable  # () -> (parameters, gradients)
    perturb: Callable
    restore: Callable

    def __call__(self, _=None):
        for p, g in zip(*self.subject()):
            p.grad = g
        self.perturb()
        for p in self.subject()[0]:
            p.grad = None
        self.restore()


def perturbed(device):
    """w + rho g / ||g|| in place of all parameters and back, for each list of the table.

    At least the gradients are read for their norm, then weights and gradients are read and a copy is written.
    """
    for name in testing.LISTS:
        size = _bytes(name)
        model = functools.cache(functools.partial(_model, name, device))
        subject = functools.cache(functools.partial(_with_gradients, model))
        yield Row(
            op="sam_perturb", case=f"{name} perturb+restore", dtype="float32", nbytes=4 * size, make=subject,
            variants=functools.partial(_movers, model, subject), check=functools.partial(_check_move, subject, device),
            sets=1,
        )  # fmt: skip


def copies(device):
    """Ten magnitude-aware copies: the weights are read once, the copies are written."""
    name = COPIED
    subject = functools.cache(lambda: [p.detach() for p in _model(name, device).parameters()])
    yield Row(
        op="perturb_copies", case=f"{name} magnitude x{COPIES}", dtype="float32", nbytes=(COPIES + 1) * _bytes(name),
        make=subject, variants=_copiers, check=functools.partial(_check_copies, subject, device), sets=1,
    )  # fmt: skip


def _bytes(name):
    return sum(4 * p.numel() for p in testing.model_of_list(name).parameters())


def _model(name, device):
    torch.manual_seed(0)
    return testing.model_of_list(name, device)


def _with_gradients(model):
    params = list(model().parameters())
    return params, [torch.randn_like(p) for p in params]


def _movers(model, subject, backends):
    move = functools.partial(Move, subject)
    forms = {"eager": _loop, "foreach": _foreach, "compile": torch.compile(_plain, dynamic=False)}
    found = []
    for name in backends:
        if name in OURS:
            sam = optim.SAM(model(), torch.optim.SGD(model().parameters(), lr=0.0), rho=RHO)
            variant = ours(name, move(sam.first_step, sam.restore))
            variant.held = lambda sam=sam: sum(t.nbytes for kept in sam._exchanges for t in kept.copies)
            found.append(variant)
        elif name in forms:
            found.append(measure.Variant(name, _swapping(move, subject, forms[name])))
        elif name == "pytorch_optimizer" and importlib.util.find_spec(name):
            found.append(measure.Variant(name, _peer(move, subject)))
    return found


def _swapping(move, subject, form):
    """``form(weights, gradients)`` makes the copy; pointers to it and back restore."""
    kept = []

    @torch.no_grad()
    def perturb():
        params, gradients = subject()
        kept[:] = [p.data for p in params]
        for p, copy in zip(params, form(kept, gradients)):
            p.data = copy

    def restore():
        for p, data in zip(subject()[0], kept):
            p.data = data

    return move(perturb, restore)


def _loop(weights, gradients):
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    size = float(RHO / norm)
    return [torch.add(w, g, alpha=size) for w, g in zip(weights, gradients)]


def _foreach(weights, gradients):
    size = float(RHO / torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    return torch._foreach_add(weights, gradients, alpha=size)


def _plain(weights, gradients):
    size = RHO / torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    return [w + size * g for w, g in zip(weights, gradients)]


class _NoStep(torch.optim.SGD):
    """The base of a SAM whose own step is not timed."""

    def step(self, closure=None):
        return None


def _peer(move, subject):
    import pytorch_optimizer

    sam = pytorch_optimizer.SAM(subject()[0], _NoStep, rho=RHO, lr=0.0)
    return move(sam.first_step, sam.second_step)


def _check_move(subject, device, variant):
    """The moved weights in float64, and the same bits as before once restored."""
    if variant.backend in OURS:
        check_serves(variant, ("multi_climb",), device)
    params, gradients = subject()
    before = [p.detach().clone() for p in params]
    size = RHO / torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    with variant.active():
        for p, g in zip(params, gradients):
            p.grad = g
        variant.step.perturb()
        moved = [p.detach().clone() for p in params]
        variant.step.restore()
    if not all(torch.equal(p, b) for p, b in zip(params, before)):
        raise Refused("restored weights differ")
    # A weight is rounded, so that its move is known to a unit in the last place of the weight.
    off = max(
        float(
            ((m.double() - b - size * g) / (SPREAD * (size * g).abs() + 1.2e-7 * b.abs() + 1e-12)).abs().max()
        )
        for m, b, g in zip(moved, before, gradients)
    )
    if not off <= 1:
        raise Refused(f"moves are off by {off:.1f} times their bound")
    return "restored"


def _copiers(backends):
    forms = {"eager": _loop_copies, "foreach": _foreach_copies}
    found = []
    for name in backends:
        if name in OURS:
            found.append(ours(name, lambda params: _flat(perturbation.perturb(
                params, "magnitude", std=STD, eps=FLOOR, num=COPIES, seed=SEED))))  # fmt: skip
        elif name in forms:
            found.append(measure.Variant(name, forms[name], "randn"))
    return found


def _flat(found):
    return [t for copy in found for t in copy]


@torch.no_grad()
def _foreach_copies(params):
    """The noise becomes the copy in place; its spread is computed once for all copies."""
    spread = torch._foreach_mul(params, params)
    torch._foreach_mul_(spread, STD * STD)
    torch._foreach_add_(spread, FLOOR * FLOOR)
    torch._foreach_sqrt_(spread)
    out = []
    for _ in range(COPIES):
        noise = [torch.randn_like(w) for w in params]
        torch._foreach_mul_(noise, spread)
        torch._foreach_add_(noise, params)
        out += noise
    return out


@torch.no_grad()
def _loop_copies(params):
    spread = [w.square().mul_(STD * STD).add_(FLOOR * FLOOR).sqrt_() for w in params]
    return [torch.randn_like(w).mul_(s).add_(w) for _ in range(COPIES) for w, s in zip(params, spread)]


def _check_copies(subject, device, variant):
    """Ours: the reference's bits in the first and the last copy. A rival: mean and spread."""
    params = subject()
    with variant.active():
        found = variant.step(params)
    if variant.backend not in OURS:
        return _check_spread(params, found)
    check_serves(variant, ("multi_perturb",), device)
    table = torch.tensor([[STD, FLOOR]], dtype=torch.float64, device=device)
    seed = torch.tensor([SEED], device=device)
    first = params[:PROVEN]
    for k in (0, COPIES - 1):
        want = [torch.empty_like(w) for w in first]
        reference.multi_perturb(want, first, [], [], reference.perturb.MAGNITUDE, table, seed, k)
        for t, w in enumerate(want):
            if not torch.equal(found[k * len(params) + t], w):
                raise Refused(f"copy {k} of tensor {t} differs from the reference")
    return "equal"


def _check_spread(params, found):
    w = max(params, key=torch.numel)
    at = next(i for i, p in enumerate(params) if p is w)
    z = (found[at].double() - w) / (STD * STD * w.double().square() + FLOOR * FLOOR).sqrt()
    mean, spread, error = float(z.mean()), float(z.std()), 5 * w.numel() ** -0.5
    text = f"mean {mean:+.1e}, spread {spread:.4f}"
    if abs(mean) > error or abs(spread - 1) > error:
        raise Refused(f"{text}, not 0 and 1")
    return text
