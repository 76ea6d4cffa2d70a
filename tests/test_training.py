"""The training loop, recipes and run folders: exact resume, and errors that say what is wrong."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import cli
from qkernels.training import bn_reestimate, build, checkpoint, load_run, make_config, train
from qkernels.training.data import build_data
from qkernels.training.engine import Interrupt, Trainer, lr_schedule
from qkernels.training.log import RunLog
from qkernels.training.recipe import available_recipes, load_recipe, parse_assignment
from qkernels.training.run import Interrupted

QUANTIZED = ["lsq", "lsq+", "pact", "dorefa", "saq_clip", "kd", "noise_tempering", "diffq", "ewgs", "fpq", "saq",
             "saq_vit", "sam", "sam_then_sgd"]  # fmt: skip
RECIPES = ["float", "float_sam", "qgen", "qgen_resnet", *QUANTIZED]
ROOT = Path(__file__).parents[1]
TINY = {"model": "tiny", "data": "fake:3x8x8:4", "batch_size": 32, "epochs": 2, "augment": False}


class Tiny(nn.Module):
    """Convolutions, BatchNorm and dropout: state, buffers and random numbers to lose."""

    def __init__(self, classes=4, bn=True):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8) if bn else nn.Identity()
        self.conv2, self.drop, self.fc = (
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.Dropout(0.1 if bn else 0.0),
            nn.Linear(32, classes),
        )

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(self.drop(torch.relu(self.conv2(x)).flatten(1)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """`--model tiny`, on one thread."""
    monkeypatch.setattr(
        build, "build_model", lambda name, classes, *_: Tiny(classes) if name == "tiny" else None
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(recipe="float", model=None, **changes):
    """A trainer of a tiny model, as `train` would build it."""
    options = {key: changes.pop(key) for key in ("progress", "loss", "wrap") if key in changes}
    config = make_config(**{**TINY, "recipe": recipe, **changes})
    torch.manual_seed(0)
    data = build_data(config["data"], config["batch_size"], 0, config["augment"])
    model = build.quantize(model or Tiny(), config)
    if config["method"]:
        qk.calibrate(model, data.train, batches=2)
    optimizer = options.pop("wrap", lambda base: base)(build.optimizer(model, config))
    loss = options.pop("loss", None) or build.loss(config, model, None)
    names = ("epochs", "amp", "accumulate", "clip_grad_norm", "compile", "channels_last")
    settings = {name: config[name] for name in names}
    schedule = lr_schedule(config["schedule"], epochs=config["epochs"])
    torch.manual_seed(1)
    return Trainer(model, optimizer, loss, data, lr_factor=schedule, **settings, **options)


def stop_after(steps):
    """A `stop` that is true at the n-th step boundary."""
    count = iter(range(1, 10**6))
    return lambda: next(count) == steps


def assert_same(a, b, where=""):
    """Equal bit for bit, through nested dicts, lists and tuples."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


# The loop


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


def test_gradient_clipping_bounds_the_step():
    run = trainer(lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad_norm=0.01, schedule="constant")
    before = [p.clone() for p in run.model.parameters()]
    run.train_epoch(stop_after(1))
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(run.model.parameters(), before)))
    assert moved == pytest.approx(0.01, rel=1e-3)


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

    def step(self, closure):
        closure()
        self.base.step(closure)


def test_an_optimizer_may_evaluate_its_closure_twice():
    calls = []

    def loss(output, target, x):
        calls.append(len(x))
        return nn.functional.cross_entropy(output, target)

    record = (run := trainer(wrap=TwoPasses, loss=loss)).train_epoch()
    assert len(calls) == 2 * run.step == 32
    assert record["images_per_s"] * record["seconds"] == pytest.approx(512)  # counted once
    assert 0 < record["train_acc"] <= 1
    with pytest.raises(ValueError, match="amp: 'fp16' scales gradients.*use 'bf16' or 'none'"):
        trainer(wrap=TwoPasses, amp="fp16")


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


def test_trainer_arguments():
    with pytest.raises(ValueError, match="amp: 'fp8' is not one of none, bf16, fp16"):
        Trainer(Tiny(), None, None, None, epochs=1, lr_factor=None, amp="fp8")
    with pytest.raises(ValueError, match="accumulate: 0 is not a positive number"):
        Trainer(Tiny(), None, None, None, epochs=1, lr_factor=None, accumulate=0)


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
    with pytest.raises(ValueError, match="loader: it yields no batch"):
        bn_reestimate(model, [])
    assert torch.equal(model.bn.running_mean, statistics)


