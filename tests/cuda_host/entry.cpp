// The launchers with C names: integers as int64_t, reals as double, so that Python needs no signatures.
#include "cuda/launch.h"
#include "cuda/moments.h"
#include "cuda/perturb.h"

using namespace qk;

namespace {

Walk walk_of(const int64_t* w) { return Walk(w[0], {w[1], w[2]}); }

// Lists come as five arrays.
std::vector<Member> members_of(int64_t count, const int64_t* types, const int64_t* numels, void* const* w,
                               void* const* d, void* const* p) {
  std::vector<Member> list;
  for (int64_t t = 0; t < count; ++t) {
    list.push_back({Dtype(types[t]), numels[t], w ? w[t] : nullptr, d ? d[t] : nullptr, p ? p[t] : nullptr});
  }
  return list;
}

}  // namespace

// walk: numel, rows, inner. numbers: scale, offset, zero_point, bounds.
extern "C" {

int64_t walk_is_columns(const int64_t* walk) { return walk_of(walk).columns; }
int64_t walk_units(const int64_t* walk) { return walk_of(walk).units; }
int64_t walk_sums(const int64_t* walk) { return sums_of(walk_of(walk)); }
int64_t walk_partials(const int64_t* walk) { return walk_of(walk).partials(); }

int64_t fake_quantize(const int64_t* walk, int64_t type, const void* x, void* y, const void* scale, const void* offset,
                      const int32_t* zero_point, int64_t quant_min, int64_t quant_max, int64_t kind, double a, double b,
                      const int64_t* seed, int64_t stream, const void* shift, const float* shift_scale) {
  return launch_fake_quantize(walk_of(walk), Dtype(type), x, y, {scale, offset, zero_point, quant_min, quant_max},
                              {kind, float(a), float(b), seed, uint64_t(stream), shift, shift_scale}, nullptr);
}

int64_t fake_quantize_backward(const int64_t* walk, int64_t type, const void* grad, const void* x, void* dx,
                               const void* scale, const void* offset, const int32_t* zero_point, int64_t quant_min,
                               int64_t quant_max, double grad_scale, int64_t clip_only, double ewgs, int64_t kind,
                               double a, double b, const int64_t* seed, int64_t stream, void* dscale, void* doffset,
                               void* partial) {
  return launch_fake_quantize_backward(walk_of(walk), Dtype(type), grad, x, dx,
                                       {scale, offset, zero_point, quant_min, quant_max},
                                       {kind, float(a), float(b), seed, uint64_t(stream), nullptr, nullptr},
                                       {grad_scale, ewgs, clip_only != 0}, {dscale, doffset, partial}, nullptr);
}

int64_t quantize(const int64_t* walk, int64_t type, const void* x, uint8_t* q, const void* scale, const void* offset,
                 const int32_t* zero_point, int64_t quant_min, int64_t quant_max) {
  return launch_quantize(walk_of(walk), Dtype(type), x, q, {scale, offset, zero_point, quant_min, quant_max}, nullptr);
}

int64_t dequantize(const int64_t* walk, int64_t type, const uint8_t* q, int64_t is_signed, void* y, const void* scale,
                   const void* offset, const int32_t* zero_point) {
  return launch_dequantize(walk_of(walk), Dtype(type), q, is_signed, y, {scale, offset, zero_point, 0, 0}, nullptr);
}

int64_t pack(const uint8_t* q, int64_t numel, int64_t bits, uint8_t* p) {
  return launch_pack(q, numel, int(bits), p, nullptr);
}

int64_t unpack(const uint8_t* p, int64_t numel, int64_t bits, int64_t is_signed, uint8_t* q) {
  return launch_unpack(p, numel, int(bits), is_signed, q, nullptr);
}

int64_t standardized_distance(const int64_t* walk, int64_t type, const void* student, const void* teacher, double eps,
                              int64_t mean, double* partial, void* distance, double* moments) {
  return launch_standardized_distance(walk_of(walk), Dtype(type), student, teacher, {eps, mean != 0}, partial, distance,
                                      moments, nullptr);
}

int64_t standardized_distance_backward(const int64_t* walk, int64_t type, const void* grad, int64_t grad_stride,
                                       const void* student, const void* teacher, const double* moments, double eps,
                                       int64_t mean, void* slopes, void* ds) {
  return launch_standardized_distance_backward(walk_of(walk), Dtype(type), grad, grad_stride, student, teacher, moments,
                                               {eps, mean != 0}, slopes, ds, nullptr);
}

int64_t list_chunks(int64_t count, const int64_t* numels) {
  int64_t sum = 0;
  for (int64_t t = 0; t < count; ++t) sum += chunks_of(numels[t]);
  return sum;
}

int64_t multi_norm(int64_t count, const int64_t* types, const int64_t* numels, void* const* weights,
                   void* const* tensors, double eta, double* partial, double* squares, double* norms, double* norm) {
  cudaError_t error = cudaSuccess;
  for_tables(members_of(count, types, numels, weights, tensors, nullptr), nullptr, 0,
             [&](const Table& table, Dtype type) {
               if (error == cudaSuccess) error = launch_list_squares(table, type, eta, partial, squares, nullptr);
             });
  return error != cudaSuccess ? error : launch_list_norms(squares, count, norms, norm, nullptr);
}

int64_t multi_dot(int64_t count, const int64_t* types, const int64_t* numels, void* const* a, void* const* b,
                  double* partial, double* sums) {
  const auto members = members_of(count, types, numels, a, b, nullptr);
  const int64_t chunks = chunks_of(members);
  cudaError_t error = cudaSuccess;
  for_tables(members, nullptr, 0, [&](const Table& table, Dtype type) {
    if (error == cudaSuccess) error = launch_list_products(table, type, partial, chunks, nullptr);
    partial += table.chunks;
  });
  partial -= chunks;
  return error != cudaSuccess ? error : launch_list_sums(partial, chunks, chunks, sums, nullptr);
}

int64_t multi_perturb(int64_t count, const int64_t* types, const int64_t* numels, void* const* params,
                      void* const* directions, void* const* points, void* const* out, int64_t copies, int64_t move,
                      const double* coefficients, int64_t width, const int64_t* seed, int64_t first_row,
                      int64_t first_copy) {
  cudaError_t error = cudaSuccess;
  for_tables(members_of(count, types, numels, params, directions, points), out, int32_t(copies),
             [&](const Table& table, Dtype type) {
               if (error != cudaSuccess) return;
               error = launch_perturb(
                   table, type, {move, points != nullptr, coefficients, int(width), int(first_row), first_copy, seed},
                   nullptr);
             });
  return error;
}
}
