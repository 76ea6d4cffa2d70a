// multi_norm, multi_dot and multi_perturb on the GPU: a block takes one chunk of one tensor, whatever their sizes.
#include "cuda/perturb.h"

#include "cuda/elements.cuh"
#include "math/perturb.h"

namespace qk {
namespace {

// The chunk of this block: its tensor's entry, and the elements [begin, end).
struct Place {
  int entry;
  int64_t begin, end;
};

__device__ __forceinline__ Place place_of(const Table& table, int chunk) {
  int low = 0, high = table.entries - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entry[middle].first <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = int64_t(chunk - table.entry[low].first) * kListChunk, numel = table.entry[low].numel;
  return {low, begin, begin + kListChunk < numel ? begin + kListChunk : numel};
}

__device__ __forceinline__ bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The sum over the block of values that each thread holds, in a fixed order, in thread 0.
__device__ __forceinline__ double block_sum(double v) { return team_sum(v, kThreads); }

template <class S>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Table table, double eta, double* partial) {
  constexpr int width = kWidth<S>;
  for (int chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const Place place = place_of(table, chunk);
    const S *x = static_cast<const S*>(table.entry[place.entry].d),
            *w = static_cast<const S*>(table.entry[place.entry].w);
    const bool aligned = on_16_bytes(x) && on_16_bytes(w);
    double sum = 0;
    for (int64_t i = place.begin + threadIdx.x * width; i < place.end; i += kThreads * width) {
      const int hi = int(place.end - i < width ? place.end - i : width);
      const Chunk<S, width> xs = load_chunk<S, width>(x + i, 0, hi, aligned);
      Chunk<S, width> ws = xs;
      if (w) ws = load_chunk<S, width>(w + i, 0, hi, aligned);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        double v = double(element(xs, e));
        if (w) v *= magnitude(double(element(ws, e))) + eta;
        if (e < hi) sum += v * v;
      }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[chunk] = sum;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    products_kernel(const __grid_constant__ Table table, double* partial, int64_t stride) {
  constexpr int width = kWidth<S>;
  for (int chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const Place place = place_of(table, chunk);
    const S *a = static_cast<const S*>(table.entry[place.entry].w),
            *b = static_cast<const S*>(table.entry[place.entry].d);
    const bool aligned = on_16_bytes(a) && on_16_bytes(b);
    double sums[3] = {};
    for (int64_t i = place.begin + threadIdx.x * width; i < place.end; i += kThreads * width) {
      const int hi = int(place.end - i < width ? place.end - i : width);
      const Chunk<S, width> as = load_chunk<S, width>(a + i, 0, hi, aligned);
      const Chunk<S, width> bs = load_chunk<S, width>(b + i, 0, hi, aligned);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const double u = double(element(as, e)), v = double(element(bs, e));
        if (e < hi) sums[0] += u * v, sums[1] += u * u, sums[2] += v * v;
      }
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const double sum = block_sum(sums[k]);
      if (threadIdx.x == 0) partial[k * stride + chunk] = sum;
    }
  }
}

// Block e sums the chunks of entry e.
__global__ void __launch_bounds__(kThreads)
    entry_sums_kernel(const __grid_constant__ Table table, const double* partial, double* squares) {
  const int e = blockIdx.x, last = e + 1 < table.entries ? table.entry[e + 1].first : table.chunks;
  double sum = 0;
  for (int i = table.entry[e].first + threadIdx.x; i < last; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) squares[table.entry[e].index] = sum;
}

__global__ void __launch_bounds__(kThreads)
    norms_kernel(const double* squares, int64_t count, double* norms, double* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += squares[i];
    norms[i] = sqrt(squares[i]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) norm[0] = sqrt(sum);
}

__global__ void __launch_bounds__(kThreads)
    sums_kernel(const double* partial, int64_t chunks, int64_t stride, double* sums) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[blockIdx.x * stride + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class C>
__device__ __forceinline__ MoveNumbers<C> numbers_of(const PerturbSettings& settings, int copy) {
  const double* row = settings.coefficients + int64_t(settings.first_row + copy) * settings.width;
  const auto number = [&](int j) { return j < settings.width ? C(finite_or_zero(row[j])) : C(0); };
  return {number(0), settings.move == kAlong && !settings.points ? C(0) : number(1), number(2)};
}

// The variates of the chunk of elements at `first`, a multiple of 4.
template <int64_t move, class C, int width>
__device__ __forceinline__ void variates(uint64_t seed, uint64_t stream, int64_t first, C (&n)[width]) {
#pragma unroll
  for (int j = 0; j < width; j += 4) {
    const Words words = philox(seed, stream, uint64_t(first + j) >> 2);
    if constexpr (move == kUniform) {
#pragma unroll
      for (int k = 0; k < 4; ++k) n[j + k] = C(symmetric(words.w[k]));
    } else {
      const Normals four = normals(words);
#pragma unroll
      for (int k = 0; k < 4; ++k) n[j + k] = C(four.n[k]);
    }
  }
}

template <int64_t move, class S>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(const __grid_constant__ Table table, const __grid_constant__ PerturbSettings settings) {
  using C = Compute<S>;
  constexpr int width = kWidth<S>;
  const uint64_t seed = draws(move) ? uint64_t(settings.seed[0]) : 0;
  // They are doubles on the device, which few threads shall convert.
  __shared__ MoveNumbers<C> numbers[kCopies];
  if (int(threadIdx.x) < table.copies) numbers[threadIdx.x] = numbers_of<C>(settings, threadIdx.x);
  __syncthreads();
  for (int chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const Place place = place_of(table, chunk);
    const S *w = static_cast<const S*>(table.entry[place.entry].w),
            *d = static_cast<const S*>(table.entry[place.entry].d),
            *p = static_cast<const S*>(table.entry[place.entry].p);
    const bool aligned = on_16_bytes(w) && on_16_bytes(d) && on_16_bytes(p);
    for (int64_t i = place.begin + threadIdx.x * width; i < place.end; i += kThreads * width) {
      const int hi = int(place.end - i < width ? place.end - i : width);
      // A single copy may be written over any of these.
      const Chunk<S, width> ws = load_chunk<S, width, Memory::kWritten>(w + i, 0, hi, aligned);
      Chunk<S, width> ds = ws, ps = ws;
      if constexpr (!draws(move)) {
        ds = load_chunk<S, width, Memory::kWritten>(d + i, 0, hi, aligned);
        if (p) ps = load_chunk<S, width, Memory::kWritten>(p + i, 0, hi, aligned);
      }
      // The element is read once for all copies.
      for (int k = 0; k < table.copies; ++k) {
        C y[width], n[width];
        if constexpr (draws(move)) {
          const uint64_t stream = stream_of(settings.first_copy + k, table.entry[place.entry].index);
          variates<move>(seed, stream, i, n);
        }
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const C x = element(ws, e);
          if constexpr (draws(move)) {
            y[e] = moved(x, spread<move>(x, numbers[k]), n[e]);
          } else {
            y[e] = perturbed<move>(x, element(ds, e), element(ps, e), numbers[k]);
          }
        }
        S* out = static_cast<S*>(table.out[k * table.entries + place.entry]);
        store_chunk(out + i, to_chunk<S>(y), 0, hi, on_16_bytes(out));
      }
    }
  }
}

int blocks_of(const Table& table) { return std::min(table.chunks, kMaxBlocks); }

}  // namespace

cudaError_t launch_list_squares(const Table& table, Dtype type, double eta, double* partial, double* squares,
                                cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    squares_kernel<decltype(storage)><<<blocks_of(table), kThreads, 0, stream>>>(table, eta, partial);
    entry_sums_kernel<<<table.entries, kThreads, 0, stream>>>(table, partial, squares);
    return cudaGetLastError();
  });
}

cudaError_t launch_list_products(const Table& table, Dtype type, double* partial, int64_t stride, cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    products_kernel<decltype(storage)><<<blocks_of(table), kThreads, 0, stream>>>(table, partial, stride);
    return cudaGetLastError();
  });
}

cudaError_t launch_list_norms(const double* squares, int64_t count, double* norms, double* norm, cudaStream_t stream) {
  norms_kernel<<<1, kThreads, 0, stream>>>(squares, count, norms, norm);
  return cudaGetLastError();
}

cudaError_t launch_list_sums(const double* partial, int64_t chunks, int64_t stride, double* sums, cudaStream_t stream) {
  sums_kernel<<<3, kThreads, 0, stream>>>(partial, chunks, stride, sums);
  return cudaGetLastError();
}

cudaError_t launch_perturb(const Table& table, Dtype type, const PerturbSettings& settings, cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    return with_kind<kAlong, kAdaptive, kNormal, kMagnitude, kUniform, kAscend, kAscendSign>(
        settings.move, [&](auto move) {
          perturb_kernel<decltype(move)::value, S><<<blocks_of(table), kThreads, 0, stream>>>(table, settings);
          return cudaGetLastError();
        });
  });
}

}  // namespace qk
