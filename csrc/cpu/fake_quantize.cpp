// fake_quantize on the CPU: one pass, x in, y out.
#include "cpu/arguments.h"

namespace qk {
namespace {

template <int64_t kind, class S, class Grids>
QK_HD void forward(const S* x, S* __restrict y, const Compute<S>* n, int64_t count, const Grids& grids, float a,
                   float b) {
  const auto body = [&](int64_t j) __attribute__((always_inline)) {
    const Compute<S> variate = kind == kPlain ? Compute<S>(0) : n[j];
    y[j] = store<S>(fake_quantize<math_kind(kind)>(load(x[j]), grids[j], variate, a, b));
  };
  int64_t begin = 0;
  for (; begin + kLanes <= count; begin += kLanes) {
    prefetch<kLanes>(x + begin, false);
    prefetch<kLanes>(y + begin, true);
    for (int64_t j = begin; j < begin + kLanes; ++j) body(j);
  }
  for (int64_t j = begin; j < count; ++j) body(j);
}

template <int64_t kind, class S>
QK_CLONES void fake_quantize_runs(const Walk& walk, const Rows<Compute<S>>& rows, const S* x, S* y,
                                  Variates<S> variates, float a, float b, int64_t first, int64_t last) {
  using C = Compute<S>;
  C noise[kTile + 8];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t run = unit / walk.parts, part = unit % walk.parts;
    const int64_t begin = run * walk.inner + part * kBlock;
    const int64_t end = std::min(begin + kBlock, (run + 1) * walk.inner);
    const OneGrid<C> grids{rows.grid(run % walk.rows)};
    if (kind == kPlain) {
      forward<kind>(x + begin, y + begin, noise, end - begin, grids, a, b);
      continue;
    }
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t count = std::min(kTile, end - i);
      forward<kind>(x + i, y + i, draw<kind>(variates, i, count, noise), count, grids, a, b);
    }
  }
}

template <int64_t kind, class S>
QK_CLONES void fake_quantize_columns(const Walk& walk, const Rows<Compute<S>>& rows, const S* x, S* y,
                                     Variates<S> variates, float a, float b, int64_t first, int64_t last) {
  using C = Compute<S>;
  C noise[kTile + 8];
  ColumnGrids<C> grids;
  const int64_t period = walk.rows * walk.inner;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t tile = unit / walk.parts, part = unit % walk.parts, column = tile * walk.tile;
    const int64_t count = std::min(walk.tile, period - column);
    if (unit == first || part == 0) grids.fill(rows, column / walk.inner, walk.inner, count);
    const int64_t end = std::min((part + 1) * walk.stretch, walk.repeats);
    for (int64_t repeat = part * walk.stretch; repeat < end; ++repeat) {
      const int64_t i = repeat * period + column;
      forward<kind>(x + i, y + i, draw<kind>(variates, i, count, noise), count, grids, a, b);
    }
  }
}

Tensor fake_quantize_cpu(const Tensor& x_, const Tensor& scale, const MaybeTensor& offset,
                         const MaybeTensor& zero_point, int64_t axis, int64_t quant_min, int64_t quant_max,
                         int64_t noise, double a, double b, const MaybeTensor& seed, int64_t stream,
                         const MaybeTensor& shift, const MaybeTensor& shift_scale) {
  const Tensor x = ordered(x_, scale, axis);
  Tensor y = torch::stable::empty_like(x);
  const Walk walk(x.numel(), layout_of(x, scale, axis));
  const Drawn drawn(noise, a, b, seed, stream, shift, shift_scale, x);
  with_storage(x.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const RowTensors<Compute<S>> rows(x.scalar_type(), scale, offset, zero_point, quant_min, quant_max);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    with_kind<kForwardKinds>(drawn.kind, [&](auto kind) {
      constexpr int64_t k = decltype(kind)::value;
      torch::stable::parallel_for(0, walk.units(), walk.grain(), [&](int64_t first, int64_t last) {
        const auto loop = walk.columns ? fake_quantize_columns<k, S> : fake_quantize_runs<k, S>;
        loop(walk, rows.rows, in, out, drawn.variates<S>(), float(drawn.a), float(drawn.b), first, last);
      });
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cpu)); }

}  // namespace qk
