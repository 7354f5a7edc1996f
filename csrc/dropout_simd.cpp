// Elementwise dropout on the CPU.  Compiled once for each vector unit.
#include "dropout_simd.h"

#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {
namespace {

constexpr int64_t kBlock = 1024;

void dropout(Storage storage, const Dropout& dropout, const void* from, int64_t begin, int64_t end,
             void* to) {
  float buffer[kBlock + element_factor_floats(0)];
  with_storage(storage, [&]<typename T>(const T*) {
    const T* x = static_cast<const T*>(from);
    T* out = static_cast<T*>(to);
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t count = smaller(kBlock, end - start);
      const float* factors = element_factors(dropout, start, count, buffer);
      for_row(count, [&](int64_t i, auto lanes) {
        lanes.store(out + start + i, lanes.load(x + start + i) * lanes.load(factors + i));
      });
    }
  });
}

} // namespace

extern const DropoutKernels dropout_kernels;
const DropoutKernels dropout_kernels = {dropout};

} // namespace superbert::SUPERBERT_ISA
