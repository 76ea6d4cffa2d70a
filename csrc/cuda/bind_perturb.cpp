// The multi-tensor ops as torch sees them on CUDA: lists become tables of pointers, one launch per dtype and table.
// The declarations of the CUDA shims stand behind this name in torch's headers.
#define USE_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <memory>

#include "cuda/perturb.h"
#include "glue.h"
#include "math/perturb.h"

namespace qk {
namespace {

using Tensors = std::vector<Tensor>;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false, "qkernels: tensors must be float32, bfloat16, float16 or float64");
  }
}

// A list in dense memory order on one device, and what runs beside it: its parts in the same order.
struct List {
  Tensors tensors;
  torch::stable::accelerator::DeviceGuard guard;

  explicit List(const Tensors& list) : guard(device_of(list)) {
    for (const Tensor& t : list) {
      check(t, list[0]);
      tensors.push_back(dense(t));
    }
  }
  static int32_t device_of(const Tensors& list) {
    STD_TORCH_CHECK(!list.empty(), "qkernels: the list of tensors is empty");
    return list[0].get_device_index();
  }
  static void check(const Tensor& t, const Tensor& first) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(),
                    "qkernels: all tensors must be on cuda:", first.get_device_index());
  }
  Tensors beside(const Tensors& others, const char* name) const {
    STD_TORCH_CHECK(others.empty() || others.size() == tensors.size(), "qkernels: ", name, " has ", others.size(),
                    " tensors for ", tensors.size());
    Tensors result;
    for (size_t i = 0; i < others.size(); ++i) {
      check(others[i], tensors[0]);
      STD_TORCH_CHECK(others[i].scalar_type() == tensors[i].scalar_type(), "qkernels: ", name, " differs in dtype");
      result.push_back(aligned(others[i], tensors[i]));
    }
    return result;
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensors[0].get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }
  int64_t chunks() const {
    int64_t sum = 0;
    for (const Tensor& t : tensors) sum += (t.numel() + kListChunk - 1) / kListChunk;
    return sum;
  }
};

const void* address(const Tensors& list, size_t t) { return list.empty() ? nullptr : list[t].const_data_ptr(); }

// launch(table, dtype) for every table of a list. `w`, `d`, `p`, `out` may be empty; out has `copies` times the list.
template <class F>
void for_tables(const Tensors& list, const Tensors& w, const Tensors& d, const Tensors& p, void* const* out,
                int32_t copies, const F& launch) {
  const size_t most = copies ? std::min<size_t>(kEntries, kOutputs / copies) : kEntries;
  const auto table = std::make_unique<Table>();
  for (const Dtype type : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64}) {
    std::vector<size_t> members;
    for (size_t t = 0; t < list.size(); ++t) {
      if (list[t].numel() && dtype_of(list[t]) == type) members.push_back(t);
    }
    for (size_t begin = 0; begin < members.size(); begin += most) {
      const size_t count = std::min(most, members.size() - begin);
      table->entries = int32_t(count), table->chunks = 0, table->copies = copies;
      for (size_t e = 0; e < count; ++e) {
        const size_t t = members[begin + e];
        table->entry[e] = {address(w, t), address(d, t), address(p, t), list[t].numel(), table->chunks, int32_t(t)};
        table->chunks += int32_t((list[t].numel() + kListChunk - 1) / kListChunk);
        for (int32_t k = 0; k < copies; ++k) table->out[k * count + e] = out[size_t(k) * list.size() + t];
      }
      launch(*table, type);
    }
  }
}

std::tuple<Tensor, Tensor> multi_norm_cuda(const Tensors& tensors, const Tensors& weights_, double eta) {
  const List list(tensors);
  const Tensors weights = list.beside(weights_, "weights");
  const int64_t count = int64_t(tensors.size());
  const Tensor& like = list.tensors[0];
  Tensor norm = torch::stable::new_empty(like, {1}, ScalarType::Double);
  Tensor norms = torch::stable::new_empty(like, {count}, ScalarType::Double);
  // Empty tensors have no chunk, and keep their 0.
  Tensor squares = torch::stable::new_zeros(like, {count}, ScalarType::Double);
  Tensor partial = torch::stable::new_empty(like, {list.chunks()}, ScalarType::Double);
  double *sums = static_cast<double*>(squares.mutable_data_ptr()),
         *parts = static_cast<double*>(partial.mutable_data_ptr());
  for_tables(list.tensors, weights, list.tensors, {}, nullptr, 0, [&](const Table& table, Dtype type) {
    STD_CUDA_CHECK(launch_list_squares(table, type, eta, parts, sums, list.stream()));
  });
  STD_CUDA_CHECK(launch_list_norms(sums, count, static_cast<double*>(norms.mutable_data_ptr()),
                                   static_cast<double*>(norm.mutable_data_ptr()), list.stream()));
  return {norm, norms};
}

