"""Random numbers as a pure function of (seed, stream, element index), the same bits on every backend.

Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (index // 4 low, high, stream low, high), word index % 4.
log, sin, cos and exp come from add and multiply alone, as in csrc/math/noise.h, so that no libm differs.
"""

import torch

_LOW = 0xFFFFFFFF
_LOG = (-0.0786014124751091, 0.12881380319595337, -0.1312841773033142, 0.14181217551231384, -0.1662459522485733,
        0.2000228613615036, -0.25000807642936707, 0.33333316445350647)  # fmt: skip
_EXP = (0.0013956100447103381, 0.008375159464776516, 0.04166608303785324, 0.16666415333747864, 0.5, 1.0, 1.0)
_SIN = (41.47294998168945, -76.69786834716797, 81.6052017211914, -41.34170150756836, 6.2831854820251465)
_COS = (59.22040557861328, -85.44285583496094, 64.93931579589844, -19.739208221435547, 1.0)


def philox(seed: torch.Tensor, stream: int, counter: torch.Tensor) -> list[torch.Tensor]:
    """The four 32-bit words (held in int64) of each counter. seed: int64 tensor (1,); counter: int64 tensor."""
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.full_like(counter, stream & _LOW), torch.full_like(counter, (stream >> 32) & _LOW)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    p = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = p * x + c
    return p


def _log_unit(u: torch.Tensor) -> torch.Tensor:
    """ln(u) for float32 u in (0, 1]."""
    shifted = u.view(torch.int32) + 0x004AFB0D
    e = ((shifted >> 23) - 127).float()
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    f2 = f * f
    tail = f2 * f * _polynomial(_LOG, f) - 0.5 * f2 + e * -2.12194440e-4
    return e * 0.693359375 + (f + tail)


def exp_negative(x: torch.Tensor) -> torch.Tensor:
    """exp(x) for float32 x in [-87, 0]."""
    n = (x * 1.44269504).round()
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    return _polynomial(_EXP, r) * ((n.int() + 127) << 23).view(torch.float32)


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded root of a float32 tensor: torch's own on the CPU is an ulp off for one value in a hundred.

    The root of a 24-bit number lies further from a rounding boundary than float64's error, so rounding twice is exact.
    """
    return x.double().sqrt().float()


def _sin_cos_turn(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = word >> 8
    j = (a + (1 << 21)) >> 22
    r = (a - (j << 22)).float() * 2.0**-24
    z = r * r
    s, c = _polynomial(_SIN, z) * r, _polynomial(_COS, z)
    odd = (j & 1).bool()
    sine, cosine = torch.where(odd, c, s), torch.where(odd, s, c)
    return torch.where((j & 2).bool(), -sine, sine), torch.where(((j + 1) & 2).bool(), -cosine, cosine)


def _normal_pair(radius_word: torch.Tensor, angle_word: torch.Tensor) -> list[torch.Tensor]:
    u = ((radius_word >> 8) + 1).float() * 2.0**-24
    r = sqrt(-2.0 * _log_unit(u))
    sine, cosine = _sin_cos_turn(angle_word)
    return [r * cosine, r * sine]


def words(seed: torch.Tensor, stream: int, count: int, first: int = 0) -> torch.Tensor:
    """int64 tensor (count,): the 32-bit words of elements first .. first + count - 1. Source: Philox4x32-10."""
    return _interleave(philox(seed, stream, _counters(seed, first, count)), first, count)


def uniform(seed: torch.Tensor, stream: int, count: int, first: int = 0) -> torch.Tensor:
    """float32 (count,), uniform on the multiples of 2**-24 in [0, 1)."""
    return (words(seed, stream, count, first) >> 8).float() * 2.0**-24


def normal(seed: torch.Tensor, stream: int, count: int, first: int = 0) -> torch.Tensor:
    """float32 (count,), standard normal by Box-Muller on the words of one counter."""
    w = philox(seed, stream, _counters(seed, first, count))
    return _interleave(_normal_pair(w[0], w[1]) + _normal_pair(w[2], w[3]), first, count)


def switched_on(seed: torch.Tensor, stream: int, p: float) -> torch.Tensor:
    """bool tensor (1,), True with probability p: one throw for a whole layer, at the counter of all ones."""
    word = philox(seed, stream, torch.full_like(seed, -1))[3]
    return (word >> 8).float() * 2.0**-24 < torch.tensor(p, dtype=torch.float32, device=seed.device)


def _counters(seed: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64, device=seed.device)


def _interleave(columns: list[torch.Tensor], first: int, count: int) -> torch.Tensor:
    return torch.stack(columns, dim=1).flatten()[first % 4 : first % 4 + count]
