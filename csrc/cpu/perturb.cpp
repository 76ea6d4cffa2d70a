// multi_norm, multi_dot and multi_perturb on the CPU: a whole list of tensors per call.
//
// The list is cut into pieces of at most kPiece elements of one tensor, whatever the number of threads. Sums are kept
// in double, by piece; variates are a function of (seed, copy, tensor, index). So every result has the same bits on one
// thread and on many.
#include "math/perturb.h"
#include "cpu/arguments.h"
#include "cpu/philox.h"

namespace qk {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kPiece = 16384;
constexpr int64_t kPieceCost = 256;              // elements whose time goes into beginning a piece
constexpr int64_t kStep = 4 * kCounters;         // elements that are computed at a time
constexpr int64_t kStreamed = int64_t(1) << 25;  // bytes of output from which on it is written past the caches

struct Piece {
  int64_t tensor, begin, end;
};

// The pieces of a list, and for each the cost of those before it.
struct Pieces {
  std::vector<Piece> list;
  std::vector<int64_t> before;
  int64_t cost = 0;

  explicit Pieces(const Tensors& tensors) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      const int64_t numel = tensors[t].numel();
      for (int64_t i = 0; i < numel; i += kPiece) {
        const int64_t end = std::min(i + kPiece, numel);
        list.push_back({int64_t(t), i, end});
        before.push_back(cost);
        cost += end - i + kPieceCost;
      }
    }
  }
  // f(number of a piece) for all of them, where an element costs `weight`; threads share the cost, not the number, and
  // each ends with `last()`.
  template <class F, class Last>
  void each(int64_t weight, F&& f, Last&& last) const {
    torch::stable::parallel_for(0, cost, std::max<int64_t>(1, kGrain / weight), [&](int64_t from, int64_t to) {
      const auto at = [&](int64_t c) { return std::lower_bound(before.begin(), before.end(), c) - before.begin(); };
      for (int64_t i = at(from), end = at(to); i < end; ++i) f(i);
      last();
    });
  }
  template <class F>
  void each(int64_t weight, F&& f) const {
    each(weight, f, [] {});
  }
};

// `list` in the memory order of `like`, or in its own; an empty list stays empty.
Tensors in_order(const Tensors& list, const Tensors& like, const char* name) {
  if (list.empty()) return {};
  STD_TORCH_CHECK(list.size() == like.size(), "qkernels: ", name, " has ", list.size(), " tensors for ", like.size());
  Tensors result;
  result.reserve(list.size());
  for (size_t t = 0; t < list.size(); ++t) {
    STD_TORCH_CHECK(list[t].scalar_type() == like[t].scalar_type(), "qkernels: ", name, " differs in dtype");
    if (list[t].is_contiguous() && like[t].is_contiguous() && list[t].numel() == like[t].numel()) {
      result.push_back(list[t]);
    } else {
      result.push_back(aligned(list[t], like[t]));
    }
  }
  return result;
}

bool same_memory_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), others = b.sizes();
  bool same = std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
  if (same && a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; same && d < a.dim(); ++d) same = sizes[d] == 1 || a.stride(d) == b.stride(d);
  return same;
}

Tensors dense_all(const Tensors& list) {
  Tensors result;
  result.reserve(list.size());
  for (const Tensor& t : list) result.push_back(dense(t));
  return result;
}

const void* address(const Tensors& list, int64_t t) { return list.empty() ? nullptr : list[t].const_data_ptr(); }

// --- sums ---

constexpr int64_t kSums = 32;  // partial sums kept side by side

template <class S>
QK_CLONES double squares(const S* x, const S* w, double eta, int64_t count) {
  double lanes[kSums] = {};
  const auto body = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    double v = double(load(x[i + j]));
    if (w) v *= magnitude(double(load(w[i + j]))) + eta;
    lanes[j] += v * v;
  };
  int64_t i = 0;
  if (w) {
    for (; i + kSums <= count; i += kSums) {
      for (int64_t j = 0; j < kSums; ++j) body(i, j);
    }
  } else {
    for (; i + kSums <= count; i += kSums) {
      for (int64_t j = 0; j < kSums; ++j) {
        const double v = double(load(x[i + j]));
        lanes[j] += v * v;
      }
    }
  }
  for (int64_t j = 0; i + j < count; ++j) body(i, j);
  double sum = 0;
  for (int64_t j = 0; j < kSums; ++j) sum += lanes[j];
  return sum;
}

struct Products {
  double ab, aa, bb;
};

