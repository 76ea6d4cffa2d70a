"""What a run keeps and reports: the weights of which epoch, and what they give once loaded and exported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, TINY_RUN

from qkernels import cli
from qkernels.training import checkpoint, load_run, make_config, train
from qkernels.training.engine import Trainer, evaluate
from qkernels.training.log import read_json, read_log

ROOT = Path(__file__).parents[1]


def test_best_is_the_epoch_of_the_highest_test_accuracy(tmp_path, monkeypatch):
    accuracies, evaluate = iter([0.9, 0.5, 0.5, 0.5]), Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda *args: (evaluate(*args)[0], next(accuracies)))
    run = tmp_path / "run"
    train(make_config(**TINY | TINY_RUN, recipe="lsq", float_recipe=""), run, quiet=True, keep_best=True)
    weights, state = checkpoint.load(run / "best")
    models = {which: load_run(run, which=which)[0] for which in ("best", "checkpoint")}
    assert state["epoch"] == 1 and not torch.equal(models["best"][0].weight, models["checkpoint"][0].weight)
    assert all(torch.equal(value, weights[name]) for name, value in models["best"].state_dict().items())
    x = torch.randn(4, 3, 8, 8)
    for which, model in models.items():
        out = tmp_path / f"{which}.pt2"
        command = ["export", str(run), "--format", "torch", "--out", str(out), "--which", which]
        assert cli.main(command) == 0
        assert torch.equal(torch.export.load(out).module()(x), model(x))


def test_the_selected_epoch_is_that_of_the_lowest_training_loss(tmp_path, monkeypatch):
    losses = iter([0.1, 1e9, 1.0, 1.0])
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: (next(losses), 0.5))
    train(make_config(**TINY | TINY_RUN, recipe="float", select="train_loss"), tmp_path, quiet=True)
    first, second = (line["train_loss"] for line in read_log(tmp_path))
    assert second < first and checkpoint.load(tmp_path / "selected")[1]["epoch"] == 2


def test_seconds_are_of_all_epochs(tmp_path):
    result = train(make_config(**TINY | TINY_RUN, recipe="float"), tmp_path, quiet=True)
    assert result["seconds"] == pytest.approx(sum(line["seconds"] for line in read_log(tmp_path)))


def test_two_processes_report_what_their_checkpoint_gives(tmp_path):
    """BatchNorm's statistics are each process's own while it trains."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "qkernels", "train", "--recipe", "float", "--model", "nin_d1_w1", "--quiet"]
    command += ["--data", "fake:3x8x8:4", "--epochs", "1", "--device", "cpu", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=100, env=env
    )
    assert done.returncode == 0, done.stderr
    model, data, _ = load_run(tmp_path)
    result = read_json(tmp_path / "result.json")
    assert evaluate(model, data.test) == pytest.approx((result["test_loss"], result["test_acc"]), rel=1e-5)
