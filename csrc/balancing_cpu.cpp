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

// Calls solve(problem, scratch) for every problem, each of which takes about K^3 operations.
template <typename Solve>
void for_problems(int64_t count, int64_t k, const Solve& solve) {
  const int64_t grain = std::max<int64_t>(1, kGrainOperations / (k * k * k));
  parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    std::vector<double> scratch = scratch_for(k);
    for (int64_t problem = first; problem < last; ++problem) solve(problem, scratch.data());
  });
}

std::tuple<Tensor, Tensor> symmetric_eigen(const Tensor& matrix) {
  const Problems problems = check_square(matrix, "matrix");
  const int64_t k = problems.k;
  Tensor values = allocate(matrix, problems.shape(1));
  Tensor vectors = allocate(matrix, problems.shape(2));
  for_problems(problems.count, k, [&](int64_t g, double*) {
    const double* source = data<double>(matrix) + g * k * k;
    std::vector<double> work(source, source + k * k);
    solvers::symmetric_eigen(work.data(), k, data<double>(values) + g * k,
                             data<double>(vectors) + g * k * k);
  });
  return {values, vectors};
}

Tensor project_onto_dual_cone(const Tensor& gram, const Tensor& lower) {
  const int64_t k = check_square(gram, "gram").k;
  check_lower(lower, gram);
  Tensor result = allocate_like(lower);
  const int64_t rows = lower.size(-2);
  for_problems(lower.numel() / k, k, [&](int64_t row, double* scratch) {
    solvers::project_onto_dual_cone(data<double>(gram) + row / rows * k * k,
                                    data<double>(lower) + row * k, k,
                                    data<double>(result) + row * k, scratch);
  });
  return result;
}

// Weights of every problem, by solve(gram, k, weights, scratch).
template <typename Solve>
Tensor solve_weights(const Tensor& gram, const Solve& solve) {
  const Problems problems = check_square(gram, "gram");
  const int64_t k = problems.k;
  Tensor weights = allocate(gram, problems.shape(1));
  for_problems(problems.count, k, [&](int64_t g, double* scratch) {
    solve(data<double>(gram) + g * k * k, k, data<double>(weights) + g * k, scratch);
  });
  return weights;
}

Tensor solve_mgda(const Tensor& gram) { return solve_weights(gram, solvers::solve_mgda); }

Tensor solve_cagrad(const Tensor& gram, double c) {
  check_number("c", c);
  return solve_weights(gram,
                       [c](const double* matrix, int64_t k, double* weights, double* scratch) {
                         solvers::solve_cagrad(matrix, c, k, weights, scratch);
                       });
}

Tensor solve_fairgrad(const Tensor& gram, double alpha) {
  check_number("alpha", alpha);
  return solve_weights(gram,
                       [alpha](const double* matrix, int64_t k, double* weights, double* scratch) {
                         solvers::solve_fairgrad(matrix, alpha, k, weights, scratch);
                       });
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
