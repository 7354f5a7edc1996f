// The K x K problems of gradient surgery on CUDA: one thread a task, the arithmetic of
// surgery_pcgrad.h, which the CPU runs too.
#pragma once

#include <cuda_runtime.h>

#include "surgery_pcgrad.h"

namespace superbert {

constexpr int kSolveThreads = 64;

inline int64_t solve_blocks(int64_t num_tasks) {
  return (num_tasks + kSolveThreads - 1) / kSolveThreads;
}

// Coefficients [num_tasks] of one task.  An order that names a task beyond K stops the kernel: it
// would read beyond the matrix, and the host, which could raise, must not wait for it.
template <typename T>
__device__ void project_task(const T* gram, int64_t num_tasks, const int64_t* order, int64_t task,
                             bool include_self, double* coefficients) {
  for (int64_t i = 0; i < num_tasks; ++i) {
    const int64_t other = order[task * num_tasks + i];
    if (other < 0 || other >= num_tasks) __trap();
  }
  pcgrad_project(gram, num_tasks, order + task * num_tasks, task, include_self, coefficients);
}

// Adds up column `task` of the coefficients, whose rows lie `stride` apart.
template <typename T>
__device__ void sum_coefficients(const double* coefficients, int64_t stride, int64_t num_tasks,
                                 int64_t task, bool mean, T* weights) {
  double sum = 0.0;
  for (int64_t i = 0; i < num_tasks; ++i) sum += coefficients[i * stride + task];
  weights[task] = static_cast<T>(mean ? sum / num_tasks : sum);
}

// The task of a thread where solve_blocks(num_tasks) blocks work on each parameter group, and the
// group.
struct GroupTask {
  int64_t group, task;
};

__device__ inline GroupTask group_task(int64_t num_tasks) {
  const int64_t blocks = (num_tasks + kSolveThreads - 1) / kSolveThreads;
  return {blockIdx.x / blocks, blockIdx.x % blocks * kSolveThreads + threadIdx.x};
}

// Up to kSolveThreads tasks: one block for each group does it all.
template <typename T>
__global__ void __launch_bounds__(kSolveThreads)
    pcgrad_kernel(const T* gram, int64_t num_tasks, const int64_t* order, bool mean,
                  bool include_self, T* weights) {
  __shared__ double coefficients[kSolveThreads][kSolveThreads];
  const int64_t task = threadIdx.x;
  gram += blockIdx.x * num_tasks * num_tasks;
  weights += blockIdx.x * num_tasks;
  if (task < num_tasks) {
    project_task(gram, num_tasks, order, task, include_self, coefficients[task]);
  }
  __syncthreads();
  if (task < num_tasks) {
    sum_coefficients(&coefficients[0][0], kSolveThreads, num_tasks, task, mean, weights);
  }
}

// More tasks: their coefficients [num_tasks, num_tasks] go through memory.
template <typename T>
__global__ void __launch_bounds__(kSolveThreads)
    pcgrad_project_kernel(const T* gram, int64_t num_tasks, const int64_t* order, bool include_self,
                          double* coefficients) {
  const auto [group, task] = group_task(num_tasks);
  if (task >= num_tasks) return;
  const int64_t matrix = group * num_tasks * num_tasks;
  project_task(gram + matrix, num_tasks, order, task, include_self,
               coefficients + matrix + task * num_tasks);
}

template <typename T>
__global__ void __launch_bounds__(kSolveThreads)
    pcgrad_sum_kernel(const double* coefficients, int64_t num_tasks, bool mean, T* weights) {
  const auto [group, task] = group_task(num_tasks);
  if (task >= num_tasks) return;
  sum_coefficients(coefficients + group * num_tasks * num_tasks, num_tasks, num_tasks, task, mean,
                   weights + group * num_tasks);
}

static __global__ void __launch_bounds__(kSolveThreads)
    draw_order_kernel(const int64_t* seed, const int64_t* step, int64_t num_tasks, int64_t* order) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kSolveThreads + threadIdx.x;
  if (task < num_tasks) {
    draw_permutation(num_tasks, static_cast<uint64_t>(*seed), static_cast<uint64_t>(*step),
                     static_cast<uint32_t>(task), order + task * num_tasks);
  }
}

} // namespace superbert
