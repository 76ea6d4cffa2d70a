// The standardised distance as torch sees it on CUDA: checks, outputs from torch's allocator, device and stream.
#include "cuda/bind.h"
#include "cuda/moments.h"

namespace qk {
namespace {

// Student and teacher in one memory order on the current device.
struct Pair {
  Device device;
  Tensor student, teacher;
  Walk walk;

  Pair(const Tensor& student_, const Tensor& teacher_, int64_t axis)
      : device(student_),
        student(dense(student_)),
        teacher(ordered(teacher_)),
        walk(student.numel(), channels_of(student, axis)) {}

  Dtype type() const { return dtype_of(student.scalar_type(), "student"); }

 private:
  Tensor ordered(const Tensor& t) const {
    device.check(t, "teacher");
    STD_TORCH_CHECK(t.scalar_type() == student.scalar_type(), "qkernels: student and teacher differ in dtype");
    return aligned(t, student);
  }
};

std::tuple<Tensor, Tensor> standardized_distance_cuda(const Tensor& student, const Tensor& teacher, int64_t axis,
                                                      double eps, bool mean) {
  const Pair pair(student, teacher, axis);
  const Walk& walk = pair.walk;
  Tensor distance = allocate(pair.student, walk.rows, compute_type(student.scalar_type()));
  Tensor moments = allocate(pair.student, std::array<int64_t, 2>{5, walk.rows}, ScalarType::Double);
  Tensor partial = allocate(pair.student, 5 * walk.partials(), ScalarType::Double);
  STD_CUDA_CHECK(launch_standardized_distance(
      walk, pair.type(), pair.student.const_data_ptr(), pair.teacher.const_data_ptr(), {eps, mean},
      static_cast<double*>(partial.mutable_data_ptr()), distance.mutable_data_ptr(),
      static_cast<double*>(moments.mutable_data_ptr()), pair.device.stream()));
  return {distance, moments};
}

Tensor standardized_distance_backward_cuda(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                           const Tensor& moments_, int64_t axis, double eps, bool mean) {
  const Pair pair(student, teacher, axis);
  const Walk& walk = pair.walk;
  pair.device.check(grad, "grad").check(moments_, "moments");
  const ScalarType type = compute_type(student.scalar_type());
  STD_TORCH_CHECK(grad.dim() == 1 && grad.numel() == walk.rows && grad.scalar_type() == type,
                  "qkernels: grad has the wrong dtype or length");
  const Tensor moments = row_values(moments_, ScalarType::Double, 5 * walk.rows, "moments");
  Tensor slopes = allocate(pair.student, 5 * walk.rows, type);
  Tensor ds = allocate_like(pair.student);
  STD_CUDA_CHECK(launch_standardized_distance_backward(
      walk, pair.type(), grad.const_data_ptr(), grad.stride(0), pair.student.const_data_ptr(),
      pair.teacher.const_data_ptr(), static_cast<const double*>(moments.const_data_ptr()), {eps, mean},
      slopes.mutable_data_ptr(), ds.mutable_data_ptr(), pair.device.stream()));
  return ds;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("standardized_distance", TORCH_BOX(&standardized_distance_cuda));
  m.impl("standardized_distance_backward", TORCH_BOX(&standardized_distance_backward_cuda));
}

}  // namespace qk
