"""The multi-tensor ops in Triton against the reference: elements bit for bit, sums within rounding."""

import math

import pytest
import torch

import qkernels as qk
from qkernels import ops, reference
from qkernels import triton as launchers

SEED = [-5]


def tensors(seed, device):
    g = torch.Generator().manual_seed(seed)
    made = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made += [
            torch.randn(4, 3, 3, 3, generator=g).to(memory_format=torch.channels_last),
            torch.randn(2500, generator=g),
        ]
        made += [
            torch.randn(0, 3, generator=g),
            torch.randn(8, 10, generator=g)[:, ::2],
            torch.randn((), generator=g),
        ]
        made[-5:] = [t.to(device, dtype) for t in made[-5:]]
    return made


def same(a, b):
    return torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))


@pytest.mark.parametrize("with_points", [False, True])
@pytest.mark.parametrize("move", range(7))
def test_copies(move, with_points, device):
    params, directions = tensors(0, device), tensors(1, device)
    points = tensors(2, device) if with_points else []
    directions[1][:3] = torch.tensor([math.nan, math.inf, -0.0])
    table = torch.tensor([[0.3, 0.1, 0.05], [math.nan, 0.2, 0.1]], dtype=torch.float64, device=device)
    seed = torch.tensor(SEED, device=device)
    results = []
    for implementation in (launchers.multi_perturb, reference.multi_perturb):
        out = [t.fill_(math.nan) for t in ops.empty_copies(params, 2)]
        implementation(out, params, directions, points, move, table, seed, 3)
        results.append(out)
    for i, (a, b) in enumerate(zip(*results)):
        assert same(a, b), f"tensor {i}, {a.dtype}"


def test_sums(device):
    a, b = tensors(0, device), tensors(1, device)
    for weights in ([], b):
        for mine, true in zip(launchers.multi_norm(a, weights, 0.01), reference.multi_norm(a, weights, 0.01)):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=0)
    torch.testing.assert_close(launchers.multi_dot(a, b), reference.multi_dot(a, b), rtol=1e-12, atol=1e-9)


def quantized(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).to(device)
    qk.quantize_(model, qk.QConfig(method="lsq", weight_bits=4, act_bits=4))
    qk.calibrate(model, [torch.ones(2, 6, device=device)])
    return model


@pytest.mark.parametrize("make", [
    lambda model, base: qk.optim.SAM(model, base, rho=0.1),
    lambda model, base: qk.optim.SAM(model, base, rho=0.1, adaptive=True),
    lambda model, base: qk.optim.SAQ(model, base, rho=0.1, case=3, every=1),
], ids=["sam", "asam", "saq"])  # fmt: skip
def test_a_step_of_the_optimizers(make, device):
    x, after = torch.randn(4, 6).to(device), []
    for name in ("triton", "reference"):
        model = quantized(device)
        optimizer = make(model, torch.optim.SGD(model.parameters(), lr=0.1))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        with qk.use_backend(name):
            assert qk.backend.serves("multi_climb", device) == name
            optimizer.step(closure)
        after.append(list(model.parameters()))
    for a, b in zip(*after):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
