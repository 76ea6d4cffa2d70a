"""quantize_, summary and param_groups on whole models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import EVEN, METHODS, Net, batch, calibrated
from torch import nn
from torch.nn.utils import parametrizations

import qkernels as qk
from qkernels import convert


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 2, 6)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=2, dilation=2), (2, 4, 6, 6)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, dilation=2, bias=False), (2, 2, 4, 4)),
        (nn.Linear(6, 3), (2, 4, 6)),
    ],
)
def test_a_layer_is_its_float_self_on_quantized_tensors(layer, shape):
    x, plain = torch.randn(shape), copy.deepcopy(layer)
    quantized = qk.calibrate(qk.quantize_(layer, weight_bits=3, **EVEN), [x]).eval()
    assert quantized is not layer and isinstance(quantized, type(layer)), "the model itself is one layer"
    with torch.no_grad():
        plain.weight.copy_(quantized.quantized_weight())
        assert plain.weight.unique().numel() > 3
        assert torch.equal(quantized(x), plain(quantized.quantized_input(x)))


def test_an_embedding_has_the_gradient_of_its_float_self():
    plain, x = nn.Embedding(4, 3, padding_idx=1, scale_grad_by_freq=True), torch.tensor([0, 1, 2, 2])
    layer = qk.quantize_(copy.deepcopy(plain))
    for embedding in (plain, layer):
        embedding(x).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize(
    "exclude, kinds", [((), ["QuantLinear", "QuantLinear"]), (["2"], ["Linear", "QuantLinear"])]
)
def test_a_block_that_comes_twice_goes_by_both_names(exclude, kinds):
    block = nn.Sequential(nn.Linear(4, 4))
    model = qk.quantize_(nn.Sequential(block, nn.Linear(4, 4), block), exclude=exclude)
    assert model[0] is model[2] and [type(layer).__name__ for layer in (model[2][0], model[1])] == kinds


def test_transposed_output_size():
    layer = qk.quantize_(nn.ConvTranspose2d(2, 3, 3, stride=2), act_bits=None)
    assert layer(torch.randn(1, 2, 4, 4), output_size=(10, 10)).shape == (1, 3, 10, 10)


def test_parameters_hooks_and_modes_stay():
    model, calls = Net().train(), []
    model.head.eval()
    model.stem.register_forward_hook(lambda *_: calls.append("stem"))
    model.mix.weight.requires_grad_(False)
    model.up.weight.register_hook(lambda grad: calls.append("up"))
    before, parameters = set(model.state_dict()), dict(model.named_parameters())
    assert qk.quantize_(model) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all("_quantizer." in name for name in set(model.state_dict()) - before)
    assert before <= set(model.state_dict())
    assert model.stem.training and not model.head.training and not model.head.input_quantizer.training
    assert not model.mix.weight.requires_grad
    model.head.train()
    model(batch()).sum().backward()
    assert calls == ["stem", "up"] and model.mix.weight.grad is None


class Shared(nn.Module):
    """One layer under two names, and one parameter in two layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 4)
        self.again = nn.ModuleDict({"layer": self.first})
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.again["layer"](self.first(self.embed(x)).relu()))


def test_shared_modules_and_tied_weights():
    model = qk.quantize_(Shared(), weight_bits=3, act_bits=4)
    assert model.first is model.again["layer"] and isinstance(model.first, qk.nn.QuantLinear)
    assert model.out.weight is model.embed.weight
    assert (model.embed.weight_quantizer.bits, model.first.weight_quantizer.bits) == (8, 3)
    assert model.out.weight_quantizer.bits == 8 and len(convert.layers(model)) == 3
    x = torch.randint(0, 6, (5,))
    model.train()(x).square().sum().backward()
    assert model.embed.weight.grad is not None
    y = model.eval()(x)
    assert torch.equal(qk.convert_(model)(x), y)


@pytest.mark.parametrize("name", ["first", "again", "again.layer"])
def test_overrides_by_any_name_of_a_shared_module(name):
    model = qk.quantize_(Shared(), overrides={name: {"weight_bits": 3}}, **EVEN)
    assert model.first.weight_quantizer.bits == 3 and model.again["layer"] is model.first


def test_excluding_one_name_of_a_shared_module_leaves_it_alone():
    model = qk.quantize_(Shared(), exclude=["again"])
    assert type(model.first) is nn.Linear and model.again["layer"] is model.first
    assert [name for name, _ in convert.layers(model)] == ["embed", "out"]


