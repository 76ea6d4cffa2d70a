// Chunks of neighbouring elements in registers: 16-byte loads and stores, conversions from and to the compute type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace qk {

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Elements of a chunk of x: 16 bytes, and at least the four that share a Philox counter.
template <class S>
constexpr int kWidth = sizeof(S) == 2 ? 8 : 4;

template <class S, int width>
struct Chunk {
  static_assert(width * sizeof(S) % 4 == 0);
  uint32_t w[width * sizeof(S) / 4];
};

template <int bytes>
using Word = std::conditional_t<
    bytes == 1, uint8_t,
    std::conditional_t<bytes == 2, uint16_t,
                       std::conditional_t<bytes == 4, uint32_t, std::conditional_t<bytes == 8, uint2, uint4>>>>;

template <class S, int width>
constexpr int kAccess = width * sizeof(S) < 16 ? width * int(sizeof(S)) : 16;

// kRead: nothing writes this memory while the kernel runs, and the read-only cache serves it.
enum class Memory { kRead, kWritten };

template <Memory memory, class W>
__device__ __forceinline__ W load_word(const W* p) {
  if constexpr (memory == Memory::kRead) return __ldg(p);
  return *p;
}

// `aligned`: the array begins at a multiple of 16 bytes. The elements [lo, hi) of the chunk at p exist; others are 0.
template <class S, int width, Memory memory = Memory::kRead>
__device__ __forceinline__ Chunk<S, width> load_chunk(const S* p, int lo, int hi, bool aligned) {
  Chunk<S, width> chunk;
  if (aligned && lo <= 0 && hi >= width) {
    using W = Word<kAccess<S, width>>;
    const W* from = reinterpret_cast<const W*>(p);
#pragma unroll
    for (int k = 0; k < int(sizeof(chunk) / sizeof(W)); ++k) {
      const W word = load_word<memory>(from + k);
      memcpy(&chunk.w[k * sizeof(W) / 4], &word, sizeof(W));
    }
    return chunk;
  }
#pragma unroll
  for (uint32_t& word : chunk.w) word = 0;
#pragma unroll
  for (int e = 0; e < width; ++e) {
    if (e < lo || e >= hi) continue;
    if constexpr (sizeof(S) == 8) {
      const uint2 bits = load_word<memory>(reinterpret_cast<const uint2*>(p) + e);
      chunk.w[2 * e] = bits.x, chunk.w[2 * e + 1] = bits.y;
    } else {
      constexpr int per_word = 4 / sizeof(S);
      const uint32_t bits = load_word<memory>(reinterpret_cast<const Word<sizeof(S)>*>(p) + e);
      chunk.w[e / per_word] |= bits << (e % per_word * 8 * sizeof(S));
    }
  }
  return chunk;
}

template <class S, int width>
__device__ __forceinline__ void store_chunk(S* p, const Chunk<S, width>& chunk, int lo, int hi, bool aligned) {
  if (aligned && lo <= 0 && hi >= width) {
    using W = Word<kAccess<S, width>>;
    W* to = reinterpret_cast<W*>(p);
#pragma unroll
    for (int k = 0; k < int(sizeof(chunk) / sizeof(W)); ++k) {
      const uint32_t* w = &chunk.w[k * sizeof(W) / 4];
      // An assignment may become stores of four bytes each, where the words come from elsewhere; these stay one.
      if constexpr (sizeof(W) == 16) {
        __stwb(to + k, make_uint4(w[0], w[1], w[2], w[3]));
      } else if constexpr (sizeof(W) == 8) {
        __stwb(to + k, make_uint2(w[0], w[1]));
      } else {
        W word;
        memcpy(&word, w, sizeof(W));
        to[k] = word;
      }
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < width; ++e) {
    if (e < lo || e >= hi) continue;
    if constexpr (sizeof(S) == 8) {
      reinterpret_cast<uint2*>(p)[e] = make_uint2(chunk.w[2 * e], chunk.w[2 * e + 1]);
    } else {
      constexpr int per_word = 4 / sizeof(S);
      using W = Word<sizeof(S)>;
      reinterpret_cast<W*>(p)[e] = W(chunk.w[e / per_word] >> (e % per_word * 8 * sizeof(S)));
    }
  }
}

template <class S, int width>
__device__ __forceinline__ Compute<S> element(const Chunk<S, width>& chunk, int e) {
  if constexpr (std::is_same_v<S, double>) {
    return __hiloint2double(int(chunk.w[2 * e + 1]), int(chunk.w[2 * e]));
  } else if constexpr (std::is_same_v<S, float>) {
    return __uint_as_float(chunk.w[e]);
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    const uint32_t word = chunk.w[e / 2];
    return __uint_as_float(e % 2 ? word & 0xFFFF0000u : word << 16);
  } else {
    return __half2float(__ushort_as_half(uint16_t(chunk.w[e / 2] >> (e % 2 * 16))));
  }
}

// Round to nearest even; NaN stays NaN. Half types convert two at a time.
template <class S, int width>
__device__ __forceinline__ Chunk<S, width> to_chunk(const Compute<S> (&y)[width]) {
  Chunk<S, width> chunk;
  if constexpr (sizeof(S) >= 4) {
    memcpy(chunk.w, y, sizeof(chunk));
  } else {
#pragma unroll
    for (int e = 0; e < width; e += 2) {
      if constexpr (std::is_same_v<S, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(y[e], y[e + 1]);
        memcpy(&chunk.w[e / 2], &pair, 4);
      } else {
        const __half2 pair = __floats2half2_rn(y[e], y[e + 1]);
        memcpy(&chunk.w[e / 2], &pair, 4);
      }
    }
  }
  return chunk;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace qk
