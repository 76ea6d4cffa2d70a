"""The training loop: exact resume, and errors that say what is wrong."""

import math
import types

import pytest
import torch
from tiny import Tiny, assert_same, stop_after, trainer
from torch import nn

from qkernels.training import bn_reestimate, checkpoint
from qkernels.training.engine import Trainer, lr_schedule

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("recipe", ["float", "lsq", "noise_tempering", "saq"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("first", [5, 16, 21])  # mid-epoch, an epoch's end, the middle of the second
def test_resume_is_exact(tmp_path, recipe, optimizer, first):
    settings = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.01, "augment": True}
    whole = trainer(recipe, **settings)
    records = [whole.train_epoch(), whole.train_epoch()]
    assert whole.step == 32
    part = trainer(recipe, **settings)
    stop = stop_after(first - (first > 16))  # no stop is asked for at the end of an epoch
    record = part.train_epoch(stop) if first != 16 else part.train_epoch()
    if first == 21:
        assert part.train_epoch(stop) is None
    assert (record is None) == (first < 16) and part.step == first
    checkpoint.save(tmp_path / "c", part.model.state_dict(), part.state_dict())

    torch.manual_seed(99)
    again = trainer(recipe, **settings)
    for p in again.model.parameters():
        p.data.add_(1.0)
    weights, state = checkpoint.load(tmp_path / "c")
    again.model.load_state_dict(weights)
    again.load_state_dict(state)
    while again.epoch < 2:
        last = again.train_epoch()
    assert_same(dict(again.model.state_dict()), dict(whole.model.state_dict()))
    assert_same(again.optimizer.state_dict(), whole.optimizer.state_dict())
    assert (last["train_loss"], last["train_acc"]) == (records[1]["train_loss"], records[1]["train_acc"])


def test_without_the_random_state_resume_would_differ(tmp_path):
    """The test above can fail: dropout does depend on the state it restores."""
    ends = []
    for seed in (1, 2):
        run = trainer()
        run.train_epoch(stop_after(5))
        torch.manual_seed(seed)
        run.train_epoch()
        ends.append(run.model.fc.weight.clone())
    assert not torch.equal(*ends)


def test_accumulated_batches_are_one_large_batch():
    small = trainer(model=Tiny(bn=False), batch_size=16, accumulate=2)
    large = trainer(model=Tiny(bn=False), batch_size=32)
    large.model.load_state_dict(small.model.state_dict())
    a, b = small.train_epoch(), large.train_epoch()
    assert small.step == large.step == 16
    for p, q in zip(small.model.parameters(), large.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["train_acc"] == b["train_acc"]


@pytest.mark.parametrize("sizes", [[16, 8], [8, 16]])
def test_accumulated_batches_of_unequal_size_are_one_large_batch(sizes):
    x, y = torch.randn(24, 3, 8, 8), torch.arange(24) % 4

    class Batches(list):
        def set_epoch(self, epoch, start_batch=0):
            pass

    parts, whole = (trainer(model=Tiny(bn=False), accumulate=n) for n in (2, 1))
    whole.model.load_state_dict(parts.model.state_dict())
    for run, split in ((parts, sizes), (whole, [24])):
        run.data = types.SimpleNamespace(train=Batches(zip(x.split(split), y.split(split))))
        run.train_epoch()
    for p, q in zip(parts.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("amp, error", [("none", 1e-3), ("fp16", 1e-2)])
def test_gradient_clipping_bounds_the_step(amp, error):
    settings = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    run = trainer(amp=amp, clip_grad_norm=0.01, **settings)
    before = [p.clone() for p in run.model.parameters()]
    run.train_epoch(stop_after(1))
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(run.model.parameters(), before)))
    assert moved == pytest.approx(0.01, rel=error)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(amp):
    seen = set()

    def loss(output, target, x):
        seen.add(output.dtype)
        return nn.functional.cross_entropy(output.float(), target)

    run = trainer(amp=amp, loss=loss, epochs=3)
    losses = [run.train_epoch()["train_loss"] for _ in range(3)]
    assert seen == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert losses[2] < 0.8 * losses[0]
    assert bool(run.state_dict()["scaler"]) == (amp == "fp16")
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_evaluation_computes_in_the_precision_of_training():
    run, seen = trainer(amp="bf16"), set()
    run.model.fc.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    run.evaluate(run.data.test)
    assert seen == {torch.bfloat16}


class TwoPasses:
    """An optimizer that evaluates its closure twice per step, as sharpness-aware ones do."""

    def __init__(self, base):
        self.base, self.param_groups = base, base.param_groups
        self.zero_grad, self.state_dict, self.load_state_dict = (
            base.zero_grad,
            base.state_dict,
            base.load_state_dict,
        )

    def first_step(self):
        pass

    def step(self, closure, scaler=None):
        closure()
        if scaler is None:
            self.base.step(closure)
        else:
            closure()
            scaler.step(self.base)


def test_an_optimizer_may_evaluate_its_closure_twice():
    calls = []

    def loss(output, target, x):
        calls.append(len(x))
        return nn.functional.cross_entropy(output, target)

    record = (run := trainer(wrap=TwoPasses, loss=loss)).train_epoch()
    assert len(calls) == 2 * run.step == 32
    assert record["images_per_s"] * record["seconds"] == pytest.approx(512)  # counted once
    assert 0 < record["train_acc"] <= 1
    scaled = trainer(wrap=TwoPasses, amp="fp16")
    before = [p.clone() for p in scaled.model.parameters()]
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    scaled.train_epoch(stop_after(2))
    assert scaled.scaler.get_scale() == 2.0**12, "updated once a step"
    assert not any(torch.equal(p, q) for p, q in zip(scaled.model.parameters(), before))


def test_compile_and_channels_last(monkeypatch):
    import functools

    plain = trainer()
    plain.train_epoch()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run = trainer(compile=True, channels_last=True)
    assert run.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    run.model.conv1.register_forward_pre_hook(lambda m, x: seen.append(x[0].stride()[1]))
    run.train_epoch()
    assert set(seen) == {1}  # images keep their channels together
    assert type(run.forward).__name__ == "OptimizedModule"
    assert "conv1.weight" in run.model.state_dict()  # no prefix in checkpoints


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(RuntimeError, match="the training loss became nan in epoch 0; a lower lr may help"):
        trainer(loss=lambda output, target, x: output.sum() * math.nan).train_epoch()


def test_learning_rate_schedules():
    cosine = lr_schedule("cosine", epochs=10)
    assert [cosine(0), cosine(5), cosine(10)] == pytest.approx([1, 0.5, 0])
    steps = lr_schedule("step", epochs=10, milestones=[0.5, 0.8], gamma=0.1)
    assert [steps(4.99), steps(5), steps(8)] == pytest.approx([1, 0.1, 0.01])
    thirds = lr_schedule("step", epochs=300, milestones=[0.3333, 0.6667], gamma=0.1)
    assert [thirds(e) for e in (99.998, 100, 199.998, 200)] == pytest.approx([1, 0.1, 0.1, 0.01])
    first = lr_schedule("step", epochs=4, milestones=[0.01, 0.99], gamma=0.1)
    assert first(0) == 1 and first(0.5) == pytest.approx(0.1) and first(3.99) == pytest.approx(0.01)
    halves = lr_schedule("step", epochs=3, milestones=[0.5], gamma=0.1)
    assert [halves(1.49), halves(1.5)] == pytest.approx([1, 0.1])
    both = lr_schedule("cosine_steps", epochs=10, milestones=[0.5], gamma=0.1)
    assert [both(0), both(5)] == pytest.approx([1, 0.05])
    warm = lr_schedule("cosine", epochs=10, warmup_epochs=2)
    assert [warm(1), warm(2), warm(6)] == pytest.approx([0.5, 1, 0.5])
    assert lr_schedule("constant", epochs=3)(2) == 1
    with pytest.raises(
        ValueError, match="schedule: 'linear' is not one of cosine, cosine_steps, step, constant"
    ):
        lr_schedule("linear", epochs=1)
    with pytest.raises(ValueError, match=r"warmup_epochs: 5 is not in \[0, epochs = 5\)"):
        lr_schedule("cosine", epochs=5, warmup_epochs=5)
    with pytest.raises(ValueError, match=r"milestones: \[100\] are not fractions of the epochs"):
        lr_schedule("step", epochs=200, milestones=[100])


def test_a_cosine_schedule_moves_within_an_epoch():
    seen = []
    run = trainer(lr=0.1, progress=lambda t: seen.append(t.optimizer.param_groups[0]["lr"]))
    run.train_epoch()
    assert seen == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 32)) for i in range(16)])


