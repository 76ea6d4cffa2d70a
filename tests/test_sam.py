"""qk.optim.SAM and SAQ against plain implementations of the papers' algorithms."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels.optim import second_pass


def network(dtype=torch.float32, seed=0, norm=True):
    torch.manual_seed(seed)
    layers = [nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).to(dtype)


def batches(count, dtype=torch.float32, size=16):
    g = torch.Generator().manual_seed(1)
    draw = [torch.randn(size, 6, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]
    return [(x, (x[:, :3].argmax(1))) for x in draw]


def base_of(name, params, factor=1.0):
    if name == "adamw":
        return torch.optim.AdamW(params, lr=0.01 * factor, weight_decay=0.01)
    return torch.optim.SGD(params, lr=0.1 * factor, momentum=0.9, weight_decay=1e-3)


def closure_of(net, optimizer, x, y, count=None):
    def closure():
        if count is not None:
            count.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def train(net, optimizer, data):
    """Steps with a closure; the number of passes."""
    count = []
    for x, y in data:
        optimizer.step(closure_of(net, optimizer, x, y, count))
    return len(count)


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


def close(a, b, tolerance):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.allclose(
            p.double(), q.double(), rtol=tolerance, atol=tolerance * float(q.double().abs().max())
        ), name


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


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


class PlainLayer(nn.Module):
    """LSQ on the weight, from torch's own operations: the gradients are autograd's."""

    def __init__(self, layer, scale, bits):
        super().__init__()
        self.weight, self.bias, self.scale = (
            nn.Parameter(t.detach().clone()) for t in (layer.weight, layer.bias, scale)
        )
        self.bound, self.e, self.q = 2 ** (bits - 1), None, None

    def forward(self, x):
        g = (self.weight[0].numel() * (self.bound - 1)) ** -0.5
        scale = (self.scale * g + (self.scale - self.scale * g).detach()).reshape(-1, 1)
        v = (self.weight / scale).clamp(-self.bound, self.bound - 1)
        self.q = (v + (v.round() - v).detach()) * scale
        assert scale.min() > 0
        self.q.retain_grad()
        return F.linear(x, self.q if self.e is None else self.q + self.e, self.bias)


def quantized(dtype=torch.float64, bits=3, **settings):
    """The network with quantized weights, some of them clipped, and its plain twin."""
    net = network(dtype)
    qk.quantize_(
        net, qk.QConfig(method="lsq", weight_bits=bits, act_bits=None, first_last_bits=None, **settings)
    )
    net.train()
    with torch.no_grad():
        net(batches(1, dtype)[0][0])
        for m in (net[1], net[3]):
            m.weight_quantizer.to(dtype).scale.mul_(0.6)
        net[0].reset_running_stats()
    plain = nn.Sequential(copy.deepcopy(net[0]), PlainLayer(net[1], net[1].weight_quantizer.scale, bits), nn.ReLU(),
                          PlainLayer(net[3], net[3].weight_quantizer.scale, bits))  # fmt: skip
    return net, plain


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


def test_batchnorm_counts_one_pass_per_step():
    mine, other = network(), network()
    optimizer = qk.optim.SAM(mine, torch.optim.SGD(mine.parameters(), lr=0.0), rho=0.5)
    train(mine, optimizer, batches(3))
    for x, _ in batches(3):
        other(x)
    assert equal(mine[0], other[0]) and mine[0].track_running_stats


def test_an_exception_in_the_second_pass_restores_everything():
    net, _ = quantized(torch.float32)
    optimizer = qk.optim.SAQ(net, base_of("sgd", net.parameters()), every=1)
    before, pointers = copy.deepcopy(net.state_dict()), [p.data_ptr() for p in net.parameters()]
    (x, y), count = batches(1)[0], []
    inner = closure_of(net, optimizer, x, y, count)

    def closure():
        loss = inner()
        if len(count) == 2:
            raise KeyError("stop")
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "running" not in name and "num" not in name)  # noqa: E501  # fmt: skip
    assert [p.data_ptr() for p in net.parameters()] == pointers and optimizer.steps == 0
    assert net[0].track_running_stats and all(m.weight_quantizer.shift is None for m in (net[1], net[3]))
    optimizer.step(inner)
    assert optimizer.steps == 1


@pytest.mark.parametrize("make", [
    lambda net, base: qk.optim.SAQ(net, base, rho=0.3, every=3),
    lambda net, base: qk.optim.SAM(net, base, rho=0.1, every=2, beta=0.5),
])  # fmt: skip
def test_resuming_is_exact(make, tmp_path):
    data = batches(11)
    whole, part = (quantized(torch.float32)[0] for _ in "ab")
    train(whole, make(whole, base_of("adamw", whole.parameters())), data)
    optimizer = make(part, base_of("adamw", part.parameters()))
    train(part, optimizer, data[:5])
    torch.save({"net": part.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = quantized(torch.float32)[0]
    resumed.load_state_dict(state["net"])
    optimizer = make(resumed, base_of("adamw", resumed.parameters()))
    optimizer.load_state_dict(state["optimizer"])
    assert optimizer.param_groups is optimizer.base.param_groups
    train(resumed, optimizer, data[5:])
    assert equal(resumed, whole)


def test_two_explicit_passes_are_a_step():
    mine, other = (quantized(torch.float32)[0] for _ in "ab")
    one = qk.optim.SAQ(mine, base_of("sgd", mine.parameters()), every=2)
    two = qk.optim.SAQ(other, base_of("sgd", other.parameters()), every=2)
    train(mine, one, batches(6))
    for x, y in batches(6):
        with two.first_pass():
            F.cross_entropy(other(x), y).backward()
        if two.first_step():
            F.cross_entropy(other(x), y).backward()
        two.second_step()
        two.zero_grad()
    assert equal(mine, other)


@pytest.mark.parametrize("make", [
    lambda net, base: qk.optim.SAM(net, base, rho=0.1),
    lambda net, base: qk.optim.SAQ(net, base, rho=0.3, every=2),
])  # fmt: skip
def test_gradient_scaling_changes_nothing_and_overflow_skips_the_step(make):
    mine, other = (quantized(torch.float32)[0] for _ in "ab")
    one, two = (make(net, base_of("sgd", net.parameters())) for net in (mine, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    train(other, two, batches(6))
    for x, y in batches(6):

        def closure(x=x, y=y):
            one.zero_grad()
            loss = F.cross_entropy(mine(x), y)
            scaler.scale(loss).backward()
            return loss

        one.step(closure, scaler=scaler)
        scaler.update()
    close(mine, other, 1e-5)
    before = copy.deepcopy(mine.state_dict())

    def overflow():
        one.zero_grad()
        loss = F.cross_entropy(mine(x), y)
        (scaler.scale(loss) * 1e38).backward()
        return loss

    for _ in range(2):
        one.step(overflow, scaler=scaler)
        scaler.update()
    assert all(
        torch.equal(mine.state_dict()[k], v)
        for k, v in before.items()
        if "running" not in k and "num" not in k
    )
    assert scaler.get_scale() == 2.0**8
    scaler.update(2.0**10)
    for _ in range(2):
        one.step(closure, scaler=scaler)
        scaler.update()
    assert all(p.isfinite().all() for p in mine.parameters())


@pytest.mark.parametrize("case", [1, 2, 3])
def test_accumulated_batches_are_one_batch(case):
    nets = [quantized(torch.float64)[0] for _ in "ab"]
    for net in nets:
        net[0].eval()
    one, two = (qk.optim.SAQ(net, base_of("sgd", net.parameters()), case=case, every=2) for net in nets)
    for x, y in batches(4, torch.float64):
        one.step(closure_of(nets[0], one, x, y))

        def closure(x=x, y=y):
            two.zero_grad()
            losses = [F.cross_entropy(nets[1](a), b) / 4 for a, b in zip(x.split(4), y.split(4))]
            for loss in losses:
                loss.backward()
            return sum(losses)

        two.step(closure)
    close(nets[0], nets[1], 1e-9)


def test_clipping_bounds_the_gradient_of_the_step():
    net = network()
    optimizer = qk.optim.SAM(net, torch.optim.SGD(net.parameters(), lr=1.0), max_norm=0.01)
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, batches(1))
    moved = torch.cat([(p - b).flatten() for p, b in zip(net.parameters(), before)]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_each_group_has_its_own_rho_and_one_norm_serves_all():
    net = network(torch.float64, norm=False)
    groups = [{"params": net[1].parameters(), "rho": 0.4}, {"params": net[3].parameters()}, {"params": []}]
    optimizer = qk.optim.SAM(net, torch.optim.SGD(groups, lr=0.1), rho=0.1)
    before, seen = [p.detach().clone() for p in net.parameters()], []
    x, y = batches(1, torch.float64)[0]
    inner = closure_of(net, optimizer, x, y)

    def closure():
        seen.append([p.detach() - b for p, b in zip(net.parameters(), before)])
        loss = inner()
        seen.append([p.grad for p in net.parameters()])
        return loss

    optimizer.step(closure)
    norm = torch.cat([g.flatten() for g in seen[1]]).norm()
    for moved, g, rho in zip(seen[2], seen[1], (0.4, 0.4, 0.1, 0.1)):
        assert torch.allclose(moved, rho * g / norm, rtol=1e-9)
    assert optimizer.param_groups[2]["params"] == []


def test_schedulers_and_new_groups_reach_the_base_optimizer():
    net, extra = network(), nn.Parameter(torch.ones(3))
    base = base_of("sgd", net.parameters())
    optimizer = qk.optim.SAM(net, base)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group({"params": [extra], "rho": 0.0})
    train(net, optimizer, batches(1))
    schedule.step()
    assert base.param_groups[0]["lr"] == 0.05 and base.param_groups[1]["momentum"] == 0.9


def test_schedulers_that_look_at_the_defaults():
    net = network()
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10, base_momentum=0.85)
    train(net, optimizer, batches(1))
    schedule.step()
    group = optimizer.base.param_groups[0]
    assert group["lr"] > 0.04 and 0.85 < group["momentum"] < 0.95


def frozen_first(net):
    net[1].weight.requires_grad_(False)
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("listed", [True, False])
def test_a_layer_that_thaws_is_perturbed(listed):
    """It was in the optimizer all the time, or comes with add_param_group; as if it had never been frozen."""
    nets = [quantized(torch.float32)[0] for _ in "ab"]
    rest = frozen_first(nets[0])
    optimizers = [
        qk.optim.SAQ(net, base_of("sgd", params), rho=0.3, every=1)
        for net, params in zip(nets, (nets[0].parameters() if listed else rest, nets[1].parameters()))
    ]
    nets[0][1].weight.requires_grad_(True)
    if not listed:
        optimizers[0].add_param_group({"params": [nets[0][1].weight]})
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, batches(3))
    assert equal(*nets)


def test_hooks_go_with_their_optimizer_and_rest_in_copies_of_the_model():
    net = quantized(torch.float32)[0]
    for _ in range(2):
        optimizer = qk.optim.SAQ(net, base_of("sgd", net.parameters()), every=1)
        assert len(net[1].weight_quantizer._forward_hooks) == 1
    train(net, optimizer, batches(1))
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(batches(1)[0][0]), batches(1)[0][1]).backward()
    (capture,) = twin[1].weight_quantizer._forward_hooks.values()
    assert capture.gradient is None and not capture.on
    del optimizer, capture
    gc.collect()
    assert not net[1].weight_quantizer._forward_hooks


def test_an_optimizer_is_saved_by_its_state_dict_alone():
    net = network()
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()))
    with pytest.raises(
        TypeError, match=r"SAM cannot be copied or pickled; make a new one and load state_dict"
    ):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="base must step without a closure, which LBFGS cannot"):
        qk.optim.SAM(net, torch.optim.LBFGS(net.parameters()))


def test_noise_in_the_quantizer_keeps_the_perturbation():
    net = network()
    qk.quantize_(
        net, qk.QConfig(method="noise_tempering", weight_bits=3, act_bits=None, first_last_bits=None)
    )
    optimizer = qk.optim.SAQ(net, torch.optim.SGD(net.parameters(), lr=0.0), rho=0.5, every=1)
    seen, quantizer = [], net[1].weight_quantizer
    handle = net[1].register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    quantizer.noise = qk.noise.Tempering(c=0.0)
    train(net, optimizer, batches(1))
    handle.remove()
    first, second = (torch.linalg.lstsq(x, y - net[1].bias).solution for x, y in seen)
    assert (first - second).norm() > 0.05 and not quantizer._forward_hooks.keys() - set(
        list(quantizer._forward_hooks)[:1]
    )


def test_only_one_copy_of_the_weights_is_kept():
    net, kept = network(), []
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()))
    for i, (x, y) in enumerate(batches(4)):
        optimizer.param_groups[0]["rho"] = 0.01 * (i + 1)
        optimizer.step(closure_of(net, optimizer, x, y))
        kept.append([c.data_ptr() for exchange in optimizer._exchanges for c in exchange.copies])
    assert len(kept[0]) == len(list(net.parameters())) and all(k == kept[0] for k in kept)


def _move(net):
    net[1].weight.data = net[1].weight.data.clone()


def _replace(net):
    net[3].weight = nn.Parameter(net[3].weight.detach().clone())


def _turn(net):
    # the same memory, shape and dtype, read in another order
    net[3].weight.data = net[3].weight.data.t()


def _narrow(net):
    net[4].weight.data = net[4].weight.data[:2]
    net[4].bias.data = net[4].bias.data[:2]


def _drop(net):
    net[4].bias.requires_grad_(False)


def _widen(net):
    net.double()


@pytest.mark.parametrize("change", [_move, _replace, _turn, _narrow, _drop, _widen])
def test_what_a_step_remembers_gives_way_to_what_is(change):
    """Each step as a new optimizer would do it, whatever happened to the parameters since the step before."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 3)
        )

    def optimizer_of(net):
        return qk.optim.SAM(net, torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5)

    mine, other = build(), build()
    kept = optimizer_of(mine)
    for step, (x, y) in enumerate(batches(5)):
        if step in (2, 3):
            for net in (mine, other):
                net.zero_grad()
                change(net)
            kept.param_groups[0]["params"] = list(mine.parameters())
        x, y = x.to(mine[1].weight.dtype), y % 2
        before = [(p.data_ptr(), p.stride()) for p in mine.parameters()]
        kept.step(closure_of(mine, kept, x, y))
        assert [(p.data_ptr(), p.stride()) for p in mine.parameters()] == before
        fresh = optimizer_of(other)
        fresh.step(closure_of(other, fresh, x, y))
        assert equal(mine, other)


