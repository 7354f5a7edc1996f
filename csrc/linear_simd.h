// What the builds of linear_simd.cpp and linear_amx.cpp share, for processors that multiply
// bfloat16: the panels of a transposed matrix, and what becomes of a product's sums.
#pragma once

#include "linear.h"
#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {

inline int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

inline const BFloat16* element(const BFloat16Rows& rows, int64_t i, int64_t j) {
  return reinterpret_cast<const BFloat16*>(rows.data) + i * rows.row + j;
}

// ---- packing ------------------------------------------------------------------------------------

// The words of up to 32 elements at p; zeros behind them.
inline Floats load_pairs(const BFloat16* p, int64_t count) {
  if (count >= 2 * kWidth) return load_bits<Floats>(p);
  uint16_t lanes[2 * kWidth] = {};
  std::memcpy(lanes, p, count * sizeof *p);
  return load_bits<Floats>(lanes);
}

// Packs a panel of W^T.  place(p, j) is that of the words of pair p from column j on, whole
// vectors. The inner dimension is filled up to a multiple of kStep.
template <int64_t kStep, typename Place>
void pack_transposed(const BFloat16Rows& w, int64_t inner, int64_t columns, const Place& place) {
  const int64_t pairs = (inner + kStep - 1) / kStep * kStep / 2;
  for (int64_t j = 0; j < columns; j += kWidth) {
    for (int64_t p = 0; p < pairs; p += kWidth) {
      Floats square[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        square[r] =
            j + r < columns ? load_pairs(element(w, j + r, 2 * p), inner - 2 * p) : Floats{};
      }
      transpose_square(square);
      const int64_t rows = smaller(kWidth, pairs - p);
      for (int64_t r = 0; r < rows; ++r) {
        store(reinterpret_cast<float*>(place(p + r, j)), square[r]);
      }
    }
  }
}

// ---- epilogue -----------------------------------------------------------------------------------

using BFloat16s = HalfWords; // a vector of them

// Rounds to nearest even.  Like the products, it takes numbers below 2^-126 for zero.
inline BFloat16s rounded(Floats v) { return (BFloat16s)_mm512_cvtneps_pbh(v); }
inline Floats widened(BFloat16s v) { // with a mask, as load()
  const __m512i words = _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
  return (Floats)_mm512_maskz_slli_epi32(0xffff, words, 16);
}

template <typename T>
void store_lanes(T* p, Floats v, AllLanes) {
  round_to(p, v);
}
template <typename T>
void store_lanes(T* p, Floats v, FirstLanes lanes) {
  T all[kWidth];
  round_to(all, v);
  std::memcpy(p, all, lanes.count * sizeof(T));
}

// gelu(x) = x Phi(x) and its derivative, to 2^-12 of Phi(-|x|): bfloat16 has 8 bits.  x is one, so
// that its square is exact.  With t = |x| and 1 / (t + 2.7) = q, Phi(-t) = exp(-t^2 / 2) q P(q).
// The polynomials are right to 2^-13; the rest is for q, of which processors give 14 bits.
// From kZero on gelu(-t) is less than 2^-126 and taken for zero: subnormal numbers take 100 cycles.
struct Gelu {
  static constexpr float kZero = 13.2f;
  Floats density; // exp(-t^2 / 2)
  Floats ratio;   // Phi(-t) / density
  Floats t;

  explicit Gelu(Floats x) {
    const Ints bits = load_bits<Ints>(&x) & 0x7fffffff;
    t = _mm512_min_ps(splat(kZero), load_bits<Floats>(&bits));          // of a NaN: the NaN
    const Floats power = t * t * -0.721347520f;                         // -t^2 / 2 in base 2
    const Floats part = _mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF); // 0 <= part < 1
    Floats e = splat(0.0780247822f);
    e = e * part + 0.226067126f;
    e = e * part + 0.695833325f;
    e = e * part + 0.999925256f;
    density = _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, splat(kZero), _CMP_LT_OQ), e, power);
    const Floats q = _mm512_rcp14_ps(t + 2.7f);
    Floats p = splat(-12.8717165f);
    p = p * q + 11.0358429f;
    p = p * q + 1.53432941f;
    p = p * q + 1.14445388f;
    p = p * q + 0.397234857f;
    ratio = p * q;
  }

  Floats value(Floats x) const { return _mm512_max_ps(Floats{}, x) - t * density * ratio; }
  Floats derivative(Floats x) const {
    const Floats lower = density * (ratio - t * 0.398942280f); // at -t
    return x < 0 ? lower : 1.0f - lower;
  }
};