def test_a_schedule_keeps_the_ratios_of_the_rates():
    run = trainer("lsq", lr=0.1)
    run.optimizer.param_groups[1]["initial_lr"] = 0.01
    run.train_epoch(stop_after(3))
    first, second = (group["lr"] for group in run.optimizer.param_groups[:2])
    assert second == pytest.approx(first / 10)


def test_trainer_arguments():
    with pytest.raises(ValueError, match="amp: 'fp8' is not one of none, bf16, fp16"):
        Trainer(Tiny(), None, None, None, epochs=1, lr_factor=None, amp="fp8")
    with pytest.raises(ValueError, match="accumulate: 0 is not a positive number"):
        Trainer(Tiny(), None, None, None, epochs=1, lr_factor=None, accumulate=0)


def test_the_best_and_the_loss_scale_survive_a_resume():
    run, again = (trainer(amp="fp16") for _ in "ab")
    run.best_acc, run.best_loss = 0.75, 0.125
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run.train_epoch(stop_after(1))
    again.load_state_dict(run.state_dict())
    assert (again.best_acc, again.best_loss, again.scaler.get_scale()) == (0.75, 0.125, 8.0)


def test_seconds_before_a_stop_count():
    run = trainer()
    run.train_epoch(stop_after(2))
    run.seconds = 1000.0
    assert run.train_epoch()["seconds"] > 1000


