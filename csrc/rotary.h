// The rotation of queries and keys by their positions on the CPU (rotary_simd.cpp has the loops);
// kernels/rotary/rotary.py has the maths.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "storage.h"

namespace superbert {

// What all tokens have in common.  Strides count elements; columns are contiguous.
struct RotaryCall {
  Storage storage;
  int64_t groups, heads, width;
  int64_t half; // pairs that are rotated in a head; the columns from 2 * half on stay as they are
  int64_t x_group, x_head;
  int64_t out_group, out_head;
  bool interleaved; // pairs are (2i, 2i + 1) rather than (i, i + half)
  float sign;       // of the angle
  bool in_place;    // x is out: what stays as it is need not be copied
};

struct RotaryKernels {
  // Rotates one token's heads [groups, heads, width] by cos and sin [half]; null copies them.
  void (*rotate)(const RotaryCall& call, const void* x, const float* cos, const float* sin,
                 void* out);
};

SUPERBERT_DISPATCH(RotaryKernels, rotary_kernels)

} // namespace superbert
