// The arithmetic of one element of a perturbed copy of a parameter, for the CPU loops and the CUDA kernels alike.
//
//   y = w + spread(w) * variate        variate: a direction d, a normal or a uniform number
//   y = w + clip(p - w + a * d, -r, r) one projected step of the worst-case search, from the point p
//
// A spread of zero leaves w as it is, whatever the variate: a gradient that overflowed cannot spoil a weight.
#pragma once
#include "noise.h"

namespace qk {

enum Move : int64_t {
  kAlong = 0,       // w + a d + b p
  kAdaptive = 1,    // w + a (|w| + b)^2 d
  kNormal = 2,      // w + a n, n ~ N(0, 1)
  kMagnitude = 3,   // w + n sqrt((a w)^2 + b^2)
  kUniform = 4,     // w + a u, u uniform on [-1, 1)
  kAscend = 5,      // a step of a d from p, kept within b |w| + c of w
  kAscendSign = 6,  // a step of a sign(d) from p, kept within b |w| + c of w
};

QK_HD constexpr bool draws(int64_t move) { return move == kNormal || move == kMagnitude || move == kUniform; }

// The numbers of one copy. One that is not finite (a rho over a norm of zero) stands for zero.
template <class T>
struct MoveNumbers {
  T a, b, c;
};

QK_HD double finite_or_zero(double x) { return x - x == 0.0 ? x : 0.0; }

QK_HD float root(float x) { return sqrtf(x); }
QK_HD double root(double x) { return sqrt(x); }

template <class T>
QK_HD T magnitude(T w) {
  return w < T(0) ? -w : w;
}

// What the variate is multiplied with; it does not change from copy to copy unless the numbers do.
template <int64_t move, class T>
QK_HD T spread(T w, MoveNumbers<T> k) {
  if (move == kAdaptive) {
    const T t = magnitude(w) + k.b;
    return k.a * (t * t);
  }
  if (move == kMagnitude) {
    const T s = k.a * w;
    return root(s * s + k.b * k.b);
  }
  return k.a;
}

template <class T>
QK_HD T moved(T w, T spread, T variate) {
  const T y = w + spread * variate;
  return spread == T(0) ? w : y;
}

template <class T>
QK_HD T ascended(T w, T d, T p, bool sign, MoveNumbers<T> k) {
  const T up = d > T(0) ? T(1) : d, unit = d < T(0) ? T(-1) : up;
  const T u = moved(p - w, k.a, sign ? unit : d), r = k.b * magnitude(w) + k.c;
  const T low = u < -r ? -r : u;
  return w + (low > r ? r : low);
}

template <int64_t move, class T>
QK_HD T perturbed(T w, T d, T p, MoveNumbers<T> k) {
  if (move == kAscend || move == kAscendSign) return ascended(w, d, p, move == kAscendSign, k);
  const T y = moved(w, spread<move>(w, k), d);
  return move == kAlong ? moved(y, k.b, p) : y;
}

// u on [-1, 1), exactly
QK_HD float symmetric(uint32_t word) { return float(int32_t(word >> 8) - (1 << 23)) * 0x1p-23f; }

// The stream of tensor t of a list in copy k.
QK_HD uint64_t stream_of(int64_t copy, int64_t tensor) { return (uint64_t(copy) << 32) + uint64_t(tensor); }

}  // namespace qk
