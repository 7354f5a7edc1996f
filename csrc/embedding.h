// Plain structs that the operators (embedding_cpu.cpp) pass to the CPU kernel (embedding_simd.cpp).
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "storage.h"

namespace superbert {

// Gradients [T, width] of looked-up rows, to be added to the rows of a table [N, width].
struct TableGradient {
  Storage storage; // of both
  int64_t width;
  const void* gradient;
  void* table;
};

struct EmbeddingKernels {
  static constexpr int64_t kColumns = 256; // the most that one call takes
  // Adds the gradients of `count` rows of the stream to one table row, in the columns
  // [begin, end): summed in float32, rounded once.
  void (*add_to_row)(const TableGradient& call, const int64_t* stream_rows, int64_t count,
                     int64_t table_row, int64_t begin, int64_t end);
};

SUPERBERT_DISPATCH(EmbeddingKernels, embedding_kernels)

} // namespace superbert