@pytest.mark.parametrize("method", METHODS)
def test_trains_under_autocast(method):
    model = calibrated(method=method).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"method": "saq"}, {"method": "diffq"}], ids=str)
def test_compiles_without_breaks(settings):
    model = calibrated(**settings).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        torch.manual_seed(0)
        outputs = [run(batch()) for _ in range(2)]
        outputs[1].square().sum().backward()
        results.append((*outputs, [p.grad for p in run.parameters()]))
    (x, y, grads), (w, z, others) = results
    torch.testing.assert_close(w, x)
    torch.testing.assert_close(z, y)
    assert torch.equal(w, z) == (model.stem.weight_quantizer.noise is None), "each step draws its own noise"
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(b, a)


def test_convert_and_quantize_errors():
    with pytest.raises(ValueError, match="model has no quantized layer to convert: call qk.quantize_ first"):
        qk.convert_(Net())
    with pytest.raises(ValueError, match=r"model has no layer to quantize \(Linear, Conv1d, Conv2d"):
        qk.quantize_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="model is already quantized"):
        qk.quantize_(qk.quantize_(Net()))
    model = Net()
    for name in ("heads", "norm", "hea"):
        with pytest.raises(ValueError, match=f"overrides names no layer that would be quantized: '{name}'"):
            qk.quantize_(model, overrides={"head": {"act_bits": 8}, name: {"act_bits": 8}})
    with pytest.raises(ValueError, match="exclude names no module: heads, tail"):
        qk.quantize_(model, exclude=("heads", "tail", "stem"))
    assert not convert.layers(model)


def test_quantize_arguments():
    for model, config, got in (("net", None, "str and NoneType"), (Net(), "lsq", "Net and str")):
        with pytest.raises(TypeError, match=f"an nn.Module and config a QConfig or None, got {got}"):
            qk.quantize_(model, config)
    with pytest.raises(ValueError, match="give config or settings, not both; got QConfig.*act_bits"):
        qk.quantize_(Net(), qk.QConfig(), act_bits=2)


def table(model):
    head, *rows = (line.split("  ") for line in qk.summary(model).splitlines())
    names = [cell.strip() for cell in head if cell.strip()]
    return [dict(zip(names, [c.strip() for c in row if c.strip()], strict=True)) for row in rows]


def test_summary():
    assert qk.summary(Net()) == "no quantized layer"
    model = qk.quantize_(Net(), exclude=["mix"])
    *rows, left = table(model)
    assert (left["layer"], left["kind"], left["weight"], left["input"]) == ("mix", "Conv1d", "float", "float")
    assert [row["layer"] for row in rows] == ["stem", "body.0", "body.2", "up", "head"]
    assert [row["kind"] for row in rows] == ["QuantConv2d"] * 3 + ["QuantConvTranspose2d", "QuantLinear"]
    assert {row["input step"] for row in rows} == {"not calibrated"}
    qk.calibrate(model, [batch()])
    rows = table(model)[:-1]
    assert rows[0]["weight"] == "8 bit [-128, 127]" and rows[2]["input"] == "4 bit [0, 15]"
    assert float(rows[0]["input step"]) == pytest.approx(model.stem.input_quantizer.scale.item(), rel=1e-3)
    shape = [row["rows"] for row in rows]
    assert shape == ["4", "4", "4", "3", "5"]
    rows = table(qk.convert_(model))[:-1]
    assert [row["rows"] for row in rows] == shape and rows[1]["weight"] == "int4"
    assert table(calibrated(weight_bits=None))[0]["weight"] == "float"
    (single,) = table(qk.quantize_(nn.Linear(2, 3), weight_axis=None))
    assert (single["layer"], single["rows"]) == ("(model)", "1")
    (alike,) = table(qk.quantize_(nn.Linear(2, 3), method="dorefa", weight_bits=2))
    assert (alike["rows"], alike["weight step"]) == ("3", "0.007843")
    assert table(qk.convert_(calibrated(weight_axis=None)))[0]["rows"] == "1"


@pytest.mark.parametrize("method", METHODS)
def test_param_groups(method):
    model = calibrated(method=method)
    model.norm.bias.requires_grad_(False)
    model.stem.input_quantizer.requires_grad_(False)
    groups = qk.param_groups(model, lr=0.1, weight_decay=0.01, scale_lr=0.002)
    listed = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    setting = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "_quantizer." in name:
            assert setting[id(parameter)] == (0.002, 0.01 if method == "pact" else 0.0), name
        else:
            assert setting[id(parameter)] == (0.1, 0.01), name
    assert all(group["lr"] == 0.1 for group in qk.param_groups(model, lr=0.1))
    assert all(group["params"] for group in groups)
    torch.optim.SGD(groups, momentum=0.9)


