"""Every block of the README runs as written."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return [
        text
        for found, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        if found == language
    ]


def names():
    """What the README's reader has already: a model, data, tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )  # fmt: skip
    return {
        "qk": qk, "torch": torch, "model": model, "criterion": nn.CrossEntropyLoss(), "float_model": model,
        "loader": [(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))) for _ in range(2)],
        "x": torch.randn(6, 128), "w": torch.randn(6, 128), "scale": torch.tensor([0.1]),
        "scales": torch.full((6,), 0.1), "group_scales": torch.full((12,), 0.1), "beta": torch.tensor([-0.2]),
        "z": 3, "g": 0.1, "seed": torch.tensor([7]),
    }  # fmt: skip


@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: b.strip().splitlines()[-1][:40])
def test_python_block(block):
    exec(compile(block, "README.md", "exec"), names())


def test_conversion_keeps_the_outputs():
    block = next(b for b in blocks("python") if "convert_" in b)
    before, last = block.rsplit("qk.convert_", 1)
    space = names()
    exec(before, space)
    model, x = space["model"].eval(), space["loader"][0][0]
    expected = model(x)
    exec("qk.convert_" + last, space)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "line", [line for b in blocks("") for line in b.splitlines() if line.startswith("qkernels ")]
)
def test_command_parses(line):
    words = shlex.split(line, comments=True)[1:]
    assert callable(cli.parse(words).run)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))))
def test_make_target_exists(line):
    assert re.search(rf"^{line}:", (Path(__file__).parent.parent / "Makefile").read_text(), re.MULTILINE)
