// The gradient of fake_quantize on the GPU: one pass over grad and x gives dx and the units' sums; a small kernel adds
// those up where a row has more than one.
#include "cuda/elements.cuh"

namespace qk {
namespace {

// Where the sums go: [0] of dscale, [1] of doffset, which is null where there is no offset.
template <class C>
struct SumSink {
  C *out[2], *partial[2];
  const C* scale;
  double factor;
  bool finished;  // a unit's sum is its row's

  __device__ void finish(int which, int64_t row, double sum) const {
    out[which][row] = C(sum * factor * (which == 0 ? double(sign_of(scale[row])) : 1.0));
  }
  __device__ void put(int which, int64_t index, int64_t row, C sum) const {
    if (finished) {
      finish(which, row, double(sum));
    } else {
      partial[which][index] = sum;
    }
  }
};

// `common`: no offset to learn, the plain straight-through estimator; it carries one sum instead of two.
template <int64_t kind, bool common, class S>
struct FakeQuantizeBackwardOp {
  using Storage = S;
  using C = Compute<S>;
  static constexpr int kBatch = sizeof(S) <= 4 ? 2 : 1, kSums = common ? 1 : 2;
  static constexpr int kBlocks = kind == kPlain || sizeof(S) > 4 ? kRunBlocks<S> : 3;
  static constexpr int kColumnBlocks = common && sizeof(S) <= 4 ? 3 : 2;
  // Scaled element by element (ewgs), dx shows the last bit of x / scale, which a multiplication may not have.
  static constexpr bool kCoin = throws_coin(kind), kMultiplies = common && kMultipliesFor<kind, S>;
  template <int width>
  struct Input {
    Chunk<S, width> grad, x;
  };

  RowNumbers<C> rows;
  const S *grad, *x;
  S* dx;
  const int64_t* seed;
  uint64_t stream;
  Estimator<C> estimator;
  SumSink<C> sink;
  float a;
  bool aligned;

  template <int width>
  __device__ Input<width> load(int64_t first, int lo, int hi) const {
    return {load_chunk<S, width>(grad + first, lo, hi, aligned), load_chunk<S, width>(x + first, lo, hi, aligned)};
  }
  // Elements of a chunk that are not there have grad 0: their terms are 0, or NaN as all those of the row are.
  template <int width, int step, class Sums>
  __device__ void apply(const Input<width>& in, int64_t first, int lo, int hi, const Row<C>* row, Sums* sums) const {
    C n[width] = {}, out[width];
    if constexpr (kMultiplies && step == 0) {
      if (row->by.serves) {
        const Reciprocal by = row->by;
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const C g = element(in.grad, e), x = element(in.x, e);
          const C v = multiplied_position(x, row->grid.scale, by), q = round_even(v);
          const bool outside = x < by.first || x > by.last;
          out[e] = outside ? C(0) : g;
          sums[0][0] += g * (outside ? q : q - v);
        }
        return store_chunk(dx + first, to_chunk<S>(out), lo, hi, aligned);
      }
    }
    if constexpr (kind != kPlain) draw<kind>(uint64_t(__ldg(seed)), stream, first, n);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const Gradient<C> term =
          fake_quantize_backward<math_kind(kind)>(element(in.grad, e), element(in.x, e), row[e * step].grid, n[e],
                                                  common ? Estimator<C>{false, C(0)} : estimator);
      out[e] = term.dx;
      sums[e * step][0] += term.dscale;
      if constexpr (!common) sums[e * step][1] += term.doffset;
    }
    store_chunk(dx + first, to_chunk<S>(out), lo, hi, aligned);
  }
  __device__ bool wants(int which) const { return sink.out[which] != nullptr; }
  __device__ void put(int which, int64_t index, int64_t row, C sum) const { sink.put(which, index, row, sum); }
  __device__ bool is_on() const { return switched_on(uint64_t(__ldg(seed)), stream, a); }
  __device__ FakeQuantizeBackwardOp<kPlain, common, S> plain() const {
    return {rows, grad, x, dx, seed, stream, estimator, sink, a, aligned};
  }
};

template <class C>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ SumSink<C> sink, int64_t rows,
                                                                int64_t repetitions, int64_t adjacent, int lanes) {
  const int which = blockIdx.y;
  finish_rows(sink.partial[which], rows, repetitions, adjacent, lanes,
              [&](int64_t row, double sum) { sink.finish(which, row, sum); });
}

template <class C>
cudaError_t launch_finish(const Walk& walk, const SumSink<C>& sink, cudaStream_t stream) {
  if (sink.finished) return cudaSuccess;
  const int lanes = finish_lanes(walk.rows);
  const dim3 grid(int(std::min<int64_t>((walk.rows + lanes - 1) / lanes, kMaxBlocks)), sink.out[1] ? 2 : 1);
  finish_kernel<<<grid, kFinishThreads, 0, stream>>>(sink, walk.rows, walk.repetitions(), walk.adjacent(), lanes);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fake_quantize_backward(const Walk& walk, Dtype type, const void* grad, const void* x, void* dx,
                                          const Numbers& numbers, const NoiseSource& noise,
                                          const GradientOptions& options, const GradientSums& sums,
                                          cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    using C = Compute<S>;
    C* partial = static_cast<C*>(sums.partial);
    const SumSink<C> sink{{static_cast<C*>(sums.dscale), static_cast<C*>(numbers.offset ? sums.doffset : nullptr)},
                          {partial, partial + sums_of(walk)},
                          static_cast<const C*>(numbers.scale),
                          options.grad_scale,
                          walk.one_partial_per_row()};
    const auto run = [&](auto kind, auto common) {
      const FakeQuantizeBackwardOp<kind, common, S> op{RowNumbers<C>(numbers),
                                                       static_cast<const S*>(grad),
                                                       static_cast<const S*>(x),
                                                       static_cast<S*>(dx),
                                                       noise.seed,
                                                       noise.stream,
                                                       {options.clip_only, C(options.ewgs)},
                                                       sink,
                                                       noise.a,
                                                       is_aligned(grad) && is_aligned(x) && is_aligned(dx)};
      const cudaError_t error = launch(walk, op, stream);
      return error == cudaSuccess ? launch_finish(walk, sink, stream) : error;
    };
    const bool common = !numbers.offset && !options.clip_only && options.ewgs == 0;
    if (noise.kind == kPlain && common) return run(std::integral_constant<int64_t, kPlain>(), std::true_type());
    return with_kind<kPlain, kBefore, kPseudo, kPseudoNormal, kStochastic>(
        noise.kind, [&](auto kind) { return run(kind, std::false_type()); });
  });
}

}  // namespace qk
