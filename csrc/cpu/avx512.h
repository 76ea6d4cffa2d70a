// The loops of the quantizer with AVX-512, for runs of one row without noise. In intrinsics: they take bfloat16 apart
// and put dx together in half of the instructions that g++ finds. Long runs multiply (math/reciprocal.h), which is
// faster where division is slow; short ones divide.
#pragma once
#include "cpu/walk.h"
#include "math/reciprocal.h"

namespace qk {

constexpr int64_t kPair = 32;  // elements that are taken together
// Bytes of output from which on it is written past the caches: its lines are not read first, and push nothing out. A
// whole training step is as fast either way; the op alone gains a tenth to a third.
constexpr int64_t kPastCaches = int64_t(1) << 22;
// Elements of a run for which its reciprocal, 10 ns, is worth computing. On Zen 5 division is as fast at any length.
constexpr int64_t kWorthReciprocal = 512;

#ifdef QK_X86_CLONES

#define QK_AVX512 __attribute__((target("arch=x86-64-v4")))
#define QK_AVX512_LAMBDA __attribute__((always_inline, target("arch=x86-64-v4")))
#define QK_AVX512_INLINE inline QK_AVX512_LAMBDA

// QKERNELS_AVX512=0 and QKERNELS_BFLOAT16=0 take the other processors' paths, for tests on this one.
inline bool switched_off(const char* name) {
  const char* wanted = std::getenv(name);
  return wanted && *wanted == '0';
}
inline bool has_avx512() {
  static const bool has = !switched_off("QKERNELS_AVX512") && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
  return has;
}
inline bool has_bfloat16() {
  static const bool has = !switched_off("QKERNELS_BFLOAT16") && __builtin_cpu_supports("avx512bf16");
  return has;
}

// kPair elements. Those of bfloat16 are the even and the odd ones, which is the cheapest to take apart.
struct Vectors {
  __m512 first, second;
};

QK_AVX512_INLINE Vectors load_vectors(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
QK_AVX512_INLINE Vectors widened(const Half*, __m512i halves) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}
QK_AVX512_INLINE Vectors widened(const BFloat16*, __m512i halves) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(halves, _mm512_set1_epi32(int32_t(0xFFFF0000))))};
}
template <class S>
QK_AVX512_INLINE Vectors load_vectors(const S* from) {
  return widened(from, _mm512_loadu_si512(from));
}

template <bool streamed>
QK_AVX512_INLINE void put(void* to, __m512i line) {
  streamed ? _mm512_stream_si512(static_cast<__m512i*>(to), line) : _mm512_storeu_si512(to, line);
}
template <bool streamed>
QK_AVX512_INLINE void put(float* to, Vectors v) {
  put<streamed>(to, _mm512_castps_si512(v.first));
  put<streamed>(to + 16, _mm512_castps_si512(v.second));
}

// hardware: bfloat16 by the processor's instruction, which flushes subnormal values.
template <bool hardware, bool streamed>
QK_AVX512_INLINE void store_vectors(float* to, Vectors v) {
  put<streamed>(to, v);
}
template <bool hardware, bool streamed>
QK_AVX512_INLINE void store_vectors(Half* to, Vectors v) {
  const __m256i first = _mm512_cvtps_ph(v.first, _MM_FROUND_TO_NEAREST_INT);
  const __m256i second = _mm512_cvtps_ph(v.second, _MM_FROUND_TO_NEAREST_INT);
  put<streamed>(to, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}
// rounded_half for vectors, where the lanes stand: the result is the upper half of each.
QK_AVX512_INLINE __m512i rounded_lanes(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}
template <bool hardware, bool streamed>
QK_AVX512_INLINE void store_vectors(BFloat16* to, Vectors v) {
  if constexpr (hardware) {  // by its name: the instruction is not part of x86-64-v4
    __m512i halves;
    asm("vcvtne2ps2bf16 %[first], %[second], %[halves]"
        : [halves] "=v"(halves)
        : [first] "v"(v.first), [second] "v"(v.second));
    const __m512i turn = _mm512_add_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_slli_epi32(_mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16));
    put<streamed>(to, _mm512_permutexvar_epi16(turn, halves));
  } else {
    const __m512i upper = _mm512_set1_epi32(int32_t(0xFFFF0000));
    const __m512i low = _mm512_srli_epi32(rounded_lanes(v.first), 16);
    put<streamed>(to, _mm512_ternarylogic_epi32(upper, rounded_lanes(v.second), low, 0xCA));
  }
}

