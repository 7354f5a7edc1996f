// The CUDA side of the balancing operators: one thread a problem, the arithmetic of
// balancing_solvers.h, which the CPU runs too.  The problems are a few numbers for a few tasks;
// what counts is that the host need not wait for them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "balancing_checks.h"
#include "balancing_solvers.h"
#include "launch_device.cuh"

namespace superbert {
namespace {

__global__ void eigen_kernel(double* matrix, int64_t k, double* values, double* vectors) {
  solvers::symmetric_eigen(matrix, k, values, vectors);
}

// One thread for each row of `lower`.
__global__ void project_kernel(const double* gram, const double* lower, int64_t k, double* result,
                               double* scratch) {
  const int64_t row = threadIdx.x;
  solvers::project_onto_dual_cone(gram, lower + row * k, k, result + row * k,
                                  scratch + row * solvers::solver_scratch(k));
}

__global__ void minimize_norm_kernel(const double* gram, int64_t k, double* weights,
                                     double* scratch) {
  solvers::minimize_norm(gram, k, weights, scratch);
}

__global__ void avoid_conflict_kernel(const double* gram, double c, int64_t k, double* weights,
                                      double* scratch) {
  solvers::avoid_conflict(gram, c, k, weights, scratch);
}

__global__ void bargain_kernel(const double* gram, double alpha, int64_t k, double* weights,
                               double* scratch) {
  solvers::bargain(gram, alpha, k, weights, scratch);
}

Tensor scratch_for(const Tensor& gram, int64_t problems) {
  return torch::stable::new_empty(gram, {problems * solvers::solver_scratch(gram.size(0))});
}

std::tuple<Tensor, Tensor> symmetric_eigen(const Tensor& matrix) {
  const int64_t k = check_square(matrix, "matrix");
  const LaunchDevice device(matrix);
  const Tensor work = torch::stable::clone(matrix);
  Tensor values = torch::stable::new_empty(matrix, {k});
  Tensor vectors = torch::stable::new_empty(matrix, {k, k});
  launch(eigen_kernel, 1, 1, device.stream(), data<double>(work), k, data<double>(values),
         data<double>(vectors));
  return {values, vectors};
}

Tensor project_onto_dual_cone(const Tensor& gram, const Tensor& lower) {
  const int64_t k = check_square(gram, "gram");
  check_lower(lower, gram);
  const LaunchDevice device(gram);
  Tensor result = torch::stable::empty_like(lower);
  if (lower.size(0) == 0) return result;
  const Tensor scratch = scratch_for(gram, lower.size(0));
  launch(project_kernel, 1, static_cast<int>(lower.size(0)), device.stream(), data<double>(gram),
         data<double>(lower), k, data<double>(result), data<double>(scratch));
  return result;
}

Tensor minimize_norm(const Tensor& gram) {
  const int64_t k = check_square(gram, "gram");
  const LaunchDevice device(gram);
  Tensor weights = torch::stable::new_empty(gram, {k});
  const Tensor scratch = scratch_for(gram, 1);
  launch(minimize_norm_kernel, 1, 1, device.stream(), data<double>(gram), k, data<double>(weights),
         data<double>(scratch));
  return weights;
}

Tensor avoid_conflict(const Tensor& gram, double c) {
  const int64_t k = check_square(gram, "gram");
  const LaunchDevice device(gram);
  Tensor weights = torch::stable::new_empty(gram, {k});
  const Tensor scratch = scratch_for(gram, 1);
  launch(avoid_conflict_kernel, 1, 1, device.stream(), data<double>(gram), c, k,
         data<double>(weights), data<double>(scratch));
  return weights;
}

Tensor bargain(const Tensor& gram, double alpha) {
  const int64_t k = check_square(gram, "gram");
  const LaunchDevice device(gram);
  Tensor weights = torch::stable::new_empty(gram, {k});
  const Tensor scratch = scratch_for(gram, 1);
  launch(bargain_kernel, 1, 1, device.stream(), data<double>(gram), alpha, k, data<double>(weights),
         data<double>(scratch));
  return weights;
}

} // namespace
} // namespace superbert

STABLE_TORCH_LIBRARY_IMPL(superbert, CUDA, m) {
  m.impl("symmetric_eigen", TORCH_BOX(&superbert::symmetric_eigen));
  m.impl("project_onto_dual_cone", TORCH_BOX(&superbert::project_onto_dual_cone));
  m.impl("minimize_norm", TORCH_BOX(&superbert::minimize_norm));
  m.impl("avoid_conflict", TORCH_BOX(&superbert::avoid_conflict));
  m.impl("bargain", TORCH_BOX(&superbert::bargain));
}
