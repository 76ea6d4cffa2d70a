"""Noise in whole models: one seed a step, from torch's generator."""

import copy

import pytest
import torch
from layers import batch, calibrated
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk


def noisy(method="noise_tempering", **settings):
    return calibrated(method=method, act_noise=qk.noise.FeaturePerturbation(p=1.0), **settings).train()


@pytest.mark.parametrize("method", ["noise_tempering", "diffq"])
def test_noise_follows_torchs_seed(method):
    model = noisy(method)

    def steps(seed):
        torch.manual_seed(seed)
        return [model(batch()) for _ in range(2)]

    first, second = steps(0)
    assert not torch.equal(first, second), "each step draws anew"
    assert all(torch.equal(a, b) for a, b in zip(steps(0), (first, second), strict=True))
    assert not torch.equal(steps(1)[0], first)
    torch.manual_seed(0)
    assert torch.equal(copy.deepcopy(model)(batch()), first)
    model.eval()
    assert torch.equal(model(batch()), model(batch()))


def test_one_draw_per_forward_of_the_model():
    model, x = noisy(), batch()
    for training in (True, False):
        torch.manual_seed(0)
        model.train(training)(x)
        after = torch.get_rng_state()
        torch.manual_seed(0)
        if training:
            torch.ops.qkernels.draw_seed(x)
        assert torch.equal(after, torch.get_rng_state())


def test_layers_draw_different_noise():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    qk.quantize_(model, method="diffq", act_bits=None).train()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.extend(model[i].quantized_weight() for i in (0, 0, 1)))
    model(torch.randn(2, 16))
    first, again, second = seen
    assert torch.equal(first, again), "within a step a layer's noise stays"
    assert not torch.equal(first, second)


def test_parts_of_a_model_called_alone_draw_their_own_noise():
    model, x = noisy("diffq"), torch.randn(2, 4, 5, 5)
    assert not torch.equal(model.body(x), model.body(x)), "before the first forward of the model"
    model(batch())
    assert not torch.equal(model.body(x), model.body(x)), "and after"
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 5, 5))
    assert not torch.equal(model.body(x), model.body(x)), "and after one that failed"
    model.eval().head.train()
    assert not torch.equal(model(batch()), model(batch())), "a part in training in a model in evaluation"


def test_checkpointing_a_part_called_alone_recomputes_the_same_noise():
    model, x, results = noisy("diffq"), torch.randn(2, 4, 5, 5), []
    for run in (model.body, lambda x: checkpoint(model.body, x, use_reentrant=False)):
        torch.manual_seed(4)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(model.body.parameters()))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_a_compiled_part_recomputes_the_same_noise():
    def gradients(model):
        torch.manual_seed(4)
        model(batch()).square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = noisy("diffq", act_bits=4)
    replayed = copy.deepcopy(plain)
    replayed.checkpointed = True
    replayed.body = torch.compile(replayed.body, backend="eager")
    for a, b in zip(gradients(plain), gradients(replayed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("outer", [False, True])
def test_checkpointing_recomputes_the_same_noise(outer):
    def gradients(model, checkpointed):
        torch.manual_seed(4)
        model.checkpointed = checkpointed and not outer
        run = (lambda x: checkpoint(model, x, use_reentrant=False)) if checkpointed and outer else model
        for i in (7, 8):
            run(batch(i)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = noisy("diffq", act_bits=4)
    replayed = copy.deepcopy(plain)
    for a, b in zip(gradients(plain, False), gradients(replayed, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Dropped(nn.Module):
    """Two parts, each under activation checkpointing where asked, and dropout in them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8))
        self.b = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.reentrant = None

    def forward(self, x):
        for part in (self.a, self.b):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("noise", [qk.noise.Tempering(), qk.noise.Pseudo()])
def test_checkpointing_finds_the_seed_of_its_own_forward(reentrant, noise):
    """Two forwards before one backward."""
    model = qk.quantize_(Dropped(), weight_noise=noise, act_noise=qk.noise.FeaturePerturbation(p=1.0))
    x = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    qk.calibrate(model, x).train()
    found = []
    for model.reentrant in (None, reentrant):
        torch.manual_seed(4)
        total = sum(model(part).square().mean() for part in x) + model.b(x[0]).square().mean()
        model.zero_grad()
        total.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_part_in_training_draws_again(reentrant):
    """Of a model in evaluation: dropout behind the noise must draw as it did."""
    model = qk.quantize_(Dropped(), weight_noise=qk.noise.Pseudo())
    x = torch.randn(6, 8, requires_grad=True)
    qk.calibrate(model, [x]).eval().a.train()
    found = []
    for model.reentrant in (None, reentrant):
        model.zero_grad()
        torch.manual_seed(4)
        model(x).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_stacked_models_draw_their_own_noise():
    models = []
    for _ in range(3):
        models.append(
            qk.quantize_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), method="noise_tempering")
        )
        qk.calibrate(models[-1], [torch.ones(4, 6)]).load_state_dict(models[0].state_dict())
    stacked, x = torch.func.stack_module_state([m.train() for m in models]), torch.randn(5, 6)
    torch.manual_seed(1)
    y = torch.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,)))(*stacked)
    torch.manual_seed(1)
    torch.testing.assert_close(y[0], models[0](x))
    assert len({tuple(each.flatten().tolist()) for each in y}) == 3
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in stacked[0].values())


def test_seeds_of_forwards_long_ago(monkeypatch):
    monkeypatch.setattr("qkernels.seeds._PLACES", 3)
    model = qk.quantize_(Dropped(), weight_noise=qk.noise.Pseudo(), act_bits=None).train()
    model.reentrant = False
    x = torch.randn(6, 8, requires_grad=True)
    losses = [model(x).square().mean() for _ in range(4)]
    losses[-1].backward()
    with pytest.warns(UserWarning, match="whose seed may be forgotten"):
        losses[0].backward()