# Recipes


def test_recipes_are_complete():
    assert set(RECIPES) <= available_recipes().keys()
    assert all(available_recipes().values()), "every recipe has a summary"
    for recipe in available_recipes():
        for data in ("digits", "cifar10:/somewhere", ""):
            settings = load_recipe(recipe, data)
            assert (settings["weight_bits"] == 32) == (not settings["method"]), recipe


def test_a_recipe_is_defaults_then_file_then_data_then_flags(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "lsq"\nlr = 0.5\nquantizer = { a = 1 }\n[data.digits]\nepochs = 7\n')
    settings = load_recipe(file, "digits", {"momentum": 0.5, "quantizer.b": 2, "lr": 1})
    assert settings["method"] == "lsq" and settings["epochs"] == 7 and settings["momentum"] == 0.5
    assert (
        settings["quantizer"] == {"a": 1, "b": 2} and settings["lr"] == 1.0 and type(settings["lr"]) is float
    )
    assert (
        settings["batch_size"] == load_recipe("lsq", "digits")["batch_size"]
    )  # the base's table still counts
    other = load_recipe(file, "cifar10:/x")
    assert other["epochs"] == load_recipe("lsq")["epochs"] and other["lr"] == 0.5


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"learning_rate": 1}, "overrides: unknown setting 'learning_rate'; known are summary, method,"),
        ({"epochs": "ten"}, "overrides: epochs = 'ten' is a str; expected int"),
        ({"epochs": True}, "overrides: epochs = True is a bool; expected int"),
        ({"epochs": 0}, "epochs: 0 is not a number of at least 1"),
        ({"float_epochs": -1}, "float_epochs: -1 is not a number of at least 0"),
        ({"calibration_batches": 0}, "calibration_batches: 0 is not a number of at least 1"),
        ({"bn_reestimate": -1}, "bn_reestimate: -1 is not a number of at least 0"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm: -1.0 is not a number of at least 0"),
        ({"gamma": -1.0}, "gamma: -1.0 is not a number of at least 0"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0 is not a number of at least 0"),
        ({"label_smoothing": 5.0}, "label_smoothing: 5.0 is not a number from 0 to 1"),
        ({"lr": math.nan}, "lr: nan is not a finite number"),
        ({"betas": [0.9, math.inf]}, "betas.1: inf is not a finite number"),
        ({"betas": ["a"]}, r"betas: \['a'\] holds something else than numbers"),
        ({"weight_decay_by_bits.2": "half"}, "weight_decay_by_bits: {.*'half'} holds something else"),
        ({"distill.weight": math.nan}, "distill.weight: nan is not a finite number"),
        ({"lr": -0.1}, "lr: -0.1 is not positive"),
        ({"optimizer": "lion"}, "optimizer: 'lion' is not one of sgd, adam, adamw, rmsprop"),
        ({"schedule": "linear"}, "schedule: 'linear' is not one of cosine, step"),
        ({"amp": "fp8"}, "amp: 'fp8' is not one of none, bf16, fp16"),
        ({"lr.x": 1}, "overrides: lr.x: lr is not a table"),
        ({"method": "", "distill.kind": "logits"}, "distill: needs a quantized method"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("lsq", "digits", overrides)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"threads": 0}, "--threads: 0 is not a number of at least 1"),
        ({"workers": -1}, "--workers: -1 is not a number of at least 0"),
        ({"tensorboard": True}, "--tensorboard needs tensorboard: pip install"),
    ],
)
def test_bad_options_fail_before_anything_is_written(tmp_path, monkeypatch, option, message):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises((ValueError, ImportError), match=message):
        train(make_config(**TINY, recipe="float"), tmp_path / "run", quiet=True, **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"model": ', "[1]"])
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_json_file_is_named(tmp_path, capsys, name, text):
    (tmp_path / "config.json").write_text(json.dumps(make_config(**TINY, recipe="float")))
    (tmp_path / name).write_text(text)
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / name} is " in said and "damaged: " in said and "complete" not in said