template <class S>
QK_CLONES Products products(const S* a, const S* b, int64_t count) {
  double ab[kSums] = {}, aa[kSums] = {}, bb[kSums] = {};
  const auto body = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const double u = double(load(a[i + j])), v = double(load(b[i + j]));
    ab[j] += u * v;
    aa[j] += u * u;
    bb[j] += v * v;
  };
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) body(i, j);
  }
  for (int64_t j = 0; i + j < count; ++j) body(i, j);
  Products sum{0, 0, 0};
  for (int64_t j = 0; j < kSums; ++j) sum.ab += ab[j], sum.aa += aa[j], sum.bb += bb[j];
  return sum;
}

// The sum of the squares of each tensor, in the order of its pieces.
std::vector<double> list_squares(const Pieces& pieces, const Tensors& tensors, const Tensors& weights, double eta) {
  std::vector<double> partial(pieces.list.size()), each(tensors.size(), 0.0);
  pieces.each(1, [&](int64_t i) {
    const auto [t, begin, end] = pieces.list[i];
    with_storage(tensors[t].scalar_type(), [&](auto storage) {
      using S = decltype(storage);
      const S *x = static_cast<const S*>(tensors[t].const_data_ptr()), *w = static_cast<const S*>(address(weights, t));
      partial[i] = squares(x + begin, w ? w + begin : nullptr, eta, end - begin);
    });
  });
  for (size_t i = 0; i < partial.size(); ++i) each[pieces.list[i].tensor] += partial[i];
  return each;
}

double norm_of(const std::vector<double>& squares) {
  double total = 0;
  for (double square : squares) total += square;
  return std::sqrt(total);
}

std::tuple<Tensor, Tensor> multi_norm_cpu(const Tensors& tensors_, const Tensors& weights_, double eta) {
  STD_TORCH_CHECK(!tensors_.empty(), "qkernels: tensors is empty");
  const Tensors tensors = dense_all(tensors_), weights = in_order(weights_, tensors, "weights");
  const std::vector<double> each = list_squares(Pieces(tensors), tensors, weights, eta);
  Tensor norm = torch::stable::new_empty(tensors[0], {1}, ScalarType::Double);
  Tensor norms = torch::stable::new_empty(tensors[0], {int64_t(each.size())}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = norm_of(each);
  double* roots = static_cast<double*>(norms.mutable_data_ptr());
  for (size_t t = 0; t < each.size(); ++t) roots[t] = std::sqrt(each[t]);
  return {norm, norms};
}

Tensor multi_dot_cpu(const Tensors& a_, const Tensors& b_) {
  STD_TORCH_CHECK(!a_.empty(), "qkernels: a is empty");
  const Tensors a = dense_all(a_), b = in_order(b_, a, "b");
  STD_TORCH_CHECK(!b.empty(), "qkernels: b is empty");
  const Pieces pieces(a);
  std::vector<Products> partial(pieces.list.size());
  pieces.each(2, [&](int64_t i) {
    const auto [t, begin, end] = pieces.list[i];
    with_storage(a[t].scalar_type(), [&](auto storage) {
      using S = decltype(storage);
      const S *x = static_cast<const S*>(a[t].const_data_ptr()), *y = static_cast<const S*>(b[t].const_data_ptr());
      partial[i] = products(x + begin, y + begin, end - begin);
    });
  });
  Tensor result = torch::stable::new_empty(a[0], {3}, ScalarType::Double);
  double* sums = static_cast<double*>(result.mutable_data_ptr());
  std::fill(sums, sums + 3, 0.0);
  for (const Products& p : partial) sums[0] += p.ab, sums[1] += p.aa, sums[2] += p.bb;
  return result;
}

// --- perturbed copies ---

// Spares reading an output that is larger than the caches before it is overwritten. Whole lines at a time: narrower
// stores cost a fifth of the pass. `from` is 64-byte aligned.
#if QK_VECTOR_PHILOX
__attribute__((target("avx512f"))) size_t write_lines(char* to, const char* from, size_t bytes) {
  size_t done = 0;
  for (; done + 64 <= bytes; done += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_load_si512(from + done));
  }
  return done;
}
__attribute__((target("default"))) size_t write_lines(char* to, const char* from, size_t bytes) {
  size_t done = 0;
  for (; done + 16 <= bytes; done += 16) {
    const __m128i word = _mm_load_si128(reinterpret_cast<const __m128i*>(from + done));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + done), word);
  }
  return done;
}
#else
size_t write_lines(char*, const char*, size_t) { return 0; }
#endif

