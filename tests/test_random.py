"""Random numbers: published vectors, the formulas in NumPy, their distributions, and noise inside the quantizer."""

import math

import numpy as np
import oracle
import pytest
import torch

import qkernels as qk
from qkernels import _elements, noise, random, testing

SEEDS = [(0, 0), (123456789012345, 3), (-1, -1), (-7046029254386353131, (5 << 33) + 2), (1 << 62, 1 << 32)]
DRAWS = 10_000_000
CHUNK = 1 << 20


def tensor(seed):
    return torch.tensor([seed])


def signed(word_low, word_high):
    value = word_high << 32 | word_low
    return value - (1 << 64) if value >> 63 else value


# The known-answer vectors of Random123 (Salmon et al. 2011) for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, words", KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    seed, stream, index = signed(*key), signed(*counter[2:]), signed(*counter[:2])
    got = random.philox(tensor(seed), stream, torch.tensor([index]))
    assert tuple(int(w) for w in got) == words
    assert tuple(_elements.philox(seed, stream, index, np.arange(4)).tolist()) == words
    assert tuple(oracle.philox(seed, stream, [index % 2**64])[:, 0].tolist()) == words


@pytest.mark.parametrize("seed, stream", SEEDS)
def test_words_and_uniforms_follow_the_formula(seed, stream):
    for first, count in ((0, 4099), (1, 6), (3, 1), (4 * (2**33 + 7) + 1, 30)):
        want = oracle.words(seed, stream, count, first)
        np.testing.assert_array_equal(
            random.words(tensor(seed), stream, count, first).numpy(), want.astype(np.int64)
        )
        np.testing.assert_array_equal(_elements.words(seed, stream, count, first), want)
        want = oracle.uniform(seed, stream, count, first)
        np.testing.assert_array_equal(random.uniform(tensor(seed), stream, count, first).numpy(), want)
        np.testing.assert_array_equal(_elements.uniform(seed, stream, count, first), want)


@pytest.mark.parametrize("seed, stream", SEEDS)
def test_normals_follow_the_formula(seed, stream):
    """Box-Muller in float64 on the same words; the float32 polynomials are within a few ulps of the radius."""
    for first, count in ((0, 40003), (2, 5), (3, 1)):
        got = random.normal(tensor(seed), stream, count, first).numpy()
        assert np.abs(got - oracle.normal(seed, stream, count, first)).max() < 1.5e-6
        np.testing.assert_array_equal(_elements.normal(seed, stream, count, first), got)


def test_the_ends_of_box_muller():
    """The smallest radius word gives the largest radius; the largest gives exactly 0, never NaN."""
    words = [torch.tensor([w]) for w in (0, 0xFF, 0xFFFFFFFF, 0xFFFFFF00)]
    for w, want in zip(words, (math.sqrt(48 * math.log(2)),) * 2 + (0.0, 0.0)):
        pair = random._normal_pair(w, torch.tensor([0]))
        assert pair[0].item() == pytest.approx(want, rel=1e-6) and pair[1].item() == 0


def test_elementary_functions_over_all_their_range():
    u = (
        torch.cat(
            [torch.arange(1, 1 << 16), torch.randint(1, 1 << 24, (200_000,)), torch.tensor([1 << 24])]
        ).float()
        * 2.0**-24
    )
    assert (
        (random._log_unit(u).double() - u.double().log()).abs()
        <= 1.2e-7 * u.double().log().abs().clamp(min=1)
    ).all()
    assert random._log_unit(torch.ones(1)).item() == 0
    x = torch.linspace(-87, 0, 200_001)
    assert (random.exp_negative(x).double() / x.double().exp() - 1).abs().max() < 2.5e-7
    assert random.exp_negative(torch.zeros(1)).item() == 1.0
    word = torch.randint(0, 1 << 32, (200_000,))
    sine, cosine = random._sin_cos_turn(word)
    turn = (word >> 8).double() * 2.0**-24 * 2 * math.pi
    assert (sine.double() - turn.sin()).abs().max() < 2e-7 and (
        cosine.double() - turn.cos()
    ).abs().max() < 2e-7


@pytest.mark.parametrize("draw", ["words", "uniform", "normal"])
def test_chunks_join(draw):
    python, native = getattr(random, draw), getattr(_elements, draw)
    whole = python(tensor(9), 5, 103)
    for cut in (1, 2, 3, 4, 50, 102):
        joined = torch.cat([python(tensor(9), 5, cut), python(tensor(9), 5, 103 - cut, cut)])
        assert torch.equal(joined, whole)
        np.testing.assert_array_equal(
            np.concatenate([native(9, 5, cut), native(9, 5, 103 - cut, cut)]), whole.numpy()
        )
    assert python(tensor(9), 5, 0).numel() == 0 == native(9, 5, 0).size


