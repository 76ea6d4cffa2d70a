"""Sweeps: the cells of a grid, and the same table after any interruption."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from tiny import TINY_RUN

from qkernels import cli, sweep
from qkernels.sweep import load_grid, run_cells
from qkernels.training import cells as cells_module
from qkernels.training import make_config
from qkernels.training.cells import Cell
from qkernels.training.engine import Trainer
from qkernels.training.run import Diverged

ROOT = Path(__file__).parents[1]
TINY = """
by = ["weight_bits"]
[settings]
recipe = "qgen"
model = "nin_d{depth}_w1"
data = "fake:3x8x8:4"
epochs = 2
lr = 0.01
[grid]
depth = [1, 2]
weight_bits = [32, 2]
"""


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "grid.toml").write_text(TINY)
    return tmp_path / "grid.toml"


def command(grid, out, *more):
    argv = ["sweep", str(grid), "--out", str(out), "--threads", "1", "--device", "cpu", *map(str, more)]
    return [sys.executable, "-m", "qkernels", *argv]


def tables(out):
    return [(out / name).read_text() for name in ("table.md", "table.json")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tables of the tiny grid, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "grid.toml").write_text(TINY)
    argv = [
        "sweep",
        str(folder / "grid.toml"),
        "--out",
        str(folder / "out"),
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    assert cli.main(argv) == 0
    return tables(folder / "out")


def test_qgens_grid_has_3_to_the_5_cells_at_four_precisions():
    found = load_grid("qgen")
    cells = [cell for cell, _ in found["cells"]]
    assert len(cells) == len({cell.name for cell in cells}) == 4 * 3**5 and found["by"] == ["weight_bits"]
    first = cells[0].arguments
    assert (first["model"], first["optimizer"], first["lr"], first["weight_bits"]) == (
        "nin_d2_w8",
        "sgd",
        0.1,
        32,
    )
    assert {c.arguments["lr"] for c in cells if c.arguments["optimizer"] == "rmsprop"} == {
        0.001,
        0.0005,
        0.0001,
    }
    other = load_grid("qgen", {"data": "digits", "epochs": 3})["cells"][-1][0].arguments
    assert other["data"] == "digits" and other["epochs"] == 3 and other["model"] == "nin_d4_w12"

    assert make_config(**first)["method"] == "" and make_config(**cells[1].arguments)["method"] == "lsq"


def test_qgens_settings_on_digits():
    small, whole = load_grid("qgen_digits")["cells"], load_grid("qgen")["cells"]
    assert len(small) == 27 * 4

    def settings(cells):
        return {
            tuple(cell.arguments[key] for key in ("optimizer", "lr", "weight_decay")) for cell, _ in cells
        }

    assert settings(small) == settings(whole)


def test_qgens_grid_of_cifar100_differs_in_depth_and_data_alone():
    ten, hundred = (load_grid(name)["cells"] for name in ("qgen", "qgen_cifar100"))
    for (a, axes), (b, others) in zip(ten, hundred, strict=True):
        assert others == {**axes, "depth": axes["depth"] + 1}
        model = f"nin_d{others['depth']}_w{others['width']}"
        assert b.arguments == {**a.arguments, "data": "cifar100:data", "model": model}


@pytest.mark.parametrize(
    "text, message",
    [
        ("[grids]\na = [1]", "grid: unknown key 'grids' in .*; known are by, settings, grid"),
        ("[grid]\nlr = 0.1", "grid.lr: 0.1 is not a list of values"),
        ("[grid]\nlr = []", "grid.lr: .. is not a list of values"),
        ("[grid]\ndepht = [1]", "grid.depht: no setting of that name, nor is {depht} in a setting's text"),
        ("[settings]\nrate = 1", "settings.rate: no setting of that name"),
        ("[grid]\ntraining = [{ rate = 1 }]", "settings.rate: no setting of that name"),
        ('by = ["seed"]\n[grid]\nlr = [0.1]', "by: 'seed' is no axis of the grid; axes are lr"),
        (
            '[settings]\nmodel = "nin_d{depth}"\n[grid]\nlr = [0.1]',
            "settings: {'depth'} in a setting's text is no",
        ),
        ("[grid]\nlr = [0.1, 0.1]", "grid: two cells are both named lr-0.1"),
        ("[grid\n", "is not valid TOML"),
    ],
)
def test_bad_grids_are_named(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_grid(tmp_path / "bad.toml")
    with pytest.raises(
        ValueError, match="grid: absent is neither a .toml file nor a grid of the package .qgen"
    ):
        load_grid("absent")


def test_bad_settings_fail_before_anything_is_written(tmp_path, grid, capsys):
    argv = command(grid, tmp_path / "out")[3:]
    for more, message in (
        (["--set", "schedule=linear"], "schedule: 'linear' is not one of"),
        (["--workers", "0"], "workers: 0 is not a positive number"),
        (["--set", "lrr=1"], "settings.lrr: no setting of that name"),
        (["--threads", "0"], "threads must be an int >= 1, got 0"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not there"),
        (["--data", "cifar10:/nowhere"], "/nowhere is not a folder"),
        (
            ["--set", "weight_bits=4"],
            "weight_bits: the axis weight_bits of the grid sets it, so it cannot be",
        ),
    ):
        assert cli.main([*argv, *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "axis, fixed, name",
    [
        ("epochs = [2, 3]", {"epochs": 5}, "epochs"),
        ("training = [{ lr = 0.1 }, { lr = 0.2 }]", {"lr": 5.0}, "training"),
        ("sharpness.rho = [0.1, 0.2]", {"sharpness": {"kind": "sam"}}, "sharpness.rho"),
        ("sharpness = [{ rho = 0.1 }]", {"sharpness.rho": 0.3}, "sharpness"),
    ],
)
def test_a_fixed_setting_is_no_axis(tmp_path, axis, fixed, name):
    (tmp_path / "g.toml").write_text("[grid]\n" + axis.replace("sharpness.rho", '"sharpness.rho"'))
    with pytest.raises(ValueError, match=f"{next(iter(fixed))}: the axis {name} of the grid sets it"):
        load_grid(tmp_path / "g.toml", fixed)
    assert (
        load_grid(tmp_path / "g.toml", {"weight_decay": 0.1})["cells"][0][0].arguments["weight_decay"] == 0.1
    )


def test_the_table_is_the_mean_over_cells(whole):
    text, values = whole[0].splitlines(), json.loads(whole[1])
    assert text[0].split("|")[1].strip() == "weight_bits" and "Generalization" in text[0]
    assert [row["weight_bits"] for row in values["rows"]] == [32, 2] and values["failed"] == {}
    for line, row in zip(text[2:], values["rows"], strict=True):
        assert (row["finished"], row["cells"]) == (2, 2)
        assert row["gap"] == pytest.approx(row["test_loss"] - row["train_loss"])
        shown = [cell.strip() for cell in line.split("|")[1:-1]]
        assert shown[:3] == [str(row["weight_bits"]), "2", f"{100 * row['train_acc']:.2f}"]


def test_killed_with_9_and_started_again_gives_the_same_table(tmp_path, grid, whole, capsys):
    """The workers of the killed process end by themselves; what they had claimed is trained on by the next."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(grid, out, "--workers", 2, "--set", "seed=0"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*/checkpoint")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(out.glob("*/result.json"))) < 4 and list((out / "claims").iterdir())
    assert cli.main(command(grid, out)[3:]) == 0
    assert tables(out) == whole
    deadline = time.monotonic() + 30
    while list((out / "claims").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)  # a worker of the killed process may have ended its cell just now
    assert not list((out / "claims").iterdir())
    assert capsys.readouterr().out.strip() == whole[0].strip()


