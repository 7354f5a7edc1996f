// Chooses the vector unit of the CPU kernels; an operator limits it, so that tests on one machine
// reach every build.
#include "cpu_isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace superbert {
namespace {

#if defined(__x86_64__)

VectorUnit widest_vector_unit() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool tiles =
      bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  return tiles    ? VectorUnit::kAmx
         : bf16   ? VectorUnit::kAvx512Bf16
         : avx512 ? VectorUnit::kAvx512
         : avx2   ? VectorUnit::kAvx2
                  : VectorUnit::kPlain;
}

// Linux gives a process the registers of tiles, 8 KiB more for a thread to save, when it asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023,
                 kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool given = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return given;
#else
  return false;
#endif
}

std::atomic<VectorUnit> chosen_unit{widest_vector_unit()};

int64_t limit_vector_unit(int64_t number) {
  const auto last = static_cast<int64_t>(VectorUnit::kAmx);
  const auto wanted = static_cast<VectorUnit>(std::clamp<int64_t>(number, 0, last));
  chosen_unit = std::min(wanted, widest_vector_unit());
  return static_cast<int64_t>(chosen_unit.load());
}

#else

int64_t limit_vector_unit(int64_t) { return 0; }

#endif

} // namespace

#if defined(__x86_64__)
bool multiplies_bf16() { return widest_vector_unit() >= VectorUnit::kAvx512Bf16; }
bool multiplies_in_tiles() { return vector_unit() == VectorUnit::kAmx && may_use_tiles(); }
VectorUnit vector_unit() { return chosen_unit.load(std::memory_order_relaxed); }
#endif

} // namespace superbert

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  // Use no better vector unit from now on than the one of this number (0: plain, 1: AVX2,
  // 2: AVX-512, 3: AVX-512 with products of bfloat16, 4: AMX); returns the number of the one in use
  // then.
  m.def("limit_vector_unit(int number) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CompositeExplicitAutograd, m) {
  m.impl("limit_vector_unit", TORCH_BOX(&superbert::limit_vector_unit));
}
