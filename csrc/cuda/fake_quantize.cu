// fake_quantize on the GPU: one pass, x in, y out.
#include "cuda/elements.cuh"

namespace qk {
namespace {

template <int64_t kind, class S>
struct FakeQuantizeOp {
  using Storage = S;
  using C = Compute<S>;
  static constexpr int kSums = 0;
  static constexpr int kBatch = sizeof(S) > 4 ? 1 : kind == kPlain ? 4 : 2;
  static constexpr int kBlocks = kRunBlocks<S>, kColumnBlocks = kind == kPlain && sizeof(S) <= 4 ? 3 : 2;
  static constexpr bool kCoin = throws_coin(kind), kMultiplies = kMultipliesFor<kind, S>;
  template <int width>
  struct Input {
    Chunk<S, width> x, shift;
  };

  RowNumbers<C> rows;
  const S *x, *shift;
  S* y;
  const int64_t* seed;
  const float* shift_scale;
  uint64_t stream;
  float a, b;
  bool aligned;

  template <int width>
  __device__ Input<width> load(int64_t first, int lo, int hi) const {
    Input<width> in;
    in.x = load_chunk<S, width>(x + first, lo, hi, aligned);
    if (kind == kShift) in.shift = load_chunk<S, width>(shift + first, lo, hi, aligned);
    return in;
  }
  template <int width, int step, class Sums>
  __device__ void apply(const Input<width>& in, int64_t first, int lo, int hi, const Row<C>* row, Sums*) const {
    C n[width] = {}, out[width];
    if constexpr (kMultiplies && step == 0) {
      if (row->by.serves) {
        const Grid<C> grid = row->grid;
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const C q = round_even(multiplied_position(element(in.x, e) - grid.offset, grid.scale, row->by));
          out[e] = value(q, grid);
        }
        return store_chunk(y + first, to_chunk<S>(out), lo, hi, aligned);
      }
    }
    if constexpr (kind == kShift) {
#pragma unroll
      for (int e = 0; e < width; ++e) n[e] = element(in.shift, e);
    } else if constexpr (kind != kPlain) {
      draw<kind>(uint64_t(__ldg(seed)), stream, first, n);
    }
    const float amplitude = kind == kShift ? __ldg(shift_scale) : a;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      out[e] = fake_quantize<math_kind(kind)>(element(in.x, e), row[e * step].grid, n[e], amplitude, b);
    }
    store_chunk(y + first, to_chunk<S>(out), lo, hi, aligned);
  }
  __device__ bool is_on() const { return switched_on(uint64_t(__ldg(seed)), stream, a); }
  __device__ FakeQuantizeOp<kPlain, S> plain() const {
    return {rows, x, shift, y, seed, shift_scale, stream, a, b, aligned};
  }
};

}  // namespace

cudaError_t launch_fake_quantize(const Walk& walk, Dtype type, const void* x, void* y, const Numbers& numbers,
                                 const NoiseSource& noise, cudaStream_t stream) {
  return with_storage(type, [&](auto storage) {
    using S = decltype(storage);
    return with_kind<kPlain, kTempering, kAfter, kBefore, kPseudo, kPseudoNormal, kStochastic, kShift>(
        noise.kind, [&](auto kind) {
          const FakeQuantizeOp<kind, S> op{RowNumbers<Compute<S>>(numbers),
                                           static_cast<const S*>(x),
                                           static_cast<const S*>(noise.shift),
                                           static_cast<S*>(y),
                                           noise.seed,
                                           noise.shift_scale,
                                           noise.stream,
                                           noise.a,
                                           noise.b,
                                           is_aligned(x) && is_aligned(y) && is_aligned(noise.shift)};
          return launch(walk, op, stream);
        });
  });
}

}  // namespace qk
