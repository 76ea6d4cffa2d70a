// The CUDA ops as torch sees them: checks, outputs from torch's allocator, the caller's device and stream.
#include "cuda/bind.h"

namespace qk {
namespace {

struct RowTensors {
  Tensor scale;
  MaybeTensor offset, zero_point;
  Numbers numbers;

  RowTensors(const Device& device, ScalarType type, const Tensor& scale_, const MaybeTensor& offset_,
             const MaybeTensor& zero_point_, int64_t quant_min, int64_t quant_max)
      : scale(row_values(scale_, compute_type(type), scale_.numel(), "scale")) {
    device.check(scale_, "scale").check(offset_, "offset").check(zero_point_, "zero_point");
    if (offset_) offset = row_values(*offset_, scale.scalar_type(), scale.numel(), "offset");
    if (zero_point_) zero_point = row_values(*zero_point_, ScalarType::Int, scale.numel(), "zero_point");
    numbers = {scale.const_data_ptr(), offset ? offset->const_data_ptr() : nullptr,
               zero_point ? static_cast<const int32_t*>(zero_point->const_data_ptr()) : nullptr, quant_min, quant_max};
  }
};

// The noise of this call. Seed and shift_scale stay on the device, so that a captured graph draws anew at each replay.
struct NoiseTensors {
  MaybeTensor seed, shift, shift_scale;
  NoiseSource source;

