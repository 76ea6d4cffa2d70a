"""Exported models compute what the model computes: ONNX in ONNX Runtime, torch.export, packed integers by name."""

import builtins
import copy
import json
import logging

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import cli
from qkernels.export import _onnx_session, export_onnx, export_torch, integer_state_dict


class Digits(nn.Module):
    """A digits classifier: convolutions with and without bias, BatchNorm, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).flatten(1))


def quantized(method="lsq", weight_bits=4, act_bits=4, model=None, **settings):
    """A calibrated model, its inputs and its outputs in evaluation."""
    torch.manual_seed(0)
    x = torch.randn(32, 1, 8, 8)
    model = qk.quantize_(
        model or Digits(), method=method, weight_bits=weight_bits, act_bits=act_bits, **settings
    )
    qk.calibrate(model, [x], batches=1)
    return model.eval(), x, model(x).detach()


def graph_of(path):
    """(model, op types in order, {initializer: type name}) of a checked ONNX file."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    types = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer}
    return model, [node.op_type for node in model.graph.node], types


def exported(model, x, path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    return export_onnx(model, x, path)


ONNX = [
    # method, weight bits, activation bits, other settings, opset, type of conv2's levels
    ("lsq", 8, 8, {}, 21, "INT8"),
    ("lsq", 4, 4, {}, 21, "INT4"),
    ("lsq", 2, 2, {"first_last_bits": None}, 25, "INT2"),
    ("lsq", 3, 3, {"weight_axis": None}, 21, "INT4"),
    ("asymmetric", 8, 8, {}, 21, "UINT8"),
    ("asymmetric", 4, 4, {}, 21, "UINT4"),
    ("asymmetric", 2, 3, {"first_last_bits": None}, 25, "UINT2"),
    ("pact", 4, 4, {}, 21, "UINT4"),
    ("dorefa", 2, 2, {}, 25, "UINT2"),
    ("saq", 4, 4, {}, 21, "UINT4"),
    ("saq", 4, 4, {"act_offset": True}, 21, "UINT4"),
    ("lsq+", 4, 4, {}, 21, "INT4"),
    ("lsq", 4, 4, {"weight_group_size": 16}, 21, "INT4"),
    ("asymmetric", 4, 4, {"weight_group_size": 8}, 21, "UINT4"),
    ("saq", 8, 4, {"weight_group_size": 4}, 21, "UINT8"),
]


@pytest.mark.parametrize(("method", "weight_bits", "act_bits", "settings", "opset", "kind"), ONNX)
def test_onnx_runtime_computes_what_the_model_computes(
    tmp_path, method, weight_bits, act_bits, settings, opset, kind
):
    pytest.importorskip("onnxruntime")
    model, x, want = quantized(method, weight_bits, act_bits, **settings)
    assert exported(model, x, tmp_path / "m.onnx") == opset
    file, nodes, types = graph_of(tmp_path / "m.onnx")
    assert types["conv2.weight_quantizer.levels"] == kind
    assert nodes.count("QuantizeLinear") == 3 and nodes.count("DequantizeLinear") == 6
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    run = _onnx_session(tmp_path / "m.onnx")
    for batch in (1, 5, 32):
        assert (run(x[:batch]) - want[:batch]).abs().max() < 1e-5


def test_onnx_runtime_agrees_under_its_default_optimizations(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model, x, want = quantized("lsq", 4, 4)
    exported(model, x, tmp_path / "m.onnx")
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert (got - want).abs().max() < 1e-5  # biases inside Conv and Gemm would be rounded: 7e-3 here


def test_weights_lie_packed_in_the_onnx_file(tmp_path):
    model, x, _ = quantized("lsq", 4, 4)
    exported(model, x, tmp_path / "m.onnx")
    file, _, _ = graph_of(tmp_path / "m.onnx")
    levels = next(i for i in file.graph.initializer if i.name == "conv2.weight_quantizer.levels")
    converted = qk.convert_(copy.deepcopy(model))
    assert levels.raw_data == bytes(converted.conv2.weight_quantizer.packed)


def test_an_export_leaves_the_log_alone_and_names_no_path_of_this_machine(tmp_path):
    log, (model, x, _) = logging.getLogger("torch.onnx"), quantized()
    before = log.level
    exported(model, x, tmp_path / "m.onnx")
    assert log.level == before and b"export.py" not in (tmp_path / "m.onnx").read_bytes()


@pytest.mark.parametrize("act_bits", [3, 6])
def test_bounds_that_do_not_fill_the_type_are_clipped(tmp_path, act_bits):
    pytest.importorskip("onnxruntime")
    model, x, _ = quantized("asymmetric", 4, act_bits, first_last_bits=None)
    exported(model, x, tmp_path / "m.onnx")
    assert graph_of(tmp_path / "m.onnx")[1].count("Clip") == 3
    wide = 10 * x  # far beyond both bounds
    assert (_onnx_session(tmp_path / "m.onnx")(wide) - model(wide)).abs().max() < 1e-5


def test_other_layers_and_negative_steps_in_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.GELU(), nn.Flatten(2)]
    model, x, _ = quantized(model=nn.Sequential(*layers, nn.Conv1d(6, 3, 3)))
    with torch.no_grad():
        model[0].input_quantizer.scale.neg_()
        model[2].weight_quantizer.scale[1].neg_()
    exported(model, x, tmp_path / "m.onnx")
    assert (_onnx_session(tmp_path / "m.onnx")(x) - model(x)).abs().max() < 1e-5


def test_batches_of_any_size_of_every_input(tmp_path):
    pytest.importorskip("onnxruntime")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x, y):
            return self.fc(x) + y

    x, y, model = torch.randn(6, 8), torch.randn(6, 3), qk.quantize_(Both(), method="lsq")
    qk.calibrate(model, [x], forward=lambda model, x: model(x, y)).eval()
    exported(model, (x[:2], y[:2]), tmp_path / "m.onnx")
    assert (_onnx_session(tmp_path / "m.onnx")(x, y) - model(x, y)).abs().max() < 1e-5
    program = export_torch(model, (x[:2], y[:2]), tmp_path / "m.pt2").module()
    assert torch.equal(program(x, y), model(x, y))


