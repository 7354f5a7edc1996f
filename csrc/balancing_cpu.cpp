// Balancing methods: the operators' schemas and their CPU side.  balancing_solvers.h has the
// solvers, kernels/balancing/ the methods themselves.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "balancing_solvers.h"
#include "balancing_torch.h"
#include "memory_torch.h"

namespace superbert {
namespace {

// Operations that are worth a thread of their own.
constexpr int64_t kGrainOperations = 1 << 18;

std::vector<double> scratch_for(int64_t k) {
  return std::vector<double>(solvers::solver_scratch(k));
}

std::tuple<Tensor, Tensor> symmetric_eigen(const Tensor& matrix) {
  const int64_t k = check_square(matrix, "matrix");
  const double* source = data<double>(matrix);
  std::vector<double> work(source, source + k * k);
  Tensor values = allocate(matrix, {k});
  Tensor vectors = allocate(matrix, {k, k});
  solvers::symmetric_eigen(work.data(), k, data<double>(values), data<double>(vectors));
  return {values, vectors};
}

Tensor project_onto_dual_cone(const Tensor& gram, const Tensor& lower) {
  const int64_t k = check_square(gram, "gram");
  check_lower(lower, gram);
  Tensor result = allocate_like(lower);
  const int64_t grain = std::max<int64_t>(1, kGrainOperations / (k * k * k));
  parallel_for(0, lower.size(0), grain, [&](int64_t first, int64_t last) {
    std::vector<double> scratch = scratch_for(k);
    for (int64_t row = first; row < last; ++row) {
      solvers::project_onto_dual_cone(data<double>(gram), data<double>(lower) + row * k, k,
                                      data<double>(result) + row * k, scratch.data());
    }
  });
  return result;
}

Tensor solve_mgda(const Tensor& gram) {
  const int64_t k = check_square(gram, "gram");
  Tensor weights = allocate(gram, {k});
  solvers::solve_mgda(data<double>(gram), k, data<double>(weights), scratch_for(k).data());
  return weights;
}

Tensor solve_cagrad(const Tensor& gram, double c) {
  const int64_t k = check_square(gram, "gram");
  check_number("c", c);
  Tensor weights = allocate(gram, {k});
  solvers::solve_cagrad(data<double>(gram), c, k, data<double>(weights), scratch_for(k).data());
  return weights;
}

Tensor solve_fairgrad(const Tensor& gram, double alpha) {
  const int64_t k = check_square(gram, "gram");
  check_number("alpha", alpha);
  Tensor weights = allocate(gram, {k});
  solvers::solve_fairgrad(data<double>(gram), alpha, k, data<double>(weights),
                          scratch_for(k).data());
  return weights;
}

} // namespace
} // namespace superbert

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("symmetric_eigen(Tensor matrix) -> (Tensor, Tensor)");
  m.def("project_onto_dual_cone(Tensor gram, Tensor lower) -> Tensor");
  m.def("solve_mgda(Tensor gram) -> Tensor");
  m.def("solve_cagrad(Tensor gram, float c) -> Tensor");
  m.def("solve_fairgrad(Tensor gram, float alpha) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("symmetric_eigen", TORCH_BOX(&superbert::symmetric_eigen));
  m.impl("project_onto_dual_cone", TORCH_BOX(&superbert::project_onto_dual_cone));
  m.impl("solve_mgda", TORCH_BOX(&superbert::solve_mgda));
  m.impl("solve_cagrad", TORCH_BOX(&superbert::solve_cagrad));
  m.impl("solve_fairgrad", TORCH_BOX(&superbert::solve_fairgrad));
}
