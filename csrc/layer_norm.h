// Plain structs, free of torch, that the operators (layer_norm_cpu.cpp, embedding_cpu.cpp) pass to
// the CPU kernels (layer_norm_simd.cpp).  The operators have checked shapes; all rows are
// contiguous.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "dropout.h"
#include "storage.h"

namespace superbert {

// Rows that are sums of one row of each table: of a word, a position and a token type.
struct EmbeddingSum {
  static constexpr int kTables = 3;
  const void* tables[kTables];
  const int64_t* indices[kTables]; // [rows]
};

// out = out_dropout((h - mean) * rstd * weight + bias),  h = residual + dropout(x + x_bias)
// RMS norm takes 0 for the mean, and gives it out as such, so that one backward pass serves both.
struct LayerNormCall {
  Storage storage; // of x, residual, tables, out and hidden
  int64_t rows, width;
  const EmbeddingSum* embedding; // or null; instead of all that makes up h
  const void* x;
  const void* residual; // or null: h = x
  const float* x_bias;  // or null
  const float* weight;  // or null: 1
  const float* bias;    // or null: 0
  float eps;
  bool is_rms_norm;
  bool prenorm;                 // h is rounded to the storage before the norm, and hidden is h
  Dropout dropout, out_dropout; // not both
  void* out;
  void* hidden; // h - mean, for the backward pass; or null: h can be had again
  float* mean;  // of the rows that the backward pass reads, hidden or h
  float* rstd;  // likewise
};

struct LayerNormGradients {
  Storage storage; // of grad_out, hidden, tables, grad_sum, grad_hidden and grad_x
  int64_t rows, width;
  const void* grad_out;
  const EmbeddingSum* embedding; // or null; h is computed again from it
  const void* hidden;
  const float* weight; // or null: 1
  const float* mean;
  const float* rstd;
  const void* grad_sum; // or null: of h itself, which a pre-norm gives out, too
  bool is_rms_norm;
  Dropout dropout, out_dropout; // not both
  void* grad_hidden;
  void* grad_x; // or null: it is grad_hidden
  int64_t sums; // of a partial: 1, for weight; 2, for bias too; or 3, for x_bias too
};

// A parameter's gradient: element i of the row is data[i].
struct GradientRow {
  Storage storage;
  void* data;
  bool accumulate;
};

// forward and backward work on the rows [begin, end), so that threads can share them out.
struct LayerNormKernels {
  int64_t (*scratch_floats)(int64_t width);
  void (*forward)(const LayerNormCall& call, int64_t begin, int64_t end, float* scratch);
  // `partial`, when not null, receives these rows' sums for weight, bias and x_bias: [sums, width].
  void (*backward)(const LayerNormGradients& call, int64_t begin, int64_t end, float* partial,
                   float* scratch);
  // Sums `count` partials, `stride` floats apart, in their order.
  void (*sum_partials)(const float* partials, int64_t count, int64_t stride, int64_t width,
                       const GradientRow& row);
};

SUPERBERT_DISPATCH(LayerNormKernels, layer_norm_kernels)

} // namespace superbert
