// From the arguments of an op to what the CPU loops take: types picked once per call, pointers, the noise's source.
#pragma once
#include <array>
#include <type_traits>

#include "cpu/walk.h"
#include "glue.h"

namespace qk {

template <class F>
void with_storage(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Half:
      return f(Half());
    default:
      STD_TORCH_CHECK(false, "qkernels: x must be float32, bfloat16, float16 or float64");
  }
}

// The noise kinds that change a pass; the backward of the others is the plain one.
constexpr std::array<int64_t, 8> kForwardKinds = {kPlain,  kTempering,    kAfter,      kBefore,
                                                  kPseudo, kPseudoNormal, kStochastic, kShift};
constexpr std::array<int64_t, 5> kBackwardKinds = {kPlain, kBefore, kPseudo, kPseudoNormal, kStochastic};

template <const auto& kinds, size_t at = 0, class F>
void with_kind(int64_t kind, F&& f) {
  if constexpr (at < kinds.size()) {
    if (kind == kinds[at]) return f(std::integral_constant<int64_t, kinds[at]>());
    return with_kind<kinds, at + 1>(kind, f);
  } else {
    STD_TORCH_CHECK(false, "qkernels: unknown noise kind ", kind);
  }
}

// The noise of this call, after the layer's coin has been thrown (feature perturbation is on with probability a).
struct Drawn {
  int64_t kind;
  double a, b;
  uint64_t seed = 0, stream = 0;
  MaybeTensor given;

  Drawn(int64_t noise, double a, double b, const MaybeTensor& seed_tensor, int64_t stream_, const MaybeTensor& shift,
        const MaybeTensor& shift_scale, const Tensor& x)
      : kind(noise), a(a), b(b), stream(uint64_t(stream_)) {
    if (kind == kPlain) return;
    if (kind == kShift) {
      STD_TORCH_CHECK(shift && shift_scale, "qkernels: a shift needs shift and shift_scale");
      STD_TORCH_CHECK(shift->scalar_type() == x.scalar_type(), "qkernels: shift and x differ in dtype");
      this->a =
          *static_cast<const float*>(row_values(*shift_scale, ScalarType::Float, 1, "shift_scale").const_data_ptr());
      given = aligned(*shift, x);
      return;
    }
    STD_TORCH_CHECK(seed_tensor, "qkernels: noise needs a seed");
    seed =
        uint64_t(*static_cast<const int64_t*>(row_values(*seed_tensor, ScalarType::Long, 1, "seed").const_data_ptr()));
    if ((kind == kAfter || kind == kBefore) && !switched_on(seed, stream, float(a))) kind = kPlain;
  }
  template <class S>
  Variates<S> variates() const {
    return {seed, stream, given ? static_cast<const S*>(given->const_data_ptr()) : nullptr};
  }
};

template <class C>
struct RowTensors {
  Tensor scale;
  MaybeTensor offset, zero_point;
  Rows<C> rows;

  RowTensors(ScalarType type, const Tensor& scale_, const MaybeTensor& offset_, const MaybeTensor& zero_point_,
             int64_t quant_min, int64_t quant_max)
      : scale(row_values(scale_, compute_type(type), scale_.numel(), "scale")) {
    if (offset_) offset = row_values(*offset_, scale.scalar_type(), scale.numel(), "offset");
    if (zero_point_) zero_point = row_values(*zero_point_, ScalarType::Int, scale.numel(), "zero_point");
    rows = {static_cast<const C*>(scale.const_data_ptr()),
            offset ? static_cast<const C*>(offset->const_data_ptr()) : nullptr,
            zero_point ? static_cast<const int32_t*>(zero_point->const_data_ptr()) : nullptr, quant_min, quant_max};
  }
};

}  // namespace qk
