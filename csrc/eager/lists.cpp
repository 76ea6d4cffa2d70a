// Lists of parameters, for SAM's steps: reading, clearing and exchanging what hangs on each, and the step uphill.
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/flat.h"
#include "eager/eager.h"

namespace qk {
namespace {

Py_ssize_t length(PyObject* list) { return PyList_GET_SIZE(list); }

// An item, kept by its Python object: a reference in C++ would cost more. What is freed in a loop may run Python code,
// which may change the list.
struct Item {
  pybind11::object kept;
  const at::Tensor& tensor;

  Item(PyObject* list, Py_ssize_t i)
      : kept(pybind11::reinterpret_borrow<pybind11::object>(PyList_GET_ITEM(list, i))),
        tensor(Arguments::as_tensor(kept.ptr())) {}
};

// Numbers in memory, which no subclass and no mode observes.
bool plain(const at::Tensor& t) {
  const auto type = t.scalar_type();
  const bool known = type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
  return known && t.layout() == at::kStrided && !t._is_zerotensor() && !at::isTensorSubclassLike(t);
}

bool alike(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device() && a.sizes() == b.sizes();
}

// p.data = t; where nothing but the memory changes, in a quarter of the time
void set_one(const at::Tensor& p, const at::Tensor& t) {
  at::TensorImpl* impl = p.unsafeGetTensorImpl();
  const bool same_kind = impl->key_set() == t.key_set() && alike(p, t) && p.strides() == t.strides();
  if (same_kind && plain(p) && impl->allow_tensor_metadata_change()) {
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
    const Item p(params, i);
    at::Tensor gradient = p.tensor.grad();
    if (!gradient.defined()) continue;
    sparse = sparse || gradient.is_sparse();
    kept.append(p.kept);
    gradients.append(pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(gradient))));
  }
  return pybind11::make_tuple(kept, gradients, sparse).release().ptr();
  END_HANDLE_TH_ERRORS
}

// clear_gradients(params)
PyObject* clear_gradients(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PyObject* params = Arguments(given, count, 1).list(0);
  for (Py_ssize_t i = 0; i < length(params); ++i) {
    const Item p(params, i);
    at::Tensor freed_last;
    std::swap(freed_last, p.tensor.mutable_grad());
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// set_data(params, tensors): p.data = t for each pair
PyObject* set_data(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments args(given, count, 2);
  PyObject *params = args.list(0), *tensors = args.list(1);
  TORCH_CHECK_VALUE(length(params) == length(tensors), "lists differ in length");
  for (Py_ssize_t i = 0; i < std::min(length(params), length(tensors)); ++i) {
    const Item p(params, i), t(tensors, i);
    set_one(p.tensor, t.tensor);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// climb(copies, params, directions, originals, rho, eta): multi_climb, if it serves here: on lists of dense CPU tensors
// whose memory is that of `originals`. Else False, and nothing is written.
PyObject* climb(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Arguments args(given, count, 6);
  const std::array<PyObject*, 4> lists = {args.list(0), args.list(1), args.list(2), args.list(3)};
  const Py_ssize_t size = length(lists[0]);
  const bool same_length =
      std::all_of(lists.begin(), lists.end(), [&](PyObject* list) { return length(list) == size; });
  if (size == 0 || !same_length) Py_RETURN_FALSE;
  const double rho = args.number(4), eta = given[5] == Py_None ? 0.0 : args.number(5);
  const auto item = [](PyObject* list, Py_ssize_t i) -> const at::Tensor& {
    return Arguments::as_tensor(PyList_GET_ITEM(list, i));
  };
  const auto serves = [](const at::Tensor& t) { return t.device().is_cpu() && t.is_contiguous() && plain(t); };
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor &copy = item(lists[0], i), &w = item(lists[1], i), &d = item(lists[2], i);
    if (!serves(copy) || !serves(w) || !serves(d) || !alike(copy, w) || !alike(d, w)) Py_RETURN_FALSE;
    if (w.const_data_ptr() != item(lists[3], i).const_data_ptr()) Py_RETURN_FALSE;
  }
  std::vector<void*> out;
  std::vector<Flat> params, directions;
  std::vector<at::Storage> held;  // while other threads of Python run, which may change the lists
  out.reserve(size), params.reserve(size), directions.reserve(size), held.reserve(3 * size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor &copy = item(lists[0], i), &w = item(lists[1], i), &d = item(lists[2], i);
    for (const at::Tensor* t : {&copy, &w, &d}) held.push_back(t->storage());
    torch::autograd::impl::bump_version(copy);
    out.push_back(copy.mutable_data_ptr());
    params.push_back({w.scalar_type(), w.numel(), w.const_data_ptr()});
    directions.push_back({d.scalar_type(), d.numel(), d.const_data_ptr()});
  }
  {
    const pybind11::gil_scoped_release released;
    qkernels_climb(out.data(), params.data(), directions.data(), size, rho, given[5] == Py_None ? nullptr : &eta);
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

}  // namespace qk
