// One vector type for all instruction sets, for the *_simd.cpp files (see cpu_isa.h).
//
// Vec<float> and Vec<double> are the compiler's own vector types: +, -, * and / work on them, and a
// scalar operand is broadcast.  This file adds loads and stores that convert from and to the 16-bit
// formats, parts of a vector for the ends of rows, the square root and the sum of the lanes.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace superbert::SUPERBERT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
using Words = Vec<uint32_t>;
using HalfWords = typename VectorOf<uint16_t, kVectorBytes / 2>::type;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that values of a storage type are computed in.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

template <typename V>
inline V load_bits(const void* address) {
  V bits;
  std::memcpy(&bits, address, sizeof(V));
  return bits;
}

// ---- whole vectors -----------------------------------------------------------------------------
inline Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }

// The forms with a mask: GCC 12 warns of an undefined value inside the plain ones.  It also
// converts halves of a vector and joins them where one instruction widens the whole.
inline Vec<float> load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i words =
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_slli_epi32(0xffff, words, 16));
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vec<float>>(_mm256_slli_epi32(words, 16));
#else
  const Words words = __builtin_convertvector(load_bits<HalfWords>(p), Words) << 16;
  return load_bits<Vec<float>>(&words);
#endif
}

#if defined(__aarch64__) // where GCC 12 has _Float16 in C alone
using NativeHalf = __fp16;
#else
using NativeHalf = _Float16;
#endif

inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> values;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    values[lane] = static_cast<float>(load_bits<NativeHalf>(p + lane));
  }
  return values;
#endif
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even; a NaN stays one, whatever its low bits.
inline void store(BFloat16* p, Vec<float> v) {
  const Words bits = load_bits<Words>(&v);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Words quiet_nan = Words{} + 0x7fc00000;
  const HalfWords result = __builtin_convertvector((v == v ? rounded : quiet_nan) >> 16, HalfWords);
  std::memcpy(p, &result, sizeof result);
}

inline void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    const NativeHalf value = static_cast<NativeHalf>(v[lane]);
    std::memcpy(p + lane, &value, sizeof value);
  }
#endif
}

// ---- the first `count` lanes, for the end of a row ---------------------------------------------
template <typename T>
inline Vec<Compute<T>> load_first(const T* p, int64_t count) {
  T lanes[kLanes<Compute<T>>] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store_first(T* p, Vec<Compute<T>> v, int64_t count) {
  T lanes[kLanes<Compute<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

// ---- arithmetic --------------------------------------------------------------------------------
inline Vec<float> square_root(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}

inline Vec<double> square_root(Vec<double> v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(v);
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) v[lane] = __builtin_sqrt(v[lane]);
  return v;
#endif
}

// Sum of the lanes, always by the same tree: the upper half is added to the lower one.
template <typename T, typename V>
inline T sum_lanes(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    using HalfVector = typename VectorOf<T, sizeof(V) / 2>::type;
    HalfVector lower, upper;
    std::memcpy(&lower, &v, sizeof lower);
    std::memcpy(&upper, reinterpret_cast<const char*>(&v) + sizeof lower, sizeof upper);
    return sum_lanes<T>(lower + upper);
  }
}

} // namespace superbert::SUPERBERT_ISA
