"""First and second derivatives, forward mode, and agreement with autograd of the straight-through expression."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import qkernels as qk
from qkernels import testing


@pytest.fixture(params=tuple(testing.backends("fake_quantize_backward")))
def backend(request):
    with qk.use_backend(request.param):
        yield request.param


def broadcast(values, x, axis):
    return values if axis is None else values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def surrogate(x, scale, quant_min, quant_max, axis=None, offset=None, grad_scale=1.0):
    """Clamp, then a straight-through round, composed of torch's own ops."""

    def scaled(t):
        return t * grad_scale + (t * (1 - grad_scale)).detach()

    s = broadcast(scaled(scale), x, axis)
    o = 0.0 if offset is None else broadcast(scaled(offset), x, axis)
    v = ((x - o) / s).clamp(quant_min, quant_max)
    return (v + (v.round() - v).detach()) * s + o


CONFIGS = {
    "tensor": ((6, 5), None, False, 1.0), "axis0": ((6, 5), 0, False, 1.0), "axis1": ((3, 4, 5), 1, True, 1.0),
    "grad_scale": ((40,), None, True, 0.3), "big": ((3, 5000), 0, True, 0.01),
}  # fmt: skip


def problem(name, dtype=torch.float64):
    """(x, scale, offset or None, keywords of both sides), away from ties and clip edges."""
    shape, axis, with_offset, grad_scale = CONFIGS[name]
    rows = 1 if axis is None else shape[axis]
    generator = torch.Generator().manual_seed(len(name))
    scale = 0.2 + 0.3 * torch.rand(rows, generator=generator, dtype=torch.float64)
    offset = torch.rand(rows, generator=generator, dtype=torch.float64) - 0.5 if with_offset else None
    v = torch.randint(-6, 6, shape, generator=generator) + 0.45 * (
        2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    )
    x = v * broadcast(scale, v, axis) + (0.0 if offset is None else broadcast(offset, v, axis))
    leaves = [t.to(dtype).requires_grad_() for t in (x, scale) + (() if offset is None else (offset,))]
    keywords = {"quant_min": -4, "quant_max": 3, "axis": axis, "grad_scale": grad_scale}
    return leaves, keywords


def run(function, leaves, keywords):
    x, scale, *offset = leaves
    return function(x, scale, offset=offset[0] if offset else None, **keywords)


