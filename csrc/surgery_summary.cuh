// The summary of an update on CUDA: one block, the arithmetic of surgery_summary.h, sums in a fixed
// order.
#pragma once

#include <cuda_runtime.h>

#include "surgery_summary.h"

namespace superbert {

constexpr int kSummaryThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSummaryThreads)
    summary_kernel(SummaryInputs<T> in, SummaryOutputs<T> out) {
  __shared__ double squares[kSummaryThreads], known[kSummaryThreads];
  const int thread = threadIdx.x;
  double square = 0.0, zero = 0.0;
  for (int64_t row = thread; row < in.groups * in.tasks; row += kSummaryThreads) {
    square += summary_square(in, row);
    zero += summary_known(in, row);
  }
  squares[thread] = square;
  known[thread] = zero;
  for (int half = kSummaryThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      squares[thread] += squares[thread + half];
      known[thread] += known[thread + half];
    }
  }
  for (int64_t entry = thread; entry < in.tasks * in.tasks; entry += kSummaryThreads) {
    out.gram[entry] = summary_gram(in, entry);
  }
  for (int64_t task = thread; task < in.tasks; task += kSummaryThreads) {
    out.weights[task] = summary_weight(in, task);
  }
  if (thread == 0) summarize(in, squares[0], known[0], out);
}

} // namespace superbert
