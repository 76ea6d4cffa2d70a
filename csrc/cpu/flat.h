// A tensor's elements in one stretch of memory; what the loops over lists work on, and the eager library hands them.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace qk {

struct Flat {
  torch::headeronly::ScalarType type;
  int64_t numel;
  const void* data;
};

}  // namespace qk

// multi_climb without a dispatcher: out[i] <- params[i] + rho directions[i] / ||directions||, or ASAM's step where eta
// is given. The lists are of `count` tensors each, alike in type and number of elements.
extern "C" __attribute__((visibility("default"))) void qkernels_climb(void* const* out, const qk::Flat* params,
                                                                      const qk::Flat* directions, int64_t count,
                                                                      double rho, const double* eta);
