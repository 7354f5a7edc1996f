// The dropout arguments of the CPU kernels (dropout_simd.h has the generator), and the elementwise
// kernel (dropout_simd.cpp).
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "storage.h"

namespace superbert {

struct Dropout {
  uint64_t seed = 0;
  uint32_t rng_offset = 0;
  uint32_t threshold = 0; // elements whose random word lies below are dropped
  float scale = 1;        // 1 / (1 - p)

  bool active() const { return threshold != 0; }
};

struct DropoutKernels {
  // Elements [begin, end) of a contiguous tensor, so that threads can share them out.
  void (*dropout)(Storage storage, const Dropout& dropout, const void* from, int64_t begin,
                  int64_t end, void* to);
};

SUPERBERT_DISPATCH(DropoutKernels, dropout_kernels)

} // namespace superbert
