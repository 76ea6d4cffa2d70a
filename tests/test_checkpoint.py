"""Checkpoints survive what happens to files: crashes at any point, truncation, other versions."""

import argparse
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels import files
from qkernels.training import checkpoint


def numbered(n):
    """A checkpoint whose every part says n."""
    return {"w": torch.full((64,), float(n))}, {"n": n, "momentum": torch.full((3,), n)}


def number_of(path):
    """The n of `numbered`, after checking that all parts agree."""
    model, state = checkpoint.load(path)
    n = state["n"]
    assert torch.equal(model["w"], torch.full((64,), float(n))) and torch.equal(
        state["momentum"], torch.full((3,), n)
    )
    return n


def test_everything_comes_back_as_it_went_in(tmp_path):
    state = {
        "plain": [1, 0.1, -1e-300, True, None, "text", "ünicode"],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "betas": (0.9, (0.999,))},
        "@odd": {"@tensor": 5},
        "empty": torch.empty(0, 4),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "int": torch.arange(4),
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "view": torch.randn(6, 4).t(),
    }
    weights = torch.randn(4, 4)
    checkpoint.save(tmp_path / "c", {"a": weights, "tied": weights, "extra": {"x": 1}}, state)
    model, back = checkpoint.load(tmp_path / "c")
    assert (
        torch.equal(model["a"], weights)
        and torch.equal(model["tied"], weights)
        and model["extra"] == {"x": 1}
    )
    assert back["plain"] == state["plain"] and back["@odd"] == state["@odd"]
    assert back["optimizer"]["betas"] == (0.9, (0.999,)) and list(back["optimizer"]["state"]) == [0, 7]
    for name in ("empty", "half", "int", "last", "view"):
        assert torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype
    assert back["last"].stride() == state["last"].stride()
    assert set(load_file(tmp_path / "c" / "model.safetensors")) == {"a", "tied"}


def test_a_value_json_lacks_is_refused_before_writing(tmp_path):
    with pytest.raises(
        TypeError, match=r"state\.deep\.1: a checkpoint cannot hold object; accepted are tensors"
    ):
        checkpoint.save(tmp_path / "c", {}, {"deep": [1, object()]})
    assert os.listdir(tmp_path) == []


def test_the_previous_checkpoint_is_kept(tmp_path):
    for n in range(3):
        checkpoint.save(tmp_path / "c", *numbered(n))
    assert number_of(tmp_path / "c") == 2 and number_of(tmp_path / "c.previous") == 1
    assert sorted(os.listdir(tmp_path)) == ["c", "c.previous"]


