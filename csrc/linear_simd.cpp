// Products of bfloat16 matrices on the CPU.  Of the builds for several vector units, one multiplies
// bfloat16; the others are empty.
#if defined(__AVX512BF16__)

#include "linear.h"

#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {
namespace {

constexpr int kRows = 8; // of a tile

int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

const BFloat16* element(const BFloat16Rows& rows, int64_t i, int64_t j) {
  return reinterpret_cast<const BFloat16*>(rows.data) + i * rows.row + j;
}

void store_words(uint32_t* p, Words v) { std::memcpy(p, &v, sizeof v); }

// ---- packing ------------------------------------------------------------------------------------

// The bits of the `count` first elements at p, one a word; zeros behind them.
Words load_bits_of(const BFloat16* p, int64_t count) {
  if (count >= kWidth) return __builtin_convertvector(load_bits<HalfWords>(p), Words);
  uint16_t lanes[kWidth] = {};
  std::memcpy(lanes, p, count * sizeof *p);
  return __builtin_convertvector(load_bits<HalfWords>(lanes), Words);
}

// kVectors vectors of columns from `column` on, `count` of which exist in the last one.
template <int kVectors>
void pack_vectors(const BFloat16Rows& x, int64_t inner, int64_t column, int64_t count, uint32_t* to,
                  int64_t width, float* sums) {
  constexpr int64_t kRowsAhead = 16; // no prefetcher follows rows that are far apart
  Floats totals[kVectors] = {};
  for (int64_t k = 0; k < inner; k += 2, to += width) {
    const bool has_second = k + 1 < inner;
    for (int64_t row = 0; row < 2; ++row) {
      __builtin_prefetch(element(x, k + kRowsAhead + row, column));
      if (kVectors > 1) __builtin_prefetch(element(x, k + kRowsAhead + row, column + 2 * kWidth));
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const int64_t j = column + v * kWidth, lanes = v + 1 < kVectors ? kWidth : count;
      const Words low = load_bits_of(element(x, k, j), lanes) << 16;
      const Words high = has_second ? load_bits_of(element(x, k + 1, j), lanes) << 16 : Words{};
      store_words(to + v * kWidth, low >> 16 | high);
      totals[v] += load_bits<Floats>(&low) + load_bits<Floats>(&high);
    }
  }
  if (sums == nullptr) return;
  for (int v = 0; v < kVectors; ++v) {
    float* own = sums + v * kWidth;
    store(own, load(own) + totals[v]);
  }
}

void pack(const BFloat16Rows& x, int64_t inner, int64_t columns, uint32_t* to, float* sums) {
  constexpr int64_t kChain = 64; // rows: sums of sums lose less than one long sum
  const int64_t width = round_up(columns);
  for (int64_t k = 0; k < inner; k += kChain, to += kChain / 2 * width) {
    const BFloat16Rows rows{x.data + k * x.row, x.row};
    const int64_t count = smaller(kChain, inner - k);
    if (columns == kPanel) {
      pack_vectors<3>(rows, count, 0, kWidth, to, width, sums);
      continue;
    }
    for (int64_t j = 0; j < columns; j += kWidth) {
      pack_vectors<1>(rows, count, j, smaller(kWidth, columns - j), to + j, width,
                      sums == nullptr ? nullptr : sums + j);
    }
  }
}

// The words of up to 32 elements at p; zeros behind them.
Floats load_pairs(const BFloat16* p, int64_t count) {
  if (count >= 2 * kWidth) return load_bits<Floats>(p);
  uint16_t lanes[2 * kWidth] = {};
  std::memcpy(lanes, p, count * sizeof *p);
  return load_bits<Floats>(lanes);
}

void pack_transposed(const BFloat16Rows& w, int64_t inner, int64_t columns, uint32_t* to) {
  const int64_t width = round_up(columns), pairs = (inner + 1) / 2;
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
        store(reinterpret_cast<float*>(to) + (p + r) * width + j, square[r]);
      }
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

using BFloat16s = HalfWords; // a vector of them

// Rounds to nearest even.  Like the products, it takes numbers below 2^-126 for zero.
BFloat16s rounded(Floats v) { return (BFloat16s)_mm512_cvtneps_pbh(v); }
Floats widened(BFloat16s v) {
  const Words words = __builtin_convertvector(v, Words) << 16;
  return load_bits<Floats>(&words);
}

void store_lanes(float* p, Floats v, AllLanes) { store(p, v); }
void store_lanes(BFloat16* p, Floats v, AllLanes) {
  const BFloat16s values = rounded(v);
  std::memcpy(p, &values, sizeof values);
}
template <typename T>
void store_lanes(T* p, Floats v, FirstLanes lanes) {
  T all[kWidth];
  store_lanes(all, v, AllLanes{});
  std::memcpy(p, all, lanes.count * sizeof(T));
}

// gelu(x) = x Phi(x) and its derivative, to 2^-12 of Phi(-|x|): bfloat16 has 8 bits.  x is one, so
// that its square is exact.  With t = |x| and 1 / (t + 2.7) = q, Phi(-t) = exp(-t^2 / 2) q P(q).
// The polynomials are right to 2^-13; the rest is for q, of which processors give 14 bits.
struct Gelu {
  Floats tail;    // Phi(-t)
  Floats density; // exp(-t^2 / 2)
  Floats t;