@pytest.mark.parametrize("terminal, period", [(True, 0.5), (False, 30.0)])
def test_progress_within_an_epoch_without_tqdm(tmp_path, capsys, monkeypatch, terminal, period):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    now = [100.0]
    monkeypatch.setattr("qkernels.training.log.time.monotonic", lambda: now[0])
    log = RunLog(tmp_path, 3, 0, 16)
    run = trainer()
    run.progress = lambda trainer: (now.__setitem__(0, now[0] + period / 4), log.step(trainer))
    run.train_epoch(stop_after(9))
    said = capsys.readouterr().err
    lines = said.split("\r\x1b[K")[1:] if terminal else said.splitlines()
    assert [line.split("  loss")[0] for line in lines] == ["epoch   1/3  step 4/16", "epoch   1/3  step 8/16"]
    log.say("above")
    assert capsys.readouterr().err == ("\r\x1b[Kabove\n" if terminal else "above\n")
    log.close()


def test_bad_recipe_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="recipe: 'lsk' is neither a .toml file nor one of .*float.*lsq"):
        load_recipe("lsk")
    (tmp_path / "bad.toml").write_text("lr = = 1")
    with pytest.raises(ValueError, match="bad.toml is not valid TOML"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("lrr = 1")
    with pytest.raises(ValueError, match="bad.toml: unknown setting 'lrr'"):
        load_recipe(tmp_path / "bad.toml")


def test_assignments():
    assert parse_assignment("lr=0.5") == ("lr", 0.5)
    assert parse_assignment("milestones=[0.5, 0.75]") == ("milestones", [0.5, 0.75])
    assert parse_assignment("nesterov=true") == ("nesterov", True)
    assert parse_assignment("schedule=step") == ("schedule", "step")
    with pytest.raises(ValueError, match="--set: 'lr' is not of the form key=value"):
        parse_assignment("lr")


@pytest.mark.parametrize("bits, factor", [(8, 1.0), (4, 1.0), (3, 0.5), (2, 0.25)])
def test_weight_decay_follows_the_bits(bits, factor):
    config = make_config(**{**TINY, "recipe": "lsq", "weight_bits": bits, "weight_decay": 1e-3})
    groups = build.optimizer(build.quantize(Tiny(), config), config).param_groups
    assert max(group["weight_decay"] for group in groups) == pytest.approx(1e-3 * factor)
    assert min(group["weight_decay"] for group in groups) == 0.0  # the step sizes


def test_logit_distillation_loss():
    teacher, x = Tiny(bn=False).eval(), torch.randn(5, 3, 8, 8)
    student, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    config = make_config(**{**TINY, "recipe": "kd", "distill.weight": 0.3, "distill.temperature": 2.0})
    got = build.loss(config, None, teacher)(student, target, x)
    with torch.no_grad():
        p, q = torch.softmax(teacher(x) / 2, 1), torch.softmax(student / 2, 1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.7 * nn.functional.cross_entropy(student, target) + 0.3 * 4 * divergence
    torch.testing.assert_close(got, expected)
    for change, message in (
        ({"distill.kind": "mimic"}, "distill.kind: 'mimic' is not one of logits, features"),
        ({"distill.tau": 1}, "distill: unknown tau; logits takes weight and temperature"),
        ({"sharpness.kind": "max"}, "sharpness.kind: 'max' is not one of sam, saq"),
    ):
        config = make_config(**{**TINY, "recipe": "kd", **change})
        with pytest.raises(ValueError, match=message):
            build.loss(config, None, teacher)
            build.optimizer(Tiny(), {**config, "method": ""})


@pytest.mark.parametrize(
    "model, bits, settings, rho",
    [
        ("tiny", 2, {}, 0.30),  # ResNet-18's
        ("tiny", 4, {}, 0.65),
        ("tiny", 8, {}, 0.65),  # the nearest that is given
        ("tiny", 3, {}, 0.30),
        ("resnet50", 4, {}, 0.95),
        ("mobilenet_v2", 2, {}, 0.40),
        ("resnet50", 4, {"sharpness.rho": 0.1}, 0.1),
    ],
)
def test_saq_takes_rho_by_model_and_bits(model, bits, settings, rho):
    config = make_config(**{**TINY, "recipe": "saq", "model": model, "weight_bits": bits, **settings})
    optimizer = build.optimizer(build.quantize(Tiny(), config), {**config, "clip_grad_norm": 2.0})
    assert {group["rho"] for group in optimizer.param_groups} == {rho}
    assert (optimizer.case, optimizer.every, optimizer.beta, optimizer.max_norm) == (3, 4, 0.7, 2.0)


@pytest.mark.parametrize(
    "recipe, change, message",
    [
        ("saq", {"sharpness.radius": 1.0}, "sharpness.radius: unknown; known are rho, case"),
        ("saq", {"sharpness.case": 4}, "case must be 1, 2 or 3, got 4"),
        ("saq", {"weight_bits": 32}, "case 3 needs a model with quantized weights"),
        ("fpq", {"distill.scale": 1.0}, "distill.scale: unknown; known are reduction"),
        ("fpq", {"weight_bits": 32, "act_bits": 32}, "distill: needs a quantized method"),
        ("fpq", {"float_recipe": ""}, "distill: needs a trained teacher; give init, or a float_recipe"),
        ("lsq", {"quantizer.axis": 1}, "quantizer.axis: unknown; known are method, weight_bits"),
        ("lsq", {"seed": 10**23}, "seed: 1000.* is not an integer from 0 to 9223372036854775807"),
        ("lsq", {"seed": -1}, "seed: -1 is not an integer from 0 to"),
        ("lsq", {"image_size": 0}, "image_size: 0 is not an integer from 1 to"),
        (
            "lsq",
            {"quantizer.act_noise": {"kind": "Tempering", "x": 1}},
            "quantizer.act_noise.x: unknown; known are c,",
        ),
        ("lsq", {"quantizer.act_noise": {"kind": "Tempering", "c": "a"}}, "c must be a number >= 0, got 'a'"),
        ("lsq", {"float_recipe": "none"}, "recipe: 'none' is neither a .toml file nor"),
        ("fpq", {"distill.weight": -7}, "distill.weight: -7 is not a number of at least 0"),
        (
            "kd",
            {"distill.weight": 2},
            "distill: weight=2, temperature=4.0; logits takes a weight from 0 to 1",
        ),
        ("kd", {"distill.temperature": -1.0}, "distill.temperature: -1.0 is not a number of at least 0"),
        ("saq", {"sharpness.rho_by_bits": 3}, "sharpness.rho_by_bits: 3 is not a table"),
        ("saq", {"amp": "fp16"}, "amp: 'fp16' scales gradients"),
    ],
)
def test_bad_arguments_of_the_methods_are_named(tmp_path, recipe, change, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(**{**TINY, "recipe": recipe, **change}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, kind", [("adam", "Adam"), ("adamw", "AdamW"), ("rmsprop", "RMSprop"), ("sgd", "SGD")]
)
def test_optimizers(name, kind):
    config = make_config(**{**TINY, "recipe": "lsq", "optimizer": name})
    assert type(build.optimizer(build.quantize(Tiny(), config), config)) is getattr(torch.optim, kind)


def test_clipping_with_two_passes_bounds_what_they_add_up_to():
    settings = {
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clip_grad_norm": 0.01,
        "schedule": "constant",
        "lr": 1.0,
    }
    run = trainer("saq", **settings, **{"sharpness.every": 1})
    before = [p.clone() for p in run.model.parameters()]
    run.train_epoch(stop_after(1))
    moved = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(run.model.parameters(), before)))
    assert moved == pytest.approx(0.01, rel=1e-3)


# Runs


def test_qgen_starts_from_random_weights_and_keeps_the_lowest_training_loss(tmp_path, monkeypatch):
    """The learning rate explodes in the last epoch, so that an earlier one is the best."""
    monkeypatch.setattr(
        "qkernels.training.run.lr_schedule", lambda *_, **__: lambda epoch: 1.0 if epoch < 2 else 300.0
    )
    config = make_config(**{**TINY, "recipe": "qgen", "epochs": 3, "lr": 0.01})
    result = train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "float").exists() and (result["weight_bits"], result["act_bits"]) == (
        4,
        32,
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[2]["train_loss"] > log[1]["train_loss"] < log[0]["train_loss"]
    assert result["test_loss"] == log[1]["test_loss"] != log[2]["test_loss"]
    assert_same(checkpoint.load_model(tmp_path / "run"), checkpoint.load_model(tmp_path / "run" / "selected"))
    initial = checkpoint.load_model(tmp_path / "run" / "initial.safetensors")
    torch.manual_seed(0)
    assert_same(initial["conv1.weight"], Tiny().conv1.weight.data)


def test_32_bits_are_floating_point(tmp_path):
    config = make_config(**{**TINY, "epochs": 1, "recipe": "qgen", "weight_bits": 32})
    assert config["method"] == "" and train(config, tmp_path / "run", quiet=True)["weight_bits"] == 32


def test_sam_then_sgd_trains_its_float_model_with_sam(tmp_path):
    config = make_config(**{**TINY, "epochs": 1}, recipe="sam_then_sgd", float_epochs=1)
    train(config, tmp_path / "run", quiet=True)
    start = json.loads((tmp_path / "run" / "float" / "config.json").read_text())
    assert start["recipe"] == "float_sam" and start["sharpness"]["kind"] == "sam" and not config["sharpness"]


def test_a_run_folder(tmp_path):
    out = tmp_path / "run"
    config = make_config(**TINY, recipe="float", seed=3)
    result = train(config, out, quiet=True, keep_best=True, tensorboard=True)
    assert json.loads((out / "config.json").read_text()) == config
    assert json.loads((out / "result.json").read_text()) == result
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1]
    keys = "epoch lr train_loss train_acc test_loss test_acc seconds step_ms images_per_s"
    assert all(line.keys() == set(keys.split()) for line in log)
    assert log[1]["test_acc"] == result["test_acc"] > 0.5
    expected = {"model": "tiny", "recipe": "float", "weight_bits": 32, "act_bits": 32, "seed": 3, "epochs": 2}
    assert result.items() >= expected.items() and result["params"] == sum(
        p.numel() for p in Tiny().parameters()
    )
    initial = checkpoint.load_model(out / "initial.safetensors")
    torch.manual_seed(3)
    assert_same(initial["conv1.weight"], Tiny().conv1.weight.data)
    assert list((out / "tensorboard").iterdir()) and checkpoint.load_model(out / "best")
    model, data, again = load_run(out)
    assert again == config and not model.training
    correct = sum((model(x).argmax(1) == target).sum().item() for x, target in data.test)
    assert correct / 128 == result["test_acc"]


