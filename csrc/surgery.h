// Plain structs, free of torch, that the operators (surgery_cpu.cpp) pass to the CPU kernels
// (surgery_simd.cpp).  The operators have checked shapes and strides.
#pragma once

#include <cstdint>

#include "cpu_isa.h"

namespace superbert {

enum class FloatType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Task gradients [num_rows, num_columns]; `row_stride` counts elements, columns lie side by side.
struct Rows {
  FloatType type;
  const void* data;
  int64_t num_rows;
  int64_t row_stride;
};

// One step of AdamW (Loshchilov and Hutter, 2019) with all that is the same for every element.
struct AdamWStep {
  double gradient_scale; // multiplies the combined gradient
  double beta1, beta2, eps;
  double weight_factor;        // 1 - lr * weight_decay
  double step_size;            // lr / (1 - beta1^t)
  double second_moment_factor; // 1 / sqrt(1 - beta2^t)
};

// Master weights and moments are float64 when the rows are, else float32.
struct AdamWState {
  void* master;
  void* exp_avg;
  void* exp_avg_sq;
  void* low_precision; // or null; of the type below
  FloatType low_precision_type;
};

// Each works on the columns [begin, end), so that threads can share them out.
struct SurgeryKernels {
  // Adds the products of two panels of rows to gram [rows.num_rows, others.num_rows].  Where the
  // panels are the same only j >= i is written; otherwise rows.num_rows is a multiple of 4.
  void (*gram)(const Rows& rows, const Rows& others, int64_t begin, int64_t end, double* gram);
  // out = sum_k weights[k] * rows[k]
  void (*combine)(const Rows& rows, const double* weights, int64_t begin, int64_t end,
                  FloatType out_type, void* out);
  // The same sum is the gradient of an AdamW step; it never goes to memory.
  void (*combine_adamw)(const Rows& rows, const double* weights, int64_t begin, int64_t end,
                        const AdamWStep& step, const AdamWState& state);
};

SUPERBERT_DISPATCH(SurgeryKernels, surgery_kernels)

} // namespace superbert