void write_past_caches(void* to, const void* from, size_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const size_t done = reinterpret_cast<uintptr_t>(to) % 64 == 0 ? write_lines(target, source, bytes) : 0;
  memcpy(target + done, source + done, bytes - done);
}

// A piece's tensors, and the copies it goes to: copy k at out[k * stride].
struct Task {
  const void *w, *d, *p;
  void* const* out;
  int64_t stride, tensor, begin, end;
};

struct Plan {
  std::vector<MoveNumbers<double>> numbers;  // by copy
  uint64_t seed;
  int64_t first_copy;
  bool streamed;

  bool same(size_t k) const {
    const MoveNumbers<double>&x = numbers[k], &y = numbers[k - 1];
    return x.a == y.a && x.b == y.b && x.c == y.c;
  }
};

template <int64_t move, class C>
QK_HD void variates(const WordBlock& words, C* __restrict n) {
  if (move == kUniform) {
    for (int64_t j = 0; j < kCounters; ++j) {
      for (int k = 0; k < 4; ++k) n[4 * j + k] = C(symmetric(words.w[k][j]));
    }
    return;
  }
  alignas(64) float v[4][kCounters];
  for (int half = 0; half < 4; half += 2) {
    for (int64_t j = 0; j < kCounters; ++j) {
      const Pair pair = normal_pair(words.w[half][j], words.w[half + 1][j]);
      v[half][j] = pair.first;
      v[half + 1][j] = pair.second;
    }
  }
  for (int64_t j = 0; j < kCounters; ++j) {
    for (int k = 0; k < 4; ++k) n[4 * j + k] = C(v[k][j]);
  }
}

// The moves that draw nothing. Points that are not given are the parameters, and of no effect in kAlong. `y` may be one
// of the inputs: no element depends on another one (ivdep).
template <int64_t move, bool points, class S>
QK_HD void move_block(const S* w, const S* d, const S* p, S* y, int64_t count, MoveNumbers<Compute<S>> k) {
  using C = Compute<S>;
  if (move == kAlong && !points) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) y[j] = store<S>(moved(load(w[j]), k.a, load(d[j])));
    return;
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) {
    const C v = load(w[j]);
    y[j] = store<S>(perturbed<move>(v, load(d[j]), points ? load(p[j]) : v, k));
  }
}

template <int64_t move, class S>
QK_CLONES void perturb_piece(const Task& task, const Plan& plan) {
  using C = Compute<S>;
  const S *w = static_cast<const S*>(task.w), *d = static_cast<const S*>(task.d), *p = static_cast<const S*>(task.p);
  WordBlock words;
  alignas(64) S block[kStep];
  alignas(64) C x[kStep], factor[kStep], n[kStep];
  for (int64_t i = task.begin; i < task.end; i += kStep) {
    const int64_t count = std::min(kStep, task.end - i);
    if (draws(move)) {
      for (int64_t j = 0; j < count; ++j) x[j] = load(w[i + j]);
    }
    for (size_t k = 0; k < plan.numbers.size(); ++k) {
      const MoveNumbers<C> numbers{C(plan.numbers[k].a), C(plan.numbers[k].b), C(plan.numbers[k].c)};
      S* out = static_cast<S*>(task.out[int64_t(k) * task.stride]) + i;
      S* y = plan.streamed ? block : out;
      if (draws(move)) {
        if (k == 0 || !plan.same(k)) {
          for (int64_t j = 0; j < count; ++j) factor[j] = spread<move>(x[j], numbers);
        }
        philox_block(plan.seed, stream_of(plan.first_copy + int64_t(k), task.tensor), uint64_t(i) >> 2, (count + 3) / 4,
                     words);
        variates<move>(words, n);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) y[j] = store<S>(moved(x[j], factor[j], n[j]));
      } else if (p) {
        move_block<move, true>(w + i, d + i, p + i, y, count, numbers);
      } else {
        move_block<move, false>(w + i, d + i, p, y, count, numbers);
      }
      if (plan.streamed) write_past_caches(out, block, size_t(count) * sizeof(S));
    }
  }
}

constexpr std::array<int64_t, 7> kMoves = {kAlong, kAdaptive, kNormal, kMagnitude, kUniform, kAscend, kAscendSign};

