// CUDA kernels on the host: the threads of a block are fibers that take turns, a barrier hands the turn on.
//
// Included before a .cu file whose `kernel<<<grid, threads, shared, stream>>>(args)` reads `emulate(grid, threads,
// shared, stream, [&] { kernel(args); })`. What a GPU would answer with an error or with chance is a fault here:
// an empty grid, a misaligned access, threads that do not all meet a barrier, a change of what the read-only cache
// serves. Local and shared
// memory begin as garbage. Threads, warps and blocks run in either order, so that a missing barrier changes a result.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __host__
#define __global__
// Alone in the library's thread-local storage, where the emulator finds all of it.
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

struct Index {
  unsigned x = 0, y = 0;
};
extern Index thread, block;
extern dim3 grid;
extern double lanes[1024];  // what each thread gives to a shuffle

void barrier();
void warp_barrier();
void fault(cudaError_t error);
void serve_read_only(const void* from, size_t bytes);
void launch(dim3 blocks, int threads, const std::function<void()>& kernel);

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define gridDim emulator::grid

template <class F>
void emulate(dim3 blocks, int threads, size_t, cudaStream_t, const F& kernel) {
  emulator::launch(blocks, threads, kernel);
}

inline void __syncthreads() { emulator::barrier(); }

template <class T>
T __shfl_down_sync(unsigned, T v, int offset, int width) {
  const int t = threadIdx.x;
  emulator::lanes[t] = double(v);
  emulator::warp_barrier();
  const T other = t % width + offset < width ? T(emulator::lanes[t + offset]) : v;
  emulator::warp_barrier();
  return other;
}

template <class T>
T __ldg(const T* p) {
  emulator::serve_read_only(p, sizeof(T));
  return *p;
}
template <class T>
void __stwb(T* p, T value) {
  *p = value;
}
inline float __uint_as_float(uint32_t word) {
  float x;
  memcpy(&x, &word, sizeof(x));
  return x;
}
inline double __hiloint2double(int hi, int lo) {
  const uint64_t word = uint64_t(uint32_t(hi)) << 32 | uint32_t(lo);
  double x;
  memcpy(&x, &word, sizeof(x));
  return x;
}
