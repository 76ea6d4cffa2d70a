// What Python spends too long on for each tensor, in C++: the way from a Python call to an op and back.
//
// Nothing is computed here. This library is built against one torch and one Python, and is loaded beside these alone
// (qkernels/eager.py); elsewhere the same is done in Python.
#pragma once
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

namespace qk {

using MaybeTensor = std::optional<at::Tensor>;

// The arguments of a call, by position. What is no tensor or no number is a TypeError.
struct Arguments {
  PyObject* const* given;

  Arguments(PyObject* const* given, Py_ssize_t count, Py_ssize_t expected) : given(given) {
    TORCH_CHECK_TYPE(count == expected, "expected ", expected, " arguments, got ", count);
  }
  const at::Tensor& tensor(int i) const { return as_tensor(given[i]); }
  MaybeTensor maybe_tensor(int i) const { return given[i] == Py_None ? MaybeTensor() : tensor(i); }
  int64_t integer(int i) const {
    const int64_t value = PyLong_AsLongLong(given[i]);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
  double number(int i) const {
    const double value = PyFloat_AsDouble(given[i]);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
  bool flag(int i) const { return given[i] == Py_True; }
  PyObject* list(int i) const {
    TORCH_CHECK_TYPE(PyList_Check(given[i]), "expected a list as argument ", i);
    return given[i];
  }
  static const at::Tensor& as_tensor(PyObject* object) {
    TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor");
    return THPVariable_Unpack(object);
  }
};

// The functions of the module, all of one type.
using Call = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);
Call fake_quantize, set_python_backward, set_python_always;  // fake_quantize.cpp
Call with_gradients, clear_gradients, set_data, climb;       // lists.cpp

}  // namespace qk