def test_integer_indices_and_a_direct_call_in_onnx(tmp_path):
    ort = pytest.importorskip("onnxruntime")

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(11, 8), nn.Linear(8, 3)

        def forward(self, tokens):
            x = qk.fake_quantize(self.table(tokens), torch.full((1,), -0.05), bits=4, zero_point=3)
            x = qk.fake_quantize(x, torch.full((1,), 0.2), bits=2, signed=False)
            return self.fc(x.mean(1))

    tokens = torch.randint(0, 11, (6, 4))
    model = qk.quantize_(Tokens(), method="lsq", first_last_bits=4)
    qk.calibrate(model, [tokens]).eval()
    exported(model, tokens, tmp_path / "m.onnx")
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: tokens.numpy()})[0])
    assert (got - model(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lsq", "asymmetric", "saq", "lsq+", "pact"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_torch_program_equals_the_model(tmp_path, method, group_size):
    model, x, _ = quantized(method, weight_group_size=group_size)
    want = {batch: model(x[:batch]) for batch in (1, 5, 32)}  # sums depend on the batch size
    before = {name: t.clone() for name, t in model.state_dict().items()}
    export_torch(model.train(), x[:1], tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    for batch, y in want.items():
        assert torch.equal(program(x[:batch]), y)
    held = program.state_dict()
    assert held["conv2.weight_quantizer.packed"].numel() == 8 * 8 * 9 // 2 and "conv2.weight" not in held
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("convert", [False, True])
def test_torch_export_of_the_model_itself(convert):
    model, x, _ = quantized()
    if convert:
        qk.convert_(model)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    assert any("qkernels.fake_quantize" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x[:3]), model(x[:3]))


@pytest.mark.parametrize("method", ["lsq", "asymmetric", "saq"])
def test_integer_state_dict_holds_the_model(tmp_path, method):
    model, x, _ = quantized(method, weight_group_size=4)
    tensors = integer_state_dict(model)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(tensors, tmp_path / "m.safetensors")
    tensors = safetensors.load_file(tmp_path / "m.safetensors")
    w = {name.removeprefix("conv2.weight."): t for name, t in tensors.items() if "conv2.weight." in name}
    levels = qk.unpack(w["packed"], int(w["bits"]), tuple(w["shape"].tolist()), bool(w["signed"]))
    value = qk.dequantize(
        levels, w["scale"], axis=int(w["axis"]), offset=w.get("offset"), zero_point=w.get("zero_point")
    )
    assert torch.equal(value, model.conv2.quantized_weight())
    w = {name.removeprefix("fc.weight."): t for name, t in tensors.items() if "fc.weight." in name}
    shape, rows = tuple(w["shape"].tolist()), w["scale"].numel()
    levels = qk.unpack(w["packed"], int(w["bits"]), shape, bool(w["signed"]))
    value = qk.dequantize(levels, w["scale"], group_size=levels.numel() // rows, offset=w.get("offset"),
                          zero_point=w.get("zero_point"))  # fmt: skip
    assert (int(w["axis"]), rows) == (-1, 80) and torch.equal(value, model.fc.quantized_weight())
    assert torch.equal(tensors["bn.running_var"], model.bn.running_var)
    assert torch.equal(tensors["conv2.bias"], model.conv2.bias) and "conv2.weight" not in tensors
    low, high = tensors["conv2.input.bounds"].tolist()
    value = qk.fake_quantize(
        x, tensors["conv2.input.scale"], quant_min=low, quant_max=high,
        zero_point=tensors.get("conv2.input.zero_point"),
    )  # fmt: skip
    assert torch.equal(value, model.conv2.input_quantizer(x))


@pytest.mark.parametrize("method", ["lsq", "lsq+", "asymmetric"])
def test_step_sizes_are_positive_in_the_integer_state_dict(method):
    """Training may turn their signs, of which the ops take no notice, but the formula does."""
    model, _, _ = quantized(method)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("scale"):
                p[::2].neg_()
    w = {name.removeprefix("conv2."): t for name, t in integer_state_dict(model).items() if "conv2." in name}
    levels = qk.unpack(w["weight.packed"], 4, tuple(w["weight.shape"].tolist()), bool(w["weight.signed"]))
    zero = w.get("weight.zero_point", torch.zeros(8)).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        (levels - zero) * w["weight.scale"].view(-1, 1, 1, 1), model.conv2.quantized_weight()
    )
    assert (w["weight.scale"] > 0).all() and (w["input.scale"] > 0).all()


def test_activations_alone_can_be_quantized(tmp_path):
    model, x, want = quantized(weight_bits=None)
    export_torch(model, x, tmp_path / "m.pt2")
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), want)
    assert torch.equal(integer_state_dict(model)["conv1.weight"], model.conv1.weight)