Tensor multi_dot_cuda(const Tensors& a, const Tensors& b_) {
  const List list(a);
  const Tensors b = list.beside(b_, "b");
  STD_TORCH_CHECK(!b.empty(), "qkernels: b is empty");
  const int64_t chunks = list.chunks();
  Tensor partial = torch::stable::new_empty(list.tensors[0], {3 * chunks}, ScalarType::Double);
  Tensor sums = torch::stable::new_empty(list.tensors[0], {3}, ScalarType::Double);
  double* parts = static_cast<double*>(partial.mutable_data_ptr());
  int64_t done = 0;
  for_tables(list.tensors, list.tensors, b, {}, nullptr, 0, [&](const Table& table, Dtype type) {
    STD_CUDA_CHECK(launch_list_products(table, type, parts + done, chunks, list.stream()));
    done += table.chunks;
  });
  STD_CUDA_CHECK(launch_list_sums(parts, chunks, chunks, static_cast<double*>(sums.mutable_data_ptr()), list.stream()));
  return sums;
}

void multi_perturb_cuda(const Tensors& out, const Tensors& params, const Tensors& directions_, const Tensors& points_,
                        int64_t move, const Tensor& coefficients, const MaybeTensor& seed, int64_t first_copy) {
  const List list(params);
  const Tensors directions = list.beside(directions_, "directions"), points = list.beside(points_, "points");
  STD_TORCH_CHECK(draws(move) || !directions.empty(), "qkernels: this move needs directions");
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2,
                  "qkernels: coefficients must be float64 of shape (copies, 1 to 3)");
  List::check(coefficients, list.tensors[0]);
  const Tensor table_of = torch::stable::contiguous(coefficients);
  const int64_t copies = table_of.size(0);
  const size_t count = params.size();
  STD_TORCH_CHECK(out.size() == count * size_t(copies), "qkernels: out must have one tensor per copy and parameter");
  std::vector<void*> targets;
  for (size_t i = 0; i < out.size(); ++i) {
    const Tensor& w = list.tensors[i % count];
    List::check(out[i], w);
    bool same = out[i].scalar_type() == w.scalar_type() && out[i].dim() == w.dim();
    for (int64_t d = 0; same && d < w.dim(); ++d) {
      same = out[i].size(d) == w.size(d) && (w.size(d) == 1 || out[i].stride(d) == w.stride(d));
    }
    STD_TORCH_CHECK(same || w.numel() == 0, "qkernels: out differs from params in dtype, shape or memory order");
    targets.push_back(out[i].mutable_data_ptr());
  }
  MaybeTensor source;
  if (draws(move)) {
    STD_TORCH_CHECK(seed, "qkernels: noise needs a seed");
    List::check(*seed, list.tensors[0]);
    source = row_values(*seed, ScalarType::Long, 1, "seed");
  }
  // Several copies share one reading of the parameters.
  constexpr int64_t kTogether = 16;
  for (int64_t k = 0; k < copies; k += kTogether) {
    const PerturbSettings settings{move,
                                   !points.empty(),
                                   static_cast<const double*>(table_of.const_data_ptr()),
                                   int(table_of.size(1)),
                                   int(k),
                                   first_copy + k,
                                   source ? static_cast<const int64_t*>(source->const_data_ptr()) : nullptr};
    for_tables(list.tensors, list.tensors, directions, points, targets.data() + size_t(k) * count,
               int32_t(std::min(kTogether, copies - k)), [&](const Table& table, Dtype type) {
                 STD_CUDA_CHECK(launch_perturb(table, type, settings, list.stream()));
               });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("multi_norm", TORCH_BOX(&multi_norm_cuda));
  m.impl("multi_dot", TORCH_BOX(&multi_dot_cuda));
  m.impl("multi_perturb", TORCH_BOX(&multi_perturb_cuda));
}

}  // namespace qk
