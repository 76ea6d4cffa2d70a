"""The arithmetic of one element in Triton, under the names of csrc/math: the same operations in the same order.

True division and square root are ``tl.div_rn`` and ``tl.sqrt_rn``, comparisons let NaN pass, and every launch switches
the contraction to fused multiply-adds off (walk.launch), so that the bits are those of every other backend.
"""

import triton
import triton.language as tl

from .. import noise

PLAIN, TEMPERING = tl.constexpr(noise.PLAIN), tl.constexpr(noise.TEMPERING)
AFTER, BEFORE = tl.constexpr(noise.AFTER), tl.constexpr(noise.BEFORE)
PSEUDO, PSEUDO_NORMAL = tl.constexpr(noise.PSEUDO), tl.constexpr(noise.PSEUDO_NORMAL)
STOCHASTIC, SHIFT = tl.constexpr(noise.STOCHASTIC), tl.constexpr(noise.SHIFT)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def philox(seed, stream, counter):
    """The four words of Philox4x32-10 at key = seed, counter = (counter low, high, stream low, high)."""
    c, s = counter.to(tl.uint64), stream.to(tl.uint64)
    return tl.philox(seed, c.to(tl.uint32), (c >> 32).to(tl.uint32), s.to(tl.uint32), (s >> 32).to(tl.uint32))


@triton.jit
def uniform(word):
    """[0, 1) on a grid of 2**-24."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def log_unit(u):
    """ln(u) for u in (0, 1]; the integer shift moves the break of the mantissa from 1 to sqrt(1/2)."""
    shifted = u.to(tl.int32, bitcast=True) + 0x004AFB0D
    e = ((shifted >> 23) - 127).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = -0.0786014124751091 * f + 0.12881380319595337
    p = p * f + -0.1312841773033142
    p = p * f + 0.14181217551231384
    p = p * f + -0.1662459522485733
    p = p * f + 0.2000228613615036
    p = p * f + -0.25000807642936707
    p = p * f + 0.33333316445350647
    f2 = f * f
    tail = f2 * f * p - 0.5 * f2 + e * -2.12194440e-4
    return e * 0.693359375 + (f + tail)


@triton.jit
def exp_negative(x):
    """exp(x) for -87 <= x <= 0."""
    n = round_even(x * 1.44269504, False)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = 0.0013956100447103381 * r + 0.008375159464776516
    p = p * r + 0.04166608303785324
    p = p * r + 0.16666415333747864
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sin_cos_turn(word):
    """sin and cos of a full turn times (word >> 8) * 2**-24; the quadrant is split off in integers, exactly."""
    a = (word >> 8).to(tl.int32)
    j = (a + (1 << 21)) >> 22
    r = (a - (j << 22)).to(tl.float32) * 5.9604644775390625e-08
    z = r * r
    s = 41.47294998168945 * z + -76.69786834716797
    s = s * z + 81.6052017211914
    s = s * z + -41.34170150756836
    s = s * z + 6.2831854820251465
    s = s * r
    c = 59.22040557861328 * z + -85.44285583496094
    c = c * z + 64.93931579589844
    c = c * z + -19.739208221435547
    c = c * z + 1.0
    odd = (j & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where((j & 2) != 0, -sine, sine), tl.where(((j + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def normal_pair(radius_word, angle_word):
    """Box-Muller: (r cos t, r sin t)."""
    u = ((radius_word >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    r = tl.sqrt_rn(-2.0 * log_unit(u))
    sine, cosine = sin_cos_turn(angle_word)
    return r * cosine, r * sine


@triton.jit
def switched_on(seed, stream, p):
    """One draw per layer and step: the uniform at the counter of all ones decides whether the noise is on."""
    _, _, _, word = philox(seed, stream, tl.full((), -1, tl.int64))
    return uniform(word) < p


@triton.jit
def tempering(d, a, b):
    """Standard deviation a * exp(-b d) * sqrt(d) at quantization error d; 0 where d is not a number."""
    x = b * d
    near = x < 87.0
    return a * exp_negative(tl.where(near, -x, 0.0)) * tl.sqrt_rn(tl.where(near, d, 0.0))


@triton.jit
def safe_scale(scale):
    """|scale| floored at 2**-126; NaN where it is not finite."""
    s = tl.abs(scale)
    s = tl.where(s < 1.1754943508222875e-38, 1.1754943508222875e-38, s)
    return tl.where(s < float("inf"), s, float("nan"))


@triton.jit
def round_even(v, WIDE: tl.constexpr):
    """rint(v) for |v| < 2**22, in two additions; with WIDE for every v (from 2**23 on there is nothing to round)."""
    if WIDE:
        big = tl.where(v < 0.0, -8388608.0, 8388608.0)
        return tl.where(tl.abs(v) < 8388608.0, (v + big) - big, v)
    return (v + 12582912.0) - 12582912.0


@triton.jit
def clip(v, lo, hi):
    v = tl.where(v < lo, lo, v)
    return tl.where(v > hi, hi, v)


@triton.jit
def position(x, scale, offset, n, KIND: tl.constexpr):
    v = tl.div_rn(x - offset, scale)
    if KIND == BEFORE:
        v = v + n
    return v


@triton.jit
def level(v, lo, hi, n, KIND: tl.constexpr, WIDE: tl.constexpr):
    """The level of v. The bounds are integers, so clipping first is the same and keeps the rounding in range."""
    if KIND == PSEUDO or KIND == PSEUDO_NORMAL:  # noqa: SIM109 (Triton knows no `in`)
        return clip(v, lo, hi) + n
    elif KIND == STOCHASTIC:
        return clip(tl.floor(v + n), lo, hi)
    else:
        return round_even(clip(v, lo, hi), WIDE)


@triton.jit
def value(q, scale, offset):
    return q * scale + offset


@triton.jit
def fake_quantize(x, scale, offset, lo, hi, n, a, b, KIND: tl.constexpr, WIDE: tl.constexpr):
    y = value(level(position(x, scale, offset, n, KIND), lo, hi, n, KIND, WIDE), scale, offset)
    if KIND == TEMPERING:
        y = y + tempering(tl.abs(y - x), a, b) * n
    elif KIND == AFTER:
        y = y + scale * n
    elif KIND == SHIFT:
        y = y + a * n
    return y


@triton.jit
def fake_quantize_backward(g, x, scale, offset, lo, hi, n, ewgs, CLIP_ONLY: tl.constexpr, EWGS: tl.constexpr,
                           KIND: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(dx, this element's term of dscale, of doffset)."""
    v = position(x, scale, offset, n, KIND)
    q = level(v, lo, hi, n, KIND, WIDE)
    outside = (v < lo) | (v > hi)
    if KIND == PSEUDO or KIND == PSEUDO_NORMAL:  # noqa: SIM109 (Triton knows no `in`)
        error = n
    else:
        error = q - v
    dx = g
    if EWGS:
        dx = g - ewgs * tl.abs(g) * error
    if CLIP_ONLY:
        term = tl.where(outside, q, 0.0)
    else:
        term = tl.where(outside, q, error)
    return tl.where(outside, 0.0, dx), g * term, tl.where(outside, g, 0.0)


@triton.jit
def widen(x):
    """x in float32. The interpreter loses the subnormal numbers of bfloat16, hence integers there."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to nearest even in dtype. The interpreter truncates to bfloat16, hence integers there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits.to(tl.uint64) + 0x7FFF + ((bits >> 16) & 1).to(tl.uint64)) >> 16).to(tl.uint16)
        quiet = tl.full((1,), 0x7FC0, tl.uint16)
        return tl.where(x == x, rounded, quiet).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