def test_a_sharpness_aware_optimizer_knows_the_parallel_model(one_process):
    run = trainer("sam")
    assert run.optimizer.model is run.parallel is not None


def test_another_number_of_processes_cannot_continue():
    run = trainer()
    state = run.state_dict()
    state["random"] = state["random"] * 2
    with pytest.raises(ValueError, match="the checkpoint is of 2 processes and this run has 1"):
        run.load_state_dict(state)


def test_bn_reestimate_is_the_mean_over_batches():
    model, batches = Tiny(), [(torch.randn(16, 3, 8, 8) + 1, None) for _ in range(4)]
    model.bn.momentum, model.conv2.training = 0.3, False
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert bn_reestimate(model, batches, iterations=3) is model
    with torch.no_grad():
        outputs = [model.conv1(x) for x, _ in batches[:3]]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    var = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in outputs]).mean(0)
    torch.testing.assert_close(model.bn.running_mean, mean)
    torch.testing.assert_close(model.bn.running_var, var)
    assert model.bn.momentum == 0.3 and model.training and model.drop.training
    assert_same(dict(model.named_parameters()), {k: nn.Parameter(v) for k, v in before.items()})
    statistics = model.bn.running_mean.clone()
    with pytest.raises(ValueError, match="iterations: 0 is not a positive number"):
        bn_reestimate(model, batches, iterations=0)
    for loader, error, message in (
        ([], ValueError, "loader: it yields no batch"),
        (iter([]), ValueError, "loader: it yields no batch"),
        ([batches[0], {"x": 0}], TypeError, "loader must give tensors or .* tuples, got dict"),
    ):
        with pytest.raises(error, match=message):
            bn_reestimate(model, loader)
        assert torch.equal(model.bn.running_mean, statistics) and model.bn.momentum == 0.3
    for again in ((x for x, _ in batches[:3]), [(x, 0, "more") for x, _ in batches[:3]]):
        model.bn.running_mean.zero_()
        bn_reestimate(model, again, iterations=3)
        torch.testing.assert_close(model.bn.running_mean, statistics)


def test_reestimated_statistics_are_without_dropout():
    model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train(), torch.randn(64, 3) + 2
    bn_reestimate(model, [x], 1)
    torch.testing.assert_close(model[1].running_mean, x.mean(0))
    torch.testing.assert_close(model[1].running_var, x.var(0))
