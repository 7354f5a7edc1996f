// For the *_simd.cpp files: rows in scratch, exp, and the small matrix products that attention is
// made of.
#pragma once

#include <cstdint>

#include "simd.h"
#include "storage.h"

namespace superbert::SUPERBERT_ISA {

using Floats = Vec<float>;
using Ints = Vec<int32_t>;
constexpr int kWidth = kLanes<float>;

// Calls f with a null pointer of the storage type.
template <typename F>
void with_storage(Storage storage, const F& f) {
  switch (storage) {
  case Storage::kFloat32:
    return f(static_cast<const float*>(nullptr));
  case Storage::kBFloat16:
    return f(static_cast<const BFloat16*>(nullptr));
  case Storage::kFloat16:
    return f(static_cast<const Half*>(nullptr));
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

inline Floats splat(float value) { return value - Floats{}; }

inline Ints lane_numbers() {
  Ints lanes;
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane;
  return lanes;
}

// The first `count` lanes of v; `rest` in the others.
inline Floats first_lanes(Floats v, int64_t count, float rest) {
  return lane_numbers() < static_cast<int32_t>(count) ? v : splat(rest);
}

// ---- rows in scratch, which is padded to whole vectors ------------------------------------------
template <typename T>
inline void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store(to + i, load_first(from + i, count - i));
}

// As store(), but bfloat16 by the processor's own rounding where it has one, which makes subnormal
// numbers zeros.
template <typename T>
inline void round_to(T* to, Floats v) {
  store(to, v);
}

#if defined(__AVX512BF16__)
inline void round_to(BFloat16* to, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(v));
}
#endif

template <typename T>
inline void narrow(const float* from, int64_t count, float factor, T* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) round_to(to + i, load(from + i) * factor);
  if (i < count) {
    T lanes[kWidth];
    round_to(lanes, load(from + i) * factor);
    std::memcpy(to + i, lanes, (count - i) * sizeof(T));
  }
}

inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Calls f(i, lanes) for each vector of a row, the last one perhaps in part; `lanes` loads, stores
// and masks the lanes that exist.
struct AllLanes {
  template <typename T>
  Floats load(const T* p) const {
    return SUPERBERT_ISA::load(p);
  }
  template <typename T>
  void store(T* p, Floats v) const {
    SUPERBERT_ISA::store(p, v);
  }
  Floats keep(Floats v) const { return v; }
};

struct FirstLanes {
  int64_t count;

  template <typename T>
  Floats load(const T* p) const {
    return load_first(p, count);
  }
  template <typename T>
  void store(T* p, Floats v) const {
    store_first(p, v, count);
  }
  Floats keep(Floats v) const { // zero in the other lanes
    return first_lanes(v, count, 0);
  }
};

template <typename F>
inline void for_row(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) f(i, AllLanes{});
  if (i < count) f(i, FirstLanes{count - i});
}

// ---- functions ----------------------------------------------------------------------------------
// Reduces the lanes by halves, always in the same order.
template <typename F>
inline float reduce_lanes(Floats v, const F& f) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) {
    v = f(v, __builtin_shuffle(v, lane_numbers() ^ half));
  }
  return v[0];
}

inline float sum_of_lanes(Floats v) {
  return reduce_lanes(v, [](Floats a, Floats b) { return a + b; });
}

inline float max_of_lanes(Floats v) {
  return reduce_lanes(v, [](Floats a, Floats b) { return a < b ? b : a; });
}

// x = n ln 2 + rest, |rest| <= ln(2) / 2, for |x| < 2^21 or so.
struct Reduced {
  Ints n;
  Floats rest;
};

inline Reduced reduce_exponent(Floats x) {
  constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats rest = (x - n * 0.693145752f) - n * 1.42860677e-6f; // ln 2 in two parts
  // The low bits of `shifted` are n on top of kRound's own.
  return {load_bits<Ints>(&shifted) - 0x4b400000, rest};
}

// 2^(n + more) exp(rest), by the Taylor polynomial of degree 7 (remainder below 2^-27); n + more
// goes into the exponent of a number that is not subnormal.
inline Floats exponential_of(const Reduced& x, Floats rest, int32_t more) {
  Floats p = splat(1.0f / 5040);
  p = p * rest + 1.0f / 720;
  p = p * rest + 1.0f / 120;
  p = p * rest + 1.0f / 24;
  p = p * rest + 1.0f / 6;
  p = p * rest + 0.5f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  const Ints power = (x.n + (127 + more)) << 23;
  return p * load_bits<Floats>(&power);
}

