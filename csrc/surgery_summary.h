// What a training step must know of a combined gradient, from the Gram matrices [G, K, K] of G
// parameter groups and their weights [G, K]; one source for the CPU and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace superbert {

template <typename T>
struct SummaryInputs {
  const T* gram;       // [groups, tasks, tasks], of losses times the loss scale
  const T* weights;    // [groups, tasks]
  const T* losses;     // [tasks]
  const T* shares;     // [groups]
  const T* loss_scale; // or null: 1
  int64_t groups, tasks;
  double max_norm; // infinite: no clipping
};

template <typename T>
struct SummaryOutputs {
  T *norm, *scale, *skipped; // a number each
  bool* skip;
  T* gram;    // [tasks, tasks], of all groups, without the loss scale
  T* weights; // [tasks], the groups' mean by their shares
};

// A number that is 0, or NaN where x is not finite: sums of it need no branches.
template <typename T>
SUPERBERT_HOST_DEVICE double zero_if_finite(T x) {
  return static_cast<double>(x - x);
}

// The part of the squared norm that row `row` of all G * K rows of Gram matrices has.
template <typename T>
SUPERBERT_HOST_DEVICE double summary_square(const SummaryInputs<T>& in, int64_t row) {
  const int64_t k = in.tasks, group = row / k, task = row % k;
  const T *products = in.gram + row * k, *weights = in.weights + group * k;
  double sum = 0.0;
  for (int64_t j = 0; j < k; ++j) {
    sum += static_cast<double>(weights[j]) * static_cast<double>(products[j]);
  }
  return sum * static_cast<double>(weights[task]);
}

// NaN where that row's entry on the diagonal is not finite, else 0.
template <typename T>
SUPERBERT_HOST_DEVICE double summary_known(const SummaryInputs<T>& in, int64_t row) {
  return zero_if_finite(in.gram[row * in.tasks + row % in.tasks]);
}

// Entry `entry` of the K * K of the Gram matrix of all groups.
template <typename T>
SUPERBERT_HOST_DEVICE T summary_gram(const SummaryInputs<T>& in, int64_t entry) {
  const int64_t size = in.tasks * in.tasks;
  double sum = 0.0;
  for (int64_t g = 0; g < in.groups; ++g) sum += static_cast<double>(in.gram[g * size + entry]);
  const double scale = in.loss_scale == nullptr ? 1.0 : static_cast<double>(*in.loss_scale);
  return static_cast<T>(sum / (scale * scale));
}

template <typename T>
SUPERBERT_HOST_DEVICE T summary_weight(const SummaryInputs<T>& in, int64_t task) {
  double sum = 0.0;
  for (int64_t g = 0; g < in.groups; ++g) {
    sum += static_cast<double>(in.shares[g]) * static_cast<double>(in.weights[g * in.tasks + task]);
  }
  return static_cast<T>(sum);
}

// Norm, factor and flag from the sums of all summary_square and summary_known.
template <typename T>
SUPERBERT_HOST_DEVICE void summarize(const SummaryInputs<T>& in, double square, double known,
                                     const SummaryOutputs<T>& out) {
  for (int64_t k = 0; k < in.tasks; ++k) known += zero_if_finite(in.losses[k]);
  const T loss_scale = in.loss_scale == nullptr ? T{1} : *in.loss_scale;
  const T norm = static_cast<T>(sqrt(square < 0.0 ? 0.0 : square)) / loss_scale;
  T scale = T{1} / loss_scale;
  if (in.max_norm < HUGE_VAL) {
    const T factor = T{1} / (norm + static_cast<T>(1e-6)) * static_cast<T>(in.max_norm);
    scale *= factor > T{1} ? T{1} : factor;
  }
  const double all = known + zero_if_finite(norm);
  *out.norm = norm;
  *out.scale = scale;
  *out.skip = !(all - all == 0.0);
  *out.skipped = *out.skip ? T{1} : T{0};
}

} // namespace superbert
