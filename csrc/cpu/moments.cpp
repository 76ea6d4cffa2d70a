// The standardised distance on the CPU: one pass over student and teacher for the five sums of each channel, one
// pass for the gradient. Sums are in double, where products of float32 are exact.
#include "math/moments.h"
#include "cpu/arguments.h"

namespace qk {
namespace {

constexpr int64_t kWidth = 8;      // doubles side by side
constexpr int64_t kColumns = 256;  // columns whose sums stay in the first cache
constexpr int64_t kDepth = 8;      // rows of columns added between two visits of those sums

typedef double Vec __attribute__((vector_size(kWidth * sizeof(double))));

template <class S>
QK_HD void load_wide(const S* x, Vec& out) {
  if constexpr (std::is_same_v<S, float>) {
    typedef float Narrow __attribute__((vector_size(kWidth * sizeof(float))));
    Narrow narrow;
    __builtin_memcpy(&narrow, x, sizeof narrow);
    out = __builtin_convertvector(narrow, Vec);
  } else {
    double wide[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) wide[j] = double(load(x[j]));
    __builtin_memcpy(&out, wide, sizeof wide);
  }
}

template <class S>
QK_HD void load_some(const S* x, int64_t count, const Vec& shift, Vec& out) {
  out = shift;
  for (int64_t j = 0; j < count; ++j) out[j] = double(load(x[j]));
}

// The walk of walk.h with narrower tiles and longer stretches: five sums in double per column, and few partial sums.
struct Stretches : Walk {
  Stretches(int64_t numel, Layout layout) : Walk(numel, layout) {
    if (!columns) return;
    const int64_t period = rows * inner;
    tile = std::min(period, kColumns / inner * inner);
    stretch = std::max<int64_t>(1, 4 * kBlock / tile);
    count = (period + tile - 1) / tile;
    parts = (repeats + stretch - 1) / stretch;
  }
  // partial sums: [turns][rows][width]
  int64_t width() const { return columns ? 1 : parts; }
  int64_t turns() const { return columns ? parts : count / rows; }
};

QK_HD void clear(Moments<Vec>& m) { m.s = m.t = m.ss = m.tt = m.st = Vec{}; }

QK_HD void drain(const Moments<Vec>& m, int64_t from, int64_t count, Moments<double>& out) {
  for (int64_t j = from; j < from + count; ++j) {
    out.s += m.s[j], out.t += m.t[j], out.ss += m.ss[j], out.tt += m.tt[j], out.st += m.st[j];
  }
}

template <class S>
QK_CLONES void moments_runs(const Stretches& walk, const S* s, const S* t, Moments<double>* partial, int64_t first,
                            int64_t last) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t run = unit / walk.parts, part = unit % walk.parts, row = run % walk.rows;
    const int64_t begin = run * walk.inner + part * kBlock;
    const int64_t end = std::min(begin + kBlock, (run + 1) * walk.inner);
    const Vec shift_s = Vec{} + double(load(s[row * walk.inner])), shift_t = Vec{} + double(load(t[row * walk.inner]));
    Moments<Vec> m;
    clear(m);
    Vec u, v;
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      load_wide(s + i, u);
      load_wide(t + i, v);
      m.add(u - shift_s, v - shift_t);
    }
    if (i < end) {
      load_some(s + i, end - i, shift_s, u);
      load_some(t + i, end - i, shift_t, v);
      m.add(u - shift_s, v - shift_t);
    }
    partial[unit] = {};
    drain(m, 0, kWidth, partial[unit]);
  }
}

