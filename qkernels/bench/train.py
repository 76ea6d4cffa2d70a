"""A whole training step: forward, loss, backward, SGD; in floating point, with eager quantizers, compiled, and ours."""

import copy
import functools

import torch
import torch.nn.functional as F

from .. import backend, convert, models
from . import measure, variants
from .rows import OURS, Problem, Refused, Row, check_serves

MODEL, BATCH, SIZE, BITS = "resnet20", 128, 32, 4
RIVAL_SPREAD = 0.01  # of a rival's loss, relative
SPREAD = (
    1e-4  # of our loss and gradients against the reference's, relative: sums may differ in their last bits
)


class _Rival(torch.nn.Module):
    """A quantizer of ours as the eager formula, on the same grid."""

    def __init__(self, quantizer, x):
        super().__init__()
        self.scale = torch.nn.Parameter(quantizer.grid()["scale"].detach().clone())
        rows, axis = self.scale.numel(), quantizer.axis
        view = (1,) if rows == 1 else tuple(-1 if d == axis else 1 for d in range(x.dim()))
        settings = *quantizer.bounds(), quantizer.grad_scale(x), axis, rows, False, view, None
        self.lsq = variants.formula(Problem(*settings))

    def forward(self, x):
        return self.lsq(x, self.scale)


def networks(model, make):
    """(float, quantized, quantized by the eager formula), the same weights and step sizes at every call."""
    torch.manual_seed(0)
    x = make()[0]
    plain = models.build_model(model, 10, in_channels=x.shape[1], image_size=x.shape[-1]).to(x.device)
    ours = convert.quantize_(copy.deepcopy(plain), method="lsq", weight_bits=BITS, act_bits=BITS)
    convert.calibrate(ours, [x], batches=1)
    rivals, hooks = {}, []
    for quantizer in convert.quantizers(ours):
        hooks.append(
            quantizer.register_forward_pre_hook(lambda q, args: rivals.update({id(q): _Rival(q, args[0])}))
        )
    with torch.no_grad():
        ours.eval()(x)
    for hook in hooks:
        hook.remove()
    eager = copy.deepcopy(ours, rivals)  # the memo puts a rival in each quantizer's place
    return [network.to(x.device).train() for network in (plain, ours, eager)]


def _step(network, compiled=False):
    """f((x, target)) -> (loss, gradients): one step of SGD whose rate is 0, so that every step is the same work."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    forward = torch.compile(network, dynamic=False) if compiled else network

    def step(batch):
        x, target = batch
        loss = F.cross_entropy(forward(x), target)
        loss.backward()
        gradients = [p.grad for p in network.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), gradients

    return step


def suite(device, model=MODEL, batch=BATCH, size=SIZE):
    """The one row of the suite "train"."""
    make = functools.partial(_batch, batch, size, device)
    case = f"{model} {batch}x3x{size}x{size} W{BITS}A{BITS}"
    yield Row(
        op="train_step", case=case, dtype="float32", nbytes=None, make=make, sets=4,
        variants=functools.partial(_variants, model, make), check=functools.partial(_check, model, make, device),
    )  # fmt: skip


def _batch(batch, size, device):
    return torch.randn(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)


def _variants(model, make, backends):
    """Float comes with whatever is asked for; "+compile" forms where "compile" is."""
    plain, ours, eager = networks(model, make)
    compiled = "compile" in backends
    found = [measure.Variant("float", _step(plain))]
    if compiled:
        found.append(measure.Variant("float+compile", _step(copy.deepcopy(plain), True)))
        found.append(measure.Variant("compile", _step(copy.deepcopy(eager), True), "formula"))
    if "eager" in backends:
        found.append(measure.Variant("eager", _step(eager), "formula"))
    for name in backends:
        if name in OURS:
            active = functools.partial(backend.use_backend, name)
            found.append(measure.Variant(name, _step(copy.deepcopy(ours)), active=active))
            if compiled and name == "native":
                found.append(
                    measure.Variant("native+compile", _step(copy.deepcopy(ours), True), active=active)
                )
    return found


def _check(model, make, device, variant):
    """The first step from the same weights on the same batch, against our network on the reference ops."""
    if variant.backend.startswith("float"):
        return ""
    if variant.backend in OURS:
        check_serves(variant, ("fake_quantize", "fake_quantize_backward"), device)
    network = networks(model, make)[1]
    batch = make()
    with backend.use_backend("reference"):
        want, want_gradients = _step(network)(batch)
    with variant.active():
        loss, gradients = variant.step(batch)
    difference = abs(float(loss) / float(want) - 1)
    ours = variant.backend.split("+")[0] in OURS
    text, limit = f"loss {difference:.1e} off", SPREAD if ours else RIVAL_SPREAD
    if ours:
        off = max(
            float((g - w).norm() / w.norm().clamp(min=1e-12)) for g, w in zip(gradients, want_gradients)
        )
        text, difference = f"{text}, gradients {off:.1e}", max(difference, off)
    if not difference <= limit:
        raise Refused(f"{text}, at most {limit:g} may")
    return text
