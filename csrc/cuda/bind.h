// What the CUDA ops need of torch: the caller's device and stream, dtypes as the launchers name them.
#pragma once
// The declarations of the CUDA shims stand behind this name in torch's headers.
#define USE_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/launch.h"
#include "glue.h"

namespace qk {

inline Dtype dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false, "qkernels: ", name, " must be float32, bfloat16, float16 or float64");
  }
}

// Makes x's device the current one; the other tensors have to be there too.
struct Device {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;

  explicit Device(const Tensor& x) : index(x.get_device_index()), guard(index) {}
  const Device& check(const MaybeTensor& t, const char* name) const {
    STD_TORCH_CHECK(!t || (t->is_cuda() && t->get_device_index() == index), "qkernels: ", name,
                    " must be on cuda:", index, " as the other tensors are");
    return *this;
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

}  // namespace qk
