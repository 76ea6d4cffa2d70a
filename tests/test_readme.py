"""Every block of the README runs as written."""

import copy
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


def names(block):
    """What the reader has already: a model (quantized, where the block trains or measures one), data, tensors."""
    torch.manual_seed(0)
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
    if "quantize_" in block:
        return found | {"model": model}
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


@pytest.mark.parametrize(
    "line", [line for b in blocks("") for line in b.splitlines() if line.startswith("qkernels ")]
)
def test_command_parses(line):
    words = shlex.split(line, comments=True)[1:]
    assert callable(cli.parse(words).run)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))))
def test_make_target_exists(line):
    assert re.search(rf"^{line}:", (Path(__file__).parent.parent / "Makefile").read_text(), re.MULTILINE)
