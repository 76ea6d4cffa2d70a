"""The perturbed copies that change places with the weights, and what a step remembers of them."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from stepping import base_of, batches, close, closure_of, equal, network, train
from torch import nn

import qkernels as qk
from qkernels.optim import second_pass


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


def test_a_layer_that_does_not_track_stays_so():
    net = network()
    net[0].track_running_stats = False
    train(net, qk.optim.SAM(net, base_of("sgd", net.parameters())), batches(1))
    assert net[0].track_running_stats is False


class Watched(nn.BatchNorm1d):
    """The setting as a property, as a subclass may have it."""

    track_running_stats = property(
        lambda self: self._track, lambda self, value: setattr(self, "_track", value)
    )


def test_statistics_stand_still_beside_scripted_modules_and_in_subclasses():
    net = nn.Sequential(torch.jit.script(nn.Linear(6, 6)), Watched(6), nn.Linear(6, 6))
    x = torch.randn(8, 6)
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()))
    for _ in range(3):
        optimizer.step(closure_of(net, optimizer, x, torch.zeros(8, dtype=torch.long)))
    assert net[1].num_batches_tracked == 3 and net[1].track_running_stats


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


def test_gradients_that_lie_in_buckets_are_kept_for_the_second_pass(one_process):
    alone, net = (network(torch.float64, norm=False) for _ in "ab")
    parallel = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    for model in (alone, parallel):
        base = base_of("sgd", model.parameters())
        optimizer = qk.optim.SAM(model, base, rho=0.1, vanilla_loss=True, sync_perturbation=True)
        train(model, optimizer, batches(4, torch.float64))
    close(alone, net, 1e-9)


def test_clipping_is_of_the_unscaled_gradient():
    net, ((x, y),) = network(), batches(1)
    optimizer = qk.optim.SAM(net, torch.optim.SGD(net.parameters(), lr=1.0), max_norm=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure, scaler)
    moved = torch.cat([(p - b).flatten() for p, b in zip(net.parameters(), before)]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_loaded_state_replaces_the_direction_of_before():
    def optimizer_of(net):
        return qk.optim.SAM(net, base_of("sgd", net.parameters()), rho=0.1, every=4)

    source, new, used = (network(torch.float64) for _ in "abc")
    first, *others = (optimizer_of(net) for net in (source, new, used))
    train(source, first, batches(5, torch.float64))
    train(used, others[1], batches(10, torch.float64)[5:])
    for net, optimizer in zip((new, used), others):
        net.load_state_dict(source.state_dict())
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        train(net, optimizer, batches(2, torch.float64))
    assert equal(new, used)


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_amid_the_exchange_restores_every_parameter(at, monkeypatch):
    net = network()
    optimizer = qk.optim.SAM(net, base_of("sgd", net.parameters()))
    train(net, optimizer, batches(1))
    before = [(p.data_ptr(), p.detach().clone()) for p in net.parameters()]
    original, count = second_pass.eager.set_data, []

    def interrupted(params, tensors):
        for p, t in zip(params, tensors):
            count.append(1)
            if len(count) == at:
                raise KeyboardInterrupt
            original([p], [t])

    monkeypatch.setattr(second_pass.eager, "set_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(net, optimizer, batches(1))
    assert all(p.data_ptr() == d and torch.equal(p, w) for p, (d, w) in zip(net.parameters(), before))
    assert net[0].track_running_stats