Plan plan_of(const Tensor& coefficients, int64_t move, bool points, const MaybeTensor& seed, int64_t first_copy) {
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2,
                  "qkernels: coefficients must be float64 of shape (copies, 1 to 3)");
  const Tensor table = torch::stable::contiguous(coefficients);
  const int64_t copies = table.size(0), width = table.size(1);
  const double* values = static_cast<const double*>(table.const_data_ptr());
  Plan plan{std::vector<MoveNumbers<double>>(copies), 0, first_copy, false};
  for (int64_t k = 0; k < copies; ++k) {
    const auto number = [&](int64_t j) { return j < width ? finite_or_zero(values[k * width + j]) : 0.0; };
    plan.numbers[k] = {number(0), move == kAlong && !points ? 0.0 : number(1), number(2)};
  }
  if (draws(move)) {
    STD_TORCH_CHECK(seed, "qkernels: noise needs a seed");
    plan.seed = uint64_t(*static_cast<const int64_t*>(row_values(*seed, ScalarType::Long, 1, "seed").const_data_ptr()));
  }
  return plan;
}

void check_alike(const Tensors& out, const Tensors& params) {
  for (size_t i = 0; i < out.size(); ++i) {
    const Tensor& w = params[i % params.size()];
    STD_TORCH_CHECK(out[i].scalar_type() == w.scalar_type() && same_memory_order(out[i], w),
                    "qkernels: out differs from params in dtype, shape or memory order");
  }
}

// All copies of all parameters; the lists are dense and in one memory order.
void write_copies(const Pieces& pieces, const Tensors& out, const Tensors& params, const Tensors& directions,
                  const Tensors& points, int64_t move, Plan& plan) {
  std::vector<void*> targets;
  targets.reserve(out.size());
  for (const Tensor& t : out) targets.push_back(t.mutable_data_ptr());
  const int64_t count = int64_t(params.size()), copies = int64_t(plan.numbers.size());
  int64_t bytes = 0;
  for (const Tensor& w : params) bytes += copies * w.numel() * int64_t(w.element_size());
  plan.streamed = bytes >= kStreamed;
  const auto write = [&](int64_t i) {
    const auto [t, begin, end] = pieces.list[i];
    const Task task{
        params[t].const_data_ptr(), address(directions, t), address(points, t), &targets[t], count, t, begin, end};
    with_storage(params[t].scalar_type(), [&](auto storage) {
      with_kind<kMoves>(move,
                        [&](auto chosen) { perturb_piece<decltype(chosen)::value, decltype(storage)>(task, plan); });
    });
  };
  pieces.each(copies * (draws(move) ? 8 : 1), write, [] {
#if QK_VECTOR_PHILOX
    _mm_sfence();
#endif
  });
}

void multi_perturb_cpu(const Tensors& out, const Tensors& params_, const Tensors& directions_, const Tensors& points_,
                       int64_t move, const Tensor& coefficients, const MaybeTensor& seed, int64_t first_copy) {
  const Tensors params = dense_all(params_), directions = in_order(directions_, params, "directions"),
                points = in_order(points_, params, "points");
  STD_TORCH_CHECK(draws(move) || !directions.empty(), "qkernels: this move needs directions");
  Plan plan = plan_of(coefficients, move, !points.empty(), seed, first_copy);
  STD_TORCH_CHECK(out.size() == params.size() * plan.numbers.size(),
                  "qkernels: out must have one tensor per copy and parameter");
  check_alike(out, params);
  write_copies(Pieces(params), out, params, directions, points, move, plan);
}

// The norm and the copies in one call: a small list costs as much to hand over as to compute.
void multi_climb_cpu(const Tensors& out, const Tensors& params_, const Tensors& directions_, const MaybeTensor& norm,
                     double rho, std::optional<double> eta) {
  STD_TORCH_CHECK(!params_.empty() && out.size() == params_.size(), "qkernels: out must have one tensor per parameter");
  const Tensors params = dense_all(params_);
  check_alike(out, params);
  const Tensors directions = in_order(directions_, params, "directions");
  STD_TORCH_CHECK(!directions.empty(), "qkernels: directions is empty");
  const Pieces pieces(params);
  const double length =
      norm ? *static_cast<const double*>(row_values(*norm, ScalarType::Double, 1, "norm").const_data_ptr())
           : norm_of(list_squares(pieces, directions, eta ? params : Tensors(), eta.value_or(0.0)));
  Plan plan{{{finite_or_zero(rho / length), finite_or_zero(eta.value_or(0.0)), 0.0}}, 0, 0, false};
  write_copies(pieces, out, params, directions, {}, eta ? kAdaptive : kAlong, plan);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("multi_norm", TORCH_BOX(&multi_norm_cpu));
  m.impl("multi_dot", TORCH_BOX(&multi_dot_cpu));
  m.impl("multi_perturb", TORCH_BOX(&multi_perturb_cpu));
  m.impl("multi_climb", TORCH_BOX(&multi_climb_cpu));
}

}  // namespace qk