// dx is grad where x is inside and 0 elsewhere, without a conversion.
template <bool streamed>
QK_AVX512_INLINE void store_kept(float* to, const float*, Vectors grad, __mmask16 first, __mmask16 second) {
  put<streamed>(to, {_mm512_maskz_mov_ps(first, grad.first), _mm512_maskz_mov_ps(second, grad.second)});
}
template <bool streamed>
QK_AVX512_INLINE void store_kept(Half* to, const Half* grad, Vectors, __mmask16 first, __mmask16 second) {
  put<streamed>(to, _mm512_maskz_loadu_epi16(__mmask32(first) | __mmask32(second) << 16, grad));
}
template <bool streamed>
QK_AVX512_INLINE void store_kept(BFloat16* to, const BFloat16* grad, Vectors v, __mmask16 first, __mmask16 second) {
  const __m512i even = _mm512_maskz_and_epi32(first, _mm512_loadu_si512(grad), _mm512_set1_epi32(0xFFFF));
  put<streamed>(to, _mm512_mask_or_epi32(even, second, even, _mm512_castps_si512(v.second)));
}

QK_AVX512_INLINE __m512 round_even(__m512 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }

// How x becomes its position on the grid, or what has the same nearest level; where the grid ends; what a level stands
// for. max and min return their second operand if one is NaN.
struct Multiplied {
  static constexpr bool offsets = false;
  __m512 scale, inverse, first, last;

  QK_AVX512_INLINE Multiplied(Grid<float> grid, Reciprocal by)
      : scale(_mm512_set1_ps(grid.scale)),
        inverse(_mm512_set1_ps(by.inverse)),
        first(_mm512_set1_ps(by.first)),
        last(_mm512_set1_ps(by.last)) {}
  QK_AVX512_INLINE __m512 position(__m512 x) const {
    const __m512 w = _mm512_mul_ps(x, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(w, scale, x), inverse, w);
  }
  QK_AVX512_INLINE __m512 compared(__m512 x, __m512) const { return x; }
  QK_AVX512_INLINE __m512 value(__m512 x) const {  // x is clipped in place of the level; a level of -0 gives +0
    const __m512 q = round_even(position(_mm512_min_ps(last, _mm512_max_ps(first, x))));
    return _mm512_fmadd_ps(q, scale, _mm512_setzero_ps());
  }
};

template <bool with_offset>
struct Divided {  // a NaN of the offset, as of the scale, is one without bits in its lower half, for rounded_lanes
  static constexpr bool offsets = with_offset;
  __m512 scale, offset, first, last;

  explicit QK_AVX512_INLINE Divided(Grid<float> grid)
      : scale(_mm512_set1_ps(grid.scale)),
        offset(_mm512_set1_ps(grid.offset == grid.offset ? grid.offset : NAN)),
        first(_mm512_set1_ps(grid.lo)),
        last(_mm512_set1_ps(grid.hi)) {}
  QK_AVX512_INLINE __m512 position(__m512 x) const {
    return _mm512_div_ps(offsets ? _mm512_sub_ps(x, offset) : x, scale);
  }
  QK_AVX512_INLINE __m512 compared(__m512, __m512 v) const { return v; }
  QK_AVX512_INLINE __m512 value(__m512 x) const {
    const __m512 q = _mm512_min_ps(last, _mm512_max_ps(first, round_even(position(x))));
    return _mm512_add_ps(_mm512_mul_ps(q, scale), offsets ? offset : _mm512_setzero_ps());
  }
};

