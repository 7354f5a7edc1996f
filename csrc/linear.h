// Plain structs, free of torch, that the operators of linear layers (linear_cpu.cpp) pass to the
// CPU kernels (linear_simd.cpp): products of bfloat16 matrices, whose sums are float32.
//
// A product is A [rows, inner] times B [inner, columns].  The processor multiplies pairs of
// neighbours along the inner dimension and adds both products to a sum.  So B is packed in panels
// of kPanel columns, the last one of whole vectors: word [p, j] of a panel, 32 bits, holds the
// elements (2 p, j) and (2 p + 1, j), zero where there is none.  A may lie anywhere, if its pairs
// are words.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "storage.h"

namespace superbert {

// Rows of bfloat16 as they lie, `row` elements apart.
struct BFloat16Rows {
  const uint16_t* data;
  int64_t row;

  BFloat16Rows at(int64_t i, int64_t j) const { return {data + i * row + j, row}; }
};

// A: the pair p of row i begins at data[i * row + p * pair].
struct ProductLeft {
  const uint16_t* data;
  int64_t row;
  int64_t pair;
};

// What becomes of a product's sums, in the order of the fields behind `row`.
struct ProductOutput {
  Storage storage; // of data: float32 or bfloat16
  void* data;      // element (i, j) at i * row + j
  int64_t row;
  const uint16_t* bias = nullptr; // bfloat16, [columns]: added
  const float* part = nullptr;    // (i, j) at i * part_row + j: added
  int64_t part_row = 0;
  const uint16_t* slope_of = nullptr; // bfloat16, as data: multiplied by gelu' of these
  bool rounds = false;                // to bfloat16
  bool accumulates = false;           // to what is there
  uint16_t* activated = nullptr;      // bfloat16, as data: gelu of what is written there
};

// The columns of a panel: with tiles of 8 rows their sums take 24 of 32 registers.
constexpr int64_t kPanel = 48;

struct LinearKernels {
  // Packs a panel of B, whose rows lie in `x`.  With `sums`, adds up the columns there.
  void (*pack)(const BFloat16Rows& x, int64_t inner, int64_t columns, uint32_t* to, float* sums);
  // The same of B = W^T, whose columns lie in `w`.
  void (*pack_transposed)(const BFloat16Rows& w, int64_t inner, int64_t columns, uint32_t* to);
  // Multiplies A by a panel.
  void (*multiply)(const ProductLeft& a, int64_t rows, int64_t pairs, const uint32_t* panel,
                   int64_t columns, const ProductOutput& out);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const LinearKernels linear_kernels;
}
#endif

} // namespace superbert
