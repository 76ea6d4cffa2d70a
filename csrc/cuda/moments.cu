// The standardised distance on the GPU: one pass over student and teacher leaves five sums per unit, a small kernel
// adds those up and finishes the channels; one pass for the gradient.
#include "cuda/moments.h"

#include "cuda/elements.cuh"
#include "math/moments.h"

namespace qk {
namespace {

template <class S>
struct Both {
  const S *s, *t;
  bool aligned;
};

template <class S, int width>
struct ChunkPair {
  Chunk<S, width> s, t;

  __device__ void load(const Both<S>& both, int64_t first, int lo, int hi) {
    s = load_chunk<S, width>(both.s + first, lo, hi, both.aligned);
    t = load_chunk<S, width>(both.t + first, lo, hi, both.aligned);
  }
};

// Near the channel's elements: its first ones.
template <class C>
struct Shift {
  C s, t;
};

template <class S>
__device__ Shift<Compute<S>> shift_of(const Both<S>& both, const Walk& walk, int64_t row) {
  return {Compute<S>(both.s[row * walk.inner]), Compute<S>(both.t[row * walk.inner])};
}

__device__ __forceinline__ double& at(Moments<double>& m, int which) {
  return which == 0 ? m.s : which == 1 ? m.t : which == 2 ? m.ss : which == 3 ? m.tt : m.st;
}

template <class S>
__global__ void __launch_bounds__(kThreads, 3)
    moments_runs_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Both<S> both, double* partial) {
  using C = Compute<S>;
  constexpr int width = kWidth<S>, batch = 2;
  const int lane = threadIdx.x & (walk.team - 1), teams = kThreads / walk.team, step = walk.team * width;
  for (int64_t block = int64_t(blockIdx.x) * teams; block < walk.units; block += int64_t(gridDim.x) * teams) {
    const int64_t unit = block + threadIdx.x / walk.team;
    // A team without a unit still takes part in the shuffles.
    const Span span = unit < walk.units ? span_of(walk, unit) : Span{0, 0, 0, 0};
    const Shift<C> shift = shift_of(both, walk, span.row);
    Moments<double> sums = {};
    for (int i = lane * width; i < span.stop; i += batch * step) {
      ChunkPair<S, width> pair[batch];
      // At most 16 terms in float32 before they go on in double, which some devices are slow at.
      Moments<C> some = {};
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int begin = i + k * step;
        if (begin < span.stop) pair[k].load(both, span.base + begin, span.head - begin, span.stop - begin);
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int lo = span.head - (i + k * step), hi = span.stop - (i + k * step);
#pragma unroll
        for (int e = 0; e < width; ++e) {
          if (e >= lo && e < hi) some.add(element(pair[k].s, e) - shift.s, element(pair[k].t, e) - shift.t);
        }
      }
      sums.merge(some);
    }
#pragma unroll
    for (int which = 0; which < 5; ++which) {
      const double sum = team_sum(at(sums, which), walk.team);
      if (lane == 0 && unit < walk.units) partial[which * walk.units + unit] = sum;
    }
  }
}

