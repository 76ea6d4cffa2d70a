// The element functions for NumPy, without torch: the shared headers themselves under test, and a reader of packed
// weights. Everything broadcasts; submodules float32 and float64 hold the quantizer in their precision.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "math/noise.h"
#include "math/pack.h"
#include "math/quantize.h"
#include "math/reciprocal.h"

namespace py = pybind11;

namespace {

template <class T>
qk::Grid<T> grid(T scale, T offset, int64_t quant_min, int64_t quant_max, int64_t zero_point) {
  return {qk::safe_scale(scale), offset, T(quant_min - zero_point), T(quant_max - zero_point)};
}

// Calls f with the noise kind, as the element functions take it, as a constant.
template <class F>
auto with_kind(int64_t kind, F f) {
  using namespace qk;
  switch (math_kind(kind)) {
    case kPlain:
      return f(std::integral_constant<int64_t, kPlain>());
    case kTempering:
      return f(std::integral_constant<int64_t, kTempering>());
    case kAfter:
      return f(std::integral_constant<int64_t, kAfter>());
    case kBefore:
      return f(std::integral_constant<int64_t, kBefore>());
    case kPseudo:
      return f(std::integral_constant<int64_t, kPseudo>());
    case kStochastic:
      return f(std::integral_constant<int64_t, kStochastic>());
    case kShift:
      return f(std::integral_constant<int64_t, kShift>());
    default:
      throw py::value_error("noise must be a kind from 0 to 7, got " + std::to_string(kind));
  }
}

template <class T>
T fake_quantize(T x, T scale, int64_t quant_min, int64_t quant_max, T offset, int64_t zero_point, int64_t noise, T n,
                float a, float b) {
  const auto g = grid(scale, offset, quant_min, quant_max, zero_point);
  return with_kind(noise, [&](auto kind) { return qk::fake_quantize<kind()>(x, g, n, a, b); });
}

template <class T>
qk::Gradient<T> gradient(T grad, T x, qk::Grid<T> g, int64_t noise, T n, qk::Estimator<T> estimator) {
  return with_kind(noise, [&](auto kind) { return qk::fake_quantize_backward<kind()>(grad, x, g, n, estimator); });
}

template <class T>
int32_t quantize(T x, T scale, int64_t quant_min, int64_t quant_max, T offset, int32_t zero_point) {
  return qk::quantize(x, grid(scale, offset, quant_min, quant_max, zero_point), zero_point);
}

template <class T>
T dequantize(int32_t q, T scale, T offset, int32_t zero_point) {
  return qk::dequantize(q, grid(scale, offset, 0, 0, 0), zero_point);
}

template <class T>
void define_quantizer(py::module_ m) {
  using namespace py::literals;
  using Array = py::array_t<T>;
  const T zero(0);
  m.def("fake_quantize", py::vectorize(fake_quantize<T>), "x"_a, "scale"_a, "quant_min"_a, "quant_max"_a,
        "offset"_a = zero, "zero_point"_a = 0, "noise"_a = 0, "n"_a = zero, "a"_a = 0.0f, "b"_a = 0.0f,
        "y of each element; n is its random variate.");
  m.def(
      "fake_quantize_backward",
      [](Array grad, Array x, Array scale, int64_t quant_min, int64_t quant_max, Array offset,
         py::array_t<int64_t> zero_point, int64_t noise, Array n, bool clip_only, T ewgs) {
        auto term = [&](auto pick) {
          return py::vectorize([=](T grad, T x, T scale, T offset, int64_t zero_point, T n) {
            const auto g = grid(scale, offset, quant_min, quant_max, zero_point);
            return pick(gradient(grad, x, g, noise, n, {clip_only, ewgs}), scale);
          })(grad, x, scale, offset, zero_point, n);
        };
        return py::make_tuple(term([](qk::Gradient<T> t, T) { return t.dx; }),
                              term([](qk::Gradient<T> t, T scale) { return qk::sign_of(scale) * t.dscale; }),
                              term([](qk::Gradient<T> t, T) { return t.doffset; }));
      },
      "grad"_a, "x"_a, "scale"_a, "quant_min"_a, "quant_max"_a, "offset"_a = zero, "zero_point"_a = 0, "noise"_a = 0,
      "n"_a = zero, "clip_only"_a = false, "ewgs"_a = zero,
      "(dx, dscale, doffset) of each element, before the row's sum.");
  m.def("quantize", py::vectorize(quantize<T>), "x"_a, "scale"_a, "quant_min"_a, "quant_max"_a, "offset"_a = zero,
        "zero_point"_a = 0, "int32 level of each element.");
  m.def("dequantize", py::vectorize(dequantize<T>), "q"_a, "scale"_a, "offset"_a = zero, "zero_point"_a = 0,
        "(q - zero_point) * scale + offset.");
}

qk::Words words_of(int64_t seed, int64_t stream, int64_t counter) {
  return qk::philox(uint64_t(seed), uint64_t(stream), uint64_t(counter));
}

// Elements first .. first + count - 1 of a stream; `convert` makes four values from the words of one counter.
template <class T, class F>
py::array_t<T> draw(int64_t seed, int64_t stream, int64_t count, int64_t first, F convert) {
  if (count < 0 || first < 0) throw py::value_error("count and first must be at least 0");
  py::array_t<T> out(count);
  T* data = out.mutable_data();
  for (int64_t i = 0; i < count;) {
    T four[4];
    convert(words_of(seed, stream, (first + i) / 4), four);
    for (int64_t k = (first + i) % 4; k < 4 && i < count; ++k) data[i++] = four[k];
  }
  return out;
}

int checked_bits(int bits) {
  if (bits != 2 && bits != 4 && bits != 8) throw py::value_error("bits must be 2, 4 or 8, got " + std::to_string(bits));
  return bits;
}

py::array_t<uint8_t> pack(const py::array& levels, int bits) {
  if (levels.dtype().itemsize() != 1) throw py::type_error("q must be an int8 or uint8 array");
  const auto q = py::array::ensure(levels, py::array::c_style);
  const int64_t fields = 8 / checked_bits(bits), count = q.size();
  const auto* from = static_cast<const uint8_t*>(q.data());
  py::array_t<uint8_t> out((count + fields - 1) / fields);
  uint8_t* to = out.mutable_data();
  for (int64_t i = 0; i < count; i += fields) *to++ = qk::pack_byte(from + i, std::min(fields, count - i), bits);
  return out;
}

py::array unpack(const py::array_t<uint8_t, py::array::c_style>& p, int bits, int64_t numel, bool is_signed) {
  const int64_t fields = 8 / checked_bits(bits);
  if (numel < 0 || p.size() != (numel + fields - 1) / fields)
    throw py::value_error("p must hold " + std::to_string((numel + fields - 1) / fields) + " bytes for " +
                          std::to_string(numel) + " levels, got " + std::to_string(p.size()));
  py::array out(is_signed ? py::dtype::of<int8_t>() : py::dtype::of<uint8_t>(), numel);
  auto* to = static_cast<uint8_t*>(out.mutable_data());
  for (int64_t i = 0; i < numel; ++i) to[i] = qk::unpack_field(p.data()[i / fields], int(i % fields), bits, is_signed);
  return out;
}

}  // namespace

