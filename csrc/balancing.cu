// The CUDA side of the balancing operators: one thread a problem, the arithmetic of
// balancing_solvers.h, which the CPU runs too.  The problems are a few numbers for a few tasks;
// what counts is that the host need not wait for them, and that all parameter groups' problems are
// one launch.
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
  const int64_t g = blockIdx.x;
  solvers::symmetric_eigen(matrix + g * k * k, k, values + g * k, vectors + g * k * k);
}

constexpr int64_t kProblemsOfBlock = 64;
constexpr int64_t kMostScratch = int64_t{1} << 25; // numbers, where there is a choice

// One thread for each row of `lower`, `at_once` of them at a time; `of_gram` rows belong to a
// matrix.
__global__ void project_kernel(const double* gram, const double* lower, int64_t rows,
                               int64_t of_gram, int64_t k, int64_t at_once, double* result,
                               double* scratch) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= at_once) return;
  for (int64_t row = thread; row < rows; row += at_once) {
    solvers::project_onto_dual_cone(gram + row / of_gram * k * k, lower + row * k, k,
                                    result + row * k,
                                    scratch + thread * solvers::solver_scratch(k));
  }
}

// ---- weights: a block of one thread for each problem, so that many run at the same time ---------

__global__ void solve_mgda_kernel(const double* gram, double, int64_t k, double* weights,
                                  double* scratch) {
  const int64_t g = blockIdx.x;
  solvers::solve_mgda(gram + g * k * k, k, weights + g * k,
                      scratch + g * solvers::solver_scratch(k));
}

__global__ void solve_cagrad_kernel(const double* gram, double c, int64_t k, double* weights,
                                    double* scratch) {
  const int64_t g = blockIdx.x;
  solvers::solve_cagrad(gram + g * k * k, c, k, weights + g * k,
                        scratch + g * solvers::solver_scratch(k));
}

__global__ void solve_fairgrad_kernel(const double* gram, double alpha, int64_t k, double* weights,
                                      double* scratch) {
  const int64_t g = blockIdx.x;
  solvers::solve_fairgrad(gram + g * k * k, alpha, k, weights + g * k,
                          scratch + g * solvers::solver_scratch(k));
}

using SolveKernel = void(const double*, double, int64_t, double*, double*);

Tensor solve_weights(SolveKernel* kernel, const Tensor& gram, double setting) {
  const Problems problems = check_square(gram, "gram");
  const LaunchDevice device(gram);
  Tensor weights = allocate(gram, problems.shape(1));
  if (problems.count == 0) return weights;
  const Tensor scratch = allocate(gram, {problems.count * solvers::solver_scratch(problems.k)});
  launch(kernel, problems.count, 1, device.stream(), data<double>(gram), setting, problems.k,
         data<double>(weights), data<double>(scratch));
  return weights;
}

// ---- operators ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> symmetric_eigen(const Tensor& matrix) {
  const Problems problems = check_square(matrix, "matrix");
  const LaunchDevice device(matrix);
  const Tensor work = allocated(matrix.sizes(), [&] { return torch::stable::clone(matrix); });
  Tensor values = allocate(matrix, problems.shape(1));
  Tensor vectors = allocate(matrix, problems.shape(2));
  if (problems.count == 0) return {values, vectors};
  launch(eigen_kernel, problems.count, 1, device.stream(), data<double>(work), problems.k,
         data<double>(values), data<double>(vectors));
  return {values, vectors};
}

Tensor project_onto_dual_cone(const Tensor& gram, const Tensor& lower) {
  const int64_t k = check_square(gram, "gram").k;
  check_lower(lower, gram);
  const LaunchDevice device(gram);
  Tensor result = allocate_like(lower);
  const int64_t rows = lower.numel() / k;
  if (rows == 0) return result;
  const int64_t fitting = std::max(kProblemsOfBlock, kMostScratch / solvers::solver_scratch(k));
  const int64_t at_once = std::min(rows, fitting);
  const int64_t threads = std::min(at_once, kProblemsOfBlock);
  const Tensor scratch = allocate(gram, {at_once * solvers::solver_scratch(k)});
  launch(project_kernel, (at_once + threads - 1) / threads, static_cast<int>(threads),
         device.stream(), data<double>(gram), data<double>(lower), rows, lower.size(-2), k, at_once,
         data<double>(result), data<double>(scratch));
  return result;
}

Tensor solve_mgda(const Tensor& gram) { return solve_weights(solve_mgda_kernel, gram, 0.0); }

Tensor solve_cagrad(const Tensor& gram, double c) {
  check_number("c", c);
  return solve_weights(solve_cagrad_kernel, gram, c);
}

Tensor solve_fairgrad(const Tensor& gram, double alpha) {
  check_number("alpha", alpha);
  return solve_weights(solve_fairgrad_kernel, gram, alpha);
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
