"""A whole training step: forward, loss, backward, SGD; in floating point, with eager quantizers, compiled, and ours."""

import copy
import functools

import torch
import torch.nn.functional as F

from .. import backend, convert, models, optim
from . import measure, variants
from .rows import BASELINES, OURS, Problem, Refused, Row, check_serves, ours, plain

MODEL, BATCH, SIZE, BITS = "resnet20", 128, 32, 4
EVERY = (4, 1)  # SAQ's tau
RIVAL_SPREAD = 0.01  # of a rival's loss, relative
# Of our loss and gradients against the reference's, relative: sums may differ in their last bits.
SPREAD = 1e-4


class _Rival(torch.nn.Module):
    """A quantizer of ours as the eager formula, on the same grid."""

    def __init__(self, quantizer, x):
        super().__init__()
        self.scale = torch.nn.Parameter(quantizer.grid()["scale"].detach().clone())
        rows, axis = self.scale.numel(), quantizer.axis
        view = variants.view(None if rows == 1 else axis, x.dim())
        settings = *quantizer.bounds(), quantizer.grad_scale(x), axis, rows, False, view, None
        self.lsq = variants.formula(Problem(*settings))

    def forward(self, x):
        return self.lsq(x, self.scale)


def networks(model, make):
    """(float, quantized, quantized by the eager formula), the same weights and step sizes at every call."""
    torch.manual_seed(0)
    x = make()[0]
    floating = models.build_model(model, 10, in_channels=x.shape[1], image_size=x.shape[-1]).to(x.device)
    quantized = convert.quantize_(copy.deepcopy(floating), method="lsq", weight_bits=BITS, act_bits=BITS)
    convert.calibrate(quantized, [x], batches=1)
    rivals, hooks = {}, []
    for quantizer in convert.quantizers(quantized):
        hooks.append(
            quantizer.register_forward_pre_hook(lambda q, args: rivals.update({id(q): _Rival(q, args[0])}))
        )
    with torch.no_grad():
        quantized.eval()(x)
    for hook in hooks:
        hook.remove()
    eager = copy.deepcopy(quantized, rivals)  # the memo puts a rival in each quantizer's place
    return [network.to(x.device).train() for network in (floating, quantized, eager)]


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


def plain_step(device, model=MODEL, batch=BATCH, size=SIZE, compiled=True):
    """One step of quantization-aware training beside its float step; without ``compiled``, no compiled network."""
    make = functools.partial(_batch, batch, size, device)
    case = f"{model} {batch}x3x{size}x{size} W{BITS}A{BITS}"
    yield Row(
        op="train_step", case=case, dtype="float32", nbytes=None, make=make, sets=4,
        variants=functools.partial(_variants, model, make, compiled),
        check=functools.partial(_check, model, make, device),
    )  # fmt: skip


def saq_steps(device, model=MODEL, batch=BATCH, size=SIZE):
    """SAQ (case 3), its second pass in every fourth step or in every step, beside plain steps of the network."""
    make = functools.partial(_batch, batch, size, device)
    for every in EVERY:
        steps = f"{every} step{'s' if every > 1 else ''}"
        yield Row(
            op="saq_step", case=f"{model} {batch}x3x{size}x{size} W{BITS}A{BITS} tau {every}, {steps}", dtype="float32",
            nbytes=None, make=make, sets=4, variants=functools.partial(_saq_variants, model, make, every),
            check=functools.partial(_check_saq, model, make, every, device),
        )  # fmt: skip


def _saq(network, every):
    """f((x, target)) -> (loss, gradients): ``every`` steps of SAQ on one batch, the last of them with two passes."""
    optimizer = optim.SAQ(network, torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9), every=every)

    def step(batch):
        x, target = batch

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), target)
            loss.backward()
            return loss

        for _ in range(every):
            loss = optimizer.step(closure)
        return loss.detach(), [p.grad for p in network.parameters()]

    return step


def _repeated(step, times):
    def steps(batch):
        for _ in range(times):
            result = step(batch)
        return result

    return steps


def _saq_variants(model, make, every, backends):
    network = networks(model, make)[1]
    found = [ours(name, _saq(copy.deepcopy(network), every)) for name in backends if name in OURS]
    return found + plain(found, _repeated(_step(network), every))


def _check_saq(model, make, every, device, variant):
    """The first steps from the same weights, against SAQ on the reference ops."""
    if variant.backend in BASELINES:
        return ""
    check_serves(variant, ("fake_quantize", "fake_quantize_backward", "multi_norm", "multi_climb"), device)
    batch = make()
    with backend.use_backend("reference"):
        want = _saq(networks(model, make)[1], every)(batch)
    with variant.active():
        got = variant.step(batch)
    return _differences(got, want)


def _differences(got, want):
    """The relative differences of loss and gradients as text; Refused where one is too large."""
    loss = abs(float(got[0]) / float(want[0]) - 1)
    off = max(float((g - w).norm() / w.norm().clamp(min=1e-12)) for g, w in zip(got[1], want[1]))
    text = f"loss {loss:.1e} off, gradients {off:.1e}"
    if not max(loss, off) <= SPREAD:
        raise Refused(f"{text}, at most {SPREAD:g} may")
    return text


def _batch(batch, size, device):
    return torch.randn(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)


def _variants(model, make, compiled, backends):
    """Float comes with whatever is asked for; "+compile" forms where "compile" is."""
    floating, quantized, eager = networks(model, make)
    compiled = compiled and "compile" in backends
    found = [measure.Variant("float", _step(floating))]
    if compiled:
        found.append(measure.Variant("float+compile", _step(copy.deepcopy(floating), True)))
        found.append(measure.Variant("compile", _step(copy.deepcopy(eager), True), "formula"))
    if "eager" in backends:
        found.append(measure.Variant("eager", _step(eager), "formula"))
    for name in backends:
        if name in OURS:
            found.append(ours(name, _step(copy.deepcopy(quantized))))
            if compiled and name == "native":  # not forced, which would keep the op in the graph
                found.append(measure.Variant("native+compile", _step(copy.deepcopy(quantized), True)))
    return found


def _check(model, make, device, variant):
    """The first step from the same weights on the same batch, against our network on the reference ops.

    Compiled, convolutions and BatchNorm round otherwise, and levels flip: there against the op in the compiled graph.
    """
    if variant.backend.startswith("float"):
        return ""
    compiled = variant.backend == "native+compile"
    if variant.backend in OURS:
        check_serves(variant, ("fake_quantize", "fake_quantize_backward"), device)
    network = networks(model, make)[1]
    batch = make()
    with backend.use_backend("native" if compiled else "reference"):
        want, want_gradients = _step(network, compiled)(batch)
    with variant.active():
        loss, gradients = variant.step(batch)
    if variant.backend.split("+")[0] in OURS:
        return _differences((loss, gradients), (want, want_gradients))
    difference = abs(float(loss) / float(want) - 1)
    if not difference <= RIVAL_SPREAD:
        raise Refused(f"loss {difference:.1e} off, at most {RIVAL_SPREAD:g} may")
    return f"loss {difference:.1e} off"
