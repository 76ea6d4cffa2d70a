"""One cell of a sweep: what it continues from, and which of several processes has it."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from tiny import TINY_RUN

from qkernels.sweep import run_cells
from qkernels.training import cells as cells_module
from qkernels.training import make_config
from qkernels.training.cells import Cell, check_cells, claim
from qkernels.training.engine import Trainer


def test_a_damaged_checkpoint_costs_an_epoch_not_the_run(tmp_path, monkeypatch):
    """First the one before it is tried, then the start; the float start stays; nothing is deleted."""
    cell = Cell("cell", {**TINY_RUN, "recipe": "lsq", "epochs": 4, "float_epochs": 1})
    run_cells([cell], tmp_path, quiet=True, threads=1, device="cpu")
    run = tmp_path / "cell"
    (whole := run / "result.json").rename(tmp_path / "whole.json")
    start = (run / "float" / "result.json").stat().st_mtime_ns
    (run / "checkpoint" / "model.safetensors").write_bytes(b"half")
    epochs, plain = [], Trainer.train_epoch
    monkeypatch.setattr(
        Trainer, "train_epoch", lambda self, stop: (epochs.append(self.epoch), plain(self, stop))[1]
    )
    run_cells([cell], tmp_path, quiet=True, threads=1, device="cpu")
    assert epochs == [3] and (run / "checkpoint.aside" / "model.safetensors").read_bytes() == b"half"
    for name in ("checkpoint", "checkpoint.previous"):
        (run / name / "state.json").unlink()
    whole.unlink()
    run_cells([cell], tmp_path, quiet=True, threads=1, device="cpu")
    assert epochs == [3, 0, 1, 2, 3] and (run / "float" / "result.json").stat().st_mtime_ns == start
    results = [json.loads(path.read_text()) for path in (whole, tmp_path / "whole.json")]
    assert results[0]["test_loss"] == results[1]["test_loss"]


@pytest.mark.parametrize("damaged", ["float/checkpoint", "selected"])
def test_a_damaged_part_of_a_run_is_made_again(tmp_path, damaged):
    """The end of a float start that was complete; what was selected. As if nothing had been damaged."""
    recipe = {"recipe": "qgen", "lr": 0.01} if damaged == "selected" else {"recipe": "lsq", "float_epochs": 2}
    cell = Cell("cell", {**TINY_RUN, **recipe, "epochs": 2})
    run_cells([cell], tmp_path, quiet=True, threads=1, device="cpu")
    run = tmp_path / "cell"
    whole = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    (run / damaged / "model.safetensors").write_bytes(b"half")
    for path in () if damaged == "selected" else run.glob("checkpoint*"):
        shutil.rmtree(path)
    _, errors = run_cells([cell], tmp_path, quiet=True, threads=1, device="cpu")
    assert not errors
    assert json.loads((run / "result.json").read_text())["test_loss"] == whole["test_loss"]


def test_float_weights_that_moved_are_found(tmp_path):
    start = Cell("start", {**TINY_RUN, "recipe": "float"})
    run_cells([start], tmp_path / "a", quiet=True, threads=1, device="cpu")

    def cell(place):
        init = str(tmp_path / place / "start")
        return Cell("cell", {**TINY_RUN, "recipe": "lsq", "init": init})

    run_cells([cell("a")], tmp_path, quiet=True, threads=1, device="cpu")
    (tmp_path / "cell" / "result.json").unlink()
    for path in (tmp_path / "cell").glob("checkpoint*"):
        shutil.rmtree(path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert run_cells([cell("b")], tmp_path, quiet=True, threads=1, device="cpu") == (0, {})
    assert (tmp_path / "cell" / "result.json").exists()


def test_other_float_weights_are_another_run(tmp_path):
    """The path says which they are; a folder that moved keeps its name."""

    def cell(init):
        return Cell("cell", {**TINY_RUN, "recipe": "lsq", "init": str(init)})

    for name in ("a/float_s0", "b/float_s0", "b/float_s1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out" / "cell").mkdir(parents=True)
    config = make_config(**cell(tmp_path / "a" / "float_s0").arguments)
    (tmp_path / "out" / "cell" / "config.json").write_text(json.dumps(config))
    check_cells([cell(tmp_path / "b" / ".." / "a" / "float_s0")], tmp_path / "out")
    for other in ("b/float_s0", "b/float_s1"):
        with pytest.raises(
            ValueError, match="init = '.*b/float_s.' differs from '.*a/float_s0' of the run in"
        ):
            check_cells([cell(tmp_path / other)], tmp_path / "out")
    (tmp_path / "a").rename(tmp_path / "c")
    check_cells([cell(tmp_path / "b" / "float_s0")], tmp_path / "out")
    with pytest.raises(ValueError, match="differs from"):
        check_cells([cell(tmp_path / "b" / "float_s1")], tmp_path / "out")


def test_a_living_claim_is_respected_and_a_dead_one_taken(tmp_path):
    with (
        claim(tmp_path, "cell") as first,
        claim(tmp_path, "cell") as second,
        claim(tmp_path, "cell.0") as other,
    ):
        assert (first, second, other) == (True, False, True)
    assert not list(tmp_path.iterdir())
    child = multiprocessing.get_context("spawn").Process(target=claim_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert [path.name for path in tmp_path.iterdir()] == ["cell.0"]
    with claim(tmp_path, "cell") as mine:
        assert mine and [path.name for path in tmp_path.iterdir()] == ["cell.1"]


def claim_and_die(folder):
    context = claim(folder, "cell")
    assert context.__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_claim_of_another_machine_is_void_without_signs_of_life(tmp_path):
    path = tmp_path / "cell.4"
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "started": "1"}))
    with claim(tmp_path, "cell") as mine:
        assert not mine
    long_ago = time.time() - 2 * cells_module.LEASE
    os.utime(path, (long_ago, long_ago))
    with claim(tmp_path, "cell") as mine:
        assert mine and [p.name for p in tmp_path.iterdir()] == ["cell.5"]


def test_an_owner_whose_claim_was_taken_ends(tmp_path, monkeypatch, capsys):
    """Else both would write the same run. One that gives its claim back goes on."""
    monkeypatch.setattr(cells_module, "BEAT", 0.01)
    monkeypatch.setattr(cells_module.os, "_exit", sys.exit)
    with claim(tmp_path, "cell.b"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    stop = threading.Event()
    (timer := threading.Timer(5.0, stop.set)).start()  # so that the test ends where the owner goes on
    with pytest.raises(SystemExit) as ended:
        cells_module._beat(tmp_path / "cell.b.0", stop, None)
    timer.cancel()
    assert ended.value.code == 1
    assert "another process has taken over cell.b; this one ends" in capsys.readouterr().err


def test_a_reused_process_id_is_not_taken_for_the_owner(tmp_path):
    owner = {**cells_module._self(), "started": "1"}
    (tmp_path / "cell.0").write_text(json.dumps(owner))
    with claim(tmp_path, "cell") as mine:
        assert mine


def test_only_one_of_many_gets_a_claim(tmp_path):
    """Sixteen threads at once, over a stale claim and over none."""
    from concurrent.futures import ThreadPoolExecutor

    for name, stale in (("a", True), ("b", False)):
        if stale:
            (tmp_path / f"{name}.0").write_text(json.dumps({**cells_module._self(), "started": "1"}))
        with ThreadPoolExecutor(16) as pool:
            taken = list(pool.map(lambda _, name=name: cells_module._take(tmp_path, name), range(64)))
        assert sum(path is not None for path in taken) == 1