template <class S>
QK_CLONES void moments_columns(const Stretches& walk, const S* s, const S* t, Moments<double>* partial, int64_t first,
                               int64_t last) {
  constexpr int64_t kVecs = kColumns / kWidth;
  const int64_t period = walk.rows * walk.inner;
  Moments<Vec> sums[kVecs];
  Vec shift_s[kVecs], shift_t[kVecs];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t tile = unit / walk.parts, part = unit % walk.parts, column = tile * walk.tile;
    const int64_t count = std::min(walk.tile, period - column), vecs = (count + kWidth - 1) / kWidth;
    for (int64_t w = 0; w < vecs; ++w) {
      clear(sums[w]);
      for (int64_t j = 0; j < kWidth; ++j) {
        const int64_t from = std::min(column + w * kWidth + j, period - 1) / walk.inner * walk.inner;
        shift_s[w][j] = double(load(s[from])), shift_t[w][j] = double(load(t[from]));
      }
    }
    const int64_t stop = std::min((part + 1) * walk.stretch, walk.repeats);
    for (int64_t repeat = part * walk.stretch; repeat < stop; repeat += kDepth) {
      const int64_t depth = std::min(kDepth, stop - repeat);
      for (int64_t w = 0; w < vecs; ++w) {
        const int64_t i = repeat * period + column + w * kWidth, some = std::min(kWidth, count - w * kWidth);
        Moments<Vec> m = sums[w];
        const Vec base_s = shift_s[w], base_t = shift_t[w];
        Vec u, v;
        if (some == kWidth) {
          for (int64_t d = 0; d < depth; ++d) {
            load_wide(s + i + d * period, u);
            load_wide(t + i + d * period, v);
            m.add(u - base_s, v - base_t);
          }
        } else {
          for (int64_t d = 0; d < depth; ++d) {
            load_some(s + i + d * period, some, base_s, u);
            load_some(t + i + d * period, some, base_t, v);
            m.add(u - base_s, v - base_t);
          }
        }
        sums[w] = m;
      }
    }
    for (int64_t j = 0, row = column / walk.inner; j < count; ++row) {
      Moments<double>& out = partial[part * walk.rows + row];
      out = {};
      for (int64_t k = 0; k < walk.inner; ++k, ++j) drain(sums[j / kWidth], j % kWidth, 1, out);
    }
  }
}

struct Pair {
  Tensor student, teacher;
  Layout layout;

  Pair(const Tensor& student_, const Tensor& teacher_, int64_t axis)
      : student(dense(student_)), teacher(aligned(teacher_, student)) {
    STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(), "qkernels: student and teacher differ in dtype");
    layout = channels_of(student, axis);
  }
  double count() const { return double(student.numel() / layout.rows); }
};

std::tuple<Tensor, Tensor> standardized_distance_cpu(const Tensor& student, const Tensor& teacher, int64_t axis,
                                                     double eps, bool mean) {
  const Pair pair(student, teacher, axis);
  const int64_t rows = pair.layout.rows;
  const double n = pair.count();
  Tensor distance = allocate(pair.student, rows, compute_type(student.scalar_type()));
  Tensor moments = allocate(pair.student, std::array<int64_t, 2>{5, rows}, ScalarType::Double);
  const Stretches walk(pair.student.numel(), pair.layout);
  const int64_t width = walk.width();
  std::vector<Moments<double>> partial(walk.turns() * rows * width), sums(rows);
  with_storage(student.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using C = Compute<S>;
    const S* s = static_cast<const S*>(pair.student.const_data_ptr());
    const S* t = static_cast<const S*>(pair.teacher.const_data_ptr());
    torch::stable::parallel_for(0, walk.units(), walk.grain(), [&](int64_t first, int64_t last) {
      (walk.columns ? moments_columns<S> : moments_runs<S>)(walk, s, t, partial.data(), first, last);
    });
    for (size_t i = 0; i < partial.size(); ++i) sums[i / width % rows].merge(partial[i]);
    C* out = static_cast<C*>(distance.mutable_data_ptr());
    double* table = static_cast<double*>(moments.mutable_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * pair.layout.inner;
      const Channel c = channel_of(sums[row], n, double(load(s[at])), double(load(t[at])));
      out[row] = C(standardized_distance(c, eps) * (mean ? 1.0 : n));
      const double values[] = {c.mean_s, c.mean_t, c.var_s, c.var_t, c.cov};
      for (int64_t k = 0; k < 5; ++k) table[k * rows + row] = values[k];
    }
  });
  return {distance, moments};
}

