// The launchers of the CUDA kernels: raw pointers and a stream, no torch. Each queues its kernels and returns
// cudaGetLastError(); none allocates, reads device memory or waits.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/walk.h"

namespace qk {

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

// The rows' numbers on the device: float32 (float64 beside float64 elements). offset and zero_point may be null.
struct Numbers {
  const void *scale, *offset;
  const int32_t* zero_point;
  int64_t quant_min, quant_max;
};

// The kinds of math/quantize.h. seed, shift and shift_scale are on the device and null where the kind has no use.
struct NoiseSource {
  int64_t kind;
  float a, b;
  const int64_t* seed;
  uint64_t stream;
  const void* shift;
  const float* shift_scale;
};

struct GradientOptions {
  double grad_scale, ewgs;
  bool clip_only;
};

// partial: room for sums_of(walk) * (offset ? 2 : 1) elements of the compute type, null where that is 0.
struct GradientSums {
  void *dscale, *doffset, *partial;
};

inline int64_t sums_of(const Walk& walk) { return walk.one_partial_per_row() ? 0 : walk.partials(); }

cudaError_t launch_fake_quantize(const Walk& walk, Dtype type, const void* x, void* y, const Numbers& numbers,
                                 const NoiseSource& noise, cudaStream_t stream);
cudaError_t launch_fake_quantize_backward(const Walk& walk, Dtype type, const void* grad, const void* x, void* dx,
                                          const Numbers& numbers, const NoiseSource& noise,
                                          const GradientOptions& options, const GradientSums& sums,
                                          cudaStream_t stream);
cudaError_t launch_quantize(const Walk& walk, Dtype type, const void* x, uint8_t* q, const Numbers& numbers,
                            cudaStream_t stream);
cudaError_t launch_dequantize(const Walk& walk, Dtype type, const uint8_t* q, bool is_signed, void* y,
                              const Numbers& numbers, cudaStream_t stream);
cudaError_t launch_pack(const uint8_t* q, int64_t numel, int bits, uint8_t* p, cudaStream_t stream);
cudaError_t launch_unpack(const uint8_t* p, int64_t numel, int bits, bool is_signed, uint8_t* q, cudaStream_t stream);

}  // namespace qk
