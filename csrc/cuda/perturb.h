// Lists of tensors on the GPU: one launch takes a table of tensors by value, cut into chunks of equal size.
#pragma once
#include "cuda/launch.h"

namespace qk {

// What a launch knows of one tensor. `first` is its first chunk in the launch, `index` its position in the list.
struct Entry {
  const void *w, *d, *p;
  int64_t numel;
  int32_t first, index;
};

constexpr int64_t kListChunk = 8192;  // elements of a chunk
constexpr int kEntries = 320;         // tensors of a launch, at most
constexpr int kOutputs = 1920;        // outputs of a launch, at most: entries times copies

// Kernel parameters hold 32764 bytes. Outputs: copy k of entry e at out[k * entries + e].
struct Table {
  Entry entry[kEntries];
  void* out[kOutputs];
  int32_t entries, chunks, copies;
};

struct PerturbSettings {
  int64_t move;
  bool points;
  const double* coefficients;  // (copies, width), on the device
  int width, first_row;        // the row of the launch's first copy
  int64_t first_copy;          // its number
  const int64_t* seed;
};

// partial: a double per chunk of the launch; squares: a double per tensor of the list, by index.
cudaError_t launch_list_squares(const Table& table, Dtype type, double eta, double* partial, double* squares,
                                cudaStream_t stream);
// Three doubles per chunk: a.b, a.a and b.b, `stride` apart.
cudaError_t launch_list_products(const Table& table, Dtype type, double* partial, int64_t stride, cudaStream_t stream);
// norms[t] = sqrt(squares[t]), norm = the root of their sum.
cudaError_t launch_list_norms(const double* squares, int64_t count, double* norms, double* norm, cudaStream_t stream);
// sums[i] = the sum of partial[i * stride] to partial[i * stride + chunks - 1], i < 3.
cudaError_t launch_list_sums(const double* partial, int64_t chunks, int64_t stride, double* sums, cudaStream_t stream);
cudaError_t launch_perturb(const Table& table, Dtype type, const PerturbSettings& settings, cudaStream_t stream);

}  // namespace qk