// The rows of a thread's columns: f(e, row).
template <class F>
__device__ __forceinline__ void for_rows(const Walk& walk, int64_t column, const F& f) {
  int64_t row = column / walk.inner, within = column - row * walk.inner;
  row %= walk.rows;
#pragma unroll
  for (int e = 0; e < kColumns; ++e) {
    f(e, row);
    if (++within == walk.inner) within = 0, row = row + 1 == walk.rows ? 0 : row + 1;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    moments_columns_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Both<S> both, double* partial) {
  using C = Compute<S>;
  constexpr int batch = sizeof(S) == 8 ? 1 : 4;
  const int c = threadIdx.x % walk.across, r = threadIdx.x / walk.across;
  for (int64_t unit = blockIdx.x; unit < walk.units; unit += gridDim.x) {
    const Strip strip = strip_of(walk, unit, c, r);
    Shift<C> shift[kColumns] = {};
    if (strip.first < strip.stop) {
      for_rows(walk, strip.column, [&](int e, int64_t row) { shift[e] = shift_of(both, walk, row); });
    }
    Moments<double> sums[kColumns] = {};
    for (int64_t i = strip.first; i < strip.stop; i += batch * strip.stride) {
      ChunkPair<S, kColumns> pair[batch];
      Moments<C> some[kColumns] = {};
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int64_t begin = i + k * strip.stride;
        if (begin < strip.stop) pair[k].load(both, begin, 0, walk.left(begin));
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int64_t begin = i + k * strip.stride;
        const int hi = begin < strip.stop ? walk.left(begin) : 0;
#pragma unroll
        for (int e = 0; e < kColumns; ++e) {
          if (e < hi) some[e].add(element(pair[k].s, e) - shift[e].s, element(pair[k].t, e) - shift[e].t);
        }
      }
#pragma unroll
      for (int e = 0; e < kColumns; ++e) sums[e].merge(some[e]);
    }
    const int64_t part = unit / walk.tiles, first = (unit - part * walk.tiles) * walk.across * kColumns;
#pragma unroll
    for (int which = 0; which < 5; ++which) {
      double own[kColumns];
#pragma unroll
      for (int e = 0; e < kColumns; ++e) own[e] = at(sums[e], which);
      column_sums(own, walk.across * kColumns, walk.down, c, r, [&](int j, double sum) {
        if (first + j < walk.line) partial[(which * walk.parts + part) * walk.line + first + j] = sum;
      });
    }
  }
}

// A row's sum of one moment, for all five: into `moments`, where the next kernel turns them into what they mean.
__global__ void __launch_bounds__(kFinishThreads)
    moments_sum_kernel(const double* partial, int64_t partials, int64_t rows, int64_t repetitions, int64_t adjacent,
                       int lanes, double* moments) {
  const int64_t which = blockIdx.y;
  finish_rows(partial + which * partials, rows, repetitions, adjacent, lanes,
              [&](int64_t row, double sum) { moments[which * rows + row] = sum; });
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    distance_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Both<S> both,
                    const __grid_constant__ DistanceSettings settings, Compute<S>* distance, double* moments) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x, rows = walk.rows;
  if (row >= rows) return;
  const double n = double(walk.numel / rows);
  const Shift<Compute<S>> shift = shift_of(both, walk, row);
  const Moments<double> sums{moments[row], moments[rows + row], moments[2 * rows + row], moments[3 * rows + row],
                             moments[4 * rows + row]};
  const Channel channel = channel_of(sums, n, double(shift.s), double(shift.t));
  distance[row] = Compute<S>(standardized_distance(channel, settings.eps) * (settings.mean ? 1.0 : n));
  moments[row] = channel.mean_s;
  moments[rows + row] = channel.mean_t;
  moments[2 * rows + row] = channel.var_s;
  moments[3 * rows + row] = channel.var_t;
  moments[4 * rows + row] = channel.cov;
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    slopes_kernel(int64_t rows, double n, const C* grad, int64_t grad_stride, const double* moments,
                  const __grid_constant__ DistanceSettings settings, Slope<C>* slopes) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const Channel channel{moments[row], moments[rows + row], moments[2 * rows + row], moments[3 * rows + row],
                        moments[4 * rows + row]};
  const double factor = double(grad[row * grad_stride]) * (settings.mean ? 1.0 / n : 1.0);
  slopes[row] = slope_of<C>(channel, factor, settings.eps);
}