// The last elements of a run, fewer than kPair, go through memory of their own.
template <class S>
struct Tail {
  alignas(64) S x[kPair] = {}, grad[kPair] = {}, out[kPair];
  int64_t bytes;

  Tail(const S* from, int64_t count) : bytes(count * int64_t(sizeof(S))) { __builtin_memcpy(x, from, bytes); }
  void write(S* to) const { __builtin_memcpy(to, out, bytes); }
};

template <bool hardware, bool streamed, class Quotient, class S>
QK_AVX512_INLINE void forward_run(Quotient quotient, const S* x, S* y, int64_t count) {
  const auto pair = [=](auto past_caches, const S* from, S* to) QK_AVX512_LAMBDA {
    const Vectors v = load_vectors(from);
    store_vectors<hardware, past_caches>(to, {quotient.value(v.first), quotient.value(v.second)});
  };
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i <= count - kPair; i += kPair) {
    prefetch<kPair>(x + i, false);
    if (!streamed) prefetch<kPair>(y + i, true);
    pair(std::bool_constant<streamed>(), x + i, y + i);
  }
  if (i < count) {
    Tail<S> tail(x + i, count - i);
    pair(std::false_type(), tail.x, tail.out);
    tail.write(y + i);
  }
}

QK_AVX512_INLINE double sum_of(Vectors sum) {
  const __m512 lanes = _mm512_add_ps(sum.first, sum.second);
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(lanes)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1))));
}

// The sums of the terms of the gradients of scale and offset go to `dscale` and `doffset`. clipped: terms of the scale
// come from elements outside alone.
template <bool streamed, bool clipped, class Quotient, class S>
QK_AVX512_INLINE void backward_run(Quotient quotient, const S* grad, const S* x, S* dx, int64_t count, Grid<float> grid,
                                   double* dscale, double* doffset) {
  const __m512 lo = _mm512_set1_ps(grid.lo), hi = _mm512_set1_ps(grid.hi);
  const auto add = [=](__m512& scales, __m512& offsets, __m512 g, __m512 x) QK_AVX512_LAMBDA {
    const __m512 v = quotient.position(x), at = quotient.compared(x, v);
    const __m512 error = clipped ? _mm512_setzero_ps() : _mm512_sub_ps(round_even(v), v);
    const __mmask16 reached = _mm512_cmp_ps_mask(at, quotient.first, _CMP_NLT_UQ);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(reached, at, quotient.last, _CMP_NGT_UQ);
    const __m512 bound = _mm512_mask_mov_ps(lo, reached, hi);
    scales = _mm512_add_ps(scales, _mm512_mul_ps(g, _mm512_mask_mov_ps(bound, inside, error)));
    if (Quotient::offsets) offsets = _mm512_mask_add_ps(offsets, _knot_mask16(inside), offsets, g);
    return inside;
  };
  Vectors scales = {_mm512_setzero_ps(), _mm512_setzero_ps()}, offsets = scales;
  const auto pair = [&](auto past_caches, const S* g_from, const S* x_from, S* to) QK_AVX512_LAMBDA {
    const Vectors g = load_vectors(g_from), v = load_vectors(x_from);
    const __mmask16 inside = add(scales.first, offsets.first, g.first, v.first);
    store_kept<past_caches>(to, g_from, g, inside, add(scales.second, offsets.second, g.second, v.second));
  };
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i <= count - kPair; i += kPair) {
    prefetch<kPair>(grad + i, false);
    prefetch<kPair>(x + i, false);
    if (!streamed) prefetch<kPair>(dx + i, true);
    pair(std::bool_constant<streamed>(), grad + i, x + i, dx + i);
  }
  if (i < count) {
    Tail<S> tail(x + i, count - i);
    __builtin_memcpy(tail.grad, grad + i, tail.bytes);
    pair(std::false_type(), tail.grad, tail.x, tail.out);
    tail.write(dx + i);
  }
  *dscale = sum_of(scales);
  if (Quotient::offsets) *doffset = sum_of(offsets);
}

