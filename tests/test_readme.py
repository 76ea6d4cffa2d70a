"""The README: its Python blocks run as written, its commands in order and with options that make them small.

Of its make targets only the names are checked; what lists should be complete, is.
"""

import copy
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import cli, quantizers
from qkernels.training.recipe import available_recipes

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return [
        text
        for found, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        if found == language
    ]


def names(block):
    """What the reader has already: a quantized model where the block trains or measures one, data, tensors."""
    torch.manual_seed(0)
    if "import torch" in block:
        return {}  # complete as it is
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )  # fmt: skip
    criterion, loader = nn.CrossEntropyLoss(), [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(2)]
    found = {
        "qk": qk,
        "torch": torch,
        "criterion": criterion,
        "loader": loader,
        "float_model": copy.deepcopy(model),
    }
    if "fake_quantize" in block:
        return found | {
            "x": torch.randn(6, 128), "w": torch.randn(6, 128), "scale": torch.tensor([0.1]), "z": 3, "g": 0.1,
            "scales": torch.full((6,), 0.1), "group_scales": torch.full((12,), 0.1), "beta": torch.tensor([-0.2]),
            "seed": torch.tensor([7]),
        }  # fmt: skip
    state = copy.deepcopy(model.state_dict())
    model, (x, target) = qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=4)), loader[0]
    qk.calibrate(model, loader)

    def closure():
        model.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        return loss

    closure()
    return found | {
        "model": model, "closure": closure, "base": torch.optim.SGD(model.parameters(), lr=0.01), "x": x,
        "target": target, "params": list(model.parameters()), "state_at_init": state,
    }  # fmt: skip


@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: b.strip().splitlines()[-1][:40])
def test_python_block(block):
    exec(compile(block, "README.md", "exec"), names(block))


def test_conversion_keeps_the_outputs():
    block = next(b for b in blocks("python") if "convert_" in b)
    before, last = block.rsplit("qk.convert_", 1)
    space = names(block)
    exec(before, space)
    model, x = space["model"].eval(), space["loader"][0][0]
    expected = model(x)
    exec("qk.convert_" + last, space)
    assert torch.equal(model(x), expected)


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in blocks("")
    for line in block.splitlines()
    if line.startswith("qkernels ")
]
# Options after the README's own, which they override.
_TRAINING = ["--model", "nin_d1_w1", "--epochs", "1", "--threads", "1"]
_RUN = [*_TRAINING, "--float-epochs", "1"]
_CELL = ["--set", "batch_size=512", "--threads", "1"]
SMALL = {
    "train --recipe": [*_RUN, "--batch-size", "512", "--quiet"],
    "measure": ["--quick", "--batches", "1", "--threads", "1", "--quiet"],
    "bench": ["--backends", "native", "--only", "64x64x3x3", "--repeats", "1", "--threads", "1"],
    "sweep": [*_CELL, "--set", "float_epochs=1"],
    "tables": [*_RUN, *_CELL, "--seeds", "1", "--bits", "4", "--batches", "1", "--quiet"],
    "demo": _TRAINING,
}
GRID = """
[settings]
recipe = "lsq"
model = "nin_d1_w1"
data = "digits"
epochs = 1
[grid]
weight_bits = [4]
"""


def test_commands_run_in_order(tmp_path, monkeypatch):
    for extra in ("matplotlib", "onnx", "onnxruntime", "sklearn"):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text(GRID)
    for words in COMMANDS:
        if words[0] == "compare":  # with what the reader measures later
            shutil.copy("base.json", "new.json")
        more = [option for start, option in SMALL.items() if " ".join(words).startswith(start)]
        assert cli.main([*words, *sum(more, [])]) == 0, words
    made = "runs/lsq4/measures.json report.html base.json runs/grid/table.md runs/saq/saq-cases.md lsq4.onnx"
    assert all((tmp_path / name).stat().st_size for name in made.split())


def test_the_lists_are_complete():
    method = re.search(
        r"^`method` is one of (.*?)\. The layers\s+are (.*?):", README, re.MULTILINE | re.DOTALL
    )
    assert set(re.findall(r"`(.*?)`", method[1])) == set(quantizers.WEIGHT)
    layers = {name.removeprefix("qk.nn.") for name in re.findall(r"`(.*?)`", method[2])}
    assert layers == {form.__name__ for form in qk.nn.QUANTIZED.values()}
    assert {words[0] for words in COMMANDS} == set(cli.COMMANDS)
    listed = re.search(r"^Recipes are .*?: (.*?)\.\s+`--data`", README, re.MULTILINE | re.DOTALL)[1]
    assert sorted(re.findall(r"`(.*?)`", listed)) == sorted(available_recipes())


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))))
def test_make_target_exists(line):
    assert re.search(rf"^{line}:", (Path(__file__).parent.parent / "Makefile").read_text(), re.MULTILINE)
