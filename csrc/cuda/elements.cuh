// The two walks as kernels over an Op, and what the quantizer's Ops share: rows, noise, dispatch.
//
// An Op is copied to the device by value and has
//   Storage                   the element type of x
//   kBatch                    chunks of a run that a thread has in flight; of columns, at most 2
//   kBlocks, kColumnBlocks    blocks that a multiprocessor shall hold, which bounds the registers
//   kSums                     0, or the number of sums per row
//   kMultiplies               whether runs may multiply in place of the division (math/reciprocal.h)
//   rows                      RowNumbers
//   load<width>(first, lo, hi) -> Input<width>: the chunk at element `first`, of which [lo, hi) exist
//   apply<width, step>(input, first, lo, hi, rows, sums): computes and stores it; element e has rows[e * step] and
//                             adds its terms to sums[e * step]
//   wants(which), put(which, index, row, sum): takes a unit's sum: the partial sum `index`, or `row`'s only one
//   kCoin, is_on(), plain()   noise that a coin switches on, and the Op without it
#pragma once
// math/noise.h unrolls a loop with a pragma of g++; nvcc does so unasked.
#pragma nv_diag_suppress 1675
#include "cuda/chunk.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "math/reciprocal.h"

namespace qk {

// As many blocks on a multiprocessor as leave the registers that eight halves, four floats or four doubles need.
template <class S>
constexpr int kRunBlocks = sizeof(S) == 4   ? 4
                           : sizeof(S) == 2 ? 3
                                            : 2;

// The division has a slow path per element, probably also for zeros; a reciprocal costs a thread 60 instructions, some
// in double, of which GPUs that are not made for computing have few units.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 700 || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || \
    __CUDA_ARCH__ == 1000
constexpr bool kFastDoubles = true;
#else
constexpr bool kFastDoubles = false;
#endif
// Elements of a thread for which it is worth computing.
constexpr int kWorthReciprocal = 8;

template <int64_t kind, class S>
constexpr bool kMultipliesFor = kFastDoubles && kind == kPlain && std::is_same_v<Compute<S>, float>;

template <class C>
struct Row {
  Grid<C> grid;
  int32_t zero_point;
  Reciprocal by = {0.0f, 0.0f, 0.0f, false};
};

template <class C>
struct RowNumbers {
  const C *scale, *offset;
  const int32_t* zero_point;
  int64_t quant_min, quant_max;

