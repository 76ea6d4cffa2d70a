// multi_perturb and multi_climb on the CPU: perturbed copies of a whole list of tensors per call.
#include "math/perturb.h"
#include "cpu/lists.h"
#include "cpu/philox.h"

namespace qk {
namespace {

constexpr int64_t kStep = 4 * kCounters;         // elements that are computed at a time
constexpr int64_t kStreamed = int64_t(1) << 25;  // bytes of output from which on it is written past the caches

// Spares reading an output that is larger than the caches before it is overwritten. Whole lines at a time: narrower
// stores cost a fifth of the pass. `from` is 64-byte aligned.
#if QK_X86_CLONES
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
// w + a d straight to lines past the caches, as many elements as fill lines: without the way over a block, a tenth of
// the pass over a large list. Other instruction sets and types take the block.
__attribute__((target("avx512f"))) int64_t along_lines(const float* w, const float* d, float* y, int64_t count,
                                                       float a) {
  const __m512 spread = _mm512_set1_ps(a);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_stream_ps(y + i, _mm512_add_ps(_mm512_loadu_ps(w + i), _mm512_mul_ps(spread, _mm512_loadu_ps(d + i))));
  }
  return i;
}
__attribute__((target("default"))) int64_t along_lines(const float*, const float*, float*, int64_t, float) { return 0; }
#else
size_t write_lines(char*, const char*, size_t) { return 0; }
int64_t along_lines(const float*, const float*, float*, int64_t, float) { return 0; }
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
  int64_t first = task.begin;
  if constexpr (move == kAlong && std::is_same_v<S, float>) {
    const float a = float(plan.numbers[0].a);
    float* y = static_cast<float*>(task.out[0]) + first;
    if (plan.streamed && plan.numbers.size() == 1 && !p && a != 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0) {
      first += along_lines(w + first, d + first, y, task.end - first, a);
    }
  }
  for (int64_t i = first; i < task.end; i += kStep) {
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
  const Tensor table = row_major(coefficients);
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

std::vector<void*> addresses(const Tensors& out) {
  std::vector<void*> result;
  result.reserve(out.size());
  for (const Tensor& t : out) result.push_back(t.mutable_data_ptr());
  return result;
}

// All copies of all parameters.
void write_copies(const Pieces& pieces, void* const* out, const Flats& params, const Flats& directions,
                  const Flats& points, int64_t move, Plan& plan) {
  const int64_t count = int64_t(params.size()), copies = int64_t(plan.numbers.size());
  int64_t bytes = 0;
  for (const Flat& w : params) {
    with_storage(w.type, [&](auto storage) { bytes += copies * w.numel * int64_t(sizeof(storage)); });
  }
  plan.streamed = bytes >= kStreamed;
  const auto write = [&](int64_t i) {
    const Piece& piece = pieces.list[i];
    const int64_t t = piece.tensor, begin = piece.begin, end = piece.end;
    const Task task{params[t].data, address(directions, t), address(points, t), &out[t], count, t, begin, end};
    with_storage(params[t].type, [&](auto storage) {
      with_kind<kMoves>(move,
                        [&](auto chosen) { perturb_piece<decltype(chosen)::value, decltype(storage)>(task, plan); });
    });
  };
  pieces.each(copies * (draws(move) ? 8 : 1), write, [] {
#if QK_X86_CLONES
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
  // First, for it gives tensors that share memory until one is written memory of their own; params may be among them.
  const std::vector<void*> targets = addresses(out);
  const Flats flats = flat(params);
  write_copies(Pieces(flats), targets.data(), flats, flat(directions), flat(points), move, plan);
}

// The copies at distance rho along the directions, whose length is given or computed here: a small list costs as much
// to hand over as to compute.
void climb(void* const* out, const Flats& params, const Flats& directions, std::optional<double> length, double rho,
           std::optional<double> eta) {
  const Pieces pieces(params);
  const double floor = eta.value_or(0.0);
  const Flats none;
  if (!length) length = norm_of(list_squares(pieces, directions, eta ? params : none, floor));
  Plan plan{{{finite_or_zero(rho / *length), finite_or_zero(floor), 0.0}}, 0, 0, false};
  write_copies(pieces, out, params, directions, {}, eta ? kAdaptive : kAlong, plan);
}

void multi_climb_cpu(const Tensors& out, const Tensors& params_, const Tensors& directions_, const MaybeTensor& norm,
                     double rho, std::optional<double> eta) {
  STD_TORCH_CHECK(!params_.empty() && out.size() == params_.size(), "qkernels: out must have one tensor per parameter");
  const Tensors params = dense_all(params_);
  check_alike(out, params);
  const Tensors directions = in_order(directions_, params, "directions");
  STD_TORCH_CHECK(!directions.empty(), "qkernels: directions is empty");
  std::optional<double> length;
  if (norm) length = *static_cast<const double*>(row_values(*norm, ScalarType::Double, 1, "norm").const_data_ptr());
  const std::vector<void*> targets = addresses(out);  // first, as above
  climb(targets.data(), flat(params), flat(directions), length, rho, eta);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("multi_perturb", TORCH_BOX(&multi_perturb_cpu));
  m.impl("multi_climb", TORCH_BOX(&multi_climb_cpu));
}

}  // namespace qk

void qkernels_climb(void* const* out, const qk::Flat* params, const qk::Flat* directions, int64_t count, double rho,
                    const double* eta) {
  qk::climb(out, {params, params + count}, {directions, directions + count}, {}, rho,
            eta ? std::optional(*eta) : std::nullopt);
}
