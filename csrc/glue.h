// What the CPU and CUDA entry points share: torch's stable ABI, memory order, and the checks memory safety needs.
// Everything a user can get wrong is refused with a fuller message in qkernels/ops.py before it comes here.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "math/quantize.h"

namespace qk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The elements fill one stretch of memory without gaps or overlap, in some order of the dimensions.
inline bool is_dense(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) == 0) return true;
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() || is_dense(x) ? x : torch::stable::contiguous(x); }

// t in the memory order of x
inline Tensor aligned(const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == x.size(d), "qkernels: grad and x differ in shape");
    same = x.size(d) == 1 || t.stride(d) == x.stride(d);
  }
  STD_TORCH_CHECK(t.dim() == x.dim(), "qkernels: grad and x differ in shape");
  if (same) return t;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

inline Layout layout_of(const Tensor& x, const Tensor& scale, int64_t axis) {
  const int64_t rows = scale.numel(), numel = x.numel();
  STD_TORCH_CHECK(rows > 0, "qkernels: scale is empty");
  if (axis < 0 || rows == 1) {
    STD_TORCH_CHECK(numel % rows == 0, "qkernels: x does not divide into the rows of scale");
    STD_TORCH_CHECK(rows == 1 || x.is_contiguous(), "qkernels: a flat granularity needs a contiguous x");
    return {rows, std::max<int64_t>(numel / rows, 1)};
  }
  STD_TORCH_CHECK(axis < x.dim() && x.size(axis) == rows, "qkernels: scale does not match x along axis");
  return {rows, std::max<int64_t>(x.stride(axis), 1)};
}

// x where a flat granularity with several rows asks for logical order
inline Tensor ordered(const Tensor& x, const Tensor& scale, int64_t axis) {
  return axis < 0 && scale.numel() > 1 ? torch::stable::contiguous(x) : dense(x);
}

inline Tensor row_values(const Tensor& values, ScalarType type, int64_t rows, const char* name) {
  STD_TORCH_CHECK(values.scalar_type() == type && values.numel() == rows, "qkernels: ", name,
                  " has the wrong dtype or length");
  return torch::stable::contiguous(values);
}

// empty_like in another dtype: shape and strides of the dense x
inline Tensor empty_like_as(const Tensor& x, ScalarType type) {
  std::array<StableIValue, 6> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(std::optional<ScalarType>(type)),
                                    torch::stable::detail::from(std::nullopt),
                                    torch::stable::detail::from(std::nullopt),
                                    torch::stable::detail::from(std::nullopt),
                                    torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// scale and offset are float32, float64 beside a float64 x
inline ScalarType compute_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

}  // namespace qk