def test_a_run_is_not_overwritten_and_a_complete_one_not_repeated(tmp_path, capsys):
    out = tmp_path / "run"
    config = make_config(**{**TINY, "epochs": 1}, recipe="float")
    result = train(config, out, quiet=True)
    with pytest.raises(
        FileExistsError, match="--out: .*run already holds a run; add --resume to continue it"
    ):
        train(config, out, quiet=True)
    before = (out / "log.jsonl").stat().st_mtime_ns
    assert train(config, out, resume=True) == result
    assert "this run is complete" in capsys.readouterr().err
    assert (out / "log.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"data": "mnist"}, ValueError, "spec='mnist': unknown data set"),
        ({"data": "cifar10:/nowhere"}, FileNotFoundError, "/nowhere is not a folder"),
        ({"init": "/nowhere"}, FileNotFoundError, "/nowhere is neither a .safetensors file nor a folder"),
        ({"schedule": "step", "milestones": [80]}, ValueError, "milestones: .80. are not fractions"),
        ({"sharpness": {"kind": "max"}}, ValueError, "sharpness.kind: 'max' is not one of sam, saq"),
    ],
)
def test_bad_input_fails_before_anything_is_written(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(make_config(**{**TINY, "recipe": "float", **changes}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    other = Tiny(classes=7).state_dict()
    other["more"] = other.pop("conv1.bias")
    checkpoint.save_tensors(tmp_path / "w.safetensors", other)
    message = (
        r"1 missing \(first: conv1.bias\), 1 unknown \(first: more\), 2 of another shape \(first: fc.bias\)"
    )
    with pytest.raises(
        ValueError, match="init: .*w.safetensors does not hold this network's weights: " + message
    ):
        build.load_weights(Tiny(), tmp_path / "w.safetensors")


def test_device_errors(tmp_path):
    config = make_config(**TINY, recipe="float")
    with pytest.raises(
        ValueError, match="--device: 'gpu' is not a device; expected auto, cpu, cuda or cuda:N"
    ):
        train(config, tmp_path / "run", device="gpu")
    with pytest.raises(ValueError, match="--device: 'cuda:99' is not there; this torch sees"):
        train(config, tmp_path / "run", device="cuda:99")
    with pytest.raises(FileNotFoundError, match="is not a run folder: it has no config.json"):
        load_run(tmp_path)


def interrupting(monkeypatch, step):
    """Makes the n-th training step of this process receive Ctrl-C."""
    plain, count = Trainer._step, iter(range(1, 10**6))

    def stepping(self, batches):
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, batches)

    monkeypatch.setattr(Trainer, "_step", stepping)


@pytest.mark.parametrize(
    "recipe, step",
    [
        ("float", 3),
        ("float", 16),
        ("lsq", 5),
        ("lsq", 40),
        ("fpq", 21),
        ("saq", 22),
        ("sam_then_sgd", 6),
        ("qgen", 19),
    ],
)
def test_ctrl_c_then_resume_is_the_uninterrupted_run(tmp_path, monkeypatch, capsys, recipe, step):
    """lsq trains 16 float steps first, so it is stopped once in the float phase and once after it."""
    config = make_config(**TINY, recipe=recipe, float_epochs=1, bn_reestimate=2)
    train(config, tmp_path / "whole", quiet=True)
    out = tmp_path / "part"
    handler = signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, step)
    with pytest.raises(
        Interrupted, match=r"stopped; continue with: qkernels train --out .*part --resume"
    ) as caught:
        train(config, out, quiet=True)
    assert caught.value.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) is handler
    assert not (out / "result.json").exists()
    result = train(config, out, resume=True)
    assert "continuing from" in capsys.readouterr().err
    assert_same(checkpoint.load_model(out), checkpoint.load_model(tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    timing = ("seconds", "step_ms")
    assert {k: v for k, v in result.items() if k not in timing} == {
        k: v for k, v in whole.items() if k not in timing
    }
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_a_second_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt()
        os.kill(os.getpid(), signal.SIGINT)


def test_log_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path, monkeypatch):
    """A crash between the log and the checkpoint leaves a line too many, perhaps half of one."""
    config, out = make_config(**TINY, recipe="float"), tmp_path / "run"
    interrupting(monkeypatch, 20)
    with pytest.raises(Interrupted):
        train(config, out, quiet=True)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"epoch": 1, "train_loss": 9}\n{"epoch": 2, "tr')
    train(config, out, resume=True, quiet=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1] and log[1]["train_loss"] < 9


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_quantized_recipes_train_and_reload(tmp_path, recipe):
    start = tmp_path / "float"
    train(make_config(**{**TINY, "epochs": 3}, recipe="float"), start, quiet=True)
    config = make_config(**TINY, recipe=recipe, init=start, weight_bits=4, act_bits=4)
    result = train(config, tmp_path / "q", quiet=True)
    assert result["test_acc"] > 0.5 and (result["weight_bits"], result["act_bits"]) == (4, 4)
    model, data, _ = load_run(tmp_path / "q")
    x, target = next(iter(data.test))
    trained = checkpoint.load_model(tmp_path / "q")
    assert_same(dict(model.state_dict()), trained)
    correct = sum((model(x).argmax(1) == target).sum().item() for x, target in data.test)
    assert correct / 128 == result["test_acc"]
    assert len(trained) > len(Tiny().state_dict())  # quantizers have state of their own


@pytest.mark.parametrize("recipe", ["float"])
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, recipe):
    common = ["-m", "qkernels", "train", "--recipe", recipe, "--model", "vit_tiny", "--data", "fake:3x8x8:4"]
    common += ["--epochs", "1", "--no-augment", "--lr", "0.01", "--device", "cpu", "--threads", "1"]
    one = [*common, "--batch-size", "64", "--out", str(tmp_path / "one")]
    two = [*common, "--batch-size", "32", "--out", str(tmp_path / "two")]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in (one, [*run, *two]):
        command = [sys.executable, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    weights = [checkpoint.load_model(tmp_path / name) for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-5)
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-4)
    assert done.stdout.count("test accuracy") == 1  # one process reports