template <class S, int width, int step>
__device__ __forceinline__ void backward_chunk(const Both<S>& both, const ChunkPair<S, width>& pair, S* ds,
                                               int64_t first, int lo, int hi, const Slope<Compute<S>>* slopes) {
  Compute<S> out[width];
#pragma unroll
  for (int e = 0; e < width; ++e) {
    out[e] = standardized_distance_backward(element(pair.s, e), element(pair.t, e), slopes[e * step]);
  }
  store_chunk(ds + first, to_chunk<S>(out), lo, hi, both.aligned);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 4)
    backward_runs_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Both<S> both,
                         const Slope<Compute<S>>* slopes, S* ds) {
  constexpr int width = kWidth<S>, batch = sizeof(S) <= 4 ? 2 : 1;
  const int lane = threadIdx.x & (walk.team - 1), teams = kThreads / walk.team, step = walk.team * width;
  for (int64_t unit = int64_t(blockIdx.x) * teams + threadIdx.x / walk.team; unit < walk.units;
       unit += int64_t(gridDim.x) * teams) {
    const Span span = span_of(walk, unit);
    const Slope<Compute<S>> slope = slopes[span.row];
    for (int i = lane * width; i < span.stop; i += batch * step) {
      ChunkPair<S, width> pair[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int begin = i + k * step;
        if (begin < span.stop) pair[k].load(both, span.base + begin, span.head - begin, span.stop - begin);
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int begin = i + k * step;
        if (begin >= span.stop) continue;
        backward_chunk<S, width, 0>(both, pair[k], ds, span.base + begin, span.head - begin, span.stop - begin, &slope);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    backward_columns_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Both<S> both,
                            const Slope<Compute<S>>* slopes, S* ds) {
  constexpr int batch = 2;
  const int c = threadIdx.x % walk.across, r = threadIdx.x / walk.across;
  for (int64_t unit = blockIdx.x; unit < walk.units; unit += gridDim.x) {
    const Strip strip = strip_of(walk, unit, c, r);
    if (strip.first >= strip.stop) continue;
    Slope<Compute<S>> own[kColumns];
    for_rows(walk, strip.column, [&](int e, int64_t row) { own[e] = slopes[row]; });
    for (int64_t i = strip.first; i < strip.stop; i += batch * strip.stride) {
      ChunkPair<S, kColumns> pair[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int64_t begin = i + k * strip.stride;
        if (begin < strip.stop) pair[k].load(both, begin, 0, walk.left(begin));
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int64_t begin = i + k * strip.stride;
        if (begin < strip.stop) {
          backward_chunk<S, kColumns, 1>(both, pair[k], ds, begin, 0, walk.left(begin), own);
        }
      }
    }
  }
}

int per_row_blocks(int64_t rows) { return int((rows + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t launch_standardized_distance(const Walk& walk, Dtype type, const void* student, const void* teacher,
                                         const DistanceSettings& settings, double* partial, void* distance,
                                         double* moments, cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    const Both<S> both{static_cast<const S*>(student), static_cast<const S*>(teacher),
                       is_aligned(student) && is_aligned(teacher)};
    const auto pass = walk.columns ? moments_columns_kernel<S> : moments_runs_kernel<S>;
    pass<<<walk.blocks(), kThreads, 0, stream>>>(walk, both, partial);
    const int lanes = finish_lanes(walk.rows);
    const dim3 grid(int(std::min<int64_t>((walk.rows + lanes - 1) / lanes, kMaxBlocks)), 5);
    moments_sum_kernel<<<grid, kFinishThreads, 0, stream>>>(partial, walk.partials(), walk.rows, walk.repetitions(),
                                                            walk.adjacent(), lanes, moments);
    distance_kernel<S><<<per_row_blocks(walk.rows), kThreads, 0, stream>>>(walk, both, settings,
                                                                           static_cast<Compute<S>*>(distance), moments);
    return cudaGetLastError();
  });
}

cudaError_t launch_standardized_distance_backward(const Walk& walk, Dtype type, const void* grad, int64_t grad_stride,
                                                  const void* student, const void* teacher, const double* moments,
                                                  const DistanceSettings& settings, void* slopes, void* ds,
                                                  cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    using C = Compute<S>;
    Slope<C>* table = static_cast<Slope<C>*>(slopes);
    slopes_kernel<C><<<per_row_blocks(walk.rows), kThreads, 0, stream>>>(
        walk.rows, double(walk.numel / walk.rows), static_cast<const C*>(grad), grad_stride, moments, settings, table);
    const Both<S> both{static_cast<const S*>(student), static_cast<const S*>(teacher),
                       is_aligned(student) && is_aligned(teacher) && is_aligned(ds)};
    const auto pass = walk.columns ? backward_columns_kernel<S> : backward_runs_kernel<S>;
    pass<<<walk.blocks(), kThreads, 0, stream>>>(walk, both, table, static_cast<S*>(ds));
    return cudaGetLastError();
  });
}

}  // namespace qk