@pytest.mark.parametrize("method", METHODS)
def test_a_few_steps_of_training_lower_the_loss(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(64, 8)
    target = x[:, :4].argmax(1)
    qk.calibrate(qk.quantize_(model, method=method, weight_bits=4, act_bits=4), [x]).train()
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.05), momentum=0.9)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_an_embedding_with_a_largest_norm_is_refused():
    net = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="0: an Embedding with max_norm cannot be quantized"):
        qk.quantize_(net)
    assert not convert.layers(net)


def test_sparse_embedding_is_refused():
    with pytest.raises(ValueError, match="sparse=True cannot be quantized"):
        qk.quantize_(nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2)))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class CustomWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))


class Holder(nn.Module):
    """A module of the user's with one parameter of this name and shape."""

    def __init__(self, name, *shape):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def replaced_forward():
    layer = nn.Linear(3, 3)
    layer.forward = layer.forward
    return layer


def test_a_model_in_ddp_is_refused(one_process):
    """Its buckets would lack the step sizes, which then differ between processes."""
    with pytest.raises(ValueError, match="in DistributedDataParallel already.*: quantize_, then wrap"):
        qk.quantize_(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ScaledLinear(3, 3), "left (ScaledLinear: a subclass of Linear may compute something else)"),
        (lambda: nn.Conv3d(1, 1, 1), "left (Conv3d: no quantized form)"),
        (lambda: nn.LSTM(3, 3), "left (LSTM: no quantized form)"),
        (lambda: nn.LazyLinear(3), "left (LazyLinear: lazy; one forward pass makes it a plain layer)"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
            "left (ParametrizedLinear: parametrized; torch.nn",
        ),
        (lambda: nn.MultiheadAttention(4, 2), "left (MultiheadAttention: no quantized form), left.out_proj"),
        (CustomWeight, "left (CustomWeight: no quantized form)"),
        (lambda: Holder("gate_up", 2, 3, 3), "left (Holder: no quantized form)"),  # of experts
        (lambda: Holder("kernel", 3, 3), "left (Holder: no quantized form)"),
        (replaced_forward, "left (Linear: its forward was replaced; quantize_ first)"),
    ],
    ids=lambda v: v.split()[1][1:-1] if isinstance(v, str) else "",
)
def test_layers_left_in_float_are_said(make, said, recwarn):
    def model(*more):
        return nn.ModuleDict({"left": make(), "norm": nn.LayerNorm((3, 3)), **dict(more)})

    with pytest.raises(ValueError, match="model has no layer to quantize .Linear") as caught:
        qk.quantize_(model())
    assert said in str(caught.value) and not recwarn.list
    quantized = qk.quantize_(model(("ours", nn.Linear(3, 3))))
    (warning,) = recwarn.list
    assert "left in floating point: " + said in str(warning.message) and warning.filename == __file__
    assert [row["layer"] for row in table(quantized)][:2] == ["ours", "left"]
    assert "ParametrizationList" not in str(warning.message)
    qk.quantize_(model(("ours", nn.Linear(3, 3))), exclude=["left"])
    assert len(recwarn.list) == 1


@pytest.mark.parametrize(
    "name, shape", [("pos_embed", (2, 3, 3)), ("cls_token", (1, 1, 3)), ("scale", (3, 3))]
)
def test_tables_and_factors_are_not_called_layers(name, shape, recwarn):
    qk.quantize_(nn.Sequential(nn.Linear(3, 3), Holder(name, *shape)))
    assert not recwarn.list


def test_many_layers_of_a_kind_are_named_in_short(recwarn):
    qk.quantize_(nn.Sequential(nn.Linear(3, 3), *(nn.Conv3d(1, 1, 1) for _ in range(9))))
    assert "left in floating point: 1 2 3 4 and 5 more (Conv3d: no quantized form)" in str(recwarn[0].message)


def test_tied_layers_have_the_bits_of_an_end():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.table = nn.Embedding(4, 4), nn.Embedding(4, 4)
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.table.weight = self.head.weight = self.shared.weight

    model = qk.quantize_(Tied())
    bits = {name: layer.weight_quantizer.bits for name, layer in convert.layers(model)}
    assert bits == {"shared": 8, "table": 8, "body": 4, "head": 8}