PYBIND11_MODULE(_elements, m) {
  using namespace py::literals;
  m.doc() = "The arithmetic of csrc/math for NumPy arrays.";
  define_quantizer<float>(m.def_submodule("float32"));
  define_quantizer<double>(m.def_submodule("float64"));
  m.def("quotient", py::vectorize(qk::quotient), "x"_a, "scale"_a, "inverse"_a, "x / scale by multiplications.");
  m.def(
      "reciprocal",
      [](float scale, int64_t quant_min, int64_t quant_max) {
        const qk::Reciprocal by = qk::reciprocal(grid(scale, 0.0f, quant_min, quant_max, 0));
        return py::make_tuple(by.inverse, by.first, by.last, by.serves);
      },
      "scale"_a, "quant_min"_a, "quant_max"_a,
      "(inverse, first, last, serves): what stands in for a division by scale, and whether it does.");

  m.def(
      "words",
      [](int64_t seed, int64_t stream, int64_t count, int64_t first) {
        return draw<uint32_t>(seed, stream, count, first,
                              [](qk::Words w, uint32_t* to) { std::copy(w.w, w.w + 4, to); });
      },
      "seed"_a, "stream"_a, "count"_a, "first"_a = 0, "Philox4x32-10 words of elements first .. first + count - 1.");
  m.def(
      "uniform",
      [](int64_t seed, int64_t stream, int64_t count, int64_t first) {
        return draw<float>(seed, stream, count, first,
                           [](qk::Words w, float* to) { std::transform(w.w, w.w + 4, to, qk::uniform); });
      },
      "seed"_a, "stream"_a, "count"_a, "first"_a = 0, "Uniform on the multiples of 2**-24 in [0, 1).");
  m.def(
      "normal",
      [](int64_t seed, int64_t stream, int64_t count, int64_t first) {
        return draw<float>(seed, stream, count, first, [](qk::Words w, float* to) {
          const qk::Normals four = qk::normals(w);
          std::copy(four.n, four.n + 4, to);
        });
      },
      "seed"_a, "stream"_a, "count"_a, "first"_a = 0, "Standard normal.");
  m.def("philox", py::vectorize([](int64_t seed, int64_t stream, int64_t counter, int word) {
          return words_of(seed, stream, counter).w[word & 3];
        }),
        "seed"_a, "stream"_a, "counter"_a, "word"_a, "One of the four words of a counter.");
  m.def("switched_on", py::vectorize([](int64_t seed, int64_t stream, float p) {
          return qk::switched_on(uint64_t(seed), uint64_t(stream), p);
        }),
        "seed"_a, "stream"_a, "p"_a, "True with probability p.");
  m.def("tempering", py::vectorize(qk::tempering), "d"_a, "c"_a, "k"_a, "c * exp(-k d) * sqrt(d).");
  m.def("pack", &pack, "q"_a, "bits"_a, "Bytes of 8 / bits levels, the first in the lowest bits.");
  m.def("unpack", &unpack, "p"_a, "bits"_a, "numel"_a, "signed"_a = true, "The levels of pack's bytes.");
}
