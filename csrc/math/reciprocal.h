// rint(x / scale) without the division, for processors on which it is slower than the memory. No noise; where there is
// an offset, x is the difference to it, which the quantizer rounds before it divides.
//
// With inverse = 1 / scale, rounded,
//   w = x * inverse,  v = fma(fma(-w, scale, x), inverse, w)
// is x / scale times (1 + d) with |d| <= 2^-46, rounded once: the rounded quotient, but where x / scale is as close as
// that to the middle between two floats. The nearest levels of both can only differ if one of the two floats is a tie
// T (an odd multiple of 1/2, with 2^e <= T < 2^(e+1)). With scale = m 2^k, m of 24 bits, x and T scale are multiples of
// 2^(k-1) there, and such an x would need m within 8 of a multiple of 2^(23-e) without being one. Those scales take
// the division: `reciprocal` looks at the largest e, which includes the smaller ones.
//
// Where x leaves the grid is exact as well: x / scale grows with x, so the grid ends at two numbers.
#pragma once
#include "quantize.h"

namespace qk {

struct Reciprocal {
  float inverse;
  float first, last;  // x is within the grid if first <= x <= last
  bool serves;        // false: divide
};

QK_HD float quotient(float x, float scale, float inverse) {
  const float w = x * inverse;
  return fmaf(fmaf(-w, scale, x), inverse, w);
}

QK_HD float neighbour(float x, bool above) {
  if (x == 0.0f) return above ? 0x1p-149f : -0x1p-149f;
  return bits_to_float(float_to_bits(x) + ((x > 0.0f) == above ? 1u : ~0u));
}

// The last x, seen from within the grid, whose x / scale is not beyond `level`, an integer below 2^23. The quotient
// rounds to the level unless it is beyond the middle between the level and its neighbour; at the middle itself it goes
// to the level, which is the even one. A double holds the middle and its product with the scale.
QK_HD float outermost(float level, float scale, bool above) {
  const double middle = 0.5 * (double(level) + double(neighbour(level, above)));
  const double end = middle * double(scale);
  const float x = float(end);
  return (above ? double(x) > end : double(x) < end) ? neighbour(x, !above) : x;
}

// A position with the same nearest level as that of x on the grid; x itself where it is NaN.
QK_HD float multiplied_position(float x, float scale, Reciprocal by) {
  return quotient(clip(x, by.first, by.last), scale, by.inverse);
}

QK_HD Reciprocal reciprocal(Grid<float> grid) {
  const float low = grid.lo < 0.0f ? -grid.lo : grid.lo, high = grid.hi < 0.0f ? -grid.hi : grid.hi;
  const float largest = low > high ? low : high;
  // Within these bounds nothing in the formula overflows or loses bits below 2^-149.
  if (!(0x1p-100f <= grid.scale && grid.scale <= 0x1p100f && largest <= 0x1p15f)) return {0.0f, 0.0f, 0.0f, false};
  const uint32_t e = (float_to_bits(largest) >> 23) - 127;
  const uint32_t modulus = 1u << (23 - e), rest = float_to_bits(grid.scale) & (modulus - 1);
  return {1.0f / grid.scale, outermost(grid.lo, grid.scale, false), outermost(grid.hi, grid.scale, true),
          rest == 0 || (rest > 8 && rest < modulus - 8)};
}

}  // namespace qk
