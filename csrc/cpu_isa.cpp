// Chooses the vector unit of the CPU kernels; an operator limits it, so that tests on one machine
// reach every build.
#include "cpu_isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace superbert {
namespace {

#if defined(__x86_64__)

VectorUnit widest_vector_unit() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? VectorUnit::kAvx512 : avx2 ? VectorUnit::kAvx2 : VectorUnit::kPlain;
}

std::atomic<VectorUnit> chosen_unit{widest_vector_unit()};

int64_t bytes_of(VectorUnit unit) {
  return unit == VectorUnit::kAvx512 ? 64 : unit == VectorUnit::kAvx2 ? 32 : 16;
}

int64_t limit_vector_unit(int64_t bytes) {
  const VectorUnit wanted = bytes >= 64   ? VectorUnit::kAvx512
                            : bytes >= 32 ? VectorUnit::kAvx2
                                          : VectorUnit::kPlain;
  chosen_unit = std::min(wanted, widest_vector_unit());
  return bytes_of(chosen_unit);
}

#else

int64_t limit_vector_unit(int64_t) { return 16; }

#endif

} // namespace

#if defined(__x86_64__)
VectorUnit vector_unit() { return chosen_unit.load(std::memory_order_relaxed); }
#endif

} // namespace superbert

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  // Use vectors of at most so many bytes from now on; returns the width that is in use then.
  m.def("limit_vector_unit(int bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CompositeExplicitAutograd, m) {
  m.impl("limit_vector_unit", TORCH_BOX(&superbert::limit_vector_unit));
}
