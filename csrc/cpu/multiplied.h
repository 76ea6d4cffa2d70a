// The loops over math/reciprocal.h with AVX-512, for long runs of one row without noise and offset. In intrinsics: they
// take bfloat16 apart and put dx together in half of the instructions that g++ finds.
#pragma once
#include "cpu/walk.h"
#include "math/reciprocal.h"

namespace qk {

constexpr int64_t kMultiplied = 32;  // elements that are taken together
// Bytes of output from which on it is written past the caches: its lines are not read first, and push nothing out. A
// whole training step is as fast either way; the op alone gains a tenth to a third.
constexpr int64_t kPastCaches = int64_t(1) << 23;
constexpr int64_t kWorthReciprocal = 256;  // elements for which a row's reciprocal is worth computing

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

// kMultiplied elements as two vectors. Those of bfloat16 are the even and the odd ones, which is the cheapest to take
// apart.
struct Vectors {
  __m512 first, second;
};

QK_AVX512_INLINE Vectors load_vectors(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }
QK_AVX512_INLINE Vectors load_vectors(const Half* from) {
  const auto* words = reinterpret_cast<const __m256i*>(from);
  return {_mm512_cvtph_ps(_mm256_loadu_si256(words)), _mm512_cvtph_ps(_mm256_loadu_si256(words + 1))};
}
QK_AVX512_INLINE Vectors load_vectors(const BFloat16* from) {
  const __m512i words = _mm512_loadu_si512(from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xFFFF0000))))};
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
  if constexpr (hardware) {  // by its name, since the instruction is not part of x86-64-v4; flushes subnormal values
    __m512i halves;
    asm("vcvtne2ps2bf16 %[first], %[second], %[halves]"
        : [halves] "=v"(halves)
        : [first] "v"(v.first), [second] "v"(v.second));
    const __m512i turn = _mm512_add_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_slli_epi32(_mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16));
    put<streamed>(to, _mm512_permutexvar_epi16(turn, halves));
  } else {
    const __m512i upper = _mm512_set1_epi32(int32_t(0xFFFF0000)), low = _mm512_srli_epi32(rounded_lanes(v.first), 16);
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

// x / scale, or what has the same nearest level.
struct Quotient {
  __m512 inverse, scale;

  QK_AVX512_INLINE Quotient(float inverse, float scale)
      : inverse(_mm512_set1_ps(inverse)), scale(_mm512_set1_ps(scale)) {}
  QK_AVX512_INLINE __m512 operator()(__m512 x) const {
    const __m512 w = _mm512_mul_ps(x, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(w, scale, x), inverse, w);
  }
};

QK_AVX512_INLINE __m512 round_even(__m512 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }

// x is clipped in place of the level; max and min return their second operand if one is NaN.
template <bool hardware, bool streamed, class S>
QK_AVX512_INLINE void forward_loop(const S* x, S* y, int64_t count, Grid<float> grid, Reciprocal by) {
  const Quotient quotient(by.inverse, grid.scale);
  const __m512 first = _mm512_set1_ps(by.first), last = _mm512_set1_ps(by.last), zero = _mm512_setzero_ps();
  const auto value = [=](__m512 x) QK_AVX512_LAMBDA {
    const __m512 q = round_even(quotient(_mm512_min_ps(last, _mm512_max_ps(first, x))));
    return _mm512_fmadd_ps(q, quotient.scale, zero);  // a level of -0 gives +0
  };
#pragma GCC unroll 2
  for (int64_t i = 0; i < count; i += kMultiplied) {
    prefetch<kMultiplied>(x + i, false);
    if (!streamed) prefetch<kMultiplied>(y + i, true);
    const Vectors v = load_vectors(x + i);
    store_vectors<hardware, streamed>(y + i, {value(v.first), value(v.second)});
  }
}

template <bool streamed, class S>
QK_AVX512_INLINE void backward_loop(const S* grad, const S* x, S* dx, int64_t count, Grid<float> grid, Reciprocal by,
                                    float* dscale) {
  const Quotient quotient(by.inverse, grid.scale);
  const __m512 lo = _mm512_set1_ps(grid.lo), hi = _mm512_set1_ps(grid.hi);
  const __m512 first = _mm512_set1_ps(by.first), last = _mm512_set1_ps(by.last);
  const auto add = [=](__m512& sum, __m512 g, __m512 x) QK_AVX512_LAMBDA {
    const __m512 v = quotient(x), error = _mm512_sub_ps(round_even(v), v);
    const __mmask16 reached = _mm512_cmp_ps_mask(x, first, _CMP_NLT_UQ);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(reached, x, last, _CMP_NGT_UQ);
    const __m512 bound = _mm512_mask_mov_ps(lo, reached, hi);
    sum = _mm512_add_ps(sum, _mm512_mul_ps(g, _mm512_mask_mov_ps(bound, inside, error)));
    return inside;
  };
  Vectors sum = load_vectors(dscale);
#pragma GCC unroll 2
  for (int64_t i = 0; i < count; i += kMultiplied) {
    prefetch<kMultiplied>(grad + i, false);
    prefetch<kMultiplied>(x + i, false);
    if (!streamed) prefetch<kMultiplied>(dx + i, true);
    const Vectors g = load_vectors(grad + i), v = load_vectors(x + i);
    const __mmask16 inside = add(sum.first, g.first, v.first);
    store_kept<streamed>(dx + i, grad + i, g, inside, add(sum.second, g.second, v.second));
  }
  put<false>(dscale, sum);
}

template <bool streamed, class S>
QK_AVX512 void run_forward(const S* x, S* y, int64_t count, Grid<float> grid, Reciprocal by) {
  if (std::is_same_v<S, BFloat16> && has_bfloat16()) {
    forward_loop<true, streamed>(x, y, count, grid, by);
  } else {
    forward_loop<false, streamed>(x, y, count, grid, by);
  }
}
template <bool streamed, class S>
QK_AVX512 void run_backward(const S* grad, const S* x, S* dx, int64_t count, Grid<float> grid, Reciprocal by,
                            float* dscale) {
  backward_loop<streamed>(grad, x, dx, count, grid, by, dscale);
}

// Whether `out`, a part of `numel` elements of output, is to be written past the caches.
template <class S>
bool past_caches(const S* out, int64_t numel) {
  return numel * int64_t(sizeof(S)) >= kPastCaches && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

inline Reciprocal reciprocal_of_run(int64_t count, Grid<float> grid) {
  return count >= kWorthReciprocal && has_avx512() ? reciprocal(grid) : Reciprocal{0.0f, 0.0f, 0.0f, false};
}

// What was written past the caches is seen by other threads after this; each run of its own would wait for the memory.
inline void end_of_streams() { _mm_sfence(); }

// Both return how many of the elements they have done, from the first on; the division does the rest. numel: elements
// of the whole output.
template <class S>
int64_t fake_quantize_multiplied(const S* x, S* y, int64_t count, int64_t numel, Grid<float> grid) {
  const Reciprocal by = reciprocal_of_run(count, grid);
  if (!by.serves) return 0;
  count -= count % kMultiplied;
  past_caches(y, numel) ? run_forward<true>(x, y, count, grid, by) : run_forward<false>(x, y, count, grid, by);
  return count;
}
template <class S>
int64_t fake_quantize_backward_multiplied(const S* grad, const S* x, S* dx, int64_t count, int64_t numel,
                                          Grid<float> grid, float* dscale) {
  const Reciprocal by = reciprocal_of_run(count, grid);
  if (!by.serves) return 0;
  count -= count % kMultiplied;
  const auto run = past_caches(dx, numel) ? run_backward<true, S> : run_backward<false, S>;
  run(grad, x, dx, count, grid, by, dscale);
  return count;
}

#else

inline void end_of_streams() {}

template <class S>
int64_t fake_quantize_multiplied(const S*, S*, int64_t, int64_t, Grid<float>) {
  return 0;
}
template <class S>
int64_t fake_quantize_backward_multiplied(const S*, const S*, S*, int64_t, int64_t, Grid<float>, float*) {
  return 0;
}

#endif

}  // namespace qk
