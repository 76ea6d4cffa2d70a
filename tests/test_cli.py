"""The command line: what it prints, and its exit codes 0 done, 1 failed, 2 bad arguments, 130 interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from timed import run

import qkernels as qk
from qkernels import cli

ROOT = Path(__file__).parents[1]
SMALL = [
    "--recipe",
    "float",
    "--model",
    "nin_d2_w1",
    "--data",
    "fake:3x8x8:4",
    "--threads",
    "1",
    "--device",
    "cpu",
]


def command(monkeypatch, main):
    """A command "probe" that runs `main`."""
    module = types.ModuleType("probe_command")
    module.add_arguments = lambda parser: parser.add_argument("--n", type=int)
    module.main = main
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "a probe"))


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, (_, text) in cli.COMMANDS.items():
        assert name in out and text.split(",")[0] in " ".join(out.split())


def test_every_public_name_is_there_and_has_a_docstring():
    assert set(qk.__all__) <= set(dir(qk))
    for name in qk.__all__:
        assert (getattr(qk, name).__doc__ or "").strip(), name
        assert name not in ("random", "importlib")  # `from qkernels import *` shadows nothing


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "qkernels", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout.startswith("qkernels ")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["train"], "--out: a folder for the run is needed"),
        (
            ["train", "--out", "{tmp}/x", "--recipe", "lsk"],
            "recipe: 'lsk' is neither a .toml file nor one of",
        ),
        (["train", "--out", "{tmp}/x", "--set", "lrr=1"], "unknown setting 'lrr'"),
        (["train", "--out", "{tmp}/x", "--set", "lr"], "--set: 'lr' is not of the form key=value"),
        (["train", "--out", "{tmp}/x", "--optimizer", "lion"], "optimizer: 'lion' is not one of sgd, adam,"),
        (["train", "--out", "{tmp}/x", "--lr", "nan"], "lr: nan is not a finite number"),
        (["train", "--out", "{tmp}/x", "--seed", "9" * 23], "seed: 9999"),
        (
            ["train", "--out", "{tmp}/x", "--recipe", "float", "--threads", "0"],
            "threads must be an int >= 1, got 0",
        ),
        (
            ["train", "--out", "{tmp}/x", "--image-size", "64"],
            "--image-size: is for folder:DIR; the images of digits have their own size",
        ),
        (
            ["train", "--out", "{tmp}/x", "--recipe", "float", "--act-bits", "4"],
            "act_bits: 4, but recipe float trains in floating point",
        ),
        (["train", "--out", "/dev/null", "--recipe", "float"], "out: /dev/null is not a folder"),
        (
            ["tables", "nt-noise", "--out", "{tmp}/x", "--threads", "0"],
            "--threads: 0 is not a positive number",
        ),
        (["train", "--out", "{tmp}/x", "--resume"], "is not a run folder: it has no config.json"),
        (["train", "--out", "{tmp}/x", "--recipe", "float", "--model", "resnet21"], "resnet21"),
        (["train", "--out", "{tmp}/x", "--recipe", "float", "--data", "cifar10:{tmp}/x"], "is not a folder"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(capsys, tmp_path, argv, message):
    code, out, err = run(capsys, *(word.format(tmp=tmp_path) for word in argv))
    assert code == 2 and out == ""
    assert err.startswith("qkernels: error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("bits: 9\nis too many"), 2, "bits: 9 is too many"),
        (FileNotFoundError("no such run"), 2, "no such run"),
        (RuntimeError("the loss became nan"), 1, "the loss became nan"),
        (ImportError("pip install qkernels[train]"), 1, "pip install qkernels[train]"),
        (OSError("disk full"), 1, "disk full"),
        (KeyError("x"), 1, "KeyError: 'x' (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(capsys, monkeypatch, error, code, text):
    def fail(args):
        raise error

    command(monkeypatch, fail)
    assert run(capsys, "probe") == (code, "", f"qkernels: error: {text}\n")


def test_debug_shows_the_traceback(capsys, monkeypatch):
    command(monkeypatch, lambda args: [][args.n])
    assert run(capsys, "probe", "--n", "1")[0] == 1
    with pytest.raises(IndexError, match="list index out of range"):
        cli.main(["probe", "--n", "1", "--debug"])


def test_the_exit_code_is_the_commands(capsys, monkeypatch):
    command(monkeypatch, lambda args: args.n)
    assert run(capsys, "probe", "--n", "1")[0] == 1 and run(capsys, "probe", "--n", "0")[0] == 0


def test_an_import_error_inside_a_command_is_reported(capsys, monkeypatch, tmp_path):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "probe", ("needs_more", "a probe"))
    code, _, err = run(capsys, "probe")
    assert code == 1 and "No module named 'a_package_that_is_absent'" in err


def test_list_recipes(capsys):
    code, out, _ = run(capsys, "train", "--list-recipes")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and {"float", "lsq", "lsq+", "pact", "dorefa", "saq_clip", "kd"} <= set(names)
    assert all(len(line.split()) > 2 for line in out.splitlines())


def test_train_resume_and_conflicts(capsys, tmp_path):
    out = tmp_path / "run"
    code, stdout, stderr = run(capsys, "train", *SMALL, "--epochs", 2, "--lr", "0.05", "--out", out)
    assert code == 0 and stdout.startswith(f"{out}: test accuracy ") and stdout.count("\n") == 1
    assert "epoch   1/2" in stderr and "images/s" in stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["epochs"], config["lr"], config["model"]) == (2, 0.05, "nin_d2_w1")
    code, _, stderr = run(capsys, "train", *SMALL, "--out", out)
    assert code == 2 and "already holds a run; add --resume" in stderr
    code, _, stderr = run(capsys, "train", "--out", out, "--resume", "--lr", "0.1")
    assert code == 2 and "--resume: lr = 0.1 differs from 0.05 of the run" in stderr
    code, stdout, stderr = run(capsys, "train", *SMALL, "--lr", "0.05", "--out", out, "--resume")
    assert code == 0 and "this run is complete" in stderr and "test accuracy" in stdout


def test_a_damaged_checkpoint_is_reported(capsys, tmp_path):
    out = tmp_path / "run"
    assert run(capsys, "train", *SMALL, "--epochs", 1, "--out", out, "--quiet")[0] == 0
    (out / "result.json").unlink()
    file = out / "checkpoint" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    code, _, stderr = run(capsys, "train", "--out", out, "--resume")
    assert code == 1 and "model.safetensors is truncated or damaged" in stderr and stderr.count("\n") == 1


def test_ctrl_c_in_a_real_process(tmp_path, interrupted_codes):
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "qkernels", "train", *SMALL, "--epochs", "2000", "--out", str(out)]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode in interrupted_codes
    assert f"qkernels: stopped; continue with: qkernels train --out {out} --resume" in stderr
    assert not (out / "result.json").exists()


def test_demo_compares_three_runs_and_resumes(capsys, tmp_path):
    argv = (
        "demo",
        "--out",
        tmp_path / "demo",
        "--model",
        "nin_d2_w1",
        "--epochs",
        1,
        "--threads",
        1,
        "--device",
        "cpu",
    )
    code, out, err = run(capsys, *argv)
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert code == 0 and [row[0] for row in rows] == ["float", "w4a4", "w2a2"]
    assert [row[1] for row in rows] == ["32", "4", "2"] and "[3/3] w2a2" in err
    results = [json.loads((tmp_path / "demo" / row[0] / "result.json").read_text()) for row in rows]
    assert all(f"{result['test_acc']:.2%}" in row for row, result in zip(rows, results))
    code, _, err = run(capsys, *argv)
    assert code == 2 and "already holds a demo; add --resume, or choose another folder" in err
    assert run(capsys, *argv, "--resume")[1] == out
