// PCGrad in the space of the Gram matrix: one source for the CPU and the CUDA kernel.
//
// Algorithm 1 of Yu et al., "Gradient Surgery for Multi-Task Learning" (NeurIPS 2020), projects a
// copy of every task gradient g_i by the others in a random order:
//
//     if <v, g_j> < 0:  v -= <v, g_j> / |g_j|^2 * g_j
//
// Each v stays a combination sum_m c_m g_m, so with G = [<g_m, g_j>] the inner product is
// sum_m c_m G[m, j] and the projection changes the one number c_j.  Nothing of length P is touched.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "surgery_rng.h"

namespace superbert {

// Coefficients c[K] of task `task`'s projected gradient; `order` holds the K task ids to project
// by. A zero gradient conflicts with nothing; where a norm is not finite, all coefficients are NaN.
template <typename T>
SUPERBERT_HOST_DEVICE void pcgrad_project(const T* gram, int64_t num_tasks, const int64_t* order,
                                          int64_t task, bool include_self, double* c) {
  double zero = 0.0; // or NaN
  for (int64_t m = 0; m < num_tasks; ++m) {
    const double norm_squared = static_cast<double>(gram[m * num_tasks + m]);
    zero += norm_squared - norm_squared;
  }
  for (int64_t m = 0; m < num_tasks; ++m) c[m] = m == task ? 1.0 + zero : zero;
  for (int64_t position = 0; position < num_tasks; ++position) {
    const int64_t other = order[position];
    if (other == task && !include_self) continue;
    double dot = 0.0;
    for (int64_t m = 0; m < num_tasks; ++m) {
      if (c[m] != 0.0) dot += c[m] * static_cast<double>(gram[m * num_tasks + other]);
    }
    const double norm_squared = static_cast<double>(gram[other * num_tasks + other]);
    if (dot < 0.0 && norm_squared > 0.0) c[other] -= dot / norm_squared;
  }
}

// A uniformly random permutation of 0 .. K-1 (Fisher-Yates), number `row` of `step`.  The bounded
// draw is a multiply-high of 32 random bits: off from uniform by less than K / 2^32.
SUPERBERT_HOST_DEVICE void draw_permutation(int64_t num_tasks, uint64_t seed, uint64_t step,
                                            uint32_t row, int64_t* permutation) {
  for (int64_t i = 0; i < num_tasks; ++i) permutation[i] = i;
  Philox4 random{};
  for (int64_t i = num_tasks - 1, drawn = 0; i > 0; --i, ++drawn) {
    if (drawn % 4 == 0) {
      random = philox({{static_cast<uint32_t>(drawn / 4), row, static_cast<uint32_t>(step),
                        static_cast<uint32_t>(step >> 32)}},
                      seed);
    }
    const uint64_t bits = random.word[drawn % 4];
    const int64_t j = static_cast<int64_t>((bits * static_cast<uint64_t>(i + 1)) >> 32);
    const int64_t swapped = permutation[i];
    permutation[i] = permutation[j];
    permutation[j] = swapped;
  }
}

} // namespace superbert
