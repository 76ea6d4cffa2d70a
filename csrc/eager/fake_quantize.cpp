// The fake quantizer's autograd node. What it means stands in qkernels/ops/quantizer.py: class FakeQuantize.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <bit>

#include "eager/eager.h"

namespace qk {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a call brings beside its tensors, in the order of the Python class's `settings`.
struct Settings {
  int64_t axis, quant_min, quant_max;
  double grad_scale;
  bool clip_only;
  double ewgs;
  int64_t noise;
  double a, b;
  int64_t stream;

  // A node keeps a list of integers; a double travels as its bits.
  c10::List<int64_t> packed() const {
    const auto bits = [](double value) { return std::bit_cast<int64_t>(value); };
    return {axis,       quant_min, quant_max, bits(grad_scale), int64_t(clip_only),
            bits(ewgs), noise,     bits(a),   bits(b),          stream};
  }
  static Settings unpacked(const c10::List<int64_t>& list) {
    const auto number = [&](size_t i) { return std::bit_cast<double>(list.get(i)); };
    return {list.get(0), list.get(1), list.get(2), number(3), list.get(4) != 0,
            number(5),   list.get(6), number(7),   number(8), list.get(9)};
  }
};

struct Inputs {
  Tensor x, scale;
  MaybeTensor offset, zero_point, seed, shift, shift_scale;
};

using Forward = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, int64_t, int64_t,
                       int64_t, double, double, const MaybeTensor&, int64_t, const MaybeTensor&, const MaybeTensor&);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                                    const MaybeTensor&, int64_t, int64_t, int64_t, double, bool, double,
                                                    int64_t, double, double, const MaybeTensor&, int64_t);

template <class F>
c10::TypedOperatorHandle<F> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Tensor quantized(const Inputs& in, const Settings& k) {
  static const auto run = op<Forward>("qkernels::fake_quantize");
  return run.call(in.x, in.scale, in.offset, in.zero_point, k.axis, k.quant_min, k.quant_max, k.noise, k.a, k.b,
                  in.seed, k.stream, in.shift, in.shift_scale);
}

PyObject* python_backward = nullptr;  // (grad, saved..., settings...) -> (dx, dscale, doffset)
std::atomic<bool> python_always = false;

// Where the gradient is differentiated itself, or another backend than the dispatcher's computes it.
variable_list in_python(const Tensor& grad, const variable_list& saved, const Settings& k) {
  pybind11::gil_scoped_acquire gil;
  const auto wrapped = [](const Tensor& t) {
    return t.defined() ? pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t)) : pybind11::none();
  };
  const pybind11::object result = pybind11::reinterpret_borrow<pybind11::object>(python_backward)(
      wrapped(grad), wrapped(saved[0]), wrapped(saved[1]), wrapped(saved[2]), wrapped(saved[3]), wrapped(saved[4]),
      k.axis, k.quant_min, k.quant_max, k.grad_scale, k.clip_only, k.ewgs, k.noise, k.a, k.b, k.stream);
  const auto unwrapped = [&](int i) {
    const pybind11::object t = result[pybind11::int_(i)];
    return t.is_none() ? Tensor() : Arguments::as_tensor(t.ptr());
  };
  return {unwrapped(0), unwrapped(1), saved[2].defined() ? unwrapped(2) : Tensor()};
}

}  // namespace

// By this name users meet it, as grad_fn; torch finds the inputs to differentiate among the direct arguments alone.
struct FakeQuantize : torch::autograd::Function<FakeQuantize> {
  static constexpr bool is_traceable = true;  // by torch's compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const MaybeTensor& offset,
                        const MaybeTensor& zero_point, const Inputs& in, const Settings& settings) {
    ctx->save_for_backward(
        {x, scale, offset.value_or(Tensor()), zero_point.value_or(Tensor()), in.seed.value_or(Tensor())});
    ctx->saved_data["settings"] = settings.packed();
    const at::AutoDispatchBelowADInplaceOrView below;
    return quantized(in, settings);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto run = op<Backward>("qkernels::fake_quantize_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Settings k = Settings::unpacked(ctx->saved_data["settings"].toIntList());
    variable_list found;
    if (at::GradMode::is_enabled() || grads[0]._fw_grad(0).defined() || python_always) {
      found = in_python(grads[0], saved, k);
    } else {
      const auto given = [](const Tensor& t) { return t.defined() ? MaybeTensor(t) : MaybeTensor(); };
      const at::AutoDispatchBelowADInplaceOrView below;
      auto [dx, dscale, doffset] =
          run.call(grads[0], saved[0], saved[1], given(saved[2]), given(saved[3]), k.axis, k.quant_min, k.quant_max,
                   k.grad_scale, k.clip_only, k.ewgs, k.noise, k.a, k.b, given(saved[4]), k.stream);
      found = {dx, dscale, saved[2].defined() ? doffset : Tensor()};
    }
    found.resize(6);
    return found;
  }
};

// FakeQuantize.apply of Python: the same arguments, the same result.
PyObject* fake_quantize(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments args(given, count, 17);
  const Inputs in{args.tensor(0),       args.tensor(1),       args.maybe_tensor(2), args.maybe_tensor(3),
                  args.maybe_tensor(4), args.maybe_tensor(5), args.maybe_tensor(6)};
  const Settings k{args.integer(7), args.integer(8),  args.integer(9), args.number(10), args.flag(11),
                   args.number(12), args.integer(13), args.number(14), args.number(15), args.integer(16)};
  Tensor y;
  {
    const pybind11::gil_scoped_release released;
    y = at::GradMode::is_enabled() ? FakeQuantize::apply(in.x, in.scale, in.offset, in.zero_point, in, k)
                                   : quantized(in, k);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// set_python_backward(function): what computes a gradient that is left to Python.
PyObject* set_python_backward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments args(given, count, 1);
  Py_INCREF(given[0]);
  Py_XSETREF(python_backward, given[0]);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// set_python_always(whether): every gradient is left to Python.
PyObject* set_python_always(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  python_always = Arguments(given, count, 1).flag(0);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace qk
