// What the emulator has to notice: kernels with one mistake each.
#include <cuda_runtime_api.h>

#include "cuda/chunk.h"

namespace {

__global__ void reversed_kernel(const float* x, float* y, bool wait) {
  __shared__ float all[64];
  all[threadIdx.x] = x[threadIdx.x];
  if (wait) __syncthreads();
  y[threadIdx.x] = all[63 - threadIdx.x];
}

__global__ void unwritten_kernel(float* y) {
  __shared__ float all[64];
  y[threadIdx.x] = all[threadIdx.x];
  all[threadIdx.x] = 0;
}

__global__ void diverging_kernel() {
  if (threadIdx.x < 8) __syncthreads();
}

__global__ void wide_kernel(const float* x, float* y) {
  qk::store_chunk(y, qk::load_chunk<float, 4>(x, 0, 4, true), 0, 4, true);
}

__global__ void rewritten_kernel(float* y) { y[0] = __ldg(y) > 0 ? -1 : 1; }

}  // namespace

extern "C" {

cudaError_t fault_order(const float* x, float* y, bool wait) {
  reversed_kernel<<<1, 64, 0, nullptr>>>(x, y, wait);
  return cudaGetLastError();
}

cudaError_t fault_unwritten(float* y) {
  unwritten_kernel<<<1, 64, 0, nullptr>>>(y);
  return cudaGetLastError();
}

cudaError_t fault_barrier() {
  diverging_kernel<<<1, 64, 0, nullptr>>>();
  return cudaGetLastError();
}

cudaError_t fault_alignment(const float* x, float* y) {
  wide_kernel<<<1, 1, 0, nullptr>>>(x, y);
  return cudaGetLastError();
}

cudaError_t fault_rewritten(float* y) {
  rewritten_kernel<<<1, 1, 0, nullptr>>>(y);
  return cudaGetLastError();
}

cudaError_t fault_grid() {
  diverging_kernel<<<0, 64, 0, nullptr>>>();
  return cudaGetLastError();
}
}
