"""The annotations: all of what users call has them, and mypy reads them as a user's program needs it."""

import importlib
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import qkernels as qk

ROOT = Path(__file__).resolve().parent.parent
MODULES = [name for name in qk.__all__ if inspect.ismodule(getattr(qk, name))]
# The command line's part of a module, and what an exported graph is made of.
NOT_FOR_USERS = {"add_arguments", "main", "Grid", "ActivationGrid", "WeightGrid"}
CALLED_BY_SYNTAX = {"__init__", "__enter__", "__exit__", "__iter__", "__len__", "__getitem__"}

GOOD = """
from pathlib import Path
import torch
from torch import nn
from typing_extensions import assert_type
import qkernels as qk

model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
loader = [(torch.randn(32, 1, 8, 8), torch.randint(10, (32,))) for _ in range(8)]
(x, target), criterion, float_model = loader[0], nn.CrossEntropyLoss(), nn.Sequential()
state_at_init = model.state_dict()

noise = qk.noise.FeaturePerturbation(p=0.1, where="after")
config = qk.QConfig(method="lsq", weight_bits=4, act_bits=None, exclude=["3"], act_noise=noise)
assert_type(qk.quantize_(model, config), nn.Sequential)
qk.QConfig(weight_noise=noise, overrides={"0": {"weight_bits": 8}})
assert_type(qk.quantize_(model, method="saq", weight_bits=2), nn.Sequential)
qk.calibrate(model, loader, batches=8, forward=lambda model, batch: model[0](batch["x"]))
base = torch.optim.SGD(qk.param_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9)
with qk.disabled(model, "0"), qk.use_backend("reference"):
    print(qk.summary(model).splitlines())
assert_type(qk.convert_(model), nn.Sequential)
assert_type(qk.bn_reestimate(model, loader), nn.Sequential)
assert_type(qk.nn.QuantLinear(3, 4, bias=False).forward(x), torch.Tensor)

scale = torch.tensor([0.1])
y = qk.fake_quantize(x, scale, quant_min=0, quant_max=15, offset=scale, zero_point=3)
y = qk.fake_quantize(x, scale, bits=4, grad_scale=0.1, noise=qk.noise.Tempering(c=0.2, k=50.0), seed=scale, stream=3)
q = qk.quantize(x, scale, bits=4, axis=0)
q = qk.unpack(qk.pack(q, bits=4), bits=4, shape=q.shape)
assert_type(qk.dequantize(q, scale, dtype=torch.bfloat16), torch.Tensor)


def closure() -> torch.Tensor:
    base.zero_grad()
    loss: torch.Tensor = criterion(model(x), target) + distill.loss(x)
    loss.backward()
    return loss


distill = qk.distill.FeatureDistillation(student=model, teacher=float_model, layers=["0"])
optimizer = qk.optim.SAQ(model, base, rho=0.3, case=3, every=4, beta=0.7)
assert_type(optimizer.step(closure), torch.Tensor)
optimizer.step(closure, torch.amp.GradScaler("cpu"))
schedule = torch.optim.lr_scheduler.StepLR(qk.optim.SAM(model, base, rho=0.05, adaptive=False), 3)
with optimizer.first_pass():
    closure()
if optimizer.first_step():
    closure()
optimizer.second_step()
optimizer.load_state_dict(optimizer.state_dict())
print(qk.distill.logit_distillation(x, y, temperature=4.0).item())

params = list(model.parameters())
assert_type(qk.perturb(params, kind="magnitude", std=0.05, num=10), list[list[torch.Tensor]])
qk.perturb(params, "direction", at=[(0.1, 0.2), (0.3, 0.4)], num=2, directions=(params, params))
with qk.perturbed(model, kind="gradient", rho=0.05) as copy:
    assert_type(copy, list[torch.Tensor])
report = qk.sharpness.measure(model, loader, initial=state_at_init, weights="latent", seed=0, progress=print)
assert_type(report.to_json(), str)
assert_type(report.to_json(Path("report.json")), Path)
assert_type(qk.sharpness.Report.from_json("report.json"), qk.sharpness.Report)
assert_type(qk.sharpness.linf_sharpness(model, loader, criterion, rho=1e-3).difference, float)
assert_type(qk.sharpness.hessian(model, loader, criterion, top=3).eigenvalues, list[float])
assert_type(qk.sharpness.landscape(model, loader, lambda y, t: y.sum(), size=5).plot("landscape.png"), str)

qk.sharpness.output_variance({"a": model, "b": model}, loader, levels=[0.1])
runs = {"a": [(0, model)], "b": [(0, model)]}
qk.sharpness.hessian_trace_along(runs, loader), qk.sharpness.hessian_trace_along(runs["a"], loader)
images = qk.corruptions.corrupt(x, "gaussian_noise", 3, seed=0)
assert_type(images, torch.Tensor)
qk.export.export_torch(model, (x,), Path("model.pt2")).module()
assert_type(qk.export.export_onnx(model, x, "model.onnx"), int)
assert_type(qk.export.integer_state_dict(model), dict[str, torch.Tensor])
result = qk.training.train(qk.training.make_config(recipe="lsq", epochs=1), "run", device="cpu")
trained, data, _ = qk.training.load_run("run")
for x, target in data.test:
    print(trained(x), len(data.train_eval.sample(4)), qk.sharpness.layer_table(trained))
qk.sharpness.generalization(trained, data, corruptions="all")
print(qk.report.write_report(["run"], "report.html").name, qk.models.build_model("resnet20", 10).training)
"""

