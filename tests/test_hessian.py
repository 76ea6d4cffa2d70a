"""Eigenvalues, trace and density of the Hessian against the exact one of tiny quantized networks."""

import gc
import importlib.metadata
import importlib.util
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import qkernels as qk
from qkernels import sharpness
from qkernels.models.vit import Attention
from qkernels.sharpness import curvature
from qkernels.sharpness.subject import Subject


def tiny(method="lsq", act_bits=4):
    """(model, loader of two batches of different size); 60 weights, quantized."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    x, target = torch.randn(40, 1, 4, 4), torch.arange(40) % 3
    loader = [(x[:24], target[:24]), (x[24:], target[24:])]
    if method is not None:
        settings = {"method": method, "weight_bits": 4, "act_bits": act_bits}
        model = qk.calibrate(qk.quantize_(model, qk.QConfig(**settings)), loader, 2)
    return model, loader


def exact(model, loader, weights):
    """The Hessian matrix of the mean loss, column by column, by autograd on the model itself."""
    model.eval()
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    state = {}
    for name, layer in layers:
        quantize = getattr(layer, "weight_quantizer", None)
        after = weights == "quantized" and quantize is not None
        state[f"{name}.weight"] = (
            (quantize(layer.weight) if after else layer.weight).detach().clone().requires_grad_()
        )
        state[f"{name}.bias"] = layer.bias.detach().clone().requires_grad_()
    kept = [(layer, getattr(layer, "weight_quantizer", None)) for _, layer in layers]
    if weights == "quantized":
        for layer, _ in kept:
            layer.weight_quantizer = None
    leaves = list(state.values())
    count = sum(len(t) for _, t in loader)
    loss = (
        sum(F.cross_entropy(functional_call(model, state, (x,)), t, reduction="sum") for x, t in loader)
        / count
    )
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, create_graph=True)])
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(g, leaves, retain_graph=True)]) for g in gradient
    ]
    for layer, quantize in kept:
        if quantize is not None:
            layer.weight_quantizer = quantize
    return torch.stack(rows).double()


CASES = [
    (None, "latent"),
    ("lsq", "latent"),
    ("lsq", "quantized"),
    ("lsq+", "latent"),
    ("saq", "latent"),
    ("dorefa", "latent"),
]


@pytest.mark.parametrize(("method", "weights"), CASES)
def test_eigenvalues_and_trace_of_the_exact_hessian(method, weights):
    model, loader = tiny(method)
    matrix = exact(model, loader, weights)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-3, atol=1e-5)
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    values = values[values.abs().argsort(descending=True)]
    found = sharpness.hessian(model, loader, F.cross_entropy, top=2, trace_samples=64, weights=weights)
    assert found.eigenvalues == pytest.approx(values[:2].tolist(), rel=1e-3)
    assert found.converged == [True, True]
    assert abs(found.trace - matrix.trace().item()) <= 3 * found.trace_stderr
    assert found.trace_stderr < 0.3 * abs(found.trace)
    assert len(found.trace_samples) == 64
    vector = torch.cat([t.flatten() for t in found.eigenvectors[0]]).double()
    residual = (matrix @ vector - found.eigenvalues[0] * vector).norm()
    assert residual <= 2e-3 * abs(found.eigenvalues[0])
    assert found.products == found.iterations + 64
    assert sum(found.traces.values()) == pytest.approx(found.trace)


@pytest.mark.parametrize("room", [3, 5, 20])
def test_lanczos_begins_again_where_its_basis_is_full(room, monkeypatch):
    monkeypatch.setattr(curvature, "_ROOM", room)
    model, loader = tiny("lsq")
    matrix = exact(model, loader, "latent")
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    values = values[values.abs().argsort(descending=True)]
    found = sharpness.hessian(model, loader, F.cross_entropy, top=4, trace_samples=0)
    assert found.eigenvalues == pytest.approx(values[:4].tolist(), rel=1e-3) and all(found.converged)
    assert found.iterations < (100 if room == 20 else 400)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_criteria_give_means(reduction):
    model, loader = tiny(None)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    measures = (sharpness.hessian, sharpness.spectral_density, sharpness.linf_sharpness, sharpness.landscape)
    for measure in measures:
        with pytest.raises(ValueError, match=f"criterion must give the mean loss.*reduction='{reduction}'"):
            measure(model, loader, criterion)


@pytest.mark.parametrize("top", [3, 8, 40])
def test_eigenvalues_that_come_several_times(top):
    """A regression with four outputs: each of X'X four times."""
    model, x = nn.Linear(10, 4, bias=False), torch.randn(30, 10)
    found = sharpness.hessian(model, [(x, torch.randn(30, 4))], F.mse_loss, top=top, trace_samples=0)
    want = torch.linalg.eigvalsh(x.T.double() @ x.double() * 2 / 120).flip(0).repeat_interleave(4)
    assert found.eigenvalues == pytest.approx(want[:top].tolist(), rel=1e-3) and all(found.converged)


