// Plain structs, free of torch, that the operators (attention_cpu.cpp) pass to the CPU kernels
// (attention_simd.cpp).  The operators have checked shapes and offsets.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "dropout.h"
#include "storage.h"

namespace superbert {

// A packed stream [T, heads, width] with any row and head stride, counted in elements.
struct HeadRows {
  void* data;
  int64_t row;
  int64_t head;
};

// No two rows of a stream are farther apart.
constexpr int64_t kNoLimit = (int64_t{1} << 31) - 2;

// What attention computes beyond its tensors, as parse_arguments() in attention_cpu.cpp checked it.
struct AttentionOptions {
  float softmax_scale;
  int64_t left, right; // keys before and behind its own place that a query sees, kNoLimit for all
  Dropout dropout;
};

// A number for each head and distance of a key from its query, which is added to their scores:
// numbers [head][distance + largest].  None: data is null.
struct RelativeBias {
  const float* data = nullptr;
  int64_t largest = 0; // the largest distance to either side

  int64_t row() const { return 2 * largest + 1; }
};

struct AttentionCall {
  Storage storage;
  int64_t sequences, heads, width;
  int64_t total_queries; // rows of q, the row length of the log-sum-exp
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  AttentionOptions options;
  RelativeBias bias;
  HeadRows q, k, v, out;
  float* lse; // [heads, total_queries]
};

struct AttentionGradients {
  HeadRows out, q, k, v;
  // Of the bias, an item's numbers apart from the others': bias_of() says where they lie.  Null
  // without a bias.
  float* bias = nullptr;

  // The numbers of a head of the sequence whose `queries` begin at row `first` of the stream: those
  // of the distances -(queries - 1) to queries - 1.
  float* bias_of(int64_t heads, int64_t first, int64_t queries, int64_t head) const {
    return bias + 2 * (heads * first + head * queries);
  }
};

// Item = sequence * heads + head.  `scratch` has scratch_floats() floats and belongs to one thread.
struct AttentionKernels {
  int64_t (*scratch_floats)(const AttentionCall& call);
  void (*forward)(const AttentionCall& call, int64_t item, float* scratch);
  void (*backward)(const AttentionCall& call, const AttentionGradients& gradients, int64_t item,
                   float* scratch);
};

SUPERBERT_DISPATCH(AttentionKernels, attention_kernels)

} // namespace superbert