  explicit RowNumbers(const Numbers& n)
      : scale(static_cast<const C*>(n.scale)),
        offset(static_cast<const C*>(n.offset)),
        zero_point(n.zero_point),
        quant_min(n.quant_min),
        quant_max(n.quant_max) {}
  __device__ Row<C> operator[](int64_t row) const {
    const int32_t zero = zero_point ? zero_point[row] : 0;
    return {{safe_scale(scale[row]), offset ? offset[row] : C(0), C(quant_min - zero), C(quant_max - zero)}, zero};
  }
};

constexpr bool throws_coin(int64_t kind) { return kind == kAfter || kind == kBefore; }

// The variates of the chunk at element `first`, a multiple of 4.
template <int64_t kind, class C, int width>
__device__ __forceinline__ void draw(uint64_t seed, uint64_t stream, int64_t first, C (&n)[width]) {
#pragma unroll
  for (int j = 0; j < width; j += 4) {
    const Words words = philox(seed, stream, uint64_t(first + j) >> 2);
    if (kind == kTempering || kind == kPseudoNormal) {
      const Normals four = normals(words);
#pragma unroll
      for (int k = 0; k < 4; ++k) n[j + k] = C(kind == kPseudoNormal ? 0.5f * four.n[k] : four.n[k]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) n[j + k] = C(kind == kStochastic ? uniform(words.w[k]) : uniform(words.w[k]) - 0.5f);
    }
  }
}

template <class Op>
__device__ __forceinline__ void walk_runs(const Walk& walk, const Op& op) {
  using C = Compute<typename Op::Storage>;
  constexpr int width = kWidth<typename Op::Storage>;
  const int lane = threadIdx.x & (walk.team - 1), teams = kThreads / walk.team, step = walk.team * width;
  for (int64_t block = int64_t(blockIdx.x) * teams; block < walk.units; block += int64_t(gridDim.x) * teams) {
    const int64_t unit = block + threadIdx.x / walk.team;
    // A team without a unit still takes part in the shuffles.
    const Span span = unit < walk.units ? span_of(walk, unit) : Span{0, 0, 0, 0};
    Row<C> row;
    C sums[Op::kSums + 1] = {};
    for (int at = lane * width; at < span.stop; at += Op::kBatch * step) {
      typename Op::template Input<width> input[Op::kBatch];
#pragma unroll
      for (int k = 0; k < Op::kBatch; ++k) {
        const int i = at + k * step;
        if (i < span.stop) input[k] = op.template load<width>(span.base + i, span.head - i, span.stop - i);
      }
      // The first elements are under way before the row's numbers are waited for.
      if (at == lane * width) {
        row = op.rows[span.row];
        if constexpr (Op::kMultiplies) {
          if (span.stop >= kWorthReciprocal * walk.team) row.by = reciprocal(row.grid);
        }
      }
#pragma unroll
      for (int k = 0; k < Op::kBatch; ++k) {
        const int i = at + k * step;
        if (i < span.stop) {
          op.template apply<width, 0>(input[k], span.base + i, span.head - i, span.stop - i, &row, &sums);
        }
      }
    }
    if constexpr (Op::kSums > 0) {
#pragma unroll
      for (int which = 0; which < Op::kSums; ++which) {
        if (!op.wants(which)) continue;
        const C sum = team_sum(sums[which], walk.team);
        if (lane == 0 && unit < walk.units) op.put(which, unit, span.row, sum);
      }
    }
  }
}

template <class Op>
__device__ __forceinline__ void walk_columns(const Walk& walk, const Op& op) {
  using C = Compute<typename Op::Storage>;
  constexpr int width = kColumns, batch = Op::kBatch < 2 ? 1 : 2;
  const int c = threadIdx.x % walk.across, r = threadIdx.x / walk.across;
  for (int64_t unit = blockIdx.x; unit < walk.units; unit += gridDim.x) {
    const Strip strip = strip_of(walk, unit, c, r);
    Row<C> rows[width];
    C sums[width][Op::kSums + 1] = {};
    for (int64_t at = strip.first; at < strip.stop; at += batch * strip.stride) {
      typename Op::template Input<width> input[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int64_t i = at + k * strip.stride;
        if (i < strip.stop) input[k] = op.template load<width>(i, 0, walk.left(i));
      }
      if (at == strip.first) {
        int64_t row = strip.column / walk.inner, within = strip.column - row * walk.inner;
        row %= walk.rows;
#pragma unroll
        for (int e = 0; e < width; ++e) {
          rows[e] = op.rows[row];
          if (++within == walk.inner) within = 0, row = row + 1 == walk.rows ? 0 : row + 1;
        }
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int64_t i = at + k * strip.stride;
        if (i < strip.stop) op.template apply<width, 1>(input[k], i, 0, walk.left(i), rows, sums);
      }
    }
    if constexpr (Op::kSums > 0) {
      const int64_t part = unit / walk.tiles, first = (unit - part * walk.tiles) * walk.across * width;
#pragma unroll
      for (int which = 0; which < Op::kSums; ++which) {
        if (!op.wants(which)) continue;
        C own[width];
#pragma unroll
        for (int e = 0; e < width; ++e) own[e] = sums[e][which];
        column_sums(own, walk.across * width, walk.down, c, r, [&](int j, C sum) {
          const int64_t column = first + j;
          if (column < walk.line) op.put(which, part * walk.line + column, column, sum);
        });
      }
    }
  }
}

template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    runs_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Op op) {
  if constexpr (Op::kCoin) {
    if (!op.is_on()) return walk_runs(walk, op.plain());
  }
  walk_runs(walk, op);
}

template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kColumnBlocks)
    columns_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Op op) {
  if constexpr (Op::kCoin) {
    if (!op.is_on()) return walk_columns(walk, op.plain());
  }
  walk_columns(walk, op);
}

template <class Op>
cudaError_t launch(const Walk& walk, const Op& op, cudaStream_t stream) {
  if (walk.numel == 0) return cudaSuccess;
  if (walk.columns) {
    columns_kernel<<<walk.blocks(), kThreads, 0, stream>>>(walk, op);
  } else {
    runs_kernel<<<walk.blocks(), kThreads, 0, stream>>>(walk, op);
  }
  return cudaGetLastError();
}

template <class F>
cudaError_t with_storage(Dtype type, F&& f) {
  switch (type) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kBFloat16:
      return f(__nv_bfloat16());
    case Dtype::kFloat16:
      return f(__half());
    case Dtype::kFloat64:
      return f(double());
  }
  return cudaErrorInvalidValue;
}

template <int64_t... kinds, class F>
cudaError_t with_kind(int64_t kind, F&& f) {
  cudaError_t result = cudaErrorInvalidValue;
  (void)((kind == kinds && (result = f(std::integral_constant<int64_t, kinds>()), true)) || ...);
  return result;
}

}  // namespace qk