def test_tied_parameters_and_gaps_in_memory_are_restored():
    net = network()
    memory = torch.randn(12, 4, 6)
    optimizer = qk.optim.SAM(net, torch.optim.SGD(net.parameters(), lr=0.0), rho=0.5)
    for view in (memory[:, 0], memory[:, 0], memory.view(12, 24)[:, :12:2]):
        net[1].weight.data = view
        before, pointer = view.clone(), view.data_ptr()
        train(net, optimizer, batches(1))
        assert torch.equal(net[1].weight, before) and net[1].weight.data_ptr() == pointer
        assert net[1].weight.stride() == view.stride()


def test_normalisation_layers_that_come_and_go_are_found():
    net = network()
    optimizer = qk.optim.SAM(net, torch.optim.SGD(net.parameters(), lr=0.0), rho=0.5)
    train(net, optimizer, batches(1))
    net.append(nn.BatchNorm1d(3))
    train(net, optimizer, batches(1))
    assert net[4].num_batches_tracked == 1
    del net[0]
    net.insert(0, nn.Sequential(nn.Identity()))
    net[0][0] = nn.BatchNorm1d(6)
    net[4].eval()
    train(net, optimizer, batches(1))
    assert net[0][0].num_batches_tracked == 1 and net[4].num_batches_tracked == 1
    assert net[0][0].track_running_stats and net[4].track_running_stats