def test_a_broken_network_has_no_eigenvalues():
    model = nn.Linear(4, 3)
    model.weight.data[0, 0] = torch.nan
    found = sharpness.hessian(model, [(torch.randn(5, 4), torch.randint(0, 3, (5,)))], top=2, trace_samples=2)
    assert all(math.isnan(value) for value in (*found.eigenvalues, *found.residuals, found.trace))
    assert found.converged == [False, False]


def test_residuals_are_those_of_a_product():
    """Of EWGS' Hessian, which is not symmetric, too."""
    model = qk.quantize_(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), method="ewgs", ewgs_delta=0.5
    )
    qk.calibrate(model, [torch.randn(16, 5)])
    data = [(torch.randn(16, 5), torch.randint(0, 3, (16,)))]
    found = sharpness.hessian(model, data, top=1, trace_samples=0)
    product = curvature._Products(model, data, F.cross_entropy, "latent", "weights", None)
    (v,), (value,) = found.eigenvectors, found.eigenvalues
    off = [h - value * t for h, t in zip(product([v])[0], v, strict=True)]
    assert math.sqrt(curvature._dot(off, off)) == pytest.approx(found.residuals[0], rel=1e-2, abs=1e-6)


def test_an_eigenvalue_is_known_to_its_own_scale():
    """Six of them after eight products: one is known to a tenth of the largest, and not of itself."""
    torch.manual_seed(0)
    found = sharpness.hessian(*tiny(None), top=6, trace_samples=0, iterations=8, tolerance=0.1)
    pairs = list(zip(found.eigenvalues, found.residuals))
    assert found.converged == [r <= 0.1 * abs(value) for value, r in pairs]
    assert not all(found.converged) and all(r <= 0.1 * abs(found.eigenvalues[0]) for _, r in pairs)


def test_eigenvalues_of_a_hessian_of_low_rank():
    """Two images: two eigenvalues of a linear regression, the others zero."""
    model, x = nn.Linear(6, 1, bias=False), torch.randn(2, 6)
    found = sharpness.hessian(model, [(x, torch.randn(2, 1))], F.mse_loss, top=4, trace_samples=0)
    want = torch.linalg.eigvalsh(x.T.double() @ x.double()).flip(0)
    assert found.eigenvalues == pytest.approx(want[:4].tolist(), rel=1e-3, abs=1e-5) and all(found.converged)
    assert len(found.eigenvectors) == 4


def test_second_derivatives_are_not_silently_zero():
    model, loader = tiny()
    found = sharpness.hessian(model, loader, top=1, trace_samples=2)
    assert found.eigenvalues[0] > 1e-2
    assert found.trace > 1e-2


