// The launchers of the standardised distance: raw pointers and a stream, as those of launch.h.
#pragma once
#include "cuda/launch.h"

namespace qk {

// One number per channel `grad_stride` apart (0: the same for all); distances and slopes in the compute type.
struct DistanceSettings {
  double eps;
  bool mean;
};

// partial: 5 * walk.partials() doubles; moments: 5 * rows doubles.
cudaError_t launch_standardized_distance(const Walk& walk, Dtype type, const void* student, const void* teacher,
                                         const DistanceSettings& settings, double* partial, void* distance,
                                         double* moments, cudaStream_t stream);
// slopes: 5 * rows elements of the compute type.
cudaError_t launch_standardized_distance_backward(const Walk& walk, Dtype type, const void* grad, int64_t grad_stride,
                                                  const void* student, const void* teacher, const double* moments,
                                                  const DistanceSettings& settings, void* slopes, void* ds,
                                                  cudaStream_t stream);

}  // namespace qk
