// fake_quantize on the CPU: one pass, x in, y out.
#include "cpu/arguments.h"
#include "cpu/avx512.h"

namespace qk {
namespace {

constexpr int64_t kTempered = 128;

// Noise tempering on kTempered elements in three loops: in a single one the processor waits for its long chain of
// operations, a third of the pass.
template <class S, class Grid>
QK_HD void temper(const S* x, const Compute<S>* n, const Grid& grids, float a, float b, Compute<S>* __restrict y) {
  using C = Compute<S>;
  float error[kTempered], factor[kTempered];
  for (int64_t j = 0; j < kTempered; ++j) {
    const C value = load(x[j]);
    y[j] = fake_quantize<kPlain>(value, grids[j], C(0), a, b);
    error[j] = near_error(float(y[j] < value ? value - y[j] : y[j] - value), b);
  }
  for (int64_t j = 0; j < kTempered; ++j) factor[j] = decay(error[j], a, b);
  for (int64_t j = 0; j < kTempered; ++j) y[j] = y[j] + C(factor[j] * sqrtf(error[j])) * n[j];
}

template <int64_t kind, Rounding rounding, class S, class Grids>
QK_HD void forward(const S* x, S* __restrict y, const Compute<S>* n, int64_t count, const Grids& grids, float a,
                   float b, int64_t ahead) {
  using C = Compute<S>;
  const auto value = [&](int64_t j) __attribute__((always_inline)) {
    return fake_quantize<math_kind(kind)>(load(x[j]), grids[j], kind == kPlain ? C(0) : n[j], a, b);
  };
  int64_t begin = 0;
  if constexpr (kind == kTempering && std::is_same_v<Grids, OneGrid<C>>) {
    for (; begin + kTempered <= count; begin += kTempered) {
      prefetch<kTempered>(x + begin, false);
      prefetch<kTempered>(y + begin, true);
      C block[kTempered];
      temper(x + begin, n + begin, grids, a, b, block);
      store_block<rounding, kTempered>(block, y + begin);
    }
  }
  const auto block = [&](auto lanes) __attribute__((always_inline)) {
    prefetch<lanes>(x + begin, false, ahead);
    prefetch<lanes>(y + begin, true, ahead);
    C values[lanes];
    for (int64_t j = 0; j < lanes; ++j) values[j] = value(begin + j);
    store_block<rounding, lanes>(values, y + begin);
    begin += lanes;
  };
  while (count - begin >= kLanes) block(std::integral_constant<int64_t, kLanes>());
  if (count - begin >= kRunLength) block(std::integral_constant<int64_t, kRunLength>());
  for (int64_t j = begin; j < count; ++j) y[j] = store<S>(value(j));
}

// What a thread does with its units, and how its results are rounded. Without noise and offset a result is x's or the
// scale's NaN or a level times a normal scale: its bits are clean.
template <int64_t kind, Rounding rounding, class S>
struct Forward {
  static constexpr bool centred = rounding != Rounding::kAnyBits;
  const Walk& walk;
  const Rows<Compute<S>>& rows;
  const S* x;
  S* y;
  Variates<S> variates;
  float a, b;

  template <class Grids>
  QK_HD void stretch(int64_t i, int64_t count, const Grids& grids, Compute<S>* noise, int64_t ahead) const {
    const Compute<S>* n = draw<kind>(variates, i, count, noise);
    if constexpr (centred) {
      forward<kind, rounding>(x + i, y + i, n, count, Centred<Grids>{grids}, a, b, ahead);
    } else {
      forward<kind, rounding>(x + i, y + i, n, count, grids, a, b, ahead);
    }
  }

  QK_HD void runs(int64_t first, int64_t last) const {
    if constexpr (kind == kPlain && std::is_same_v<Compute<S>, float>) {
      if (fake_quantize_avx512(walk, rows, x, y, first, last)) return;
    }
    Compute<S> noise[kTile + 8];
    const int64_t step = kind == kPlain ? kBlock : kTile;
    for (Run run(walk, first); run.unit < last; run.next()) {
      const OneGrid<Compute<S>> grids{rows.grid(run.row)};
      const int64_t end = run.end();
      for (int64_t i = run.begin(); i < end; i += step) {
        stretch(i, std::min(step, end - i), grids, noise, kPage<S>);
      }
    }
  }

  QK_HD void columns(int64_t first, int64_t last) const {
    Compute<S> noise[kTile + 8];
    ColumnGrids<Compute<S>> grids;
    for (int64_t unit = first; unit < last; ++unit) {
      const Patch patch(walk, unit);
      if (unit == first || patch.part == 0) grids.fill(rows, patch.row, walk.inner, patch.count);
      for (int64_t repeat = patch.first; repeat < patch.last; ++repeat) {
        stretch(repeat * patch.period + patch.column, patch.count, grids, noise, patch.period);
      }
    }
  }
};

template <bool columns, class Work>
QK_CLONES void fake_quantize_units(const Work& work, int64_t first, int64_t last) {
  columns ? work.columns(first, last) : work.runs(first, last);
}

Tensor fake_quantize_cpu(const Tensor& x_, const Tensor& scale, const MaybeTensor& offset,
                         const MaybeTensor& zero_point, int64_t axis, int64_t quant_min, int64_t quant_max,
                         int64_t noise, double a, double b, const MaybeTensor& seed, int64_t stream,
                         const MaybeTensor& shift, const MaybeTensor& shift_scale) {
  const Tensor x = ordered(x_, scale, axis);
  Tensor y = allocate_like(x);
  const Walk walk(x.numel(), layout_of(x, scale, axis));
  const Drawn drawn(noise, a, b, seed, stream, shift, shift_scale, x);
  with_storage(x.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const RowTensors<Compute<S>> rows(x.scalar_type(), scale, offset, zero_point, quant_min, quant_max);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    const auto run = [&](auto kind, auto rounding) {
      using Work = Forward<decltype(kind)::value, decltype(rounding)::value, S>;
      const Work work{walk, rows.rows, in, out, drawn.variates<S>(), float(drawn.a), float(drawn.b)};
      const auto loop = walk.columns ? fake_quantize_units<true, Work> : fake_quantize_units<false, Work>;
      torch::stable::parallel_for(0, walk.units(), walk.grain(),
                                  [&](int64_t first, int64_t last) { loop(work, first, last); });
    };
    constexpr std::integral_constant<Rounding, Rounding::kAnyBits> any;
    if (drawn.kind != kPlain || offset) {
      return with_kind<kForwardKinds>(drawn.kind, [&](auto kind) { run(kind, any); });
    }
    run(std::integral_constant<int64_t, kPlain>(), std::integral_constant<Rounding, Rounding::kCleanBits>());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cpu)); }

}  // namespace qk