def _bins(draw, edges):
    """(counts per bin, mean, second, third, fourth moment, correlation of neighbours) over DRAWS draws."""
    counts, powers, products, last = np.zeros(len(edges) + 1), np.zeros(4), 0.0, None
    for first in range(0, DRAWS, CHUNK):
        x = draw(2024, 7, min(CHUNK, DRAWS - first), first).astype(np.float64)
        counts += np.bincount(np.searchsorted(edges, x, side="right"), minlength=len(edges) + 1)
        square = x * x
        powers += [x.sum(), square.sum(), (square * x).sum(), (square * square).sum()]
        products += x[1:] @ x[:-1] + (0.0 if last is None else last * x[0])
        last = x[-1]
    return counts, powers / DRAWS, products / DRAWS


def _kolmogorov_smirnov(counts, cdf):
    return np.abs(np.cumsum(counts)[:-1] / DRAWS - cdf).max() * math.sqrt(DRAWS)


def test_ten_million_uniforms():
    edges = np.arange(1, 4096) / 4096
    counts, moments, product = _bins(_elements.uniform, edges)
    # P(sqrt(n) D > 1.95) = 0.001
    assert _kolmogorov_smirnov(counts, edges) < 1.95
    root = math.sqrt(DRAWS)
    for power, moment in enumerate(moments, start=1):
        deviation = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs(moment - 1 / (power + 1)) * root < 4 * deviation
    assert abs(product - 0.25 - (moments[0] - 0.5)) * root < 4 / 12


def test_ten_million_normals():
    from scipy.special import ndtr

    edges = np.linspace(-4, 4, 2001)
    counts, moments, product = _bins(_elements.normal, edges)
    assert _kolmogorov_smirnov(counts, ndtr(edges)) < 1.95
    root = math.sqrt(DRAWS)
    for moment, want, deviation in zip(
        moments, (0, 1, 0, 3), (1, math.sqrt(2), math.sqrt(15), math.sqrt(96))
    ):
        assert abs(moment - want) * root < 4 * deviation
    assert abs(product) * root < 4


@pytest.mark.parametrize("draw", [_elements.uniform, _elements.normal], ids=["uniform", "normal"])
def test_streams_and_seeds_are_unrelated(draw):
    n = 200_000
    base = draw(1, 0, n).astype(np.float64)
    others = [
        draw(seed, stream, n)
        for seed, stream in ((1, 1), (1, 2), (2, 0), (1 << 32, 0), (1, 1 << 32), (-1, 0))
    ]
    others += [np.roll(base, shift) for shift in (1, 2, 3, 4, 8)]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) * math.sqrt(n) < 4.5


# Inside the quantizer


@pytest.fixture(params=tuple(testing.backends("fake_quantize")))
def backend(request):
    with qk.use_backend(request.param):
        yield request.param


S, LO, HI = np.float32(0.25), -8, 7


def quantized(x, how, seed=5, stream=9, **keywords):
    return qk.fake_quantize(
        x, torch.tensor([0.25]), bits=4, noise=how, seed=tensor(seed), stream=stream, **keywords
    )


def test_each_noise_is_its_formula(backend):
    x = testing.Case("fake_quantize", (3, 7, 11), torch.float32, "tensor").args()[0]
    x = torch.where(x.abs() > 1e30, 0.1, x)
    n = x.numel()
    a, v = x.numpy().ravel(), x.numpy().ravel() / S
    u, g = oracle.uniform(5, 9, n), oracle.normal(5, 9, n)
    y = np.clip(np.rint(v), LO, HI) * S
    half = u - np.float32(0.5)
    exact = {
        qk.noise.FeaturePerturbation(1.0): y + S * half,
        qk.noise.FeaturePerturbation(1.0, "before"): np.clip(np.rint(v + half), LO, HI) * S,
        qk.noise.Pseudo(): (np.clip(v, LO, HI) + half) * S,
        qk.noise.StochasticRounding(): np.clip(np.floor(v + u), LO, HI) * S,
    }
    for how, want in exact.items():
        np.testing.assert_array_equal(quantized(x, how).numpy().ravel(), want, err_msg=str(how))
    got = quantized(x, qk.noise.Pseudo("normal")).numpy().ravel()
    np.testing.assert_allclose(got, (np.clip(v, LO, HI) + 0.5 * g) * S, atol=1e-6)
    d = np.abs(y - a).astype(np.float64)
    got = quantized(x, qk.noise.Tempering(0.3, 5.0)).numpy().ravel()
    np.testing.assert_allclose(got, y + 0.3 * np.exp(-5 * d) * np.sqrt(d) * g, rtol=1e-6, atol=1e-6)


def test_the_index_is_the_position_in_memory(backend):
    x = torch.randn(2, 3, 4, 5)
    for memory in ("channels_last", "transposed"):
        t = testing.arrange(x, memory)
        order = np.argsort(np.array(t.stride()) @ np.indices(t.shape).reshape(4, -1))
        flat = x.reshape(-1)[torch.from_numpy(order)]
        for how in (qk.noise.StochasticRounding(), qk.noise.Tempering()):
            got = quantized(t, how).reshape(-1)[torch.from_numpy(order)]
            assert torch.equal(got, quantized(flat, how)), (memory, how)


@pytest.mark.parametrize("how", [qk.noise.Tempering(), qk.noise.FeaturePerturbation(1.0), qk.noise.Pseudo("normal"),
                                 qk.noise.StochasticRounding()], ids=lambda how: type(how).__name__)  # fmt: skip
