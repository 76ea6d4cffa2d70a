// Integer levels on the GPU: quantize, dequantize, pack, unpack.
#include "cuda/elements.cuh"
#include "math/pack.h"

namespace qk {
namespace {

template <class S>
struct QuantizeOp {
  using Storage = S;
  using C = Compute<S>;
  static constexpr int kBatch = sizeof(S) <= 4 ? 4 : 2, kSums = 0, kBlocks = kRunBlocks<S>, kColumnBlocks = 2;
  static constexpr bool kCoin = false, kMultiplies = false;
  template <int width>
  using Input = Chunk<S, width>;

  RowNumbers<C> rows;
  const S* x;
  uint8_t* q;
  bool aligned;

  template <int width>
  __device__ Input<width> load(int64_t first, int lo, int hi) const {
    return load_chunk<S, width>(x + first, lo, hi, aligned);
  }
  template <int width, int step, class Sums>
  __device__ void apply(const Input<width>& in, int64_t first, int lo, int hi, const Row<C>* row, Sums*) const {
    Chunk<uint8_t, width> out = {};
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const uint32_t byte = uint8_t(quantize(element(in, e), row[e * step].grid, row[e * step].zero_point));
      out.w[e / 4] |= byte << (e % 4 * 8);
    }
    store_chunk(q + first, out, lo, hi, aligned);
  }
};

template <class S>
struct DequantizeOp {
  using Storage = S;
  using C = Compute<S>;
  static constexpr int kBatch = 4, kSums = 0, kBlocks = kRunBlocks<S>, kColumnBlocks = 2;
  static constexpr bool kCoin = false, kMultiplies = false;
  template <int width>
  using Input = Chunk<uint8_t, width>;

  RowNumbers<C> rows;
  const uint8_t* q;
  S* y;
  bool is_signed, aligned;

  template <int width>
  __device__ Input<width> load(int64_t first, int lo, int hi) const {
    return load_chunk<uint8_t, width>(q + first, lo, hi, aligned);
  }
  template <int width, int step, class Sums>
  __device__ void apply(const Input<width>& in, int64_t first, int lo, int hi, const Row<C>* row, Sums*) const {
    C out[width];
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const uint8_t byte = uint8_t(in.w[e / 4] >> (e % 4 * 8));
      const int32_t stored = is_signed ? int32_t(int8_t(byte)) : int32_t(byte);
      out[e] = dequantize(stored, row[e * step].grid, row[e * step].zero_point);
    }
    store_chunk(y + first, to_chunk<S>(out), lo, hi, aligned);
  }
};

// A thread owns 4 packed bytes and the 32 / bits elements in them.
template <int bits>
__global__ void __launch_bounds__(kThreads) pack_kernel(const uint8_t* q, int64_t numel, uint8_t* p, bool aligned) {
  constexpr int per_byte = 8 / bits, width = 4 * per_byte;
  const int64_t bytes = (numel + per_byte - 1) / per_byte, step = int64_t(gridDim.x) * kThreads * 4;
  for (int64_t byte = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4; byte < bytes; byte += step) {
    const int64_t first = byte * per_byte, left = numel - first;
    const auto in = load_chunk<uint8_t, width>(q + first, 0, int(left < width ? left : width), aligned);
    Chunk<uint8_t, 4> out = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint8_t fields[per_byte];
#pragma unroll
      for (int e = 0; e < per_byte; ++e) {
        const int i = k * per_byte + e;
        fields[e] = uint8_t(in.w[i / 4] >> (i % 4 * 8));
      }
      out.w[0] |= uint32_t(pack_byte(fields, per_byte, bits)) << (8 * k);
    }
    store_chunk(p + byte, out, 0, int(bytes - byte < 4 ? bytes - byte : 4), aligned);
  }
}

template <int bits>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* p, int64_t numel, bool is_signed, uint8_t* q, bool aligned) {
  constexpr int per_byte = 8 / bits, width = 4 * per_byte;
  const int64_t bytes = (numel + per_byte - 1) / per_byte, step = int64_t(gridDim.x) * kThreads * 4;
  for (int64_t byte = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4; byte < bytes; byte += step) {
    const int64_t first = byte * per_byte, left = numel - first;
    const auto in = load_chunk<uint8_t, 4>(p + byte, 0, int(bytes - byte < 4 ? bytes - byte : 4), aligned);
    Chunk<uint8_t, width> out = {};
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const uint8_t packed = uint8_t(in.w[0] >> (i / per_byte * 8));
      out.w[i / 4] |= uint32_t(unpack_field(packed, i % per_byte, bits, is_signed)) << (i % 4 * 8);
    }
    store_chunk(q + first, out, 0, int(left < width ? left : width), aligned);
  }
}

template <class F>
cudaError_t with_bits(int bits, F&& f) {
  return with_kind<2, 4, 8>(bits, f);
}

int pack_blocks(int64_t numel, int bits) {
  const int64_t elements = int64_t(kThreads) * 32 / bits;
  return int(std::min<int64_t>((numel + elements - 1) / elements, kMaxBlocks));
}

}  // namespace

cudaError_t launch_quantize(const Walk& walk, Dtype type, const void* x, uint8_t* q, const Numbers& numbers,
                            cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    const QuantizeOp<S> op{RowNumbers<Compute<S>>(numbers), static_cast<const S*>(x), q,
                           is_aligned(x) && is_aligned(q)};
    return launch(walk, op, stream);
  });
}

cudaError_t launch_dequantize(const Walk& walk, Dtype type, const uint8_t* q, bool is_signed, void* y,
                              const Numbers& numbers, cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    const DequantizeOp<S> op{RowNumbers<Compute<S>>(numbers), q, static_cast<S*>(y), is_signed,
                             is_aligned(q) && is_aligned(y)};
    return launch(walk, op, stream);
  });
}

cudaError_t launch_pack(const uint8_t* q, int64_t numel, int bits, uint8_t* p, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_bits(bits, [&](auto b) {
    pack_kernel<int(b)><<<pack_blocks(numel, bits), kThreads, 0, stream>>>(q, numel, p, is_aligned(q) && is_aligned(p));
    return cudaGetLastError();
  });
}

cudaError_t launch_unpack(const uint8_t* p, int64_t numel, int bits, bool is_signed, uint8_t* q, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_bits(bits, [&](auto b) {
    unpack_kernel<int(b)>
        <<<pack_blocks(numel, bits), kThreads, 0, stream>>>(p, numel, is_signed, q, is_aligned(p) && is_aligned(q));
    return cudaGetLastError();
  });
}

}  // namespace qk