def test_density_has_the_moments_of_the_spectrum():
    model, loader = tiny()
    values = torch.linalg.eigvalsh(exact(model, loader, "latent"))
    density = sharpness.spectral_density(model, loader, probes=8, steps=25)
    nodes, weights = torch.tensor(density.nodes).double(), torch.tensor(density.weights).double()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert nodes.max().item() == pytest.approx(values.max().item(), rel=1e-3)
    assert nodes.min().item() == pytest.approx(values.min().item(), abs=1e-3 * values.max().item())
    stderr = (2 * values.square().sum() / 8).sqrt().item() / len(values)
    assert (nodes @ weights).item() == pytest.approx(values.mean().item(), abs=3 * stderr)
    grid, curve = density.curve(points=400)
    assert torch.trapezoid(torch.tensor(curve), torch.tensor(grid)).item() == pytest.approx(1.0, abs=1e-2)
    both = sharpness.hessian(model, loader, top=0, trace_samples=0, density_probes=1, density_steps=5)
    assert both.density.probes == 1
    assert both.trace is None
    assert both.to_dict()["density"]["probes"] == 1


def test_attention_is_differentiated_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = Attention(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x).mean(1))

    loader = [(torch.randn(6, 3, 4), torch.arange(6) % 2)]
    model = Net().eval()
    found = sharpness.hessian(model, loader, top=1, trace_samples=0)
    subject, step = Subject(model), 1e-2
    vector = found.eigenvectors[0]

    def gradient(at):
        values = [w + at * v for w, v in zip(subject.values, vector, strict=True)]
        return subject.gradient(values, *loader[0], F.cross_entropy)[1]

    ends = zip(gradient(step), gradient(-step), vector, strict=True)
    slope = sum(((g - h) * v).sum().item() for g, h, v in ends) / (2 * step)
    assert found.eigenvalues[0] == pytest.approx(slope, rel=1e-2)
    quantized = qk.calibrate(qk.quantize_(model, qk.QConfig()), loader, 1)
    assert sharpness.hessian(quantized, loader, top=1, trace_samples=0).eigenvalues[0] > 0.1 * slope


def test_the_model_and_memory_are_left_alone():
    model, loader = tiny()
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []

    def criterion(y, target):
        seen.append(weakref.ref(y))
        return F.cross_entropy(y, target)

    gc.disable()
    try:
        sharpness.hessian(model, loader, criterion, top=1, trace_samples=4)
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
    assert len(seen) > 4
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": -1}, "top must be an int >= 0, got -1"),
        ({"top": 1000}, "top must be at most 47, the number of parameters, got 1000"),
        ({"iterations": 0}, "iterations must be an int >= 1, got 0"),
        ({"weights": "float"}, "weights must be one of 'latent', 'quantized', got 'float'"),
    ],
)
def test_bad_arguments(settings, message):
    model, loader = tiny()
    with pytest.raises(ValueError, match=message):
        sharpness.hessian(model, loader, **settings)


if importlib.util.find_spec("curvlinops"):
    # From version 3 on its products are forward over reverse, for which the quantizers have no rule.
    TWICE_BACKWARD = int(importlib.metadata.version("curvlinops-for-pytorch").partition(".")[0]) < 3

    @pytest.mark.parametrize("method", [None, "lsq", "lsq+"] if TWICE_BACKWARD else [None])
    def test_agrees_with_curvlinops(method):
        import curvlinops

        model, loader = tiny(method)
        model.eval()
        params = [p for m in (model[0], model[4]) for p in (m.weight, m.bias)]
        operator = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), params, loader)
        matrix = torch.as_tensor(operator @ torch.eye(operator.shape[0])).double()
        found = sharpness.hessian(model, loader, top=1, trace_samples=64)
        assert found.eigenvalues[0] == pytest.approx(
            torch.linalg.eigvalsh((matrix + matrix.T) / 2).abs().max().item(), rel=1e-3
        )
        assert abs(found.trace - matrix.trace().item()) <= 3 * found.trace_stderr


def test_a_compiled_model_is_measured_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    compiled = torch.compile(model, backend="aot_eager")
    compiled(data[0][0])
    found, want = (sharpness.hessian(m, data, top=2, trace_samples=2) for m in (compiled, model))
    assert found.eigenvalues == want.eigenvalues and found.trace == want.trace
