// The CUDA side of the balancing operators: one thread a problem, the arithmetic of
// balancing_solvers.h, which the CPU runs too.  The problems are a few numbers for a few tasks;
// what counts is that the host need not wait for them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "balancing_solvers.h"
#include "balancing_torch.h"
#include "launch_device_torch.cuh"
#include "memory_torch.h"

namespace superbert {
namespace {

__global__ void eigen_kernel(double* matrix, int64_t k, double* values, double* vectors) {
  solvers::symmetric_eigen(matrix, k, values, vectors);
}

constexpr int64_t kProblemsOfBlock = 64;
constexpr int64_t kMostScratch = int64_t{1} << 25; // numbers, where there is a choice

// One thread for each row of `lower`, `at_once` of them at a time.
__global__ void project_kernel(const double* gram, const double* lower, int64_t rows, int64_t k,
                               int64_t at_once, double* result, double* scratch) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= at_once) return;
  for (int64_t row = thread; row < rows; row += at_once) {
    solvers::project_onto_dual_cone(gram, lower + row * k, k, result + row * k,
                                    scratch + thread * solvers::solver_scratch(k));
  }
}

__global__ void solve_mgda_kernel(const double* gram, int64_t k, double* weights, double* scratch) {
  solvers::solve_mgda(gram, k, weights, scratch);
}

__global__ void solve_cagrad_kernel(const double* gram, double c, int64_t k, double* weights,
                                    double* scratch) {
  solvers::solve_cagrad(gram, c, k, weights, scratch);
}

__global__ void solve_fairgrad_kernel(const double* gram, double alpha, int64_t k, double* weights,
                                      double* scratch) {
  solvers::solve_fairgrad(gram, alpha, k, weights, scratch);
}

Tensor scratch_for(const Tensor& gram, int64_t problems) {
  return allocate(gram, {problems * solvers::solver_scratch(gram.size(0))});
}

std::tuple<Tensor, Tensor> symmetric_eigen(const Tensor& matrix) {
  const int64_t k = check_square(matrix, "matrix");
  const LaunchDevice device(matrix);
  const Tensor work = allocated(matrix.sizes(), [&] { return torch::stable::clone(matrix); });
  Tensor values = allocate(matrix, {k});
  Tensor vectors = allocate(matrix, {k, k});
  launch(eigen_kernel, 1, 1, device.stream(), data<double>(work), k, data<double>(values),
         data<double>(vectors));
  return {values, vectors};
}

Tensor project_onto_dual_cone(const Tensor& gram, const Tensor& lower) {
  const int64_t k = check_square(gram, "gram");
  check_lower(lower, gram);
  const LaunchDevice device(gram);
  Tensor result = allocate_like(lower);
  const int64_t rows = lower.size(0);
  if (rows == 0) return result;
  const int64_t fitting = std::max(kProblemsOfBlock, kMostScratch / solvers::solver_scratch(k));
  const int64_t at_once = std::min(rows, fitting);
  const int64_t threads = std::min(at_once, kProblemsOfBlock);
  const Tensor scratch = scratch_for(gram, at_once);
  launch(project_kernel, (at_once + threads - 1) / threads, static_cast<int>(threads),
         device.stream(), data<double>(gram), data<double>(lower), rows, k, at_once,
         data<double>(result), data<double>(scratch));
  return result;
}

Tensor solve_mgda(const Tensor& gram) {
  const int64_t k = check_square(gram, "gram");
  const LaunchDevice device(gram);
  Tensor weights = allocate(gram, {k});
  const Tensor scratch = scratch_for(gram, 1);
  launch(solve_mgda_kernel, 1, 1, device.stream(), data<double>(gram), k, data<double>(weights),
         data<double>(scratch));
  return weights;
}

Tensor solve_cagrad(const Tensor& gram, double c) {
  const int64_t k = check_square(gram, "gram");
  check_number("c", c);
  const LaunchDevice device(gram);
  Tensor weights = allocate(gram, {k});
  const Tensor scratch = scratch_for(gram, 1);
  launch(solve_cagrad_kernel, 1, 1, device.stream(), data<double>(gram), c, k,
         data<double>(weights), data<double>(scratch));
  return weights;
}

Tensor solve_fairgrad(const Tensor& gram, double alpha) {
  const int64_t k = check_square(gram, "gram");
  check_number("alpha", alpha);
  const LaunchDevice device(gram);
  Tensor weights = allocate(gram, {k});
  const Tensor scratch = scratch_for(gram, 1);
  launch(solve_fairgrad_kernel, 1, 1, device.stream(), data<double>(gram), alpha, k,
         data<double>(weights), data<double>(scratch));
  return weights;
}

} // namespace
} // namespace superbert

STABLE_TORCH_LIBRARY_IMPL(superbert, CUDA, m) {
  m.impl("symmetric_eigen", TORCH_BOX(&superbert::symmetric_eigen));
  m.impl("project_onto_dual_cone", TORCH_BOX(&superbert::project_onto_dual_cone));
  m.impl("solve_mgda", TORCH_BOX(&superbert::solve_mgda));
  m.impl("solve_cagrad", TORCH_BOX(&superbert::solve_cagrad));
  m.impl("solve_fairgrad", TORCH_BOX(&superbert::solve_fairgrad));
}