# A comment names the error of its line.
BAD = """
import torch
from torch import nn
import qkernels as qk

x, scale, model = torch.ones(3), torch.ones(1), nn.Linear(3, 3)
base = torch.optim.SGD(model.parameters(), lr=0.1)
qk.fake_quantize("x", scale, bits=4)  # arg-type
qk.fake_quantize(x, scale, bits="4")  # arg-type
qk.fake_quantise(x, scale, bits=4)  # attr-defined
qk.fake_quantize(x, scale, 4)  # call-arg
qk.QConfig(weight_bits="4")  # arg-type
qk.quantize_(model, {"weight_bits": 4})  # arg-type
qk.optim.SAM(model.parameters(), base)  # arg-type
qk.optim.SAM(model, base).step(0.1)  # call-overload
qk.perturb(x for x in model.parameters())  # arg-type
qk.sharpness.hessian(model, [(x, x)], "cross_entropy")  # arg-type
qk.sharpness.hessian(model, [(x, x)]).eigenvalue  # attr-defined
qk.export.export_onnx(model, x, None)  # arg-type
"""


def public():
    """(name, function) of all that users call: functions, methods, and what syntax calls of a class."""
    for module in (qk, *(importlib.import_module(f"qkernels.{name}") for name in MODULES)):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            home = getattr(value, "__module__", None) or ""
            own = home == module.__name__ or (hasattr(module, "__all__") and home.startswith("qkernels"))
            if name.startswith("_") or name in NOT_FOR_USERS or not own:
                continue
            if inspect.isclass(value):
                yield from methods(value)
            elif inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value


def methods(kind):
    for base in kind.__mro__:
        for name, value in vars(base).items() if base.__module__.startswith("qkernels") else ():
            value = getattr(value, "__func__", value)  # of a classmethod
            value = value.fget if isinstance(value, property) else value
            if inspect.isfunction(value) and (name in CALLED_BY_SYNTAX or not name.startswith("_")):
                yield f"{kind.__module__}.{kind.__name__}.{name}", value


def test_all_that_users_call_is_annotated():
    found, bare = dict(public()), {}
    for name, function in found.items():
        hints = typing.get_type_hints(inspect.unwrap(function))
        wanted = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        missing = [p for p in (*wanted, "return") if p not in hints]
        if missing:
            bare[name] = missing
    assert not bare
    assert len(found) > 100 and {"qkernels.perturb", "qkernels.optim.sam.SAM.step"} <= found.keys()


def test_mypy_accepts_a_users_program_and_finds_its_mistakes(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--cache-dir", os.devnull,
            "--follow-imports", "silent", "--allow-untyped-calls", "good.py", "bad.py",
        ],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    lines = re.findall(r"^(\w+\.py):(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    assert [line for line in lines if line[0] != "bad.py"] == [], done.stdout
    found = {}
    for _, number, code in lines:
        found.setdefault(int(number), set()).add(code)
    expected = {
        number: {line.partition("  # ")[2]}
        for number, line in enumerate(BAD.splitlines(), 1)
        if "  # " in line
    }
    assert found == expected, done.stdout
