// Plain structs, free of torch, that the operators of linear layers (linear_cpu.cpp) pass to the
// CPU kernels (linear_simd.cpp, linear_amx.cpp): products of bfloat16 matrices, whose sums are
// float32.
//
// A product is A [rows, inner] times B [inner, columns].  The processor multiplies pairs of
// neighbours along the inner dimension and adds both products to a sum.  So B is packed in panels
// of so many columns, the last one of whole vectors: word [p, j] of a panel, 32 bits, holds the
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

// A: the pair p of row i begins at data[i * row + p * pair]; or A^T as it lies, rows of the inner
// dimension.
struct ProductLeft {
  const uint16_t* data;
  int64_t row;
  int64_t pair;
  bool is_transposed = false;
  float* sums = nullptr; // of the rows of A, if is_transposed
};

// B: panels, one behind the other.
struct ProductRight {
  const uint32_t* words;
  int64_t inner, pairs, columns;
};

// What becomes of a product's sums, in the order of the fields behind `row`.
struct ProductOutput {
  Storage storage; // of data: float32 or bfloat16
  void* data;      // element (i, j) at i * row + j
  int64_t row;
  const uint16_t* bias = nullptr; // bfloat16, [columns]: added
  const float* part = nullptr;    // (i, j) at i * part_row + j: added
  int64_t part_row = 0;
  const uint16_t* slope_of = nullptr; // alone, bfloat16, as data: multiplied by gelu' of these
  bool rounds = false;                // to bfloat16
  bool accumulates = false;           // to what is there
  uint16_t* activated = nullptr; // with a bias at most, bfloat16, as data: gelu of what is written
};

constexpr int64_t kRowBlock = 128;    // rows of A that go through all panels
constexpr int64_t kTokenBlock = 1024; // of a weight gradient's inner dimension

struct LinearKernels {
  int64_t step;             // the inner dimension of a packed operand is whole steps
  int64_t panel;            // columns of B
  int64_t right_bytes;      // of B, at most, that blocks of rows go through
  int64_t items_per_thread; // at least: few pack less, many end together
  // Of a weight gradient, whose blocks are at most so large.
  int64_t left_panel;   // outputs that are multiplied together
  int64_t left_panels;  // of a block
  int64_t left_words;   // that A needs, of left_panel rows and kTokenBlock columns
  int64_t right_panels; // of a block
  int64_t right_packed; // panels that are packed together

  // Packs panels of B, whose rows lie in `x`.
  void (*pack)(const BFloat16Rows& x, int64_t inner, int64_t columns, uint32_t* to);
  // The same of one panel of B = W^T, whose columns lie in `w`.
  void (*pack_transposed)(const BFloat16Rows& w, int64_t inner, int64_t columns, uint32_t* to);
  // A = x^T, of `columns` rows, packed or not.  With `sums`, adds up the columns of x there, at the
  // latest when A is multiplied.
  ProductLeft (*transpose)(const BFloat16Rows& x, int64_t inner, int64_t columns, uint32_t* to,
                           float* sums);
  // Multiplies A by B, in a scratch of scratch_floats(columns of B).
  void (*multiply)(const ProductLeft& a, int64_t rows, const ProductRight& b,
                   const ProductOutput& out, float* scratch);
  int64_t (*scratch_floats)(int64_t columns);
  // Writes sums to row 0 of a result that no product belongs to.
  void (*write)(const float* sums, int64_t columns, const ProductOutput& out);
};

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const LinearKernels linear_kernels;
}
namespace amx {
extern const LinearKernels linear_kernels;
}
#endif

} // namespace superbert