def test_an_exception_at_any_call_leaves_a_loadable_checkpoint(tmp_path, monkeypatch):
    calls, fail_at = 0, None

    def breaking(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError("the disk is gone")
            return function(*args, **kwargs)

        return call

    for module, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree"), (json, "dumps")):
        monkeypatch.setattr(module, name, breaking(getattr(module, name)))
    path = tmp_path / "c"
    checkpoint.save(path, *numbered(0))
    calls = 0
    checkpoint.save(path, *numbered(1))
    expected, total = 1, calls
    assert total >= 9
    for call in range(1, total + 1):
        calls, fail_at = 0, call
        with pytest.raises(OSError, match="the disk is gone"):
            checkpoint.save(path, *numbered(expected + 1))
        found = number_of(path)
        assert found in (expected, expected + 1)
        expected, calls = found + 1, total  # and the next save works, over whatever was left behind
        checkpoint.save(path, *numbered(expected))
        assert number_of(path) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 needs a POSIX process")
def test_kill_9_leaves_a_loadable_checkpoint(tmp_path):
    path, last, rng = tmp_path / "c", 0, random.Random(0)
    checkpoint.save(path, *numbered(0))
    kills = 0
    while kills < 30 or last <= 30:  # a busy machine saves less between two kills
        kills += 1
        child = os.fork()
        if child == 0:
            try:
                os.fsync = lambda descriptor: (
                    None
                )  # a killed process loses no written data, and faster saves hit more
                for n in range(last + 1, last + 10**6):
                    checkpoint.save(path, *numbered(n))
            finally:
                os._exit(1)
        time.sleep(0.002 + 0.03 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = number_of(path)
        assert found >= last
        last = found


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["half", "one byte short", "empty", "one bit"])
def test_a_damaged_file_is_named(tmp_path, file, damage):
    path = tmp_path / "c"
    checkpoint.save(path, *numbered(0))
    checkpoint.save(path, *numbered(1))
    data = (path / file).read_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    cut = {"half": data[: len(data) // 2], "one byte short": data[:-1], "empty": b"", "one bit": flipped}
    (path / file).write_bytes(cut[damage])
    with pytest.raises(
        checkpoint.DamagedCheckpoint,
        match=rf"{file} is truncated or damaged.*the one before it is in .*c\.previous",
    ):
        checkpoint.load(path)
    assert number_of(tmp_path / "c.previous") == 0


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_missing_file_is_named(tmp_path, file):
    checkpoint.save(tmp_path / "c", *numbered(0))
    (tmp_path / "c" / file).unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=rf"{file}.*there is no previous one") as caught:
        checkpoint.load(tmp_path / "c")
    assert caught.value.path == tmp_path / "c"


def test_no_checkpoint_and_another_version(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    checkpoint.save(tmp_path / "c", *numbered(0))
    index = tmp_path / "c" / "state.json"
    index.write_text(index.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(RuntimeError, match="has version 99; this qkernels reads version 1") as caught:
        checkpoint.load(tmp_path / "c")
    assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)  # it is whole, and worth keeping


def test_load_model_takes_a_file_a_checkpoint_or_a_run(tmp_path):
    checkpoint.save(tmp_path / "run" / "checkpoint", *numbered(4))
    save_file(numbered(5)[0], tmp_path / "w.safetensors")
    for path, n in (("run", 4), ("run/checkpoint", 4), ("w.safetensors", 5)):
        assert checkpoint.load_model(tmp_path / path)["w"][0] == n
    with pytest.raises(FileNotFoundError, match="neither a .safetensors, .pt or .pth file nor a folder"):
        checkpoint.load_model(tmp_path / "absent")
    (tmp_path / "w.safetensors").write_bytes(b"not tensors")
    with pytest.raises(RuntimeError, match="w.safetensors is not a whole safetensors file"):
        checkpoint.load_model(tmp_path / "w.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
def test_load_model_reads_state_dicts_of_torch_save(tmp_path, under, legacy):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    state = model.state_dict()
    value = state if under is None else {under: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    for name in ("w.pth", "w.pth.tar"):
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        found = checkpoint.load_model(tmp_path / name)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_other_files_of_torch_save_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    for value in ([torch.ones(2)], {"w": torch.ones(2), "epoch": 3}, {"state_dict": 1}, torch.ones(2)):
        torch.save(value, path)
        with pytest.raises(RuntimeError, match="w.pt holds no state dict: expected names and tensors"):
            checkpoint.load_model(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(RuntimeError, match="w.pt is not a whole file of torch.save with tensors alone: W"):
        checkpoint.load_model(path)
    torch.save({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    for data in (whole[:-200], whole[:3], b"", b"not a file of torch"):
        path.write_bytes(data)
        with pytest.raises(RuntimeError, match="w.pt is not a whole file of torch.save"):
            checkpoint.load_model(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, order = tmp_path / "a.json", []
    files.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"x": float("nan")})
    with pytest.raises(OSError, match="full"), files.whole(path) as part:
        assert part.suffix == ".json" and part.parent == tmp_path
        part.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == '{\n "x": 1\n}\n' and os.listdir(tmp_path) == ["a.json"]
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (order.append(name), call(*a))[1])
    files.write_text(path, "new")
    assert order == ["fsync", "replace"] and path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_random_state_round_trip(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()

    draw()
    checkpoint.save(tmp_path / "c", {}, {"random": checkpoint.random_state()})
    first = draw()
    assert draw() != first
    checkpoint.set_random_state(checkpoint.load(tmp_path / "c")[1]["random"])
    assert draw() == first
