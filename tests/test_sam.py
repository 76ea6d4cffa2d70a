"""qk.optim.SAM and SAQ against plain implementations of the papers' algorithms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stepping import base_of, batches, close, closure_of, equal, network, quantized, train
from torch import nn

import qkernels as qk


def plain_sam(net, base, data, rho, eta=None):
    """SAM, or ASAM where eta is given, in ten lines."""
    for x, y in data:
        norms, kept = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)], []
        for first in (True, False):
            base.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if first:
                reach = [
                    torch.ones_like(p) if eta is None else p.detach().abs() + eta for p in net.parameters()
                ]
                pairs = list(zip(reach, net.parameters()))
                norm = torch.cat([(t * p.grad).flatten() for t, p in pairs]).norm()
                kept = [(p, p.detach().clone()) for p in net.parameters()]
                for t, p in pairs:
                    p.data.add_(rho * t * t * p.grad / norm)
                stats = [copy.deepcopy(m.state_dict()) for m in norms]
        for p, w in kept:
            p.data.copy_(w)
        for m, s in zip(norms, stats):
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                getattr(m, name).copy_(s[name])
        base.step()


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_equals_ten_plain_lines(base, adaptive):
    mine, plain, data = network(torch.float64), network(torch.float64), batches(20, torch.float64)
    rho = 0.5 if adaptive else 0.05
    optimizer = qk.optim.SAM(mine, base_of(base, mine.parameters()), rho=rho, adaptive=adaptive)
    assert train(mine, optimizer, data) == 40
    plain_sam(plain, base_of(base, plain.parameters()), data, rho, 0.01 if adaptive else None)
    close(mine, plain, 1e-10)
    single, again = network(), network()
    train(
        single,
        qk.optim.SAM(single, base_of("sgd", single.parameters()), rho=rho, adaptive=adaptive),
        batches(20),
    )
    plain_sam(again, base_of("sgd", again.parameters()), batches(20), rho, 0.01 if adaptive else None)
    close(single, again, 2e-5)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_equals_pytorch_optimizers(base, adaptive):
    peer = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is an optional peer")
    # BatchNorm's statistics are left out: the peer updates them in both passes.
    mine, other, data = (network(torch.float64, norm=False) for _ in "ab"), None, batches(20, torch.float64)
    mine, other = mine
    optimizer = qk.optim.SAM(mine, base_of(base, mine.parameters()), rho=0.1, adaptive=adaptive, eta=0.0)
    train(mine, optimizer, data)
    kind, settings = (
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.01})
        if base == "adamw"
        else (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3})
    )
    theirs = peer.SAM(list(other.parameters()), base_optimizer=kind, rho=0.1, adaptive=adaptive, **settings)
    for x, y in data:
        for step in (theirs.first_step, theirs.second_step):
            F.cross_entropy(other(x), y).backward()
            step(zero_grad=True)
    close(mine, other, 1e-6)


def plain_saq(net, base, data, rho, case, every, beta, vanilla, scales):
    """Algorithm 1 of the SAQ paper, line by line, in float64."""
    layers, gv, params = [net[1], net[3]], None, list(net.parameters())
    own = {id(m.scale) for m in layers}
    second = 0

    def gradients(x, y):
        base.zero_grad()
        F.cross_entropy(net(x), y).backward()
        return torch.cat([p.grad.flatten() for p in params])

    for t, (x, y) in enumerate(data, 1):
        g = gradients(x, y)
        if t % every == 0:
            second += 1
            inner = {id(m.weight): (m.q.grad if case == 3 else m.weight.grad).clone() for m in layers}
            moved = {id(p): inner.get(id(p), p.grad.clone()) for p in params if scales or id(p) not in own}
            norm = torch.cat([v.flatten() for v in moved.values()]).norm()
            kept = [p.detach().clone() for p in params]
            stats = {k: v.clone() for k, v in net[0].state_dict().items()}
            for p in params:
                if id(p) in moved and (case == 2 or id(p) not in inner):
                    p.data.add_(rho * moved[id(p)] / norm)
            for m in layers:
                m.e = None if case == 2 else rho * inner[id(m.weight)] / norm
            gs = gradients(x, y)
            for m in layers:
                m.e = None
            net[0].load_state_dict(stats)
            for p, w in zip(params, kept):
                p.data.copy_(w)
            gv = gs - (gs @ g) / (g @ g) * g
        else:
            gs = g if gv is None else g + beta * g.norm() * gv / gv.norm()
        final = gs + g if vanilla else gs
        for p, part in zip(params, final.split([p.numel() for p in params])):
            p.grad = part.view_as(p).clone()
        base.step()
    return second


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("case", [1, 2, 3])
@pytest.mark.parametrize("every, vanilla, scales", [(4, True, False), (1, True, True), (3, False, False)])
def test_saq_is_algorithm_1(case, base, every, vanilla, scales):
    mine, plain = quantized()
    data, rho = batches(20, torch.float64), 0.05 if scales else 0.3
    assert any(
        (m.weight / m.weight_quantizer.scale.reshape(-1, 1)).abs().max() > 4 for m in (mine[1], mine[3])
    )
    optimizer = qk.optim.SAQ(mine, base_of(base, mine.parameters(), 0.3), rho=rho, case=case, every=every, beta=0.7,
                             vanilla_loss=vanilla, perturb_scales=scales)  # fmt: skip
    passes = train(mine, optimizer, data)
    second = plain_saq(
        plain, base_of(base, plain.parameters(), 0.3), data, rho, case, every, 0.7, vanilla, scales
    )
    assert passes == 20 + 20 // every == 20 + second
    for m, p in ((mine[1], plain[1]), (mine[3], plain[3])):
        for a, b in ((m.weight, p.weight), (m.bias, p.bias), (m.weight_quantizer.scale, p.scale)):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    close(mine[0], plain[0], 1e-5)


def test_the_cases_differ():
    results = []
    for case in (1, 2, 3):
        net, _ = quantized()
        train(
            net,
            qk.optim.SAQ(net, base_of("sgd", net.parameters()), rho=0.3, case=case),
            batches(8, torch.float64),
        )
        results.append(net[1].weight.detach())
    assert not any(torch.allclose(results[i], results[j], rtol=1e-4) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_looksam_runs_the_second_pass_once_in_every_steps():
    net, count = network(), []
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()), every=5)
    passes = []
    for x, y in batches(15):
        count.clear()
        optimizer.step(closure_of(net, optimizer, x, y, count))
        passes.append(len(count))
    assert passes == [1, 1, 1, 1, 2] * 3


@pytest.mark.parametrize("kind", ["sam", "asam", "looksam", "saq"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_rho_zero_is_the_base_optimizer_to_the_bit(base, kind):
    mine, other = (quantized(torch.float32)[0] for _ in "ab")
    inner = base_of(base, mine.parameters())
    optimizer = {
        "sam": lambda: qk.optim.SAM(mine, inner, rho=0.0),
        "asam": lambda: qk.optim.SAM(mine, inner, rho=0.0, adaptive=True),
        "looksam": lambda: qk.optim.SAM(mine, inner, rho=0.0, every=2),
        "saq": lambda: qk.optim.SAQ(mine, inner, rho=0.0),
    }[kind]()
    reference = base_of(base, other.parameters())
    assert train(mine, optimizer, batches(6)) == 6
    for x, y in batches(6):
        closure_of(other, reference, x, y)()
        reference.step()
    assert equal(mine, other)