@pytest.mark.parametrize("parallel", [False, True], ids=["", "sharded"])
def test_torchs_first_fsdp_is_refused(parallel, one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(calibrated(), device_id=torch.device("cpu"), use_orig_params=parallel)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = (lambda: qk.summary(model), lambda: qk.convert_(model), lambda: qk.optim.SAM(model, base),
             lambda: qk.calibrate(model, [batch()]), lambda: qk.quantize_(model))  # fmt: skip
    for call in calls:
        with pytest.raises(
            ValueError, match=r"FullyShardedDataParallel \(FSDP1\): use fully_shard \(FSDP2\)"
        ):
            call()


def test_old_weight_norm_converts():
    with pytest.warns(FutureWarning):
        model = qk.quantize_(nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    y = qk.calibrate(model, [x]).eval()(x)
    assert torch.equal(qk.convert_(model)(x), y)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:left in floating point")
def test_torchs_encoder_keeps_the_quantizers(padded):
    """Its fast path, taken in evaluation without gradients, reads the weights of linear1 and linear2 itself."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x = torch.randn(3, 4, 8)
    mask = torch.arange(4) >= torch.tensor([[4], [3], [2]]) if padded else None
    plain = model.eval()(x, src_key_padding_mask=mask)
    qk.calibrate(qk.quantize_(model, weight_bits=2, act_bits=2, first_last_bits=None), [x])
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = model(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(
            y, expected
        )  # the attention between them, in floating point, takes its own
        assert (y - plain).abs().max() > 0.1
        assert torch.equal(qk.convert_(model)(x, src_key_padding_mask=mask), y)


def test_a_quantized_layer_put_into_torchs_encoder_by_hand():
    encoder, calls = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), []
    encoder.linear1 = qk.nn.QuantLinear(8, 16).eval()
    encoder.linear1.quantized_weight = lambda: calls.append(1) or encoder.linear1.weight
    with torch.no_grad():
        encoder(torch.randn(2, 3, 8))
    assert calls == [1]


def test_compiling_before_calibration_says_what_to_do():
    model = qk.quantize_(Net()).train()
    with pytest.raises(Exception, match="call qk.calibrate"):
        torch.compile(model, fullgraph=True, backend="eager")(batch())
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(batch()), plain(batch()))
    torch._dynamo.reset()
    other = qk.quantize_(Net()).eval()
    with torch.no_grad():
        for mine, value in zip(other.state_dict().values(), plain.state_dict().values(), strict=True):
            mine.copy_(value)
    assert torch.equal(torch.compile(other, backend="eager")(batch()), plain.eval()(batch())), (
        "started by a copy"
    )


def test_disabled_quantizers_pass_everything_on():
    torch.manual_seed(1)
    source = Net()
    model, x = calibrated(model=copy.deepcopy(source), weight_bits=2, act_bits=2).eval(), batch()
    want, quantized = source.eval()(x), model(x)
    with qk.disabled(model):
        assert torch.equal(model(x), want)
        with qk.disabled(model, "stem", "body"):
            assert torch.equal(model(x), want)
        assert torch.equal(model(x), want), "the inner block leaves the outer one alone"
    assert torch.equal(model(x), quantized)
    with qk.disabled(model, "body"):
        assert torch.equal(model.body[0].quantized_weight(), source.body[0].weight)
        assert not torch.equal(model.up.quantized_weight(), source.up.weight)
    for name in ("norm", "nothing"):
        with pytest.raises(ValueError, match=f"{name} has no quantizers"), qk.disabled(model, name):
            pass
    with pytest.raises(KeyError), qk.disabled(model):
        raise KeyError
    assert torch.equal(model(x), quantized)
    with qk.disabled(torch.compile(model), "body"):
        assert torch.equal(model.body[0].quantized_weight(), source.body[0].weight)
    with (
        pytest.raises(ValueError, match="model has integer weights .*cannot be disabled"),
        qk.disabled(qk.convert_(model)),
    ):
        pass


def test_layers_made_by_hand_get_their_quantizers():
    torch.manual_seed(1)
    made = nn.Sequential(qk.nn.QuantConv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), qk.nn.QuantLinear(36, 3))
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    plain.load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="model has no quantizer: call qk.quantize_ first"):
        qk.calibrate(made, [batch()])
    outputs = [qk.calibrate(qk.quantize_(m, method="saq"), [batch()]).eval()(batch()) for m in (made, plain)]
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="model is already quantized"):
        qk.quantize_(made)
