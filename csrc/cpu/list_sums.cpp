// multi_norm and multi_dot on the CPU: a whole list of tensors per call.
#include "cpu/lists.h"
#include "math/perturb.h"

namespace qk {
namespace {

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

}  // namespace

std::vector<double> list_squares(const Pieces& pieces, const Flats& tensors, const Flats& weights, double eta) {
  std::vector<double> partial(pieces.list.size()), each(tensors.size(), 0.0);
  pieces.each(1, [&](int64_t i) {
    const Piece& piece = pieces.list[i];
    const int64_t t = piece.tensor, begin = piece.begin, end = piece.end;
    with_storage(tensors[t].type, [&](auto storage) {
      using S = decltype(storage);
      const S *x = static_cast<const S*>(tensors[t].data), *w = static_cast<const S*>(address(weights, t));
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

namespace {

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

std::tuple<Tensor, Tensor> multi_norm_cpu(const Tensors& tensors_, const Tensors& weights_, double eta) {
  STD_TORCH_CHECK(!tensors_.empty(), "qkernels: tensors is empty");
  const Tensors tensors = dense_all(tensors_), weights = in_order(weights_, tensors, "weights");
  const Flats flats = flat(tensors);
  const std::vector<double> each = list_squares(Pieces(flats), flats, flat(weights), eta);
  Tensor norm = allocate(tensors[0], 1, ScalarType::Double);
  Tensor norms = allocate(tensors[0], int64_t(each.size()), ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = norm_of(each);
  double* roots = static_cast<double*>(norms.mutable_data_ptr());
  for (size_t t = 0; t < each.size(); ++t) roots[t] = std::sqrt(each[t]);
  return {norm, norms};
}

Tensor multi_dot_cpu(const Tensors& a_, const Tensors& b_) {
  STD_TORCH_CHECK(!a_.empty(), "qkernels: a is empty");
  const Tensors a = dense_all(a_), b = in_order(b_, a, "b");
  STD_TORCH_CHECK(!b.empty(), "qkernels: b is empty");
  const Flats first = flat(a), second = flat(b);
  const Pieces pieces(first);
  std::vector<Products> partial(pieces.list.size());
  pieces.each(2, [&](int64_t i) {
    const Piece& piece = pieces.list[i];
    const int64_t t = piece.tensor, begin = piece.begin, end = piece.end;
    with_storage(first[t].type, [&](auto storage) {
      using S = decltype(storage);
      const S *x = static_cast<const S*>(first[t].data), *y = static_cast<const S*>(second[t].data);
      partial[i] = products(x + begin, y + begin, end - begin);
    });
  });
  Tensor result = allocate(a[0], 3, ScalarType::Double);
  double* sums = static_cast<double*>(result.mutable_data_ptr());
  std::fill(sums, sums + 3, 0.0);
  for (const Products& p : partial) sums[0] += p.ab, sums[1] += p.aa, sums[2] += p.bb;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("multi_norm", TORCH_BOX(&multi_norm_cpu));
  m.impl("multi_dot", TORCH_BOX(&multi_dot_cpu));
}

}  // namespace qk
