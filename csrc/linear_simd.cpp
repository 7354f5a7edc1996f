// Products of bfloat16 matrices on the CPU.  Of the builds for several vector units, one multiplies
// bfloat16; the others are empty.
#if defined(__AVX512BF16__)

#include "linear_simd.h"

namespace superbert::SUPERBERT_ISA {
namespace {

constexpr int kRows = 8; // of a tile
constexpr int64_t kPair = 2;
// The columns of a panel: with tiles of 8 rows their sums take 24 of 32 registers.
constexpr int64_t kPanel = 3 * kWidth;

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

// Packs a panel.  With `sums`, adds up its columns there.
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

void pack_right(const BFloat16Rows& x, int64_t inner, int64_t columns, uint32_t* to) {
  const int64_t pairs = (inner + 1) / 2;
  for (int64_t j = 0; j < columns; j += kPanel) {
    pack({x.data + j, x.row}, inner, smaller(kPanel, columns - j), to + j * pairs, nullptr);
  }
}

void pack_right_transposed(const BFloat16Rows& w, int64_t inner, int64_t columns, uint32_t* to) {
  const int64_t width = round_up(columns);
  pack_transposed<kPair>(w, inner, columns,
                         [&](int64_t p, int64_t j) { return to + p * width + j; });
}

ProductLeft transpose(const BFloat16Rows& x, int64_t inner, int64_t columns, uint32_t* to,
                      float* sums) {
  pack(x, inner, columns, to, sums);
  return {reinterpret_cast<const uint16_t*>(to), 2, 2 * round_up(columns)};
}

// ---- products -----------------------------------------------------------------------------------

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

// All rows from row i on by the panel of columns from j on: kTileRows at a time, then what is left
// by halves.
template <int kTileRows, int kTileVectors>
void multiply_rows(const ProductLeft& a, int64_t i, int64_t rows, int64_t pairs,
                   const uint32_t* panel, int64_t j, int64_t columns, const ProductOutput& out) {
  constexpr int64_t kRow = kTileVectors * kWidth;
  alignas(kVectorBytes) float sums[kTileRows * kRow];
  for (; i + kTileRows <= rows; i += kTileRows) {
    sum_tile<kTileRows, kTileVectors>({a.data + i * a.row, a.row, a.pair}, pairs, panel, sums);
    write(sums, kRow, i, kTileRows, j, columns, out);
  }
  if constexpr (kTileRows > 1) {
    if (i < rows) {
      multiply_rows<kTileRows / 2, kTileVectors>(a, i, rows, pairs, panel, j, columns, out);
    }
  }
}

void multiply(const ProductLeft& a, int64_t rows, const ProductRight& b, const ProductOutput& out,
              float*) {
  const uint32_t* panel = b.words;
  for (int64_t j = 0; j < b.columns; j += kPanel, panel += kPanel * b.pairs) {
    const int64_t columns = smaller(kPanel, b.columns - j);
    const auto run = columns > 2 * kWidth ? multiply_rows<kRows, 3>
                     : columns > kWidth   ? multiply_rows<kRows, 2>
                                          : multiply_rows<kRows, 1>;
    run(a, 0, rows, b.pairs, panel, j, columns, out);
  }
}

} // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    .step = kPair,
    .panel = kPanel,
    .right_bytes = INT64_MAX,
    .items_per_thread = 6,
    .left_panel = kPanel,
    .left_panels = 6,
    .left_words = kPanel * kTokenBlock / 2,
    .right_panels = 8,
    .right_packed = 1,
    .pack = pack_right,
    .pack_transposed = pack_right_transposed,
    .transpose = transpose,
    .multiply = multiply,
    .scratch_floats = [](int64_t) -> int64_t { return 0; },
    .write = write_row,
};

} // namespace superbert::SUPERBERT_ISA

#endif
