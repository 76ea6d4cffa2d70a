// The arithmetic of one element of the quantizer, for the CPU loops and the CUDA kernels alike.
//
//   v = (x - offset) / scale,  q = clip(rint(v), lo, hi),  y = q * scale + offset
//
// Float (or double) in and out; loads and stores convert. Comparisons instead of fmin/fmax: NaN passes through and
// g++ vectorises. Forward and backward share `level`, so that the gradient never re-derives the code.
#pragma once
#include <cmath>
#include <cstdint>

#include "layout.h"
#include "noise.h"

namespace qk {

// What the noise does to an element; the variate n is an argument of the element functions (noise.h draws it).
enum Noise : int64_t {
  kPlain = 0,         // no noise
  kTempering = 1,     // y + a * exp(-b * |y - x|) * sqrt(|y - x|) * n
  kAfter = 2,         // y + scale * n
  kBefore = 3,        // rint(v + n)
  kPseudo = 4,        // clip(v) + n in place of rint, n uniform
  kPseudoNormal = 5,  // the same, n ~ N(0, 1/4)
  kStochastic = 6,    // floor(v + n)
  kShift = 7,         // y + a * n, n given by the caller (a perturbation of the quantized value)
};

// The normal pseudo noise differs from the uniform one in its variate only.
QK_HD constexpr int64_t math_kind(int64_t kind) { return kind == kPseudoNormal ? int64_t(kPseudo) : kind; }

// Noise that is added to the output leaves the gradient alone.
QK_HD constexpr int64_t backward_kind(int64_t kind) {
  return kind == kTempering || kind == kAfter || kind == kShift ? int64_t(kPlain) : kind;
}

// The quantizer of one row. `scale` is floored and never negative; a non-finite one is NaN.
template <class T>
struct Grid {
  T scale, offset, lo, hi;
};

template <class T>
QK_HD T safe_scale(T scale) {
  const T s = scale < T(0) ? -scale : scale;
  if (!(s < T(INFINITY))) return T(NAN);
  return s < T(0x1p-126) ? T(0x1p-126) : s;
}

template <class T>
QK_HD T sign_of(T scale) {
  return scale < T(0) ? T(-1) : T(1);
}

QK_HD float round_even(float v) { return rintf(v); }
QK_HD double round_even(double v) { return rint(v); }
QK_HD float round_down(float v) { return floorf(v); }
QK_HD double round_down(double v) { return floor(v); }

template <class T>
QK_HD T clip(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// The position of x on the grid, and the level it takes there.
template <int64_t kind, class T>
QK_HD T position(T x, Grid<T> grid, T n) {
  const T v = (x - grid.offset) / grid.scale;
  return kind == kBefore ? v + n : v;
}

template <int64_t kind, class T>
QK_HD T level(T v, Grid<T> grid, T n) {
  if (kind == kPseudo) return clip(v, grid.lo, grid.hi) + n;
  if (kind == kStochastic) return clip(round_down(v + n), grid.lo, grid.hi);
  return clip(round_even(v), grid.lo, grid.hi);
}

// A level of -0 becomes +0 through the addition, so that integer storage loses nothing.
template <class T>
QK_HD T value(T q, Grid<T> grid) {
  return q * grid.scale + grid.offset;
}

template <int64_t kind, class T>
QK_HD T fake_quantize(T x, Grid<T> grid, T n, float a, float b) {
  const T y = value(level<kind>(position<kind>(x, grid, n), grid, n), grid);
  if (kind == kTempering) return y + T(tempering(float(y < x ? x - y : y - x), a, b)) * n;
  if (kind == kAfter) return y + grid.scale * n;
  if (kind == kShift) return y + T(a) * n;
  return y;
}

template <class T>
struct Gradient {
  T dx, dscale, doffset;  // dscale and doffset are this element's terms of the row's sums
};

// clip_only: the scale learns from clipped elements alone (PACT).
// ewgs: dx = g * (1 + ewgs * sign(g) * (v - q)), element-wise gradient scaling; 0 leaves g as it is, to the bit.
template <class T>
struct Estimator {
  bool clip_only;
  T ewgs;
};

template <int64_t kind, class T>
QK_HD Gradient<T> fake_quantize_backward(T g, T x, Grid<T> grid, T n, Estimator<T> estimator) {
  const T v = position<kind>(x, grid, n);
  const T q = level<kind>(v, grid, n);
  const bool outside = v < grid.lo || v > grid.hi;
  const T error = kind == kPseudo ? n : q - v;
  T dx = g;
  if (estimator.ewgs != T(0)) dx = g - estimator.ewgs * (g < T(0) ? -g : g) * error;
  return {outside ? T(0) : dx, g * (outside ? q : (estimator.clip_only ? T(0) : error)), outside ? g : T(0)};
}

// The stored integer of x: the level counted from the zero point. NaN takes the level nearest to zero.
template <class T>
QK_HD int32_t quantize(T x, Grid<T> grid, int32_t zero_point) {
  const T q = level<kPlain>(position<kPlain>(x, grid, T(0)), grid, T(0));
  return int32_t(q == q ? q : clip(T(0), grid.lo, grid.hi)) + zero_point;
}

template <class T>
QK_HD T dequantize(int32_t stored, Grid<T> grid, int32_t zero_point) {
  return value(T(stored - zero_point), grid);
}

}  // namespace qk