template <class S>
QK_CLONES void backward_runs(const Walk& walk, const Slope<Compute<S>>* slopes, const S* s, const S* t, S* ds,
                             int64_t first, int64_t last) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t run = unit / walk.parts, part = unit % walk.parts;
    const int64_t begin = run * walk.inner + part * kBlock;
    const int64_t end = std::min(begin + kBlock, (run + 1) * walk.inner);
    const Slope<Compute<S>> slope = slopes[run % walk.rows];
    for (int64_t i = begin; i < end; ++i) {
      ds[i] = store<S>(standardized_distance_backward(load(s[i]), load(t[i]), slope));
    }
  }
}

template <class S>
QK_CLONES void backward_columns(const Walk& walk, const Slope<Compute<S>>* slopes, const S* s, const S* t, S* ds,
                                int64_t first, int64_t last) {
  using C = Compute<S>;
  C mean_s[kTile], mean_t[kTile], p[kTile], q[kTile], rest[kTile];
  for (int64_t unit = first; unit < last; ++unit) {
    const Patch patch(walk, unit);
    for (int64_t j = 0; j < patch.count; ++j) {
      const Slope<C>& k = slopes[(patch.column + j) / walk.inner];
      mean_s[j] = k.mean_s, mean_t[j] = k.mean_t, p[j] = k.p, q[j] = k.q, rest[j] = k.rest;
    }
    for (int64_t repeat = patch.first; repeat < patch.last; ++repeat) {
      const int64_t i = repeat * patch.period + patch.column;
      for (int64_t j = 0; j < patch.count; ++j) {
        const Slope<C> slope{mean_s[j], mean_t[j], p[j], q[j], rest[j]};
        ds[i + j] = store<S>(standardized_distance_backward(load(s[i + j]), load(t[i + j]), slope));
      }
    }
  }
}

Tensor standardized_distance_backward_cpu(const Tensor& grad_, const Tensor& student, const Tensor& teacher,
                                          const Tensor& moments_, int64_t axis, double eps, bool mean) {
  const Pair pair(student, teacher, axis);
  const int64_t rows = pair.layout.rows;
  const ScalarType type = compute_type(student.scalar_type());
  const Tensor grad = row_values(grad_, type, rows, "grad");
  const Tensor moments = row_values(moments_, ScalarType::Double, 5 * rows, "moments");
  const double* m = static_cast<const double*>(moments.const_data_ptr());
  const double each = mean ? 1.0 / pair.count() : 1.0;
  Tensor ds = allocate_like(pair.student);
  const Walk walk(pair.student.numel(), pair.layout);
  with_storage(student.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using C = Compute<S>;
    const C* g = static_cast<const C*>(grad.const_data_ptr());
    std::vector<Slope<C>> slopes(rows);
    for (int64_t c = 0; c < rows; ++c) {
      const Channel channel{m[c], m[rows + c], m[2 * rows + c], m[3 * rows + c], m[4 * rows + c]};
      slopes[c] = slope_of<C>(channel, double(g[c]) * each, eps);
    }
    const S* s = static_cast<const S*>(pair.student.const_data_ptr());
    const S* t = static_cast<const S*>(pair.teacher.const_data_ptr());
    S* out = static_cast<S*>(ds.mutable_data_ptr());
    torch::stable::parallel_for(0, walk.units(), walk.grain(), [&](int64_t first, int64_t last) {
      (walk.columns ? backward_columns<S> : backward_runs<S>)(walk, slopes.data(), s, t, out, first, last);
    });
  });
  return ds;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("standardized_distance", TORCH_BOX(&standardized_distance_cpu));
  m.impl("standardized_distance_backward", TORCH_BOX(&standardized_distance_backward_cpu));
}

}  // namespace qk
