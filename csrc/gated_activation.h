// The CPU kernels of the gated activations; kernels/gated_activation/gated_activation.py has the
// maths.
#pragma once

#include <cstdint>

#include "cpu_isa.h"
#include "dropout.h"
#include "storage.h"

namespace superbert {

enum class Activation { kGelu, kGeluTanh, kSilu };

struct GatedActivationKernels {
  // Elements [begin, end) of the output [rows, width], so that threads can share them out; x and
  // its gradient are [rows, 2 * width], all of them contiguous.
  void (*forward)(Storage storage, Activation activation, const Dropout& dropout, const void* x,
                  int64_t width, int64_t begin, int64_t end, void* out);
  void (*backward)(Storage storage, Activation activation, const Dropout& dropout,
                   const void* grad_out, const void* x, int64_t width, int64_t begin, int64_t end,
                   void* grad_x);
};

SUPERBERT_DISPATCH(GatedActivationKernels, gated_activation_kernels)

} // namespace superbert
