// Lists of tensors on the GPU: one launch takes a table of tensors by value, cut into chunks of equal size.
#pragma once
#include <memory>
#include <vector>

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

constexpr int kCopies = 16;  // copies of a launch, at most: they share one reading of the parameters

// Kernel parameters hold 32764 bytes. Outputs: copy k of entry e at out[k * entries + e].
struct Table {
  Entry entry[kEntries];
  void* out[kOutputs];
  int32_t entries, chunks, copies;
};

// One tensor of a list; w, d and p are null where the launch has no use for them.
struct Member {
  Dtype type;
  int64_t numel;
  const void *w, *d, *p;
};

inline int64_t chunks_of(int64_t numel) { return (numel + kListChunk - 1) / kListChunk; }
inline int64_t chunks_of(const std::vector<Member>& list) {
  int64_t sum = 0;
  for (const Member& member : list) sum += chunks_of(member.numel);
  return sum;
}

// launch(table, dtype) for every table of a list: one dtype each, no empty tensors. out: `copies` times the list.
template <class F>
void for_tables(const std::vector<Member>& list, void* const* out, int32_t copies, const F& launch) {
  const size_t most = copies ? std::min<size_t>(kEntries, kOutputs / copies) : kEntries;
  const auto table = std::make_unique<Table>();
  for (const Dtype type : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64}) {
    std::vector<size_t> chosen;
    for (size_t t = 0; t < list.size(); ++t) {
      if (list[t].numel && list[t].type == type) chosen.push_back(t);
    }
    for (size_t begin = 0; begin < chosen.size(); begin += most) {
      const size_t count = std::min(most, chosen.size() - begin);
      table->entries = int32_t(count), table->chunks = 0, table->copies = copies;
      for (size_t e = 0; e < count; ++e) {
        const size_t t = chosen[begin + e];
        const Member& member = list[t];
        table->entry[e] = {member.w, member.d, member.p, member.numel, table->chunks, int32_t(t)};
        table->chunks += int32_t(chunks_of(member.numel));
        for (int32_t k = 0; k < copies; ++k) table->out[k * count + e] = out[size_t(k) * list.size() + t];
      }
      launch(*table, type);
    }
  }
}

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
