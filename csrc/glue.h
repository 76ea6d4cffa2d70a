// What the CPU and CUDA entry points share: torch's stable ABI, memory order, and the checks memory safety needs.
// Everything a user can get wrong is refused with a fuller message in qkernels/ops/ before it comes here.
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

// Uninitialised memory on the device of x. The dispatcher would cost as much as a small kernel.
inline Tensor allocate(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType type) {
  int32_t device_type, device_index;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, device_index, &made));
  return Tensor(made);
}

// of the shape and strides of the dense x
inline Tensor allocate_like(const Tensor& x, ScalarType type) { return allocate(x, x.sizes(), x.strides(), type); }
inline Tensor allocate_like(const Tensor& x) { return allocate_like(x, x.scalar_type()); }

// row-major
template <size_t dims>
Tensor allocate(const Tensor& x, const std::array<int64_t, dims>& sizes, ScalarType type) {
  std::array<int64_t, dims> strides;
  int64_t stride = 1;
  for (size_t d = dims; d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return allocate(x, {sizes.data(), dims}, {strides.data(), dims}, type);
}
inline Tensor allocate(const Tensor& x, int64_t count, ScalarType type) {
  return allocate(x, std::array<int64_t, 1>{count}, type);
}

inline Tensor row_major(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

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
  Tensor copy = allocate_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

inline bool same_memory_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), others = b.sizes();
  bool same = std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
  if (same && a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; same && d < a.dim(); ++d) same = sizes[d] == 1 || a.stride(d) == b.stride(d);
  return same;
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

// The channels of the standardised distance along axis.
inline Layout channels_of(const Tensor& student, int64_t axis) {
  STD_TORCH_CHECK(axis >= 0 && axis < student.dim(), "qkernels: axis is out of range");
  STD_TORCH_CHECK(student.numel() > 0, "qkernels: student is empty");
  const int64_t rows = student.size(axis);
  return {rows, rows == 1 ? student.numel() : student.stride(axis)};
}

// x where a flat granularity with several rows asks for logical order
inline Tensor ordered(const Tensor& x, const Tensor& scale, int64_t axis) {
  return axis < 0 && scale.numel() > 1 ? row_major(x) : dense(x);
}

inline Tensor row_values(const Tensor& values, ScalarType type, int64_t rows, const char* name) {
  STD_TORCH_CHECK(values.scalar_type() == type && values.numel() == rows, "qkernels: ", name,
                  " has the wrong dtype or length");
  return row_major(values);
}

// The bytes of integer levels, or of packed ones.
inline const uint8_t* bytes_of(const Tensor& q) {
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Byte || q.scalar_type() == ScalarType::Char,
                  "qkernels: levels must be int8 or uint8");
  return static_cast<const uint8_t*>(q.const_data_ptr());
}

inline int64_t fields_per_byte(int64_t bits) {
  STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "qkernels: bits must be 2, 4 or 8, got ", bits);
  return 8 / bits;
}

inline void check_holds(const Tensor& p, int64_t bits, int64_t numel) {
  STD_TORCH_CHECK(numel >= 0 && p.numel() * fields_per_byte(bits) >= numel, "qkernels: p does not hold ", numel,
                  " levels");
}

// scale and offset are float32, float64 beside a float64 x
inline ScalarType compute_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

}  // namespace qk
