// Chooses at run time between the builds of one source for several vector units.
//
// CMake compiles every *_simd.cpp once for each instruction set, with SUPERBERT_ISA set to its
// name, and its code is in the namespace superbert::SUPERBERT_ISA.  Such a file may include
// nothing whose inline functions could end up shared with other files (no torch, no containers):
// the linker keeps one copy of those, and it might keep the one that needs AVX-512.
#pragma once

namespace superbert {

#if defined(__x86_64__)

// The fourth one multiplies bfloat16, too; the last one has the tiles of AMX besides.
enum class VectorUnit { kPlain, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Whether this processor has the fourth one, which nothing limits.
bool multiplies_bf16();

// Whether the last one is in use.  The first call asks the kernel for the tiles' registers.
bool multiplies_in_tiles();

// The widest one of this processor, or the narrower one that limit_vector_unit() asked for.
VectorUnit vector_unit();

template <typename T>
const T& best_for_cpu(const T& plain, const T& avx2, const T& avx512, const T& avx512_bf16) {
  switch (vector_unit()) {
  case VectorUnit::kPlain:
    return plain;
  case VectorUnit::kAvx2:
    return avx2;
  case VectorUnit::kAvx512Bf16:
    return avx512_bf16;
  default: // where there is AMX, too, whose processors multiply pairs of bfloat16 at half the rate
    return avx512;
  }
}

// Declares the builds of `name`, an object of type `type`, and `name()` that picks one.
#define SUPERBERT_DISPATCH(type, name)                                                             \
  namespace plain {                                                                                \
  extern const type name;                                                                          \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  extern const type name;                                                                          \
  }                                                                                                \
  namespace avx512 {                                                                               \
  extern const type name;                                                                          \
  }                                                                                                \
  namespace avx512_bf16 {                                                                          \
  extern const type name;                                                                          \
  }                                                                                                \
  inline const type& name() {                                                                      \
    return best_for_cpu(plain::name, avx2::name, avx512::name, avx512_bf16::name);                 \
  }

#else

#define SUPERBERT_DISPATCH(type, name)                                                             \
  namespace plain {                                                                                \
  extern const type name;                                                                          \
  }                                                                                                \
  inline const type& name() { return plain::name; }

#endif

} // namespace superbert