def test_interrupted_then_continued_gives_the_same_table(tmp_path, grid, whole, monkeypatch, capsys):
    from qkernels.training.engine import Trainer

    plain, count = Trainer._step, iter(range(1, 10**6))

    def stepping(self, batches):
        if next(count) == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, batches)

    monkeypatch.setattr(Trainer, "_step", stepping)
    argv = command(grid, tmp_path / "out")[3:]
    assert cli.main(argv) == 130
    captured = capsys.readouterr()
    assert "stopped; continue with the same command" in captured.err and "1 of 2" in captured.out
    assert cli.main(argv) == 0 and tables(tmp_path / "out") == whole
    assert cli.main([*argv, "--set", "lr=0.02"]) == 2
    assert "lr = 0.02 differs from 0.01 of the run in" in capsys.readouterr().err


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, grid, capsys):
    argv = command(grid, tmp_path / "out", "--set", "epochs=1")[3:]
    grid.write_text(TINY.replace('by = ["weight_bits"]', 'by = ["depth"]').replace("[1, 2]", "[1, 9999]"))
    plain, cells_module.train = cells_module.train, failing(cells_module.train)
    try:
        assert cli.main(argv) == 1
    finally:
        cells_module.train = plain
    captured = capsys.readouterr()
    assert "the training loss became nan" in captured.err and "2 cells failed; --retry trains" in captured.err
    assert "0 of 2" in captured.out and len(json.loads(tables(tmp_path / "out")[1])["failed"]) == 2


def failing(train):
    """`train`, in which the largest networks diverge."""

    def training(config, *args, **options):
        if "9999" in config["model"]:
            args[0].mkdir()
            raise Diverged("the training loss became nan")
        return train(config, *args, **options)

    return training


def counting(monkeypatch, change=None):
    """The names of the cells that are trained from now on, and whether each was resumed."""
    trained, plain = [], cells_module.train

    def training(config, out, resume=False, **options):
        trained.append((out.name, resume))
        if change is not None:
            change(config)
        return plain(config, out, resume=resume, **options)

    monkeypatch.setattr(cells_module, "train", training)
    return trained