// exp(x) for x <= 88, to about one unit in the last place.  Exactly zero below -87.3, where the
// result would be subnormal.  A NaN comes back as NaN.
inline Floats exponential(Floats x) {
  constexpr float kLowest = -87.3f;
  const Reduced reduced = reduce_exponent(x);
  return x < kLowest ? Floats{} : exponential_of(reduced, reduced.rest, 0);
}

// ---- transposition ------------------------------------------------------------------------------

// Transposes a square of vectors: log2(kWidth) rounds, each of which exchanges between rows `half`
// apart the lanes that differ in that bit.
inline void transpose_square(Floats (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int half = 1; half < kWidth; half *= 2) {
    const Ints lane = lane_numbers();
    const Ints own_low = (lane & half) == 0 ? lane : kWidth + lane - half;
    const Ints own_high = (lane & half) == 0 ? lane + half : kWidth + lane;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if (i & half) continue;
      const Floats low = rows[i], high = rows[i + half];
      rows[i] = __builtin_shuffle(low, high, own_low);
      rows[i + half] = __builtin_shuffle(low, high, own_high);
    }
  }
}

// to [columns, to_row] = from [rows, from_row] transposed.  Whole squares are written: what fills
// the last one beyond `rows` is zero.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                      int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kWidth) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      Floats square[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        square[r] = i + r < rows ? load(from + (i + r) * from_row + j) : Floats{};
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) store(to + (j + c) * to_row + i, square[c]);
    }
  }
}

// ---- matrix product -----------------------------------------------------------------------------
//
// Operands are float32 or, where the processor multiplies pairs of them, bfloat16, and sums are
// float32.  Scratch holds operands as 32-bit words: a number, or two that are neighbours along the
// inner dimension, the last one of an odd dimension beside a zero.

// What tensors that are stored as T are multiplied as.
template <typename T>
struct OperandOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<BFloat16> {
  using type = BFloat16;
};
#endif
template <typename T>
using Operand = typename OperandOf<T>::type;

template <typename E>
constexpr bool kInPairs = sizeof(E) < sizeof(float);

// Words of `count` numbers along the inner dimension.
template <typename E>
constexpr int64_t words(int64_t count) {
  return kInPairs<E> ? (count + 1) / 2 : count;
}

// A left operand: word k of row i is data[i * row + k * column].
struct Left {
  const float* data;
  int64_t row;
  int64_t column;

  Left from_row(int64_t i) const { return {data + i * row, row, column}; }
};

// A right operand: word k of column j is data[k * row + j].
struct Right {
  const float* data;
  int64_t row;

  Right from_column(int64_t j) const { return {data + j, row}; }
};

// C = factor A B, or C += factor A B.
struct Result {
  float* data;
  int64_t row;
  float factor = 1;
  bool add = false;

  Result from(int64_t i, int64_t j) const { return {data + i * row + j, row, factor, add}; }
};

// Writes a row of a tensor as words: whole vectors, zeros behind the last number.
template <typename T>
inline void pack(const T* from, int64_t count, float* to) {
  if constexpr (kInPairs<Operand<T>>) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
      std::memcpy(to + i / 2, from + i, kVectorBytes);
    }
    if (i < count) {
      T last[2 * kWidth] = {};
      std::memcpy(last, from + i, (count - i) * sizeof(T));
      std::memcpy(to + i / 2, last, kVectorBytes);
    }
  } else {
    widen(from, count, to);
  }
}

