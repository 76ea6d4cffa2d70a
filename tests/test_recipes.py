"""Recipes and their methods: the settings they accept, the losses and decays they compute."""

import json
import math
import sys
import types

import pytest
import torch
from tiny import QUANTIZED, TINY, Tiny, assert_same, stop_after, trainer
from torch import nn

from qkernels import cli
from qkernels.sharpness import measure_command
from qkernels.training import build, checkpoint, load_run, make_config, train
from qkernels.training.config import float_config
from qkernels.training.log import RunLog
from qkernels.training.recipe import available_recipes, load_recipe, parse_assignment

pytestmark = pytest.mark.usefixtures("tiny")


def test_recipes_are_complete():
    assert {"float", "float_sam", "qgen", "qgen_resnet", *QUANTIZED} <= available_recipes().keys()
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
        ({"weight_bits": 99}, "weight_bits: 99 is not 2 to 8, or 32 for floating point"),
        ({"calibration_images": -1}, "calibration_images: -1 is not a number of at least 0"),
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
    "images, processes, seen", [(0, 1, 96), (40, 1, 40), (40, 3, 14), (97, 1, 97), (200, 1, 128)]
)
def test_calibration_takes_the_first_images(monkeypatch, images, processes, seen):
    """Without a number of images three batches of 32; processes share them, and a batch is never one image."""
    config = make_config(**TINY, recipe="lsq", calibration_batches=3, calibration_images=images)
    x, taken, model = torch.randn(128, 3, 8, 8), [], build.quantize(Tiny(), config)
    data = types.SimpleNamespace(train=list(zip(x.split(32), torch.zeros(128).split(32), strict=True)))
    model.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    monkeypatch.setattr("qkernels.training.distributed.world", lambda: processes)
    build.calibrate(model, data, config)
    assert torch.equal(torch.cat(taken), x[:seen]) and len({len(part) // 2 for part in taken}) == 1


@pytest.mark.parametrize(
    "option, message",
    [
        ({"threads": 0}, "threads must be an int >= 1, got 0"),
        ({"workers": -1}, "workers must be an int >= 0, got -1"),
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


def test_batchnorm_is_re_estimated_for_mobilenet_alone():
    """SAQ, appendix A: for MobileNetV2, as PROFIT does, and "unless otherwise specified" not."""
    assert {name for name in available_recipes() if load_recipe(name)["bn_reestimate"]} == {"saq_mobilenet"}
    mobilenet = load_recipe("saq_mobilenet")
    assert (mobilenet["epochs"], mobilenet["weight_decay"], mobilenet["bn_reestimate"]) == (140, 4e-5, 10)
    assert mobilenet["quantizer"]["act_offset"] is True
    assert (
        mobilenet["sharpness"]["rho"] == mobilenet["sharpness"]["rho_by_model"]["mobilenet_v2"]["4"] == 0.40
    )


def test_the_float_start_has_the_seed_and_the_images_of_the_run():
    same = {"model": "nin_d1_w1", "data": "fake:3x8x8:4", "seed": 5}
    same |= {"image_size": 96, "batch_size": 17, "augment": False}
    start = float_config(make_config(recipe="lsq", float_epochs=3, **same))
    assert start == {**start, **same, "epochs": 3, "recipe": "float"}


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


def test_label_smoothing_reaches_the_loss():
    y, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    got = build.loss(make_config(**TINY, recipe="lsq", label_smoothing=0.2), None, None)(y, target, None)
    torch.testing.assert_close(got, nn.functional.cross_entropy(y, target, label_smoothing=0.2))


def test_feature_distillation_has_its_weight():
    x, target, teacher = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0]), Tiny(bn=False).eval()
    student, losses = build.quantize(Tiny(bn=False), make_config(**TINY, recipe="lsq")), []
    for weight in (0.0, 0.1, 0.2):
        config = make_config(**TINY, recipe="fpq", **{"distill.weight": weight})
        losses.append(build.loss(config, student, teacher)(student(x), target, x).item())
    assert (
        losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)
        and losses[1] > losses[0]
    )


@pytest.mark.parametrize(
    "model, bits, settings, rho",
    [
        ("tiny", 2, {}, 0.30),  # ResNet-18's
        ("tiny", 4, {}, 0.65),
        ("tiny", 8, {}, 0.65),  # the nearest that is given
        ("tiny", 3, {}, 0.30),
        ("resnet50", 4, {}, 0.95),
        ("mobilenet_v2", 2, {}, 0.40),
        ("torchvision:mobilenet_v2", 4, {}, 0.40),
        ("timm:mobilenetv2_100", 4, {"recipe": "saq_mobilenet"}, 0.40),
        ("timm:vit_base_patch32_224", 2, {"recipe": "saq_vit"}, 0.01),
        ("resnet50", 4, {"sharpness.rho": 0.1}, 0.1),
    ],
)
def test_saq_takes_rho_by_model_and_bits(model, bits, settings, rho):
    config = make_config(**{**TINY, "recipe": "saq", "model": model, "weight_bits": bits, **settings})
    config["optimizer"] = "sgd"
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
        ("float", {"sharpness.kind": "saq"}, "sharpness.kind: 'saq' needs a quantized method; 'sam' is for"),
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
    ],
)
def test_bad_arguments_of_the_methods_are_named(tmp_path, recipe, change, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(**{**TINY, "recipe": recipe, **change}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_layers_of_their_own_bits():
    own = {"conv2": {"weight_bits": 3, "act_noise": {"kind": "Tempering", "c": 0.1}, "act_bits": "none"}}
    model = build.quantize(Tiny(), make_config(**{**TINY, "recipe": "lsq", "quantizer.overrides": own}))
    assert model.conv2.weight_quantizer.bits == 3 and model.conv2.input_quantizer is None
    with pytest.raises(ValueError, match="overrides.'conv2'. must be a dict of act_bits, .*got {'bits': 3}"):
        build.quantize(
            Tiny(), make_config(**{**TINY, "recipe": "lsq", "quantizer.overrides": {"conv2": {"bits": 3}}})
        )


@pytest.mark.parametrize(
    "name, kind", [("adam", "Adam"), ("adamw", "AdamW"), ("rmsprop", "RMSprop"), ("sgd", "SGD")]
)
def test_optimizers(name, kind):
    config = make_config(**{**TINY, "recipe": "lsq", "optimizer": name})
    assert type(build.optimizer(build.quantize(Tiny(), config), config)) is getattr(torch.optim, kind)


def test_settings_reach_the_optimizer():
    sgd = build.optimizer(Tiny(), make_config(**TINY, recipe="float", momentum=0.7, nesterov=True))
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.7, True)
    adam = build.optimizer(Tiny(), make_config(**TINY, recipe="float", optimizer="adamw", betas=[0.8, 0.95]))
    assert adam.defaults["betas"] == (0.8, 0.95)


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
        "qkernels.training.start.lr_schedule", lambda *_, **__: lambda epoch: 1.0 if epoch < 2 else 300.0
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
    state = checkpoint.load(tmp_path / "run" / "checkpoint")[1]
    assert (state["weights_epoch"], state["epoch"]) == (2, 3)
    run = types.SimpleNamespace(out=tmp_path / "run", model=load_run(tmp_path / "run")[0])
    assert [epoch for epoch, _ in measure_command.Run.kept(run)] == [0, 2]  # as labels of `measure --figures`
    initial = checkpoint.load_model(tmp_path / "run" / "initial.safetensors")
    torch.manual_seed(0)
    assert_same(initial["conv1.weight"], Tiny().conv1.weight.data)


@pytest.mark.parametrize(
    "recipe, kind", [("saq", None), ("saq_vit", None), ("kd", None), ("fpq", None), ("sam", "sam")]
)
def test_32_bits_clear_what_needs_quantizers(tmp_path, recipe, kind):
    """So that an axis of bits may include them."""
    config = make_config(**{**TINY, "epochs": 1, "recipe": recipe, "weight_bits": 32, "act_bits": 32})
    assert config["sharpness"].get("kind") == kind and not config["distill"] and not config["method"]
    assert train(config, tmp_path / "run", quiet=True)["test_acc"] > 0


def test_32_bits_are_floating_point(tmp_path):
    config = make_config(**{**TINY, "epochs": 1, "recipe": "qgen", "weight_bits": 32})
    assert config["method"] == "" and train(config, tmp_path / "run", quiet=True)["weight_bits"] == 32


def test_sam_then_sgd_trains_its_float_model_with_sam(tmp_path):
    config = make_config(**{**TINY, "epochs": 1}, recipe="sam_then_sgd", float_epochs=1)
    train(config, tmp_path / "run", quiet=True)
    start = json.loads((tmp_path / "run" / "float" / "config.json").read_text())
    assert start["recipe"] == "float_sam" and start["sharpness"]["kind"] == "sam" and not config["sharpness"]