def test_an_error_that_is_not_the_settings_leaves_the_cell_to_be_trained(tmp_path, grid, capsys, monkeypatch):
    """The others go on, the same worker does not try it for ever, and the next call trains it."""
    argv = command(grid, tmp_path / "out", "--set", "epochs=1", "--quiet")[3:]

    def full(config):
        if config["model"] == "nin_d2_w1":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        trained = counting(patch, full)
        assert cli.main(argv) == 1 and len(trained) == 4
    err = capsys.readouterr().err
    assert err.count("OutOfMemoryError: CUDA out of memory") == 2 and "2 cells are left" in err
    assert not list((tmp_path / "out").glob("*/failure.json"))
    trained = counting(monkeypatch)
    assert cli.main(argv) == 0 and len(trained) == 2


def test_errors_of_several_workers_are_told(tmp_path, grid, capfd):
    text = TINY.replace("[32, 2]", "[2]") + 'quantizer = [{ act_noise = { kind = "Loud" } }]\n'
    grid.write_text(text)
    assert cli.main(command(grid, tmp_path / "out", "--workers", 2, "--quiet")[3:]) == 1
    err = capfd.readouterr().err
    assert (
        err.count("ValueError: quantizer.act_noise.kind: 'Loud' is not one of") == 2
        and "2 cells are left" in err
    )
    assert not list((tmp_path / "out").glob("*/config.json"))


def test_retry_trains_from_the_start_what_diverged(tmp_path, grid, capsys, monkeypatch):
    """Its checkpoint is one epoch away from diverging again, and is kept beside."""
    out = tmp_path / "out"
    grid.write_text(TINY.replace("[1, 2]", "[1]").replace("[32, 2]", "[32]"))
    argv = command(grid, out, "--quiet")[3:]
    cell = out / "depth-1_weight_bits-32"
    plain, calls = Trainer.train_epoch, []

    def diverging(self, stop):
        calls.append(self.epoch)
        if len(calls) == 2:
            for p in self.model.parameters():
                p.data.fill_(math.nan)
        return plain(self, stop)

    monkeypatch.setattr(Trainer, "train_epoch", diverging)
    assert cli.main(argv) == 1 and calls == [0, 1]
    error = "Diverged: the training loss became nan in epoch 1; a lower lr may help"
    assert json.loads((cell / "failure.json").read_text()) == {"error": error}
    assert (cell / "checkpoint.aside").is_dir() and not (cell / "checkpoint").exists()
    assert cli.main(argv) == 1 and calls == [0, 1]
    assert error in capsys.readouterr().err  # each time, even with --quiet
    assert cli.main([*argv, "--retry"]) == 0 and calls == [0, 1, 0, 1]
    assert not (cell / "failure.json").exists() and (cell / "result.json").exists()


def test_an_error_on_resume_keeps_the_run(tmp_path, monkeypatch):
    cell = Cell("cell", {**TINY_RUN, "recipe": "float", "epochs": 2})
    run_cells([cell], tmp_path, quiet=True, threads=1, device="cpu")
    (tmp_path / "cell" / "result.json").unlink()
    before = sorted(path for path in (tmp_path / "cell").rglob("*"))

    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    counting(monkeypatch, full)
    _, errors = run_cells([cell], tmp_path, quiet=True, threads=1, device="cpu")
    assert errors == {"cell": "OutOfMemoryError: CUDA out of memory"}
    assert before == sorted(path for path in (tmp_path / "cell").rglob("*"))


def test_ray_is_an_extra(tmp_path, grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    cells = [cell for cell, _ in load_grid(grid)["cells"]]
    with pytest.raises(ImportError, match="--engine ray needs Ray: pip install ray"):
        run_cells(cells, tmp_path / "out", engine="ray")


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cpu", 0)])
def test_ray_tasks_ask_for_a_gpu_where_there_are_any(tmp_path, monkeypatch, device, gpus):
    """Ray hides the GPUs from tasks that ask for none, and their working directory is not the caller's."""
    asked, ray = [], types.ModuleType("ray")
    ray.init, ray.cluster_resources, ray.get = lambda **_: None, lambda: {"CPU": 4.0, "GPU": 2.0}, list

    def remote(**resources):
        asked.append(resources)
        return lambda function: types.SimpleNamespace(
            remote=lambda *args, **_: (asked.append(args), (0, {args[1].name: "lost"}))[1]
        )

    ray.remote = remote
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.chdir(tmp_path)
    assert run_cells([], "out", 2, engine="ray", device=device, threads=1) == (0, {"out": "lost"})
    assert (asked[0]["num_cpus"], asked[0]["num_gpus"]) == (1, gpus)
    assert [args[1] for args in asked[1:]] == [tmp_path / "out"] * 2


def test_list_names_the_cells(grid, tmp_path, capsys):
    assert cli.main(["sweep", str(grid), "--out", str(tmp_path / "out"), "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert names[0] == "depth-1_weight_bits-32" and len(names) == 4 and not (tmp_path / "out").exists()
    assert sweep._known("sharpness.rho") and not sweep._known("depth")