def test_errors_name_what_is_wrong(tmp_path, monkeypatch):
    model, x, _ = quantized()
    raw = qk.quantize_(Digits(), method="lsq")
    for export in (export_torch, lambda m, *_: integer_state_dict(m)):
        with pytest.raises(RuntimeError, match="input of conv1 has no step size yet: call qk.calibrate"):
            export(raw, x, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_torch(model, x, tmp_path / "absent" / "m.pt2")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_torch(model, x, tmp_path)
    with pytest.raises(TypeError, match="batch first"):
        export_torch(model, 3, tmp_path / "m.pt2")
    with pytest.raises(ValueError, match="no quantized layer"):
        integer_state_dict(Digits())
    assert list(tmp_path.iterdir()) == []


def test_onnx_says_what_it_cannot_take(tmp_path):
    class Calls(nn.Linear):
        def forward(self, x):
            return x @ qk.fake_quantize(self.weight, **self.settings).T

    model, x, _ = quantized()
    with pytest.raises(ValueError, match="must be float32 for ONNX, conv1.weight is torch.bfloat16"):
        exported(copy.deepcopy(model).bfloat16(), x, tmp_path / "m.onnx")
    with pytest.raises(RuntimeError, match="input of conv1 has no step size yet"):
        exported(qk.quantize_(Digits(), method="lsq"), x, tmp_path / "m.onnx")
    one, x = torch.ones(1), torch.randn(4, 8)
    for settings, message in (
        ({"scale": torch.ones(6), "bits": 4, "group_size": 4}, "per-tensor and per-channel grids"),
        ({"scale": one, "bits": 9}, r"bounds within 8 bits.*the model has \[-256, 255\]"),
        ({"scale": one, "bits": 4, "zero_point": one.int()}, "zero_point as an int"),
        ({"scale": one, "bits": 4, "noise": qk.noise.Pseudo("uniform"), "seed": one.long()}, "no noise"),
    ):
        model = Calls(8, 3)
        model.settings = settings
        with pytest.raises(ValueError, match=message):
            exported(model, x, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    model, x, _ = quantized()
    real = builtins.__import__

    def without_onnx(name, *rest, **options):
        if name == "onnx":
            raise ImportError("No module named 'onnx'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(ImportError, match=r"pip install qkernels\[onnx\]"):
        export_onnx(model, x, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    model, x, _ = quantized()
    (tmp_path / "m.pt2").write_text("old")

    def broken(program, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        export_torch(model, x, tmp_path / "m.pt2")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.pt2", "old")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    from qkernels.training import make_config, train

    folder = tmp_path_factory.mktemp("run") / "lsq"
    config = make_config(recipe="lsq", model="nin_d1_w1", data="digits", epochs=1, batch_size=512)
    train(config, folder)
    return folder


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_the_command_writes_and_checks(run_folder, tmp_path, capsys, form):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"m.{form}"
    assert cli.main(["export", str(run_folder), "--format", form, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.stat().st_size > 0 and "the same class for 64 of 64 test images" in text
    assert json.loads((run_folder / "config.json").read_text())["recipe"] == "lsq"


def test_the_command_refuses_bad_arguments(tmp_path, capsys):
    out = str(tmp_path / "m.onnx")
    assert cli.main(["export", str(tmp_path), "--format", "onnx", "--out", out]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(tmp_path), "--format", "tflite", "--out", out])
    assert stopped.value.code == 2 and "'onnx', 'torch'" in capsys.readouterr().err