  NoiseTensors(const Device& device, int64_t kind, double a, double b, const MaybeTensor& seed_, int64_t stream,
               const MaybeTensor& shift_, const MaybeTensor& shift_scale_, const Tensor& x)
      : source{kind, float(a), float(b), nullptr, uint64_t(stream), nullptr, nullptr} {
    STD_TORCH_CHECK(kind >= kPlain && kind <= kShift, "qkernels: unknown noise kind ", kind);
    if (kind == kPlain) return;
    if (kind == kShift) {
      STD_TORCH_CHECK(shift_ && shift_scale_, "qkernels: a shift needs shift and shift_scale");
      STD_TORCH_CHECK(shift_->scalar_type() == x.scalar_type(), "qkernels: shift and x differ in dtype");
      device.check(shift_, "shift").check(shift_scale_, "shift_scale");
      shift = aligned(*shift_, x);
      shift_scale = row_values(*shift_scale_, ScalarType::Float, 1, "shift_scale");
      source.shift = shift->const_data_ptr();
      source.shift_scale = static_cast<const float*>(shift_scale->const_data_ptr());
      return;
    }
    STD_TORCH_CHECK(seed_, "qkernels: noise needs a seed");
    device.check(seed_, "seed");
    seed = row_values(*seed_, ScalarType::Long, 1, "seed");
    source.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
};

Tensor fake_quantize_cuda(const Tensor& x_, const Tensor& scale, const MaybeTensor& offset,
                          const MaybeTensor& zero_point, int64_t axis, int64_t quant_min, int64_t quant_max,
                          int64_t noise, double a, double b, const MaybeTensor& seed, int64_t stream,
                          const MaybeTensor& shift, const MaybeTensor& shift_scale) {
  const Device device(x_);
  const Tensor x = ordered(x_, scale, axis);
  const Dtype type = dtype_of(x.scalar_type(), "x");
  const Walk walk(x.numel(), layout_of(x, scale, axis));
  const RowTensors rows(device, x.scalar_type(), scale, offset, zero_point, quant_min, quant_max);
  const NoiseTensors drawn(device, noise, a, b, seed, stream, shift, shift_scale, x);
  Tensor y = allocate_like(x);
  STD_CUDA_CHECK(launch_fake_quantize(walk, type, x.const_data_ptr(), y.mutable_data_ptr(), rows.numbers, drawn.source,
                                      device.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cuda(const Tensor& grad_, const Tensor& x_,
                                                               const Tensor& scale, const MaybeTensor& offset,
                                                               const MaybeTensor& zero_point, int64_t axis,
                                                               int64_t quant_min, int64_t quant_max, double grad_scale,
                                                               bool clip_only, double ewgs, int64_t noise, double a,
                                                               double b, const MaybeTensor& seed, int64_t stream) {
  const Device device(x_);
  device.check(grad_, "grad");
  const Tensor x = ordered(x_, scale, axis), grad = aligned(grad_, x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "qkernels: grad and x differ in dtype");
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const ScalarType type = compute_type(x.scalar_type());
  const Walk walk(x.numel(), layout_of(x, scale, axis));
  const RowTensors rows(device, x.scalar_type(), scale, offset, zero_point, quant_min, quant_max);
  const NoiseTensors drawn(device, backward_kind(noise), a, b, seed, stream, {}, {}, x);
  const int64_t count = scale.numel(), offsets = offset ? count : 0, partials = sums_of(walk) * (offset ? 2 : 1);
  Tensor dx = allocate_like(x);
  Tensor dscale = allocate(x, count, type), doffset = allocate(x, offsets, type);
  Tensor partial = allocate(x, partials, type);
  STD_CUDA_CHECK(launch_fake_quantize_backward(
      walk, dtype, grad.const_data_ptr(), x.const_data_ptr(), dx.mutable_data_ptr(), rows.numbers, drawn.source,
      {grad_scale, ewgs, clip_only},
      {dscale.mutable_data_ptr(), doffset.mutable_data_ptr(), partial.mutable_data_ptr()}, device.stream()));
  return {dx, dscale, doffset};
}

Tensor quantize_cuda(const Tensor& x_, const Tensor& scale, const MaybeTensor& offset, const MaybeTensor& zero_point,
                     int64_t axis, int64_t quant_min, int64_t quant_max) {
  const Device device(x_);
  const Tensor x = ordered(x_, scale, axis);
  const Dtype type = dtype_of(x.scalar_type(), "x");
  const Walk walk(x.numel(), layout_of(x, scale, axis));
  const RowTensors rows(device, x.scalar_type(), scale, offset, zero_point, quant_min, quant_max);
  Tensor q = allocate_like(x, quant_max > 127 ? ScalarType::Byte : ScalarType::Char);
  STD_CUDA_CHECK(launch_quantize(walk, type, x.const_data_ptr(), static_cast<uint8_t*>(q.mutable_data_ptr()),
                                 rows.numbers, device.stream()));
  return q;
}

Tensor dequantize_cuda(const Tensor& q_, const Tensor& scale, const MaybeTensor& offset, const MaybeTensor& zero_point,
                       int64_t axis, ScalarType dtype) {
  const Device device(q_);
  const Tensor q = ordered(q_, scale, axis);
  const uint8_t* in = bytes_of(q);
  const Dtype type = dtype_of(dtype, "dtype");
  const Walk walk(q.numel(), layout_of(q, scale, axis));
  const RowTensors rows(device, dtype, scale, offset, zero_point, 0, 0);
  Tensor y = allocate_like(q, dtype);
  STD_CUDA_CHECK(launch_dequantize(walk, type, in, q.scalar_type() == ScalarType::Char, y.mutable_data_ptr(),
                                   rows.numbers, device.stream()));
  return y;
}

Tensor pack_cuda(const Tensor& q_, int64_t bits) {
  const Device device(q_);
  const Tensor q = row_major(q_);
  const uint8_t* in = bytes_of(q);
  const int64_t per_byte = fields_per_byte(bits);
  Tensor p = allocate(q, (q.numel() + per_byte - 1) / per_byte, ScalarType::Byte);
  STD_CUDA_CHECK(launch_pack(in, q.numel(), int(bits), static_cast<uint8_t*>(p.mutable_data_ptr()), device.stream()));
  return p;
}

Tensor unpack_cuda(const Tensor& p_, int64_t bits, int64_t numel, bool is_signed) {
  const Device device(p_);
  const Tensor p = row_major(p_);
  const uint8_t* in = bytes_of(p);
  check_holds(p, bits, numel);
  Tensor q = allocate(p, numel, is_signed ? ScalarType::Char : ScalarType::Byte);
  STD_CUDA_CHECK(
      launch_unpack(in, numel, int(bits), is_signed, static_cast<uint8_t*>(q.mutable_data_ptr()), device.stream()));
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cuda));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cuda));
  m.impl("quantize", TORCH_BOX(&quantize_cuda));
  m.impl("dequantize", TORCH_BOX(&dequantize_cuda));
  m.impl("pack", TORCH_BOX(&pack_cuda));
  m.impl("unpack", TORCH_BOX(&unpack_cuda));
}

}  // namespace qk
