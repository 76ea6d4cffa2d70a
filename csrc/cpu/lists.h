// Lists of tensors on the CPU, and how threads share them.
//
// A list is cut into pieces of at most kPiece elements of one tensor, whatever the number of threads. Sums are kept in
// double, by piece; variates are a function of (seed, copy, tensor, index). So every result has the same bits on one
// thread and on many.
#pragma once
#include "cpu/arguments.h"
#include "cpu/flat.h"

namespace qk {

using Tensors = std::vector<Tensor>;
using Flats = std::vector<Flat>;

constexpr int64_t kPiece = 16384;
constexpr int64_t kPieceCost = 256;  // elements whose time goes into beginning a piece

struct Piece {
  int64_t tensor, begin, end;
};

// The pieces of a list, and for each the cost of those before it.
struct Pieces {
  std::vector<Piece> list;
  std::vector<int64_t> before;
  int64_t cost = 0;

  explicit Pieces(const Flats& flats) {
    for (size_t t = 0; t < flats.size(); ++t) {
      const int64_t numel = flats[t].numel;
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
inline Tensors in_order(const Tensors& list, const Tensors& like, const char* name) {
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

inline Tensors dense_all(const Tensors& list) {
  Tensors result;
  result.reserve(list.size());
  for (const Tensor& t : list) result.push_back(dense(t));
  return result;
}

// The elements of dense tensors.
inline Flats flat(const Tensors& list) {
  Flats result;
  result.reserve(list.size());
  for (const Tensor& t : list) result.push_back({t.scalar_type(), t.numel(), t.const_data_ptr()});
  return result;
}

inline const void* address(const Flats& list, int64_t t) { return list.empty() ? nullptr : list[t].data; }

// The sum of the squares of each tensor, or of (|w| + eta) times it, in the order of its pieces.
std::vector<double> list_squares(const Pieces& pieces, const Flats& tensors, const Flats& weights, double eta);
double norm_of(const std::vector<double>& squares);

}  // namespace qk
