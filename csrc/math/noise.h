// Random numbers as a pure function of (seed, stream, element index), and the elementary functions they need.
//
// Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (index / 4 low, high, stream low, high), word index % 4.
// log, sin, cos and exp are polynomials in separately rounded multiplies and adds, so every backend has the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace qk {

struct Words {
  uint32_t w[4];
};

QK_HD Words philox(uint64_t seed, uint64_t stream, uint64_t counter) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = uint32_t(stream), c3 = uint32_t(stream >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1) on a grid of 2^-24
QK_HD float uniform(uint32_t word) { return float(int32_t(word >> 8)) * 0x1p-24f; }

QK_HD float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

QK_HD uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// ln(u) for u in (0, 1]; error below 1 ulp of the result or 1e-7
QK_HD float log_unit(float u) {
  const uint32_t shifted = float_to_bits(u) + 0x004AFB0Du;  // moves the break of the mantissa from 1 to sqrt(1/2)
  const float e = float(int32_t(shifted >> 23) - 127);
  const float f = bits_to_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = -0.0786014124751091f;
  p = p * f + 0.12881380319595337f;
  p = p * f + -0.1312841773033142f;
  p = p * f + 0.14181217551231384f;
  p = p * f + -0.1662459522485733f;
  p = p * f + 0.2000228613615036f;
  p = p * f + -0.25000807642936707f;
  p = p * f + 0.33333316445350647f;
  const float f2 = f * f;
  const float tail = f2 * f * p - 0.5f * f2 + e * -2.12194440e-4f;
  return e * 0.693359375f + (f + tail);
}

// exp(x) for -87 <= x <= 0
QK_HD float exp_negative(float x) {
  const float n = rintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 0.0013956100447103381f;
  p = p * r + 0.008375159464776516f;
  p = p * r + 0.04166608303785324f;
  p = p * r + 0.16666415333747864f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_to_float(uint32_t(int32_t(n) + 127) << 23);
}

struct Pair {
  float first, second;
};

// sin and cos of a full turn times (word >> 8) * 2^-24; the quadrant is split off in integers, exactly
QK_HD Pair sin_cos_turn(uint32_t word) {
  const uint32_t a = word >> 8, j = (a + (1u << 21)) >> 22;
  const float r = float(int32_t(a) - int32_t(j << 22)) * 0x1p-24f, z = r * r;
  float s = 41.47294998168945f;
  s = s * z + -76.69786834716797f;
  s = s * z + 81.6052017211914f;
  s = s * z + -41.34170150756836f;
  s = s * z + 6.2831854820251465f;
  s = s * r;
  float c = 59.22040557861328f;
  c = c * z + -85.44285583496094f;
  c = c * z + 64.93931579589844f;
  c = c * z + -19.739208221435547f;
  c = c * z + 1.0f;
  const float sine = (j & 1u) ? c : s, cosine = (j & 1u) ? s : c;
  return {(j & 2u) ? -sine : sine, ((j + 1u) & 2u) ? -cosine : cosine};
}

// Box-Muller: the even element is r cos t, the odd one r sin t
QK_HD Pair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const float u = float(int32_t((radius_word >> 8) + 1u)) * 0x1p-24f;
  const float r = sqrtf(-2.0f * log_unit(u));
  const Pair turn = sin_cos_turn(angle_word);
  return {r * turn.second, r * turn.first};
}

struct Normals {
  float n[4];
};

QK_HD Normals normals(Words words) {
  const Pair a = normal_pair(words.w[0], words.w[1]), b = normal_pair(words.w[2], words.w[3]);
  return {{a.first, a.second, b.first, b.second}};
}

// One draw per layer and step: the uniform at the index whose counter is all ones decides whether the noise is on.
QK_HD bool switched_on(uint64_t seed, uint64_t stream, float p) {
  return uniform(philox(seed, stream, ~uint64_t(0)).w[3]) < p;
}

// Noise tempering's standard deviation a * exp(-b d) * sqrt(d) at quantization error d; 0 where d is not a number, or
// so large that the exponential is.
QK_HD float near_error(float d, float b) { return b * d < 87.0f ? d : 0.0f; }
QK_HD float decay(float near, float a, float b) { return a * exp_negative(-(b * near)); }
QK_HD float tempering(float d, float a, float b) {
  const float near = near_error(d, b);
  return decay(near, a, b) * sqrtf(near);
}

}  // namespace qk
