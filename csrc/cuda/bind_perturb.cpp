// The multi-tensor ops as torch sees them on CUDA: lists become tables of pointers, one launch per dtype and table.
#include "cuda/bind.h"
#include "cuda/perturb.h"
#include "math/perturb.h"

namespace qk {
namespace {

using Tensors = std::vector<Tensor>;

// A list in dense memory order on one device, and what runs beside it: its parts in the same order.
struct List {
  Device device;
  Tensors tensors;

  explicit List(const Tensors& list) : device(first_of(list)) {
    for (const Tensor& t : list) {
      device.check(t, "every tensor");
      tensors.push_back(dense(t));
    }
  }
  static const Tensor& first_of(const Tensors& list) {
    STD_TORCH_CHECK(!list.empty(), "qkernels: the list of tensors is empty");
    return list[0];
  }
  Tensors beside(const Tensors& others, const char* name) const {
    STD_TORCH_CHECK(others.empty() || others.size() == tensors.size(), "qkernels: ", name, " has ", others.size(),
                    " tensors for ", tensors.size());
    Tensors result;
    for (size_t i = 0; i < others.size(); ++i) {
      device.check(others[i], name);
      STD_TORCH_CHECK(others[i].scalar_type() == tensors[i].scalar_type(), "qkernels: ", name, " differs in dtype");
      result.push_back(aligned(others[i], tensors[i]));
    }
    return result;
  }
  // The list as the launchers take it; w, d and p are this list, one beside it, or empty.
  std::vector<Member> members(const Tensors& w, const Tensors& d, const Tensors& p) const {
    const auto address = [](const Tensors& list, size_t t) {
      return list.empty() ? nullptr : list[t].const_data_ptr();
    };
    std::vector<Member> result;
    for (size_t t = 0; t < tensors.size(); ++t) {
      result.push_back({dtype_of(tensors[t].scalar_type(), "every tensor"), tensors[t].numel(), address(w, t),
                        address(d, t), address(p, t)});
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> multi_norm_cuda(const Tensors& tensors, const Tensors& weights_, double eta) {
  const List list(tensors);
  const Tensors weights = list.beside(weights_, "weights");
  const int64_t count = int64_t(tensors.size());
  const Tensor& like = list.tensors[0];
  Tensor norm = allocate(like, 1, ScalarType::Double);
  Tensor norms = allocate(like, count, ScalarType::Double);
  // Empty tensors have no chunk, and keep their 0.
  Tensor squares = torch::stable::new_zeros(like, {count}, ScalarType::Double);
  const std::vector<Member> members = list.members(weights, list.tensors, {});
  Tensor partial = allocate(like, chunks_of(members), ScalarType::Double);
  double *sums = static_cast<double*>(squares.mutable_data_ptr()),
         *parts = static_cast<double*>(partial.mutable_data_ptr());
  for_tables(members, nullptr, 0, [&](const Table& table, Dtype type) {
    STD_CUDA_CHECK(launch_list_squares(table, type, eta, parts, sums, list.device.stream()));
  });
  STD_CUDA_CHECK(launch_list_norms(sums, count, static_cast<double*>(norms.mutable_data_ptr()),
                                   static_cast<double*>(norm.mutable_data_ptr()), list.device.stream()));
  return {norm, norms};
}

Tensor multi_dot_cuda(const Tensors& a, const Tensors& b_) {
  const List list(a);
  const Tensors b = list.beside(b_, "b");
  STD_TORCH_CHECK(!b.empty(), "qkernels: b is empty");
  const std::vector<Member> members = list.members(list.tensors, b, {});
  const int64_t chunks = chunks_of(members);
  Tensor partial = allocate(list.tensors[0], 3 * chunks, ScalarType::Double);
  Tensor sums = allocate(list.tensors[0], 3, ScalarType::Double);
  double* parts = static_cast<double*>(partial.mutable_data_ptr());
  int64_t done = 0;
  for_tables(members, nullptr, 0, [&](const Table& table, Dtype type) {
    STD_CUDA_CHECK(launch_list_products(table, type, parts + done, chunks, list.device.stream()));
    done += table.chunks;
  });
  STD_CUDA_CHECK(
      launch_list_sums(parts, chunks, chunks, static_cast<double*>(sums.mutable_data_ptr()), list.device.stream()));
  return sums;
}

void multi_perturb_cuda(const Tensors& out, const Tensors& params, const Tensors& directions_, const Tensors& points_,
                        int64_t move, const Tensor& coefficients, const MaybeTensor& seed, int64_t first_copy) {
  const List list(params);
  const Tensors directions = list.beside(directions_, "directions"), points = list.beside(points_, "points");
  STD_TORCH_CHECK(draws(move) || !directions.empty(), "qkernels: this move needs directions");
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2,
                  "qkernels: coefficients must be float64 of shape (copies, 1 to 3)");
  list.device.check(coefficients, "coefficients");
  const Tensor table_of = row_major(coefficients);
  const int64_t copies = table_of.size(0);
  const size_t count = params.size();
  STD_TORCH_CHECK(out.size() == count * size_t(copies), "qkernels: out must have one tensor per copy and parameter");
  const std::vector<Member> members = list.members(list.tensors, directions, points);
  std::vector<void*> targets;
  for (size_t i = 0; i < out.size(); ++i) {
    const Tensor& w = list.tensors[i % count];
    list.device.check(out[i], "out");
    const bool same = out[i].scalar_type() == w.scalar_type() && same_memory_order(out[i], w);
    STD_TORCH_CHECK(same || w.numel() == 0, "qkernels: out differs from params in dtype, shape or memory order");
    targets.push_back(out[i].mutable_data_ptr());
  }
  MaybeTensor source;
  if (draws(move)) {
    STD_TORCH_CHECK(seed, "qkernels: noise needs a seed");
    list.device.check(seed, "seed");
    source = row_values(*seed, ScalarType::Long, 1, "seed");
  }
  for (int64_t k = 0; k < copies; k += kCopies) {
    const PerturbSettings settings{move,
                                   !points.empty(),
                                   static_cast<const double*>(table_of.const_data_ptr()),
                                   int(table_of.size(1)),
                                   int(k),
                                   first_copy + k,
                                   source ? static_cast<const int64_t*>(source->const_data_ptr()) : nullptr};
    for_tables(members, targets.data() + size_t(k) * count, int32_t(std::min<int64_t>(kCopies, copies - k)),
               [&](const Table& table, Dtype type) {
                 STD_CUDA_CHECK(launch_perturb(table, type, settings, list.device.stream()));
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
