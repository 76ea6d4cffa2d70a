// Lists of parameters, for SAM's steps: reading, clearing and exchanging what hangs on each, and the step uphill.
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "cpu/flat.h"
#include "eager/eager.h"

namespace qk {
namespace {

Py_ssize_t length(PyObject* list) { return PyList_GET_SIZE(list); }
const at::Tensor& at_(PyObject* list, Py_ssize_t i) { return Arguments::as_tensor(PyList_GET_ITEM(list, i)); }

// Numbers in memory, which no subclass and no mode observes.
bool plain(const at::Tensor& t) {
  return t.layout() == at::kStrided && t.is_floating_point() && !t.is_neg() && !at::isTensorSubclassLike(t);
}

bool alike(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device() && a.sizes() == b.sizes();
}

// p.data = t; where nothing but the memory changes, in a quarter of the time
void set_one(const at::Tensor& p, const at::Tensor& t) {
  at::TensorImpl* impl = p.unsafeGetTensorImpl();
  if (plain(p) && plain(t) && alike(p, t) && p.strides() == t.strides() && impl->allow_tensor_metadata_change()) {
    impl->set_storage_keep_dtype(t.storage());
    impl->set_storage_offset(t.storage_offset());
  } else {
    p.set_data(t);
  }
}

}  // namespace

// with_gradients(params): (those that have a gradient, their gradients, whether one of these is sparse)
PyObject* with_gradients(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PyObject* params = Arguments(given, count, 1).list(0);
  pybind11::list kept, gradients;
  bool sparse = false;
  for (Py_ssize_t i = 0; i < length(params); ++i) {
    const at::Tensor& gradient = at_(params, i).grad();
    if (!gradient.defined()) continue;
    sparse = sparse || gradient.is_sparse();
    kept.append(pybind11::handle(PyList_GET_ITEM(params, i)));
    gradients.append(pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(gradient)));
  }
  return pybind11::make_tuple(kept, gradients, sparse).release().ptr();
  END_HANDLE_TH_ERRORS
}

// clear_gradients(params)
PyObject* clear_gradients(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PyObject* params = Arguments(given, count, 1).list(0);
  for (Py_ssize_t i = 0; i < length(params); ++i) at_(params, i).mutable_grad().reset();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// set_data(params, tensors): p.data = t for each pair
PyObject* set_data(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments args(given, count, 2);
  PyObject *params = args.list(0), *tensors = args.list(1);
  TORCH_CHECK_VALUE(length(params) == length(tensors), "lists differ in length");
  for (Py_ssize_t i = 0; i < length(params); ++i) set_one(at_(params, i), at_(tensors, i));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// climb(copies, params, directions, originals, rho, eta): multi_climb, if it serves here: on lists of dense CPU tensors
// whose memory is that of `originals`. Else False, and nothing is written.
PyObject* climb(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments args(given, count, 6);
  PyObject *copies = args.list(0), *params = args.list(1), *directions = args.list(2), *originals = args.list(3);
  const Py_ssize_t size = length(params);
  if (size == 0 || length(copies) != size || length(directions) != size || length(originals) != size) Py_RETURN_FALSE;
  const double rho = args.number(4), eta = given[5] == Py_None ? 0.0 : args.number(5);
  std::vector<void*> out;
  std::vector<Flat> weights, gradients;
  out.reserve(size), weights.reserve(size), gradients.reserve(size);
  std::vector<at::Storage> held;  // while other threads of Python run, which may empty the lists
  held.reserve(3 * size);
  const auto serves = [](const at::Tensor& t) { return t.device().is_cpu() && t.is_contiguous() && plain(t); };
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor &c = at_(copies, i), &w = at_(params, i), &d = at_(directions, i);
    if (!serves(c) || !serves(w) || !serves(d) || !alike(c, w) || !alike(d, w)) Py_RETURN_FALSE;
    if (w.const_data_ptr() != at_(originals, i).const_data_ptr()) Py_RETURN_FALSE;
    out.push_back(c.mutable_data_ptr());
    weights.push_back({w.scalar_type(), w.numel(), w.const_data_ptr()});
    gradients.push_back({d.scalar_type(), d.numel(), d.const_data_ptr()});
    for (const at::Tensor* t : {&c, &w, &d}) held.push_back(t->storage());
  }
  for (Py_ssize_t i = 0; i < size; ++i) torch::autograd::impl::bump_version(at_(copies, i));
  {
    const pybind11::gil_scoped_release released;
    qkernels_climb(out.data(), weights.data(), gradients.data(), size, rho, given[5] == Py_None ? nullptr : &eta);
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

}  // namespace qk