def both(leaves, keywords):
    return [run(function, leaves, keywords) for function in (qk.fake_quantize, surrogate)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_first_derivatives_are_the_surrogates(backend, name, dtype):
    leaves, keywords = problem(name, dtype)
    ours, theirs = both(leaves, keywords)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=8 * eps)
    g = torch.randn(ours.shape, dtype=dtype)
    for got, want in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g)):
        # The decomposed expression rounds v * s / s and sums differences of large terms.
        bound = testing.sum_bound(dtype, g.numel(), 16.0 * float(g.abs().max()), want)
        assert ((got.double() - want.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", ["tensor", "axis0", "axis1", "grad_scale"])
def test_hessian_vector_products_are_the_surrogates(backend, name):
    leaves, keywords = problem(name)
    vectors = [torch.randn_like(t) for t in leaves]
    weight = torch.randn(leaves[0].shape, dtype=torch.float64)
    products = []
    for y in both(leaves, keywords):
        loss = (weight * y**3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        products.append(torch.autograd.grad(first, leaves, vectors))
    for got, want in zip(*products):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_third_derivatives_are_the_surrogates(backend):
    leaves, keywords = problem("axis0")
    results = []
    for y in both(leaves, keywords):
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((f**2).sum() for f in first), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum((s * s.detach()).sum() for s in second), leaves))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_hessian_of_a_network_with_a_quantized_weight(backend):
    torch.manual_seed(1)
    w, s = torch.randn(3, 4, dtype=torch.float64) * 0.7, torch.full((3,), 0.31, dtype=torch.float64)
    data = torch.randn(8, 4, dtype=torch.float64)

    def loss(quantizer, w, s):
        return torch.tanh(data @ quantizer(w, s, quant_min=-4, quant_max=3, axis=0).t()).square().mean()

    ours = torch.autograd.functional.hessian(lambda w, s: loss(qk.fake_quantize, w, s), (w, s))
    theirs = torch.autograd.functional.hessian(lambda w, s: loss(surrogate, w, s), (w, s))
    for i in range(2):
        for j in range(2):
            assert theirs[i][j].abs().max() > 1e-4
            torch.testing.assert_close(ours[i][j], theirs[i][j], rtol=1e-9, atol=1e-12)


def test_a_second_derivative_of_ewgs(backend):
    """dx is linear in g on each side of 0, so its derivative is 1 + delta sign(g) (v - rint v)."""
    x = torch.tensor([0.3, -0.3, 9.0], dtype=torch.float64, requires_grad=True)
    y = qk.fake_quantize(x, torch.ones(1, dtype=torch.float64), bits=4, ewgs=0.5)
    g = torch.tensor([2.0, -4.0, 1.0], dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (slope,) = torch.autograd.grad(dx.sum(), g)
    torch.testing.assert_close(slope, torch.tensor([1.15, 1.15, 0.0], dtype=torch.float64))


def dual(f, values, tangents, gradient=False, create_graph=False):
    """The tangent of f, or of the gradient of its sum, by dual numbers."""
    with forward_ad.dual_level():
        values = [v.clone().requires_grad_(gradient) for v in values]
        y = f(*map(forward_ad.make_dual, values, tangents))
        if not gradient:
            return forward_ad.unpack_dual(y).tangent
        found = torch.autograd.grad(y.sum(), values, create_graph=create_graph)
        return [forward_ad.unpack_dual(g).tangent for g in found]


def samples(f):
    """f over a batch of two of its first argument."""
    return lambda x, *rest: torch.vmap(lambda x: f(x, *rest))(torch.stack([x, 2 * x]))


FORWARD = {
    "jvp": lambda f, values, tangents: torch.func.jvp(f, values, tangents)[1],
    "of_vmap": lambda f, values, tangents: torch.func.jvp(samples(f), values, tangents)[1],
    "jacfwd": lambda f, values, _: torch.func.jacfwd(f, argnums=(0, 1))(*values),
    "hessian": lambda f, values, _: torch.func.hessian(lambda *a: f(*a).sum(), argnums=(0, 1))(*values),
    "twice": lambda f, values, _: torch.func.jacfwd(torch.func.jacfwd(f, argnums=1), argnums=(0, 1))(*values),
    "reverse_over": lambda f, values, _: torch.func.jacrev(torch.func.jacfwd(f, argnums=1), argnums=(0, 1))(*values),
    "dual": dual,
    "dual_gradient": lambda *a: dual(*a, gradient=True),
    "dual_graph": lambda *a: dual(*a, gradient=True, create_graph=True),
}  # fmt: skip


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("name", ["tensor", "axis0", "axis1", "grad_scale"])
def test_forward_mode_is_the_surrogates(backend, name, way):
    leaves, keywords = problem(name)
    values, tangents = tuple(t.detach() for t in leaves), tuple(torch.randn_like(t) for t in leaves)
    cube = [lambda *a, f=f: run(f, a, keywords) ** 3 for f in (qk.fake_quantize, surrogate)]
    ours, theirs = (tree_leaves(FORWARD[way](f, values, tangents)) for f in cube)
    assert sum(want.detach().abs().sum() for want in theirs) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_forward_mode_of_ewgs(backend):
    """The forward pass knows no sign of a gradient; the gradient is linear in g between the signs."""
    x, scale = torch.tensor([0.3, -0.3, 9.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    quantizer = lambda x: qk.fake_quantize(x, scale, bits=4, ewgs=0.5)  # noqa: E731
    with pytest.raises(NotImplementedError, match="ewgs=0.5 has no forward-mode derivative: EWGS"):
        torch.func.jvp(quantizer, (x,), (x,))
    g, tangent = torch.tensor([[2.0, -4.0, 1.0], [1.0, -2.0, 3.0]], dtype=torch.float64)
    slope = torch.func.jvp(lambda g: torch.func.vjp(quantizer, x)[1](g)[0], (g,), (tangent,))[1]
    torch.testing.assert_close(slope, torch.tensor([1.15, 1.15, 0.0], dtype=torch.float64) * tangent)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("name", ["tensor", "axis1"])
def test_gradcheck_where_the_function_is_smooth(backend, kind, name):
    """Pseudo noise does not round, so that finite differences see the true derivative, inside and outside the clip."""
    leaves, keywords = problem(name)
    keywords = {**keywords, "grad_scale": 1.0, "noise": qk.noise.Pseudo(kind), "seed": torch.tensor([5])}

    def f(x, scale, offset=None):
        return qk.fake_quantize(x, scale, offset=offset, **keywords)

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True)


def test_gradcheck_beyond_the_clip(backend):
    x = torch.tensor([5.0, -6.0, 7.5, 9.0], dtype=torch.float64, requires_grad=True)
    scale, offset = (torch.tensor([s], dtype=torch.float64, requires_grad=True) for s in (0.4, 0.1))
    for zero_point in (0, 2):
        f = lambda x, s, o: qk.fake_quantize(x, s, bits=3, offset=o, zero_point=zero_point)  # noqa: B023, E731
        assert torch.autograd.gradcheck(f, (x, scale, offset))


@pytest.mark.parametrize("noise", [qk.noise.Tempering(), qk.noise.FeaturePerturbation(1.0)], ids=str)
def test_output_noise_is_outside_the_gradient(backend, noise):
    leaves, keywords = problem("axis1")
    x, scale, offset = leaves
    plain = qk.fake_quantize(x, scale, offset=offset, **keywords)
    noisy = qk.fake_quantize(x, scale, offset=offset, noise=noise, seed=torch.tensor([3]), **keywords)
    assert not torch.equal(plain, noisy)
    g = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(plain, leaves, g), torch.autograd.grad(noisy, leaves, g)):
        assert torch.equal(a, b)


def test_stochastic_and_before_gradients_use_the_drawn_level(backend):
    x = (torch.rand(200, dtype=torch.float64) * 9 - 4.5).requires_grad_()
    scale, seed = torch.tensor([0.5], dtype=torch.float64, requires_grad=True), torch.tensor([11])
    for noise in (qk.noise.StochasticRounding(), qk.noise.FeaturePerturbation(1.0, "before")):
        y = qk.fake_quantize(x, scale, bits=4, noise=noise, seed=seed)
        dx, dscale = torch.autograd.grad(y.sum(), (x, scale))
        q, v = y.detach() / 0.5, x.detach() / 0.5
        if isinstance(noise, qk.noise.StochasticRounding):
            inside = (v >= -8) & (v <= 7)
            want = torch.where(inside, q - v, q).sum()
        else:
            v = v + qk.random.uniform(seed, 0, 200).double() - 0.5
            inside = (v >= -8) & (v <= 7)
            want = torch.where(inside, q - v, q).sum()
        assert torch.equal(dx, inside.double())
        assert dscale.item() == pytest.approx(want.item(), rel=1e-12)


def test_only_what_needs_a_gradient_gets_one(backend):
    for wants in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        leaves, keywords = problem("axis1")
        for leaf, want in zip(leaves, wants):
            leaf.requires_grad_(want)
        both(leaves, keywords)[0].sum().backward()
        assert tuple(leaf.grad is not None for leaf in leaves) == wants
    with torch.no_grad():
        assert not both(leaves, keywords)[0].requires_grad


def test_upstream_gradients_of_any_layout(backend):
    x = torch.randn(4, 5, 6, 3).to(memory_format=torch.channels_last).requires_grad_()
    scale = torch.rand(5).add(0.1).requires_grad_()
    y = qk.fake_quantize(x, scale, bits=3, axis=1)
    base = torch.randn(4, 5, 6, 3)
    want = torch.autograd.grad(y, (x, scale), base, retain_graph=True)
    for g in (base.to(memory_format=torch.channels_last), base.transpose(0, 2).contiguous().transpose(0, 2),
              base.repeat_interleave(2, dim=-1)[..., ::2]):  # fmt: skip
        got = torch.autograd.grad(y, (x, scale), g, retain_graph=True)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    ones = torch.autograd.grad(y, (x, scale), torch.ones(()).expand(y.shape), retain_graph=True)
    summed = torch.autograd.grad(y.sum(), (x, scale))
    assert torch.equal(ones[0], summed[0]) and torch.equal(ones[1], summed[1])
