// Integer levels on the CPU: quantize, dequantize, pack, unpack.
#include "cpu/arguments.h"
#include "math/pack.h"

namespace qk {
namespace {

struct OneZero {
  int32_t zero;
  QK_HD int32_t operator[](int64_t) const { return zero; }
};

// f(i, count, grids, zeros): elements i to i + count, and element j of them on grids[j] with the zero point zeros[j].
template <class C, class F>
QK_HD void each_stretch(const Walk& walk, const Rows<C>& rows, int64_t first, int64_t last, const F& f) {
  const auto zero_of = [&](int64_t row) { return rows.zero_point ? rows.zero_point[row] : 0; };
  if (!walk.columns) {
    for (Run run(walk, first); run.unit < last; run.next()) {
      f(run.begin(), run.end() - run.begin(), OneGrid<C>{rows.grid(run.row)}, OneZero{zero_of(run.row)});
    }
    return;
  }
  ColumnGrids<C> grids;
  int32_t zeros[kTile];
  for (int64_t unit = first; unit < last; ++unit) {
    const Patch patch(walk, unit);
    if (unit == first || patch.part == 0) {
      grids.fill(rows, patch.row, walk.inner, patch.count);
      for (int64_t j = 0, row = patch.row; j < patch.count; j += walk.inner, ++row) {
        std::fill(zeros + j, zeros + j + walk.inner, zero_of(row));
      }
    }
    for (int64_t repeat = patch.first; repeat < patch.last; ++repeat) {
      f(repeat * patch.period + patch.column, patch.count, grids, zeros);
    }
  }
}

template <class S>
QK_CLONES void quantize_units(const Walk& walk, const Rows<Compute<S>>& rows, const S* x, uint8_t* q, int64_t first,
                              int64_t last) {
  each_stretch(walk, rows, first, last,
               [&](int64_t i, int64_t count, const auto& grids, const auto& zeros) __attribute__((always_inline)) {
                 for (int64_t j = 0; j < count; ++j) q[i + j] = uint8_t(quantize(load(x[i + j]), grids[j], zeros[j]));
               });
}

template <class Q, class S>
QK_CLONES void dequantize_units(const Walk& walk, const Rows<Compute<S>>& rows, const Q* q, S* y, int64_t first,
                                int64_t last) {
  each_stretch(walk, rows, first, last,
               [&](int64_t i, int64_t count, const auto& grids, const auto& zeros) __attribute__((always_inline)) {
                 for (int64_t j = 0; j < count; ++j)
                   y[i + j] = store<S>(dequantize(int32_t(q[i + j]), grids[j], zeros[j]));
               });
}

Tensor quantize_cpu(const Tensor& x_, const Tensor& scale, const MaybeTensor& offset, const MaybeTensor& zero_point,
                    int64_t axis, int64_t quant_min, int64_t quant_max) {
  const Tensor x = ordered(x_, scale, axis);
  Tensor q = allocate_like(x, quant_max > 127 ? ScalarType::Byte : ScalarType::Char);
  const Walk walk(x.numel(), layout_of(x, scale, axis));
  with_storage(x.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    const RowTensors<Compute<S>> rows(x.scalar_type(), scale, offset, zero_point, quant_min, quant_max);
    torch::stable::parallel_for(0, walk.units(), walk.grain(), [&](int64_t first, int64_t last) {
      quantize_units<S>(walk, rows.rows, static_cast<const S*>(x.const_data_ptr()),
                        static_cast<uint8_t*>(q.mutable_data_ptr()), first, last);
    });
  });
  return q;
}

Tensor dequantize_cpu(const Tensor& q_, const Tensor& scale, const MaybeTensor& offset, const MaybeTensor& zero_point,
                      int64_t axis, ScalarType dtype) {
  const Tensor q = ordered(q_, scale, axis);
  const uint8_t* in = bytes_of(q);
  Tensor y = allocate_like(q, dtype);
  const Walk walk(q.numel(), layout_of(q, scale, axis));
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    const RowTensors<Compute<S>> rows(dtype, scale, offset, zero_point, 0, 0);
    S* out = static_cast<S*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, walk.units(), walk.grain(), [&](int64_t first, int64_t last) {
      if (q.scalar_type() == ScalarType::Byte) {
        dequantize_units(walk, rows.rows, in, out, first, last);
      } else {
        dequantize_units(walk, rows.rows, reinterpret_cast<const int8_t*>(in), out, first, last);
      }
    });
  });
  return y;
}

Tensor pack_cpu(const Tensor& q_, int64_t bits) {
  const Tensor q = row_major(q_);
  const uint8_t* in = bytes_of(q);
  const int64_t per_byte = fields_per_byte(bits), bytes = (q.numel() + per_byte - 1) / per_byte;
  Tensor p = allocate(q, bytes, ScalarType::Byte);
  uint8_t* out = static_cast<uint8_t*>(p.mutable_data_ptr());
  torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      out[i] = pack_byte(in + i * per_byte, std::min(per_byte, q.numel() - i * per_byte), int(bits));
    }
  });
  return p;
}

Tensor unpack_cpu(const Tensor& p_, int64_t bits, int64_t numel, bool is_signed) {
  const Tensor p = row_major(p_);
  const uint8_t* in = bytes_of(p);
  const int64_t per_byte = fields_per_byte(bits);
  check_holds(p, bits, numel);
  Tensor q = allocate(p, numel, is_signed ? ScalarType::Char : ScalarType::Byte);
  uint8_t* out = static_cast<uint8_t*>(q.mutable_data_ptr());
  torch::stable::parallel_for(0, numel, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      out[i] = unpack_field(in[i / per_byte], int(i % per_byte), int(bits), is_signed);
    }
  });
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize_cpu));
  m.impl("dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("pack", TORCH_BOX(&pack_cpu));
  m.impl("unpack", TORCH_BOX(&unpack_cpu));
}

}  // namespace qk