  explicit Gelu(Floats x) {
    const Ints bits = load_bits<Ints>(&x) & 0x7fffffff;
    t = _mm512_min_ps(splat(14.0f), load_bits<Floats>(&bits));          // of a NaN: the NaN
    const Floats power = t * t * -0.721347520f;                         // -t^2 / 2 in base 2
    const Floats part = _mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF); // 0 <= part < 1
    Floats e = splat(0.0780247822f);
    e = e * part + 0.226067126f;
    e = e * part + 0.695833325f;
    e = e * part + 0.999925256f;
    density = _mm512_scalef_ps(e, power);
    const Floats q = _mm512_rcp14_ps(t + 2.7f);
    Floats p = splat(-12.8717165f);
    p = p * q + 11.0358429f;
    p = p * q + 1.53432941f;
    p = p * q + 1.14445388f;
    p = p * q + 0.397234857f;
    tail = density * (p * q);
  }

  Floats value(Floats x) const { return _mm512_max_ps(Floats{}, x) - t * tail; }
  Floats derivative(Floats x) const {
    const Floats lower = tail - t * density * 0.398942280f; // at -t
    return x < 0 ? lower : 1.0f - lower;
  }
};

// Writes rows of sums from row i on, after adding what else belongs to them.
template <typename T>
void write(const float* sums, int64_t sums_row, int64_t i, int64_t rows, int64_t columns,
           const ProductOutput& out) {
  for (int64_t r = 0; r < rows; ++r, ++i, sums += sums_row) {
    T* to = static_cast<T*>(out.data) + i * out.row;
    for_row(columns, [&](int64_t j, auto lanes) {
      const auto bf16 = [&](const uint16_t* p) {
        return reinterpret_cast<const BFloat16*>(p) + i * out.row + j;
      };
      Floats sum = load(sums + j);
      if (out.bias != nullptr) {
        sum += lanes.load(reinterpret_cast<const BFloat16*>(out.bias) + j);
      }
      if (out.part != nullptr) sum += lanes.load(out.part + i * out.part_row + j);
      if (out.slope_of != nullptr) {
        const Floats x = lanes.load(bf16(out.slope_of));
        sum *= Gelu(x).derivative(x);
      }
      if (out.rounds) sum = widened(rounded(sum));
      if (out.accumulates) sum += lanes.load(to + j);
      store_lanes(to + j, sum, lanes);
      if (out.activated != nullptr) {
        const Floats x = widened(rounded(sum));
        store_lanes(const_cast<BFloat16*>(bf16(out.activated)), Gelu(x).value(x), lanes);
      }
    });
  }
}

// The sums of a tile: kTileRows of A by kTileVectors vectors, a whole panel.
template <int kTileRows, int kTileVectors>
void sum_tile(const ProductLeft& a, int64_t pairs, const uint32_t* panel, float* to) {
  Floats sums[kTileRows][kTileVectors] = {};
  const uint16_t* left = a.data;
  for (int64_t p = 0; p < pairs; ++p, panel += kTileVectors * kWidth, left += a.pair) {
    __m512bh right[kTileVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) right[v] = load_bits<__m512bh>(panel + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto pair = (__m512bh)_mm512_set1_epi32(load_bits<int32_t>(left + r * a.row));
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) {
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, right[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      store(to + (r * kTileVectors + v) * kWidth, sums[r][v]);
    }
  }
}

// All rows from row i on: kTileRows at a time, then what is left by halves.
template <int kTileRows, int kTileVectors>
void multiply_rows(const ProductLeft& a, int64_t i, int64_t rows, int64_t pairs,
                   const uint32_t* panel, int64_t columns, const ProductOutput& out) {
  constexpr int64_t kRow = kTileVectors * kWidth;
  alignas(kVectorBytes) float sums[kTileRows * kRow];
  for (; i + kTileRows <= rows; i += kTileRows) {
    sum_tile<kTileRows, kTileVectors>({a.data + i * a.row, a.row, a.pair}, pairs, panel, sums);
    if (out.storage == Storage::kBFloat16) {
      write<BFloat16>(sums, kRow, i, kTileRows, columns, out);
    } else {
      write<float>(sums, kRow, i, kTileRows, columns, out);
    }
  }
  if constexpr (kTileRows > 1) {
    if (i < rows) {
      multiply_rows<kTileRows / 2, kTileVectors>(a, i, rows, pairs, panel, columns, out);
    }
  }
}

void multiply(const ProductLeft& a, int64_t rows, int64_t pairs, const uint32_t* panel,
              int64_t columns, const ProductOutput& out) {
  static_assert(kPanel == 3 * kWidth);
  if (columns > 2 * kWidth) return multiply_rows<kRows, 3>(a, 0, rows, pairs, panel, columns, out);
  if (columns > kWidth) return multiply_rows<kRows, 2>(a, 0, rows, pairs, panel, columns, out);
  multiply_rows<kRows, 1>(a, 0, rows, pairs, panel, columns, out);
}

} // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {pack, pack_transposed, multiply};

} // namespace superbert::SUPERBERT_ISA

#endif
