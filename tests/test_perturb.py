"""multi_norm, multi_dot, multi_perturb, qk.perturb and qk.perturbed."""

import math

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import layout, ops, perturbation, reference
from qkernels.reference import perturb as moves

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = {
    "gradient": {"rho": 0.1},
    "adaptive": {"rho": 0.1},
    "normal": {"std": 0.1},
    "magnitude": {"std": 0.1},
    "uniform": {"alpha": 0.1},
    "sign": {"alpha": 0.1},
    "ascent": {"alpha": 0.1, "step": 0.5},
    "direction": {"at": 0.1},
}


def tensors(seed):
    """Shapes and memory orders of a model, and awkward ones, in every dtype."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    made = []
    for dtype in DTYPES:
        made += [draw(5, 7, 3, 3).to(dtype), draw(5, 7, 3, 3).to(dtype).to(memory_format=torch.channels_last)]
        made += [draw(1025).to(dtype), draw().to(dtype), draw(0, 3).to(dtype), draw(8, 10).to(dtype)[:, ::2]]
        made += [draw(17000).to(dtype), draw(3, 9).to(dtype).t(), draw(33).to(dtype)[1:]]
    return made


def same(a, b):
    return torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0)) and a.dtype == b.dtype


def poisoned(params, num):
    return [t.fill_(math.nan) for t in ops.empty_copies(params, num)]


def run(implementation, params, num, *args):
    out = poisoned(params, num)
    implementation(out, params, *args)
    return out


SEED = torch.tensor([-5], dtype=torch.int64)
TABLE = torch.tensor(
    [[0.3, 0.1, 0.05], [0.3, 0.1, 0.05], [math.nan, 0.2, 0.1], [0, 0.3, 0.2]], dtype=torch.float64
)


@pytest.mark.parametrize("with_points", [False, True])
@pytest.mark.parametrize("move", range(7))
def test_native_equals_the_reference(move, with_points):
    params, directions, points = tensors(0), tensors(1), tensors(2) if with_points else []
    directions[0].view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    before = [[t.clone() for t in group] for group in (params, directions, points)]
    args = (params, 4, directions, points, move, TABLE, SEED, 2)
    native = run(torch.ops.qkernels.multi_perturb.default, *args)
    for i, (a, b) in enumerate(zip(native, run(reference.multi_perturb, *args))):
        if a.dtype == torch.float64 and move == moves.MAGNITUDE:
            # torch's own float64 root is not correctly rounded
            assert torch.allclose(a, b, rtol=1e-15, atol=1e-15, equal_nan=True)
        else:
            assert same(a, b), f"tensor {i}, {a.dtype}"
    for group, kept in zip((params, directions, points), before):
        assert all(same(t, k) for t, k in zip(group, kept))


def test_sums_equal_the_reference():
    a, b = tensors(0), tensors(1)
    for weights in ([], b):
        for mine, true in zip(
            torch.ops.qkernels.multi_norm(a, weights, 0.01), reference.multi_norm(a, weights, 0.01)
        ):
            assert torch.allclose(mine, true, rtol=1e-13, atol=0)
    mine, true = torch.ops.qkernels.multi_dot(a, b), reference.multi_dot(a, b)
    assert torch.allclose(mine, true, rtol=1e-13, atol=1e-9)
    norm, norms = ops.multi_norm(a)
    assert torch.allclose(norm, norms.square().sum().sqrt().reshape(1), rtol=1e-14, atol=0)


def test_norm_of_huge_and_tiny_numbers_neither_overflows_nor_vanishes():
    assert ops.multi_norm([torch.full((4,), 3e38)])[0].item() == pytest.approx(6e38, rel=1e-6)
    assert ops.multi_norm([torch.full((4,), 2.0**-140)])[0].item() == 2.0**-139
    assert ops.multi_norm([torch.zeros(3), torch.empty(0)])[0].item() == 0
    assert math.isnan(ops.multi_norm([torch.tensor([1.0, math.nan])])[0].item())


def test_a_result_does_not_depend_on_threads_or_on_the_number_of_copies():
    params = tensors(0) + [torch.randn(300_001)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            copies = qk.perturb(params, "magnitude", std=0.1, num=5, seed=7)
            results.append(
                [
                    *[t for copy in copies for t in copy],
                    *ops.multi_norm(params),
                    ops.multi_dot(params, params),
                ]
            )
        assert all(same(a, b) for a, b in zip(*results))
    finally:
        torch.set_num_threads(threads)
    for k in range(5):
        alone = qk.perturb(params, "magnitude", std=0.1, seed=7, first=k)[0]
        assert all(same(a, b) for a, b in zip(alone, copies[k]))
    assert not same(copies[0][0], copies[1][0])
    other = qk.perturb(params, "magnitude", std=0.1, seed=8)[0]
    assert not same(other[0], copies[0][0])


def test_large_outputs_are_written_whole():
    # from 32 MB on, outputs go past the caches, by 16 bytes
    params = [torch.randn(4_200_001), torch.randn(37), torch.randn(4_300_003).bfloat16()]
    copies = qk.perturb(params, "direction", at=[0.5, -2.0], num=2, directions=params)
    for copy, at in zip(copies, (0.5, -2.0)):
        for w, t in zip(params, copy):
            assert torch.equal(t, (w.float() + at * w.float()).to(w.dtype))
    # and those of one copy straight from the registers, where they begin with a line
    w, d = torch.randn(8_400_037), torch.randn(8_400_037)
    d[5] = math.inf
    for start in (0, 1):
        out = torch.zeros(w.numel() + 1)[start:][: w.numel()]
        ops.multi_climb([out], [w], [d], torch.ones(1, dtype=torch.float64), 0.5)
        assert torch.equal(out, w + 0.5 * d)
        ops.multi_climb([out], [w], [d], torch.zeros(1, dtype=torch.float64), 0.5)
        assert torch.equal(out, w)


@pytest.mark.parametrize("eta", [None, 0.01])
def test_climbing_is_the_norm_and_the_move(eta):
    params, gradients = with_gradients(), [w.grad for w in with_gradients()]
    norm = ops.multi_norm(gradients, params if eta else None, eta or 0.0)[0]
    table = torch.stack([0.3 / norm.item() + 0 * norm, 0 * norm + (eta or 0.0)], 1)
    want, got, given = (poisoned(params, 1) for _ in range(3))
    ops.multi_perturb(want, params, moves.ADAPTIVE if eta else moves.ALONG, table, gradients)
    ops.multi_climb(got, params, gradients, None, 0.3, eta)
    ops.multi_climb(given, params, gradients, norm, 0.3, eta)
    assert all(same(a, b) and same(a, c) for a, b, c in zip(want, got, given))


def test_autograd_sees_what_is_written_over_a_saved_tensor():
    w, d = torch.ones(3), torch.ones(3)
    table = torch.ones(1, 1, dtype=torch.float64)
    for write in (lambda t: ops.multi_climb([t], [w], [d], None, 0.1),
                  lambda t: ops.multi_perturb([t], [w], moves.ALONG, table, [d])):  # fmt: skip
        saved, factor = torch.zeros(3), torch.ones(3, requires_grad=True)
        y = (factor * saved).sum()
        write(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("climb", [ops.multi_climb, reference.multi_climb], ids=["native", "reference"])
def test_climbing_writes_nothing_where_a_copy_is_not_laid_out_as_its_parameter(climb):
    w, g = torch.randn(6, 6), torch.randn(6, 6)
    for other in (torch.zeros(6, 6).t(), torch.zeros(36), torch.zeros(4, 9), torch.zeros(6, 6).double()):
        out = [torch.zeros(5), other]
        with pytest.raises(RuntimeError, match="out differs from params"):
            climb(out, [torch.randn(5), w], [torch.randn(5), g], None, 0.1, None)
        assert not any(t.any() for t in out)
    with pytest.raises(RuntimeError, match="out"):
        climb([], [w], [g], None, 0.1, None)


def test_noise_has_the_moments_it_claims():
    w = torch.full((200_000,), 3.0)
    normal, magnitude, uniform = (
        qk.perturb([w], kind, seed=1, **{name: 0.5})[0][0].double() - 3
        for kind, name in (("normal", "std"), ("magnitude", "std"), ("uniform", "alpha"))
    )
    # four standard errors
    assert abs(normal.mean()) < 4 * 0.5 / 200_000**0.5 and abs(normal.std() / 0.5 - 1) < 4 / 400_000**0.5
    assert abs(magnitude.std() / 1.5 - 1) < 4 / 400_000**0.5
    assert uniform.min() >= -0.5 and uniform.max() < 0.5 and abs(uniform.std() / (0.5 / 3**0.5) - 1) < 0.01


def with_gradients(seed=0):
    params = [nn.Parameter(t) for t in tensors(seed) if t.dtype == torch.float32]
    for i, w in enumerate(params):
        w.grad = torch.empty_like(w).copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(i)))
    return params


def test_gradient_kinds_follow_their_formulas():
    params = with_gradients()
    norm = torch.cat([w.grad.flatten() for w in params]).double().norm()
    for w, t in zip(params, qk.perturb(params, "gradient", rho=0.3)[0]):
        assert torch.allclose(t, w + (0.3 / norm).float() * w.grad, rtol=1e-6, atol=1e-7)
    reach = [w.detach().double().abs() + 0.01 for w in params]
    norm = torch.cat([(r * w.grad).flatten() for r, w in zip(reach, params)]).norm()
    for w, r, t in zip(params, reach, qk.perturb(params, "adaptive", rho=0.3)[0]):
        assert torch.allclose(t.double(), w + 0.3 * r.square() * w.grad / norm, rtol=1e-6, atol=1e-7)
    moved = [t.detach() - w.detach() for w, t in zip(params, qk.perturb(params, "gradient", rho=0.3)[0])]
    assert ops.multi_norm(moved)[0].item() == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize(
    "ball, radius", [("constant", lambda w: 0.1), ("magnitude", lambda w: 0.1 * (w.abs() + 1))]
)
def test_ascent_stays_in_its_ball(ball, radius):
    params = [w.detach() for w in with_gradients()]
    grads = [w.grad for w in with_gradients()]
    points = params
    for _ in range(5):
        points = qk.perturb(params, "ascent", alpha=0.1, step=0.04, ball=ball, grads=grads, points=points)[0]
    reached = 0
    for w, p in zip(params, points):
        assert ((p - w).abs() <= radius(w) + 1e-6).all()
        reached += int(((p - w).abs() > 0.999 * radius(w)).sum())
    assert reached > 0
    for w, g, p in zip(params, grads, qk.perturb(params, "sign", alpha=0.1, grads=grads)[0]):
        assert torch.allclose(p, w + 0.1 * g.sign(), atol=1e-6)


def test_two_directions_make_a_plane():
    params, x, y = tensors(0)[:3], tensors(1)[:3], tensors(2)[:3]
    copies = qk.perturb(params, "direction", at=[(0.5, -1.0), (0.0, 2.0)], num=2, directions=(x, y))
    for i, w in enumerate(params):
        assert torch.allclose(copies[0][i], w + 0.5 * x[i] - y[i], atol=1e-6)
        assert torch.equal(copies[1][i], w + 2.0 * y[i])
    scaled = perturbation.filter_normalized(x, params)
    assert torch.allclose(scaled[0].flatten(1).norm(dim=1), params[0].flatten(1).norm(dim=1), rtol=1e-5)
    assert not scaled[2].any()


def test_nothing_moves_where_the_gradient_gives_no_direction():
    params = with_gradients()
    for value in (0.0, math.inf):
        for w in params:
            w.grad.fill_(value)
        for kind in ("gradient", "adaptive"):
            assert all(torch.equal(w, t) for w, t in zip(params, qk.perturb(params, kind, rho=0.1)[0]))


def test_out_is_overwritten_and_copies_keep_the_memory_order():
    params = [t for t in tensors(0) if t.numel()]
    copies = qk.perturb(params, "normal", std=0.1, num=2, seed=1)
    pointers, versions = [t.data_ptr() for t in copies[1]], [t._version for t in copies[1]]
    again = qk.perturb(params, "normal", std=0.1, num=2, seed=2, out=copies)
    assert [t.data_ptr() for t in again[1]] == pointers
    assert all(t._version > v for t, v in zip(again[1], versions))
    assert all(same(a, b) for a, b in zip(again[0], qk.perturb(params, "normal", std=0.1, seed=2)[0]))
    assert all(t.stride() == layout.dense(w).stride() for w, t in zip(params, again[0]))


def test_several_copies_are_not_written_over_what_they_are_made_of():
    params, grads = [torch.ones(3)], [torch.ones(3)]
    assert qk.perturb(params, "sign", alpha=1, grads=grads, out=[params])[0][0] is params[0]
    for over in (params, grads):
        with pytest.raises(ValueError, match="out must not be params, directions or points"):
            qk.perturb(params, "sign", alpha=1, grads=grads, num=2, out=[over, [torch.ones(3)]])


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    net[0].weight.data = net[0].weight.data.to(memory_format=torch.channels_last)
    return net


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_perturbed_restores_bits_and_memory(kind, dtype):
    net = model().to(dtype)
    x = torch.randn(5, 2, 6, 6).to(dtype)
    net(x).square().mean().backward()
    settings = dict(KINDS[kind])
    if kind == "direction":
        settings["directions"] = [torch.ones_like(p) for p in net.parameters()]
    before = [(p.clone(), p.data_ptr(), p.stride()) for p in net.parameters()]
    with qk.perturbed(net, kind, **settings) as copy:
        inside = net(x)
        assert all(p.data_ptr() == t.data_ptr() for p, t in zip(net.parameters(), copy))
    with pytest.raises(KeyError), qk.perturbed(net, kind, **settings):
        assert torch.equal(net(x), inside)
        raise KeyError
    for p, (value, pointer, stride) in zip(net.parameters(), before):
        assert same(p.detach(), value) and p.data_ptr() == pointer and p.stride() == stride
    assert not torch.equal(inside, net(x)) or dtype in (torch.bfloat16, torch.float16)


def test_quantizers_numbers_are_not_perturbed():
    net = qk.quantize_(model(), qk.QConfig(method="lsq", weight_bits=4, act_bits=4))
    net(torch.randn(5, 2, 6, 6))
    scales = [p for m in net.modules() if isinstance(m, qk.quantizers.Quantizer) for p in m.parameters()]
    before = [p.clone() for p in scales]
    with qk.perturbed(net, "normal", std=0.1) as copy:
        assert all(torch.equal(p, b) for p, b in zip(scales, before))
    assert len(copy) == len(list(net.parameters())) - len(scales)


def test_integer_weights_are_no_parameters():
    net = qk.convert_(qk.quantize_(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), act_bits=None))
    with pytest.raises(ValueError, match="model has integer weights"), qk.perturbed(net, "normal", std=0.1):
        pass
    with qk.perturbed(net, "normal", std=0.1, params=iter([net[0].bias])) as (bias,):
        assert net[0].bias.data_ptr() == bias.data_ptr()


def test_copies_feed_functional_call():
    net = model().eval()
    x, names = torch.randn(5, 2, 6, 6), [name for name, _ in net.named_parameters()]
    copies = qk.perturb(list(net.parameters()), "normal", std=0.1, num=3, seed=3)
    for k, copy in enumerate(copies):
        with qk.perturbed(net, "normal", std=0.1, seed=3, first=k):
            expected = net(x)
        assert torch.equal(torch.func.functional_call(net, dict(zip(names, copy)), (x,)), expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num": 0}, ValueError, r"num must be an int >= 1, got 0"),
        ({"params": []}, ValueError, r"params must be a non-empty list of tensors, got an empty list"),
        ({"kind": "gaussian"}, ValueError, r"kind must be one of .*'normal'.*, got 'gaussian'"),
        ({"kind": "gradient"}, ValueError, r"needs rho"),
        ({"kind": "gradient", "rho": -0.1}, ValueError, r"rho must be a finite number >= 0, got -0.1"),
        ({"kind": "gradient", "rho": math.nan}, ValueError, r"rho must be a finite number >= 0, got nan"),
        ({"kind": "gradient", "rho": 0.1}, ValueError, r"params\[0\] has no gradient"),
        ({"kind": "normal", "std": 0.1, "rho": 0.1}, ValueError, r"kind 'normal' takes std, not rho"),
        ({"kind": "normal", "std": 0.1, "directions": []}, ValueError, r"kind 'normal' takes std, not directions"),
        ({"kind": "uniform", "alpha": 0.1, "ball": "magnitude"}, ValueError, r"takes alpha, not ball"),
        ({"kind": "gradient", "rho": 0.1, "points": []}, ValueError, r"takes rho, grads, not points"),
        ({"kind": "normal", "std": 0.1, "first": 1.7}, ValueError, r"first must be an int >= 0, got 1.7"),
        ({"kind": "normal", "std": 0.1, "first": -1}, ValueError, r"first must be an int >= 0, got -1"),
        ({"kind": "normal", "std": [0.1, 0.2]}, ValueError, r"std must be a number or num=1 of them, got 2"),
        ({"kind": "normal", "std": 0.1, "seed": 0.5}, ValueError, r"seed must be an int within int64.*got 0.5"),
        ({"kind": "normal", "std": 0.1, "seed": 2**64}, ValueError, r"seed must be an int within int64.*got 1844"),
        ({"kind": "magnitude", "std": 0.1, "eps": "a"}, ValueError, r"eps must be a finite number, got 'a'"),
        ({"kind": "ascent", "alpha": 1, "step": math.nan}, ValueError, r"step must be a finite number, got nan"),
        ({"kind": "adaptive", "rho": 1, "eta": [1.0]}, ValueError, r"eta must be a finite number, got \[1.0\]"),
        ({"kind": "normal", "std": 0.1, "out": [[]]}, ValueError, r"out must be a non-empty list"),
        ({"kind": "ascent", "alpha": 0.1, "grads": [torch.ones(3)]}, ValueError, r"needs step"),
        ({"kind": "sign", "alpha": 1, "grads": [torch.ones(3)], "ball": "l2"}, ValueError, r"ball must be .*got 'l2'"),
        ({"kind": "sign", "alpha": 1, "grads": [torch.ones(4)]}, ValueError, r"grads\[0\] must be .*\(3,\).*\(4,\)"),
        ({"kind": "sign", "alpha": 1, "grads": []}, ValueError, r"grads must be a non-empty list"),
        ({"kind": "direction", "at": 1}, ValueError, r"needs directions"),
        ({"kind": "direction", "at": 1, "directions": ([torch.ones(3)],) * 2}, ValueError, r"at must give 2 number"),
        ({"params": [torch.ones(3, dtype=torch.int32)]}, TypeError, r"params\[0\] must be .* got torch.int32"),
        ({"params": [torch.ones(3), torch.ones(3, device="meta")]}, ValueError, r"params must be on one device"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"params": [torch.ones(3)], "kind": "normal"}
    if not {"kind", "std"} & set(change):
        arguments["std"] = 0.1
    with pytest.raises(error, match=message):
        qk.perturb(**{**arguments, **change})


def test_perturbed_needs_a_gradient_for_a_gradient_kind():
    with (
        pytest.raises(ValueError, match="no parameter of the model has one"),
        qk.perturbed(model(), "gradient", rho=1),
    ):
        pass
    with pytest.raises(ValueError, match="num=3"), qk.perturbed(model(), "normal", std=1.0, num=3):
        pass


def test_the_ops_keep_torchs_contracts():
    params, grads = tensors(0)[:3], tensors(1)[:3]
    torch.library.opcheck(torch.ops.qkernels.multi_norm.default, (grads, params, 0.01))
    torch.library.opcheck(torch.ops.qkernels.multi_dot.default, (params, grads))
    out = [t.zero_() for t in ops.empty_copies(params, 4)]
    args = (out, params, grads, [], moves.NORMAL, TABLE, SEED, 0)
    torch.library.opcheck(torch.ops.qkernels.multi_perturb.default, args)
    args = (out[:3], params, grads, None, 0.1, 0.01)
    torch.library.opcheck(torch.ops.qkernels.multi_climb.default, args)


def test_backward_belongs_into_the_block():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before = model(x).square().sum()
    with qk.perturbed(model, kind="normal", std=0.5):
        inside, used = model(x).square().sum(), model(x).square().sum()
        used.backward()
    assert not torch.allclose(model[0].weight.grad, want[0])
    late = [lambda: inside.backward(retain_graph=True)] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.pop()()
    with (
        qk.perturbed(model, kind="normal", std=0.5, seed=1),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        late.pop()()
    model.zero_grad()
    before.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.pop()()


@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch has no copy-on-write")
def test_parameters_that_share_memory_until_one_is_written():
    torch.set_num_threads(2)
    for _ in range(5):
        first, step = torch.ones(1 << 20), torch.ones(1 << 20)
        pair = [first, torch._lazy_clone(first)]
        ops.multi_perturb(pair, pair, ops.ALONG, torch.tensor([[1.0]], dtype=torch.float64), [step, step])
        assert all((t == 2).all() for t in pair)