template <bool hardware, bool streamed, bool offsets, class S>
QK_AVX512 void forward_runs(const Walk& walk, const Rows<float>& rows, const S* x, S* y, int64_t first, int64_t last) {
  for (Run run(walk, first); run.unit < last; run.next()) {
    const Grid<float> grid = rows.grid(run.row);
    const int64_t begin = run.begin(), count = run.end() - begin;
    const Reciprocal by = offsets || count < kWorthReciprocal ? Reciprocal{} : reciprocal(grid);
    if (by.serves) {
      forward_run<hardware, streamed>(Multiplied(grid, by), x + begin, y + begin, count);
    } else {
      forward_run<hardware, streamed>(Divided<offsets>(grid), x + begin, y + begin, count);
    }
  }
  if (streamed) _mm_sfence();
}
template <bool streamed, bool clipped, bool offsets, class S>
QK_AVX512 void backward_runs(const Walk& walk, const Rows<float>& rows, const S* grad, const S* x, S* dx,
                             double* dscale, double* doffset, int64_t first, int64_t last) {
  for (Run run(walk, first); run.unit < last; run.next()) {
    const Grid<float> grid = rows.grid(run.row);
    const int64_t begin = run.begin(), count = run.end() - begin;
    const S *g = grad + begin, *in = x + begin;
    double *scale = dscale + run.unit, *offset = offsets ? doffset + run.unit : nullptr;
    const Reciprocal by = offsets || count < kWorthReciprocal ? Reciprocal{} : reciprocal(grid);
    if (by.serves) {
      backward_run<streamed, clipped>(Multiplied(grid, by), g, in, dx + begin, count, grid, scale, offset);
    } else {
      backward_run<streamed, clipped>(Divided<offsets>(grid), g, in, dx + begin, count, grid, scale, offset);
    }
  }
  if (streamed) _mm_sfence();
}

// Whether all runs of the output can be, and are to be, written past the caches.
template <class S>
bool past_caches(const S* out, const Walk& walk) {
  const bool lines = walk.inner * int64_t(sizeof(S)) % 64 == 0 || walk.inner == walk.numel;
  return lines && walk.numel * int64_t(sizeof(S)) >= kPastCaches && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// f(streamed, offsets), both constants
template <class S, class F>
void with_loops(const Walk& walk, const Rows<float>& rows, const S* out, F&& f) {
  const auto flag = [](bool value, auto&& next) { value ? next(std::true_type()) : next(std::false_type()); };
  flag(past_caches(out, walk),
       [&](auto streamed) { flag(rows.offset != nullptr, [&](auto offsets) { f(streamed, offsets); }); });
}

// Both do all of the units, or return false.
template <class S>
bool fake_quantize_avx512(const Walk& walk, const Rows<float>& rows, const S* x, S* y, int64_t first, int64_t last) {
  if (!has_avx512()) return false;
  with_loops(walk, rows, y, [&](auto streamed, auto offsets) {
    if constexpr (std::is_same_v<S, BFloat16> && !offsets) {
      if (has_bfloat16()) {
        return forward_runs<true, streamed, offsets>(walk, rows, x, y, first, last);
      }
    }
    forward_runs<false, streamed, offsets>(walk, rows, x, y, first, last);
  });
  return true;
}
template <bool clipped, class S>
bool fake_quantize_backward_avx512(const Walk& walk, const Rows<float>& rows, const S* grad, const S* x, S* dx,
                                   double* dscale, double* doffset, int64_t first, int64_t last) {
  if (!has_avx512()) return false;
  with_loops(walk, rows, dx, [&](auto streamed, auto offsets) {
    backward_runs<streamed, clipped, offsets>(walk, rows, grad, x, dx, dscale, doffset, first, last);
  });
  return true;
}

#else

template <class S>
bool fake_quantize_avx512(const Walk&, const Rows<float>&, const S*, S*, int64_t, int64_t) {
  return false;
}
template <bool clipped, class S>
bool fake_quantize_backward_avx512(const Walk&, const Rows<float>&, const S*, const S*, S*, double*, double*, int64_t,
                                   int64_t) {
  return false;
}

#endif

}  // namespace qk
