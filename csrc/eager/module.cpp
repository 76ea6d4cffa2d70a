// What Python sees of this library.
#include "eager/eager.h"

namespace {

template <qk::Call call>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<qk::fake_quantize>("fake_quantize"),
    method<qk::set_python_backward>("set_python_backward"),
    method<qk::set_python_always>("set_python_always"),
    method<qk::with_gradients>("with_gradients"),
    method<qk::clear_gradients>("clear_gradients"),
    method<qk::set_data>("set_data"),
    method<qk::climb>("climb"),
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_eager", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__eager() { return PyModule_Create(&definition); }
