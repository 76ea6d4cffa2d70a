// Sums in an order that depends on the shape alone: within a team, down the lines of a block, across units.
#pragma once
#include "cuda/walk.h"

namespace qk {

// The sum over the `team` threads that hold v, in the team's first thread. Every thread of the block calls it.
template <class C>
__device__ __forceinline__ C team_sum(C v, int team) {
  const int lanes = team < 32 ? team : 32;
  for (int offset = lanes / 2; offset; offset /= 2) v += __shfl_down_sync(0xFFFFFFFFu, v, offset, lanes);
  if (team <= 32) return v;
  __shared__ C warps[kThreads / 32];
  // The previous call's sums may still be read.
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < kThreads / 32; ++k) v += warps[k];
  }
  return v;
}

// f(j, sum) for each of the block's `columns`: thread (c, r) holds `width` of them, from c * width on, in line r <
// down.
template <class C, int width, class F>
__device__ __forceinline__ void column_sums(const C (&own)[width], int columns, int down, int c, int r, const F& f) {
  __shared__ C lines[kThreads * width];
  __syncthreads();
  if (r < down) {
#pragma unroll
    for (int e = 0; e < width; ++e) lines[r * columns + c * width + e] = own[e];
  }
  __syncthreads();
  for (int j = threadIdx.x; j < columns; j += kThreads) {
    C sum = 0;
    for (int k = 0; k < down; ++k) sum += lines[k * columns + j];
    f(j, sum);
  }
}

constexpr int kFinishThreads = 512;

// The rows' sums from the units' (Walk: repetitions, adjacent), in double. put(row, sum) for each row.
template <class C, class F>
__device__ __forceinline__ void finish_rows(const C* partial, int64_t rows, int64_t repetitions, int64_t adjacent,
                                            int lanes, const F& put) {
  __shared__ double sums[kFinishThreads];
  const int lane = threadIdx.x % lanes, y = threadIdx.x / lanes, down = kFinishThreads / lanes;
  for (int64_t first = int64_t(blockIdx.x) * lanes; first < rows; first += int64_t(gridDim.x) * lanes) {
    const int64_t row = first + lane;
    double sum = 0;
    if (row < rows) {
      for (int64_t m = y; m < repetitions * adjacent; m += down) {
        const int64_t repetition = adjacent == 1 ? m : m / adjacent;
        sum += double(partial[(repetition * rows + row) * adjacent + (m - repetition * adjacent)]);
      }
    }
    sums[threadIdx.x] = sum;
    for (int half = down / 2; half; half /= 2) {
      __syncthreads();
      if (y < half) sums[threadIdx.x] += sums[threadIdx.x + half * lanes];
    }
    if (y == 0 && row < rows) put(row, sums[threadIdx.x]);
    __syncthreads();
  }
}

// Rows side by side where there are many, so that neighbouring threads read neighbouring sums.
inline int finish_lanes(int64_t rows) {
  int lanes = 1;
  while (lanes < 32 && lanes < rows) lanes *= 2;
  return lanes;
}

}  // namespace qk
