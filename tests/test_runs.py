"""Run folders: what a run leaves, Ctrl-C, resume, and the recipes from end to end."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import QUANTIZED, TINY, Tiny, assert_same

from qkernels.training import build, checkpoint, load_run, make_config, run, train
from qkernels.training.config import check_unchanged, read_config
from qkernels.training.engine import Interrupt, Trainer
from qkernels.training.log import read_json
from qkernels.training.run import Diverged, Interrupted

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("tiny")


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
        FileExistsError, match=r"out: .*run already holds a run; add --resume \(resume=True\) to continue it"
    ):
        train(config, out, quiet=True)
    before = (out / "log.jsonl").stat().st_mtime_ns
    assert train(config, out, resume=True) == result
    assert "this run is complete" in capsys.readouterr().err
    assert (out / "log.jsonl").stat().st_mtime_ns == before


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    out, config = tmp_path / "run", make_config(**{**TINY, "epochs": 1}, recipe="float")
    during = []
    epochs = run._train_epochs

    def train_epochs(*args):
        for resume, message in ((False, "already holds a run"), (True, "another process trains in")):
            with pytest.raises(FileExistsError, match=message):
                train(config, out, resume=resume, quiet=True)
            during.append(resume)
        return epochs(*args)

    monkeypatch.setattr(run, "_train_epochs", train_epochs)
    assert train(config, out, quiet=True) == read_json(out / "result.json")
    assert during == [False, True]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"data": "mnist"}, ValueError, "spec='mnist': unknown data set"),
        ({"data": "cifar10:/nowhere"}, FileNotFoundError, "/nowhere is not a folder"),
        ({"init": "/nowhere"}, FileNotFoundError, "/nowhere is neither a .safetensors, .pt or .pth file"),
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


def test_weights_without_the_counters_of_batch_norm_load(tmp_path):
    """As torchvision's older files are."""
    torch.manual_seed(5)
    state = Tiny().state_dict()
    del state["bn.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth")
    model = build.load_weights(Tiny(), tmp_path / "w.pth")
    assert torch.equal(model.conv1.weight, state["conv1.weight"]) and model.bn.num_batches_tracked == 0


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_weights_of_wrapped_models_load(tmp_path, prefix):
    torch.manual_seed(5)
    state = Tiny().state_dict()
    torch.save({prefix + name: t for name, t in state.items()}, tmp_path / "w.pth")
    assert torch.equal(build.load_weights(Tiny(), tmp_path / "w.pth").conv1.weight, state["conv1.weight"])
    inner = torch.nn.ModuleDict({"module": Tiny()})
    torch.save(inner.state_dict(), tmp_path / "w.pth")
    build.load_weights(inner, tmp_path / "w.pth")


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


@pytest.mark.parametrize("recipe, needed", [("lsq", False), ("kd", True)])
def test_a_resumed_run_needs_its_float_weights_for_a_teacher_alone(tmp_path, monkeypatch, recipe, needed):
    """The path of --init holds in every working directory."""
    monkeypatch.chdir(tmp_path)
    train(make_config(**{**TINY, "epochs": 1}, recipe="float"), "float", quiet=True)
    config = make_config(**TINY, recipe=recipe, init="float")
    interrupting(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "q", quiet=True)
    config = read_config(tmp_path / "q")
    assert config["init"] == str(tmp_path / "float")
    check_unchanged(config, {"init": "float"}, {}, "q")
    monkeypatch.chdir("/")
    (tmp_path / "float").rename(tmp_path / "moved")
    if needed:
        with pytest.raises(FileNotFoundError, match="float is neither a .safetensors, .pt or .pth file"):
            train(config, tmp_path / "q", resume=True, quiet=True)
        (tmp_path / "moved").rename(tmp_path / "float")
    assert train(config, tmp_path / "q", resume=True, quiet=True)["epochs"] == 2