// What is done with sums but to round and store them: nothing, or their bias is added; GELU and its
// derivative besides; or anything.
enum class Epilogue { kBias, kGelu, kSlope, kAny };

// A vector of sums becomes element (i, j) and on of the result.
template <typename T, Epilogue kEpilogue, typename Lanes>
inline Floats finished(Floats sum, int64_t i, int64_t j, const ProductOutput& out,
                       const Lanes& lanes) {
  const auto bf16 = [](const uint16_t* p) { return reinterpret_cast<const BFloat16*>(p); };
  const int64_t place = i * out.row + j;
  if (kEpilogue != Epilogue::kSlope && out.bias != nullptr) sum += lanes.load(bf16(out.bias) + j);
  if constexpr (kEpilogue == Epilogue::kAny) {
    if (out.part != nullptr) sum += lanes.load(out.part + i * out.part_row + j);
    if (out.rounds) sum = widened(rounded(sum));
    if (out.accumulates) sum += lanes.load(static_cast<T*>(out.data) + place);
  }
  if constexpr (kEpilogue == Epilogue::kSlope) {
    const Floats x = lanes.load(bf16(out.slope_of) + place);
    sum *= Gelu(x).derivative(x);
  }
  if constexpr (kEpilogue == Epilogue::kGelu) {
    const Floats x = widened(rounded(sum));
    store_lanes(reinterpret_cast<BFloat16*>(out.activated) + place, Gelu(x).value(x), lanes);
  }
  return sum;
}

// `out` is a copy, which no store may change.
template <typename T, Epilogue kEpilogue>
void write_as(const float* sums, int64_t sums_row, int64_t i, int64_t rows, int64_t j,
              int64_t columns, const ProductOutput out) {
  for (const int64_t end = i + rows; i < end; ++i, sums += sums_row) {
    T* to = static_cast<T*>(out.data) + i * out.row + j;
    int64_t c = 0;
    if constexpr (sizeof(T) == sizeof(BFloat16)) { // a cache line at a time
      for (; c + 2 * kWidth <= columns; c += 2 * kWidth) {
        const int64_t next = c + kWidth;
        const Floats low = finished<T, kEpilogue>(load(sums + c), i, j + c, out, AllLanes{});
        const Floats high = finished<T, kEpilogue>(load(sums + next), i, j + next, out, AllLanes{});
        const auto both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        std::memcpy(to + c, &both, sizeof both);
      }
    }
    for_row(columns - c, [&](int64_t d, auto lanes) {
      const Floats sum = finished<T, kEpilogue>(load(sums + c + d), i, j + c + d, out, lanes);
      store_lanes(to + c + d, sum, lanes);
    });
  }
}

// Writes a block of sums to (i, j) on, after adding what else belongs to them.
inline void write(const float* sums, int64_t sums_row, int64_t i, int64_t rows, int64_t j,
                  int64_t columns, const ProductOutput& out) {
  const bool is_any = out.part != nullptr || out.rounds || out.accumulates;
  const auto run = out.storage != Storage::kBFloat16 ? write_as<float, Epilogue::kAny>
                   : is_any                          ? write_as<BFloat16, Epilogue::kAny>
                   : out.activated != nullptr        ? write_as<BFloat16, Epilogue::kGelu>
                   : out.slope_of != nullptr         ? write_as<BFloat16, Epilogue::kSlope>
                                                     : write_as<BFloat16, Epilogue::kBias>;
  run(sums, sums_row, i, rows, j, columns, out);
}

inline void write_row(const float* sums, int64_t columns, const ProductOutput& out) {
  write(sums, 0, 0, 1, 0, columns, out);
}

} // namespace superbert::SUPERBERT_ISA
