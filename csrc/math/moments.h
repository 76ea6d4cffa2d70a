// The distance of two tensors, each channel standardised, from five sums per channel; and its gradient.
//
//   s~ = (s - mean_s) * r_s,  r_s = 1 / sqrt(var_s + eps)      (t likewise)
//   sum (t~ - s~)^2 = n * (var_s r_s^2 + var_t r_t^2 - 2 cov r_s r_t)
//   d/ds_i          = p (s_i - mean_s) + q (t_i - mean_t)
//       p = 2 r_s^2 (eps r_s^2 + cov r_s r_t),  q = -2 r_s r_t
#pragma once
#include <cmath>

#include "math/layout.h"

namespace qk {

// Sums of u = s - shift_s and v = t - shift_t; a shift inside the channel's range keeps the variance of a channel
// whose mean is far from zero.
template <class A>
struct Moments {
  A s, t, ss, tt, st;

  QK_HD void add(const A& u, const A& v) {
    s += u;
    t += v;
    ss += u * u;
    tt += v * v;
    st += u * v;
  }
  template <class B>
  QK_HD void merge(const Moments<B>& other) {
    s += A(other.s);
    t += A(other.t);
    ss += A(other.ss);
    tt += A(other.tt);
    st += A(other.st);
  }
};

// What one channel's sums say; in double, since near-equal student and teacher cancel in the distance.
struct Channel {
  double mean_s, mean_t, var_s, var_t, cov;
};

QK_HD double not_negative(double x) { return x < 0 ? 0.0 : x; }

QK_HD Channel channel_of(const Moments<double>& sum, double n, double shift_s, double shift_t) {
  const double u = sum.s / n, v = sum.t / n;
  return {shift_s + u, shift_t + v, not_negative(sum.ss / n - u * u), not_negative(sum.tt / n - v * v),
          sum.st / n - u * v};
}

// Per element of the channel: the mean of (t~ - s~)^2.
QK_HD double standardized_distance(const Channel& c, double eps) {
  const double r_s = 1.0 / std::sqrt(c.var_s + eps), r_t = 1.0 / std::sqrt(c.var_t + eps);
  return not_negative(c.var_s * r_s * r_s + c.var_t * r_t * r_t - 2.0 * (c.cov * r_s * r_t));
}

// The gradient of `factor` times the channel's sum. `rest` is what rounding the means to C leaves out.
template <class C>
struct Slope {
  C mean_s, mean_t, p, q, rest;
};

template <class C>
QK_HD Slope<C> slope_of(const Channel& c, double factor, double eps) {
  const double r_s = 1.0 / std::sqrt(c.var_s + eps), r_t = 1.0 / std::sqrt(c.var_t + eps);
  const double p = 2.0 * factor * (r_s * r_s) * (eps * (r_s * r_s) + c.cov * r_s * r_t);
  const double q = -2.0 * factor * r_s * r_t;
  const C mean_s = C(c.mean_s), mean_t = C(c.mean_t);
  return {mean_s, mean_t, C(p), C(q), C(p * (double(mean_s) - c.mean_s) + q * (double(mean_t) - c.mean_t))};
}

template <class C>
QK_HD C standardized_distance_backward(C s, C t, const Slope<C>& k) {
  return k.p * (s - k.mean_s) + (k.q * (t - k.mean_t) + k.rest);
}

}  // namespace qk
