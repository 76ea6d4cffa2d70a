// Many Philox counters at once. g++ turns the 32 x 32 -> 64 bit product into a slow 64-bit one, so the instruction that
// computes it is named here; the words are those of philox() in math/noise.h.
#pragma once
#include "cpu/types.h"

namespace qk {
namespace {

constexpr int64_t kCounters = 256;  // counters of one call, at most; four words each

struct WordBlock {
  alignas(64) uint32_t w[4][kCounters];
};

#if QK_X86_CLONES

// One counter to a 64-bit lane; the upper half of a lane holds what the multiplication ignores.
__attribute__((unused)) __attribute__((target("avx512f"))) void philox_block(uint64_t seed, uint64_t stream,
                                                                             uint64_t first, int64_t count,
                                                                             WordBlock& out) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t j = 0; j < count; j += 8) {
    const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(int64_t(first) + j), lanes);
    __m512i c0 = counter, c1 = _mm512_srli_epi64(counter, 32);
    __m512i c2 = _mm512_set1_epi64(int64_t(stream)), c3 = _mm512_set1_epi64(int64_t(stream >> 32));
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
      c1 = p1, c3 = p0;
    }
    const __m512i words[4] = {c0, c1, c2, c3};
    for (int k = 0; k < 4; ++k) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out.w[k] + j), _mm512_cvtepi64_epi32(words[k]));
    }
  }
}

__attribute__((unused)) __attribute__((target("avx2"))) void philox_block(uint64_t seed, uint64_t stream,
                                                                          uint64_t first, int64_t count,
                                                                          WordBlock& out) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i lanes = _mm256_set_epi64x(3, 2, 1, 0), low = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
  for (int64_t j = 0; j < count; j += 4) {
    const __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first) + j), lanes);
    __m256i c0 = counter, c1 = _mm256_srli_epi64(counter, 32);
    __m256i c2 = _mm256_set1_epi64x(int64_t(stream)), c3 = _mm256_set1_epi64x(int64_t(stream >> 32));
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
      c1 = p1, c3 = p0;
    }
    const __m256i words[4] = {c0, c1, c2, c3};
    for (int k = 0; k < 4; ++k) {
      const __m256i packed = _mm256_permutevar8x32_epi32(words[k], low);
      _mm_store_si128(reinterpret_cast<__m128i*>(out.w[k] + j), _mm256_castsi256_si128(packed));
    }
  }
}

__attribute__((target("default")))
#endif
__attribute__((unused)) void philox_block(uint64_t seed, uint64_t stream, uint64_t first, int64_t count,
                                          WordBlock& out) {
  for (int64_t j = 0; j < count; ++j) {
    const Words words = philox(seed, stream, first + uint64_t(j));
    for (int k = 0; k < 4; ++k) out.w[k][j] = words.w[k];
  }
}

}  // namespace
}  // namespace qk
