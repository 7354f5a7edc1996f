// The K x K problems of gradient surgery on CUDA: one thread a task, the arithmetic of
// pcgrad_solver.h, which the CPU runs too.
#pragma once

#include <cuda_runtime.h>

#include "pcgrad_solver.h"

namespace superbert {

// One block of kMaxTasks threads.  An order that names a task beyond K stops the kernel: it would
// read beyond the matrix, and the host, which could raise, must not wait for it.
template <typename T>
__global__ void __launch_bounds__(kMaxTasks)
    pcgrad_kernel(const T* gram, int64_t num_tasks, const int64_t* order, bool mean,
                  bool include_self, T* weights) {
  __shared__ double coefficients[kMaxTasks][kMaxTasks];
  const int64_t task = threadIdx.x;
  if (task < num_tasks) {
    for (int64_t i = 0; i < num_tasks; ++i) {
      const int64_t other = order[task * num_tasks + i];
      if (other < 0 || other >= num_tasks) __trap();
    }
    pcgrad_project(gram, num_tasks, order + task * num_tasks, task, include_self,
                   coefficients[task]);
  }
  __syncthreads();
  if (task < num_tasks) {
    double sum = 0.0;
    for (int64_t i = 0; i < num_tasks; ++i) sum += coefficients[i][task];
    weights[task] = static_cast<T>(mean ? sum / num_tasks : sum);
  }
}

static __global__ void __launch_bounds__(kMaxTasks)
    draw_order_kernel(const int64_t* seed, const int64_t* step, int64_t num_tasks, int64_t* order) {
  const int64_t task = threadIdx.x;
  if (task < num_tasks) {
    draw_permutation(num_tasks, static_cast<uint64_t>(*seed), static_cast<uint64_t>(*step),
                     static_cast<uint32_t>(task), order + task * num_tasks);
  }
}

} // namespace superbert
