// Half types as 16-bit integers with branch-free conversions that g++ vectorises; round to nearest even, NaN stays NaN.
#pragma once
#include <cstdlib>
#include <type_traits>

#include "math/noise.h"

// Where g++ compiles one function for several instruction sets; its levels of x86-64 have names from version 12 on.
#if defined(__x86_64__) && __GNUC__ >= 12 && !defined(__clang__) && defined(__linux__) && !defined(QK_NO_CLONES)
#define QK_X86_CLONES 1
// One body per instruction set, chosen when the library is loaded: one wheel, no -march, full speed.
#define QK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// The compiler's own header trips this warning when inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define QK_CLONES
#endif

namespace qk {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

QK_HD double load(double x) { return x; }
QK_HD float load(float x) { return x; }
QK_HD float load(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
QK_HD float load(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFFu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t scaled = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t special = (x.bits & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  return bits_to_float(scaled | special | sign);
}

template <class S>
S store(decltype(load(S())) x);

template <>
QK_HD double store<double>(double x) {
  return x;
}
template <>
QK_HD float store<float>(float x) {
  return x;
}
// The upper half, to nearest even; a NaN needs its lower half to be 0.
QK_HD uint32_t rounded_half(uint32_t bits) { return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16; }

template <>
QK_HD BFloat16 store<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  return {uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded_half(bits))};
}
template <>
QK_HD Half store<Half>(float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return {uint16_t(half | sign)};
}

// How a block of results becomes S. What is known of the results spares bfloat16 most of the work.
//   kAnyBits     nothing
//   kCleanBits   no NaN has a bit set below S's
//   kExact       every result is a value of S
enum class Rounding { kAnyBits, kCleanBits, kExact };

template <Rounding rounding, int64_t count, class S>
QK_HD void store_block(const decltype(load(S()))* from, S* to) {
  constexpr bool bfloat16 = std::is_same_v<S, BFloat16>;
  if constexpr (bfloat16 && rounding == Rounding::kExact) {
    for (int64_t j = 0; j < count; ++j) to[j] = {uint16_t(float_to_bits(from[j]) >> 16)};
  } else if constexpr (bfloat16 && rounding == Rounding::kCleanBits) {
    for (int64_t j = 0; j < count; ++j) to[j] = {uint16_t(rounded_half(float_to_bits(from[j])))};
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = store<S>(from[j]);
  }
}

template <class S>
constexpr int64_t kPage = 4096 / sizeof(S);  // elements

// Ask for what is read, or written, `distance` further on: the hardware's own prefetch stops at every page, and with
// two or three streams each stop costs more than the arithmetic (a quarter of the time of a pass over cold memory,
// measured).
template <int64_t count, class S>
QK_HD void prefetch(const S* at, bool written, int64_t distance = kPage<S>) {
  const char* ahead = reinterpret_cast<const char*>(at + distance);
  for (int64_t byte = 0; byte < count * int64_t(sizeof(S)); byte += 64) {
    if (written) {
      __builtin_prefetch(ahead + byte, 1);
    } else {
      __builtin_prefetch(ahead + byte, 0);
    }
  }
}

template <class S>
using Compute = decltype(load(S()));

}  // namespace qk