def test_seed_stream_and_length(backend, how):
    x = torch.randn(5003)
    base = quantized(x, how)
    assert torch.equal(base, quantized(x, how))
    for other in ({"seed": 6}, {"stream": 10}, {"seed": 5 + (1 << 32)}, {"stream": 9 + (1 << 32)}):
        assert not torch.equal(base, quantized(x, how, **other))
    # An element does not depend on how many follow it, nor on the row it is in.
    for n in (1, 2, 3, 5, 4001):
        assert torch.equal(quantized(x[:n], how), base[:n])
    rows = qk.fake_quantize(
        x[:5000].view(8, 625), torch.full((8,), 0.25), bits=4, axis=0, noise=how, seed=tensor(5), stream=9
    )
    assert torch.equal(rows.flatten(), base[:5000])


def test_threads_change_no_draw():
    x = torch.randn(300_001)
    for how in (qk.noise.Tempering(), qk.noise.StochasticRounding(), qk.noise.Pseudo()):
        one = quantized(x, how)
        torch.set_num_threads(2)
        two = quantized(x, how)
        torch.set_num_threads(1)
        assert torch.equal(one, two)


@pytest.mark.parametrize("c, k", [(0.2, 50.0), (0.4, 5.0)])
def test_temperings_variance_by_quantization_error(backend, c, k):
    """NT eq. 7: the noise at error d has mean 0 and standard deviation c exp(-k d) sqrt(d)."""
    n = 40_000
    for error in (0.002, 0.01, 0.03, 0.08, 0.12):
        x = torch.full((n,), 0.5 + error)
        e = (quantized(x, qk.noise.Tempering(c, k), stream=int(error * 1000)).double() - 0.5).numpy()
        deviation = c * math.exp(-k * error) * math.sqrt(error)
        assert abs(e.mean()) < 4 * deviation / math.sqrt(n)
        assert abs(e.var() / deviation**2 - 1) < 4 * math.sqrt(2 / n)


def test_tempering_vanishes_on_the_grid_and_far_away(backend):
    x = torch.tensor([0.5, 0.25, 0.0, -2.0, 1e6, math.inf, -math.inf])
    assert quantized(x, qk.noise.Tempering()).tolist() == [0.5, 0.25, 0.0, -2.0, 1.75, 1.75, -2.0]


@pytest.mark.parametrize("where", ["after", "before"])
def test_feature_perturbation_is_on_with_probability_p(backend, where):
    x, p, n = torch.full((3,), 0.26), 0.3, 2000
    plain = qk.fake_quantize(x, torch.tensor([0.25]), bits=4)
    how = qk.noise.FeaturePerturbation(p, where)
    x = x if where == "after" else torch.full((40,), 0.37)
    plain = qk.fake_quantize(x, torch.tensor([0.25]), bits=4)
    on = np.array([not torch.equal(quantized(x, how, stream=stream), plain) for stream in range(n)])
    assert abs(on.mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    np.testing.assert_array_equal(on, _elements.switched_on(5, np.arange(n), p))
    top = (oracle.philox(5, 0, [2**64 - 1])[3, 0] >> np.uint64(8)) * 2.0**-24
    assert bool(random.switched_on(tensor(5), 0, p)) == (top < p) == bool(on[0])
    # The gradient is that of the throw the forward pass made.
    x.requires_grad_()
    (dx,) = torch.autograd.grad(quantized(x, how, stream=int(on.argmax())).sum(), x)
    assert torch.equal(dx, torch.ones_like(x))


def test_stochastic_rounding_is_unbiased(backend):
    n = 100_000
    for v in (0.1, 0.5, 0.9, -0.3):
        levels = quantized(torch.full((n,), v * 0.25), qk.noise.StochasticRounding()) / 0.25
        assert set(levels.unique().tolist()) == {math.floor(v), math.ceil(v)}
        assert abs(levels.double().mean().item() - v) < 4 * math.sqrt(
            abs(v - math.floor(v)) * (math.ceil(v) - v) / n
        )


def test_the_seed_is_read_when_the_op_runs(backend):
    """A seed tensor changed in place gives new noise: captured graphs replay with fresh seeds."""
    x, seed = torch.randn(100), torch.tensor([1])
    first = qk.fake_quantize(x, torch.tensor([0.25]), bits=4, noise=qk.noise.Pseudo(), seed=seed)
    seed += 1
    second = qk.fake_quantize(x, torch.tensor([0.25]), bits=4, noise=qk.noise.Pseudo(), seed=seed)
    assert not torch.equal(first, second)
    assert torch.equal(
        second, qk.fake_quantize(x, torch.tensor([0.25]), bits=4, noise=qk.noise.Pseudo(), seed=tensor(2))
    )


def test_noise_kinds_are_numbered_as_in_the_headers():
    names = ("PLAIN", "TEMPERING", "AFTER", "BEFORE", "PSEUDO", "PSEUDO_NORMAL", "STOCHASTIC", "SHIFT")
    assert [getattr(noise, name) for name in names] == list(range(8))