// Packed rows [count, width] as right operand whose inner dimension counts them.  Pairs of rows are
// written to `to`; an odd last one is beside zeros, not what lies behind it, which may be NaN.
template <typename E>
inline Right pair_rows(const float* rows, int64_t row, int64_t count, int64_t width, float* to,
                       int64_t to_row) {
  if constexpr (!kInPairs<E>) return {rows, row};
  for (int64_t i = 0; i < count; i += 2) {
    const auto* low = reinterpret_cast<const E*>(rows + i * row);
    const auto* high = reinterpret_cast<const E*>(rows + (i + 1) * row);
    for (int64_t j = 0; j < width; j += kWidth) {
      Words pairs = __builtin_convertvector(load_bits<HalfWords>(low + j), Words);
      if (i + 1 < count) {
        pairs |= __builtin_convertvector(load_bits<HalfWords>(high + j), Words) << 16;
      }
      std::memcpy(to + i / 2 * to_row + j, &pairs, sizeof pairs);
    }
  }
  return {to, to_row};
}

// A float32 tile [rows, columns] as left operand; what is rounded is written to `to`, rows half as
// long.
template <typename E>
inline Left round_rows(const float* tile, int64_t row, int64_t rows, int64_t columns, float* to) {
  if constexpr (!kInPairs<E>) return {tile, row, 1};
  for (int64_t i = 0; i < rows; ++i) {
    auto* numbers = reinterpret_cast<E*>(to + i * row / 2);
    for (int64_t j = 0; j < columns; j += kWidth) round_to(numbers + j, load(tile + i * row + j));
  }
  return {to, row / 2, 1};
}

// The transpose of a float32 tile [rows, columns] as left operand; what is rounded is written to
// the tile itself.
template <typename E>
inline Left round_columns(float* tile, int64_t row, [[maybe_unused]] int64_t rows,
                          [[maybe_unused]] int64_t columns) {
#if defined(__AVX512BF16__)
  const auto in_turn = (__m512i)(lane_numbers() | (lane_numbers() + kWidth) << 16);
  for (int64_t i = 0; kInPairs<E> && i < rows; i += 2) {
    const float* low = tile + i * row;
    for (int64_t j = 0; j < columns; j += kWidth) {
      const Floats high = i + 1 < rows ? load(low + row + j) : Floats{};
      const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, load(low + j)); // low's are first
      store(tile + i / 2 * row + j, (Floats)_mm512_permutexvar_epi16(in_turn, both));
    }
  }
#endif
  return {tile, 1, row};
}

// sum + the products of the numbers in a word and those in each lane's.
template <typename E>
inline Floats multiply_add(Floats sum, float left, Floats right) {
#if defined(__AVX512BF16__)
  if constexpr (kInPairs<E>) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
  }
#endif
  return sum + left * right;
}

// One register tile: kRows rows by kVectors vectors over the whole inner dimension.
template <typename E, int kRows, int kVectors>
inline void multiply_tile(int64_t inner, Left a, Right b, Result c) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < words<E>(inner); ++k) {
    Floats right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b.data + k * b.row + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float left = a.data[i * a.row + k * a.column];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add<E>(sums[i][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = c.data + i * c.row + v * kWidth;
      const Floats sum = sums[i][v] * c.factor;
      // Added at the end, so that a long sum is one of sums and loses less to rounding.
      store(to, c.add ? load(to) + sum : sum);
    }
  }
}

// All rows of a strip of columns: kRows at a time, then what is left by halves.
template <typename E, int kRows, int kVectors>
inline void multiply_strip(int64_t rows, int64_t inner, Left a, Right b, Result c) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    multiply_tile<E, kRows, kVectors>(inner, a.from_row(i), b, c.from(i, 0));
  }
  if constexpr (kRows > 1) {
    if (i < rows) {
      multiply_strip<E, kRows / 2, kVectors>(rows - i, inner, a.from_row(i), b, c.from(i, 0));
    }
  }
}

// C [rows, columns] from A [rows, inner] B [inner, columns], by strips of two vectors.  Columns
// beyond `columns` up to a whole vector are computed too; b and c have room for them.
template <typename E>
inline void multiply(int64_t rows, int64_t columns, int64_t inner, Left a, Right b, Result c) {
  constexpr int kRows = kWidth == 16 ? 8 : 4; // sums take 16 of 32 registers, or 8 of 16
  int64_t j = 0;
  for (; j + kWidth < columns; j += 2 * kWidth) {
    multiply_strip<E, kRows, 2>(rows, inner, a, b.from_column(j), c.from(0, j));
  }
  if (j < columns) multiply_strip<E, kRows, 1>(rows, inner, a, b.from_column(j), c.from(0, j));
}

} // namespace superbert::SUPERBERT_ISA