def test_the_first_gradients_are_released_before_the_second_pass():
    net, seen = network(), []
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()))
    x, y = batches(1)[0]
    inner = closure_of(net, optimizer, x, y)

    def closure():
        seen.append([r() is not None for r in alive])
        loss = inner()
        alive[:] = [weakref.ref(p.grad) for p in net.parameters()]
        return loss

    alive = []
    optimizer.step(closure)
    assert len(seen) == 2 and seen[1] and not any(seen[1])


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_amid_the_exchange_restores_every_parameter(at, monkeypatch):
    net = network()
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()))
    train(net, optimizer, batches(1))
    before = [(p.data_ptr(), p.detach().clone()) for p in net.parameters()]
    original, count = second_pass._set_data, []

    def interrupted(params, tensors):
        for p, t in zip(params, tensors):
            count.append(1)
            if len(count) == at:
                raise KeyboardInterrupt
            original([p], [t])

    monkeypatch.setattr(second_pass, "_set_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(net, optimizer, batches(1))
    assert all(p.data_ptr() == d and torch.equal(p, w) for p, (d, w) in zip(net.parameters(), before))
    assert net[0].track_running_stats


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda net, base: qk.optim.SAM(net, base, rho=-0.1), r"rho must be a finite number >= 0, got -0.1"),
        (
            lambda net, base: qk.optim.SAM(net, base, rho=math.inf),
            r"rho must be a finite number >= 0, got inf",
        ),
        (lambda net, base: qk.optim.SAM(net, base, every=0), r"every must be an int >= 1, got 0"),
        (
            lambda net, base: qk.optim.SAM(net, base, max_norm=0.0),
            r"max_norm must be a number > 0 or None, got 0.0",
        ),
        (lambda net, base: qk.optim.SAQ(net, base, case=4), r"case must be 1, 2 or 3, got 4"),
        (
            lambda net, base: qk.optim.SAQ(net, base),
            r"case 3 needs a model with quantized weights: call qk.quantize_",
        ),
        (lambda net, base: qk.optim.SAM(net, base).step(), r"step needs closure"),
        (
            lambda net, base: qk.optim.SAM(net, base).load_state_dict(base.state_dict()),
            r"not one of SAM: it lacks base, steps",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        make(net, base_of("sgd", net.parameters()))


def test_bad_use_is_refused_before_anything_is_written():
    net = network()
    base = base_of("sgd", net.parameters())
    with pytest.raises(TypeError, match="base must be a torch optimizer instance"):
        qk.optim.SAM(net, torch.optim.SGD)
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        qk.optim.SAM(list(net.parameters()), base)
    before = copy.deepcopy(net.state_dict())
    optimizer = qk.optim.SAM(net, base)
    with pytest.raises(TypeError, match="closure must return the loss, got None"):
        optimizer.step(lambda: None)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(RuntimeError, match="second_step needs first_step"):
        optimizer.second_step()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    quiet = qk.optim.SAQ(net, base, case=2, every=1)
    assert train(net, quiet, batches(1)) == 2
