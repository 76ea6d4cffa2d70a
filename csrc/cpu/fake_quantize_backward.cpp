// The gradient of fake_quantize on the CPU: one pass over grad and x gives dx and the rows' sums.
#include "cpu/arguments.h"
#include "cpu/avx512.h"

namespace qk {
namespace {

// What a loop computes; what it need not is dropped at compile time.
//   kScale    dx is grad or 0 and the scale learns: no offset, the plain straight-through estimator
//   kOffset   the offset learns as well
//   kClipped  as kOffset, if there is one; the scale learns from clipped elements alone
//   kGeneral  any estimator
enum class Learns { kScale, kOffset, kClipped, kGeneral };

template <int64_t kind, Learns learns, class S, class Grids>
QK_HD void backward(const S* grad, const S* x, S* __restrict dx, const Compute<S>* n, int64_t count, const Grids& grids,
                    Estimator<Compute<S>> estimator, Compute<S>* __restrict dscale, Compute<S>* __restrict doffset,
                    int64_t ahead) {
  using C = Compute<S>;
  constexpr bool plain = learns != Learns::kGeneral, centred = learns == Learns::kScale;
  C out[kLanes];
  int64_t begin = 0;
  const auto body = [&](int64_t j) __attribute__((always_inline)) {
    const C variate = kind == kPlain ? C(0) : n[begin + j];
    Grid<C> grid = grids[begin + j];
    if (centred) grid.offset = 0;
    const Gradient<C> term =
        fake_quantize_backward<math_kind(kind)>(load(grad[begin + j]), load(x[begin + j]), grid, variate,
                                                plain ? Estimator<C>{learns == Learns::kClipped, C(0)} : estimator);
    const int64_t lane = std::is_same_v<Grids, OneGrid<C>> ? j : begin + j;
    out[j] = term.dx;
    dscale[lane] += term.dscale;
    if (!centred) doffset[lane] += term.doffset;
  };
  const auto block = [&](auto lanes) __attribute__((always_inline)) {
    prefetch<lanes>(grad + begin, false, ahead);
    prefetch<lanes>(x + begin, false, ahead);
    prefetch<lanes>(dx + begin, true, ahead);
    for (int64_t j = 0; j < lanes; ++j) body(j);
    store_block<plain ? Rounding::kExact : Rounding::kAnyBits, lanes>(out, dx + begin);
    begin += lanes;
  };
  while (count - begin >= kLanes) block(std::integral_constant<int64_t, kLanes>());
  if (count - begin >= kRunLength) block(std::integral_constant<int64_t, kRunLength>());
  for (int64_t j = 0; j < count - begin; ++j) body(j);
  for (int64_t j = 0; j < count - begin; ++j) dx[begin + j] = store<S>(out[j]);
}

// Eight sums side by side, as a vector, which g++ does not find: a single one takes longer than a short row.
template <class C>
QK_HD double sum_of_lanes(const C (&lanes)[kLanes], int64_t used) {
  typedef C Values __attribute__((vector_size(8 * sizeof(C))));
  typedef double Sums __attribute__((vector_size(8 * sizeof(double))));
  Sums sums = {};
  for (int64_t j = 0; j < used; j += 8) {
    Values values;
    __builtin_memcpy(&values, lanes + j, sizeof(values));
    sums += __builtin_convertvector(values, Sums);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class C>
QK_HD void sum_rows(const C* columns, int64_t count, int64_t inner, double* out) {
  if (inner == 1) {  // g++ vectorises this one
    for (int64_t j = 0; j < count; ++j) out[j] = columns[j];
    return;
  }
  for (int64_t j = 0; j < count; ++out) {
    double sum = 0;
    for (int64_t k = 0; k < inner; ++k, ++j) sum += columns[j];
    *out = sum;
  }
}

struct Sums {
  double *dscale, *doffset;  // doffset: null without an offset
};

template <int64_t kind, Learns learns, class S>
QK_CLONES void fake_quantize_backward_runs(const Walk& walk, const Rows<Compute<S>>& rows, const S* grad, const S* x,
                                           S* dx, Variates<S> variates, Estimator<Compute<S>> estimator, Sums sums,
                                           int64_t first, int64_t last) {
  using C = Compute<S>;
  if constexpr (learns != Learns::kGeneral && std::is_same_v<C, float>) {
    constexpr bool clipped = learns == Learns::kClipped;
    if (fake_quantize_backward_avx512<clipped>(walk, rows, grad, x, dx, sums.dscale, sums.doffset, first, last)) return;
  }
  C noise[kTile + 8];
  const int64_t step = kind == kPlain ? kBlock : kTile, used = std::min(kLanes, walk.inner);
  for (Run run(walk, first); run.unit < last; run.next()) {
    const OneGrid<C> grids{rows.grid(run.row)};
    const int64_t end = run.end();
    C dscale[kLanes] = {}, doffset[kLanes] = {};
    for (int64_t i = run.begin(); i < end; i += step) {
      const int64_t count = std::min(step, end - i);
      backward<kind, learns>(grad + i, x + i, dx + i, draw<kind>(variates, i, count, noise), count, grids, estimator,
                             dscale, doffset, kPage<S>);
    }
    sums.dscale[run.unit] = sum_of_lanes(dscale, used);
    if (sums.doffset) sums.doffset[run.unit] = sum_of_lanes(doffset, used);
  }
}

template <int64_t kind, Learns learns, class S>
QK_CLONES void fake_quantize_backward_columns(const Walk& walk, const Rows<Compute<S>>& rows, const S* grad, const S* x,
                                              S* dx, Variates<S> variates, Estimator<Compute<S>> estimator, Sums sums,
                                              int64_t first, int64_t last) {
  using C = Compute<S>;
  C noise[kTile + 8], dscale[kTile], doffset[kTile];
  ColumnGrids<C> grids;
  for (int64_t unit = first; unit < last; ++unit) {
    const Patch patch(walk, unit);
    if (unit == first || patch.part == 0) grids.fill(rows, patch.row, walk.inner, patch.count);
    std::fill(dscale, dscale + patch.count, C(0));
    std::fill(doffset, doffset + patch.count, C(0));
    for (int64_t repeat = patch.first; repeat < patch.last; ++repeat) {
      const int64_t i = repeat * patch.period + patch.column;
      backward<kind, learns>(grad + i, x + i, dx + i, draw<kind>(variates, i, patch.count, noise), patch.count, grids,
                             estimator, dscale, doffset, patch.period);
    }
    const int64_t at = patch.part * walk.rows + patch.row;
    sum_rows(dscale, patch.count, walk.inner, sums.dscale + at);
    if (sums.doffset) sum_rows(doffset, patch.count, walk.inner, sums.doffset + at);
  }
}

// Partial sums in unit order, row by row, in double.
template <class C>
void finish(const Walk& walk, const std::vector<double>& partial, double factor, const C* signs, C* out) {
  const int64_t cycle = walk.columns ? walk.rows : walk.rows * walk.parts;
  const int64_t repeats = int64_t(partial.size()) / cycle, width = walk.columns ? 1 : walk.parts;
  for (int64_t row = 0; row < walk.rows; ++row) {
    double sum = 0;
    for (int64_t r = 0; r < repeats; ++r) {
      for (int64_t k = 0; k < width; ++k) sum += partial[r * cycle + row * width + k];
    }
    out[row] = C(sum * factor * (signs ? double(sign_of(signs[row])) : 1.0));
  }
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cpu(const Tensor& grad_, const Tensor& x_,
                                                              const Tensor& scale, const MaybeTensor& offset,
                                                              const MaybeTensor& zero_point, int64_t axis,
                                                              int64_t quant_min, int64_t quant_max, double grad_scale,
                                                              bool clip_only, double ewgs, int64_t noise, double a,
                                                              double b, const MaybeTensor& seed, int64_t stream) {
  const Tensor x = ordered(x_, scale, axis), grad = aligned(grad_, x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "qkernels: grad and x differ in dtype");
  Tensor dx = allocate_like(x);
  const ScalarType type = compute_type(x.scalar_type());
  const int64_t count = scale.numel(), offsets = offset ? count : 0;
  Tensor dscale = allocate(x, count, type), doffset = allocate(x, offsets, type);
  const Walk walk(x.numel(), layout_of(x, scale, axis));
  const Drawn drawn(backward_kind(noise), a, b, seed, stream, {}, {}, x);
  const size_t partials = walk.columns ? walk.parts * walk.rows : walk.units();
  std::vector<double> dscales(partials), doffsets(offset ? partials : 0);
  with_storage(x.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using C = Compute<S>;
    const RowTensors<C> rows(x.scalar_type(), scale, offset, zero_point, quant_min, quant_max);
    const S *g = static_cast<const S*>(grad.const_data_ptr()), *in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    const auto run = [&](auto kind, auto learns) {
      constexpr int64_t k = decltype(kind)::value;
      constexpr Learns l = decltype(learns)::value;
      const auto loop = walk.columns ? fake_quantize_backward_columns<k, l, S> : fake_quantize_backward_runs<k, l, S>;
      torch::stable::parallel_for(0, walk.units(), walk.grain(), [&](int64_t first, int64_t last) {
        loop(walk, rows.rows, g, in, out, drawn.variates<S>(), {clip_only, C(ewgs)},
             {dscales.data(), offset ? doffsets.data() : nullptr}, first, last);
      });
    };
    constexpr std::integral_constant<int64_t, kPlain> plain;
    if (drawn.kind != kPlain || ewgs != 0) {
      with_kind<kBackwardKinds>(drawn.kind,
                                [&](auto kind) { run(kind, std::integral_constant<Learns, Learns::kGeneral>()); });
    } else if (clip_only) {
      run(plain, std::integral_constant<Learns, Learns::kClipped>());
    } else if (offset) {
      run(plain, std::integral_constant<Learns, Learns::kOffset>());
    } else {
      run(plain, std::integral_constant<Learns, Learns::kScale>());
    }
    finish(walk, dscales, grad_scale, rows.rows.scale, static_cast<C*>(dscale.mutable_data_ptr()));
    if (offset) {
      finish(walk, doffsets, grad_scale, static_cast<const C*>(nullptr), static_cast<C*>(doffset.mutable_data_ptr()));
    }
  });
  return {dx, dscale, doffset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cpu));
}

}  // namespace qk