def test_a_run_of_an_earlier_version_continues(tmp_path, monkeypatch):
    """Its config lacks a setting that has been added since."""
    config = make_config(**TINY, recipe="lsq", float_epochs=1)
    interrupting(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "q", quiet=True)
    del config["calibration_images"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert train(read_config(tmp_path / "q"), tmp_path / "q", resume=True, quiet=True)["epochs"] == 2


def test_a_resumed_run_does_not_train_its_float_start_again(tmp_path, monkeypatch):
    config = make_config(**TINY, recipe="lsq", float_epochs=1)
    interrupting(monkeypatch, 20)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "q", quiet=True)
    shutil.rmtree(tmp_path / "q" / "float")
    assert train(config, tmp_path / "q", resume=True, quiet=True)["epochs"] == 2
    assert not (tmp_path / "q" / "float").exists()


def test_a_run_that_diverges_says_so(tmp_path, monkeypatch):
    with pytest.raises(Diverged, match="the training loss became nan in epoch 0; a lower lr may help"):
        train(make_config(**TINY, recipe="float", lr=1e30), tmp_path / "train", quiet=True)
    evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: (math.nan, 0.5))
    with pytest.raises(Diverged, match="the trained network's loss is nan on training and nan on test"):
        train(make_config(**{**TINY, "epochs": 1}, recipe="float"), tmp_path / "test", quiet=True)
    monkeypatch.setattr(Trainer, "evaluate", evaluate)

    def failing(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        train(make_config(**TINY, recipe="float"), tmp_path / "memory", quiet=True)


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


def test_processes_have_the_same_weights_and_noise_of_their_own(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(build, "build_model", lambda *_: (seeds.append(torch.initial_seed()), Tiny())[1])
    monkeypatch.setattr(run, "_train_epochs", lambda *_: seeds.append(torch.initial_seed()))
    monkeypatch.setattr("qkernels.training.distributed.rank", lambda: 3)
    monkeypatch.setattr("qkernels.training.distributed.world", lambda: 4)
    train(make_config(**TINY, recipe="float", seed=5), tmp_path / "run", quiet=True)
    assert seeds == [5, 8]


def test_the_teacher_is_in_evaluation(tmp_path, monkeypatch):
    teachers, loss = [], build.loss
    monkeypatch.setattr(build, "loss", lambda *args: (teachers.append(args[2]), loss(*args))[1])
    train(make_config(**TINY, recipe="kd", float_epochs=1), tmp_path / "run", quiet=True)
    assert not teachers[-1].training
    assert_same(dict(teachers[-1].state_dict()), checkpoint.load_model(tmp_path / "run" / "float"))


MAIN = """
import os, sys
from pathlib import Path
from qkernels import cli
assert cli.main(sys.argv[1:]) == 0
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
Path(__file__).with_name("threads" + os.environ["RANK"]).write_text("\\n".join(names))
"""


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    """The float start, then the quantized run, which is less near: a weight at a tie may round the other way."""
    common = ["-m", "qkernels", "train", "--recipe", "lsq", "--model", "vit_tiny", "--data", "fake:3x8x8:4"]
    common += ["--epochs", "1", "--float-epochs", "1", "--no-augment", "--lr", "0.01", "--device", "cpu"]
    common += ["--threads", "1"]
    one = [*common, "--batch-size", "64", "--out", str(tmp_path / "one")]
    two = [*common, "--batch-size", "32", "--out", str(tmp_path / "two")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "main.py").write_text(MAIN)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "main.py")]
    for command in (one, [*run, *two[2:]]):
        command = [sys.executable, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    first, second = (checkpoint.load_model(tmp_path / name / "float") for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)
    first, second = (checkpoint.load_model(tmp_path / name) for name in ("one", "two"))
    for name, value in first.items():  # without the exchange of gradients 7 % apart
        torch.testing.assert_close(
            value, second[name], rtol=0.0, atol=0.01 * value.double().abs().max().item()
        )
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=0.01)
    assert done.stdout.count("test accuracy") == 1  # one process reports
    for rank in (0, 1):  # gloo's threads can abort a process at its end
        names = (tmp_path / f"threads{rank}").read_text()
        assert "python" in names and "gloo" not in names
