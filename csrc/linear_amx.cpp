// Products of bfloat16 matrices on the CPU by the tiles of AMX.
//
// A tile register holds 16 rows of 64 bytes.  One instruction multiplies 16 rows of A, 32 numbers
// each, by 16 rows of a panel of B, 16 words each, and adds up 16 x 16 sums.  Four tiles of sums
// take every tile of A and of B twice.
//
// A core multiplies as fast as its second cache hands out one of the operands.  So the inner
// dimension is divided into chunks: one of 32 rows of A is packed, tile by tile, and stays in the
// first cache while all panels of B go past.  Results are written along their rows, which the
// prefetcher of the second cache follows.
#include "linear_simd.h"

namespace superbert::SUPERBERT_ISA {
namespace {

constexpr int kTile = 16;            // rows of a tile
constexpr int kStep = 32;            // numbers of a row of one
constexpr int64_t kPair = 2 * kTile; // rows or columns of two tiles
constexpr int64_t kChunk = 12;       // steps, at most
constexpr int64_t kLine = 64;        // bytes
constexpr int64_t kTileNumbers = kTile * kStep;
constexpr int64_t kSums = kPair * kPair; // of four tiles

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- tile registers -----------------------------------------------------------------------------
// 0 to 3: sums, [0 1; 2 3].  4 and 5: A, its upper and lower rows.  6 and 7: B, left and right.

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
constexpr TileShapes kShapes; // as the processor reads them

// Gives this thread tile registers while it lives.
struct TileRegisters {
  TileRegisters() { _tile_loadconfig(&kShapes); }
  ~TileRegisters() { _tile_release(); }
};

// ---- packing ------------------------------------------------------------------------------------

uint32_t first_bits(int64_t count) { return static_cast<uint32_t>((uint64_t{1} << count) - 1); }

// A row's 32 numbers from `column` on, of which `mask` exist, or zeros if there is no such row.
__m512i load_row(const BFloat16Rows& x, int64_t row, int64_t rows, int64_t column, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(row < rows ? mask : 0, element(x, row, column));
}

// A panel is one of tiles: its words from (p, j) on, of `width` in a row.
uint32_t* place(uint32_t* panel, int64_t width, int64_t p, int64_t j) {
  return panel + (p / kTile * width + j) * kTile + p % kTile * kTile;
}

void pack_right_transposed(const BFloat16Rows& w, int64_t inner, int64_t columns, uint32_t* to) {
  pack_transposed<kStep>(w, inner, columns,
                         [&](int64_t p, int64_t j) { return place(to, round_up(columns), p, j); });
}

// Goes along the rows, 32 at a time.
void pack(const BFloat16Rows& x, int64_t inner, int64_t columns, uint32_t* to) {
  // unpack* work within quarters of a vector.
  const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const int64_t steps = ceil_div(inner, kStep), pairs = steps * kTile;
  for (int64_t p = 0; p < pairs; p += kTile) {
    for (int64_t j = 0; j < columns; j += kPair) {
      const int64_t count = smaller(kPair, columns - j), width = round_up(count);
      const __mmask32 mask = first_bits(count);
      uint32_t* tile = place(to + j * pairs, width, p, 0);
      for (int64_t k = 2 * p; k < 2 * p + kStep; k += 2, tile += kTile) {
        const __m512i even = load_row(x, k, inner, j, mask);
        const __m512i odd = load_row(x, k + 1, inner, j, mask);
        const __m512i low = _mm512_unpacklo_epi16(even, odd);
        const __m512i high = _mm512_unpackhi_epi16(even, odd);
        _mm512_storeu_si512(tile, _mm512_permutex2var_epi64(low, left, high));
        if (width > kTile) {
          _mm512_storeu_si512(tile + kTile * kTile, _mm512_permutex2var_epi64(low, right, high));
        }
      }
    }
  }
}

// Interleaves the lower or upper halves of quarters, by 32 or 64 bits.  With a mask of all lanes:
// GCC 12 warns of an undefined value inside the forms without.
__m512i low32(__m512i a, __m512i b) { return _mm512_maskz_unpacklo_epi32(0xffff, a, b); }
__m512i high32(__m512i a, __m512i b) { return _mm512_maskz_unpackhi_epi32(0xffff, a, b); }
__m512i low64(__m512i a, __m512i b) { return _mm512_maskz_unpacklo_epi64(0xff, a, b); }
__m512i high64(__m512i a, __m512i b) { return _mm512_maskz_unpackhi_epi64(0xff, a, b); }

// Transposes squares of 8 x 8 numbers, one in each quarter of the vectors.
void transpose_quarters(__m512i (&rows)[8]) {
  __m512i pairs[8];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm512_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]);
    pairs[4 + i] = _mm512_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    const __m512i upper01 = low32(pairs[i], pairs[i + 1]);
    const __m512i upper23 = high32(pairs[i], pairs[i + 1]);
    const __m512i lower01 = low32(pairs[i + 2], pairs[i + 3]);
    const __m512i lower23 = high32(pairs[i + 2], pairs[i + 3]);
    rows[i] = low64(upper01, lower01);
    rows[i + 1] = high64(upper01, lower01);
    rows[i + 2] = low64(upper23, lower23);
    rows[i + 3] = high64(upper23, lower23);
  }
}

// A chunk of A: rows i to i + rows, of the inner dimension from `begin` to `end`.
struct Chunk {
  int64_t i, rows, begin, end;
};

constexpr int kColumns = 8; // of A^T that are transposed together

// `rows` rows of A^T become rows of tiles at `to`.  `totals` gains the sums of pairs of each.
template <bool kWhole>
void transpose_step(const BFloat16Rows& x, int64_t rows, __mmask8 mask, uint16_t* to,
                    Floats* totals) {
  const auto load = [&](int64_t row) {
    const auto* p = reinterpret_cast<const __m128i*>(element(x, row, 0));
    if constexpr (kWhole) return _mm_loadu_si128(p);
    return _mm_maskz_loadu_epi16(row < rows ? mask : 0, p);
  };
  __m512i square[kColumns];
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row) { // and the 8th, 16th and 24th after it
    square[row] = _mm512_castsi128_si512(load(row));
    square[row] = _mm512_inserti32x4(square[row], load(row + 8), 1);
    square[row] = _mm512_inserti32x4(square[row], load(row + 16), 2);
    square[row] = _mm512_inserti32x4(square[row], load(row + 24), 3);
  }
  transpose_quarters(square);
  const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
#pragma GCC unroll 8
  for (int column = 0; column < kColumns; ++column) {
    _mm512_storeu_si512(to + column * kStep, square[column]);
    totals[column] = _mm512_dpbf16_ps(totals[column], (__m512bh)square[column], ones);
  }
}

// Packs a chunk of A, tile by tile, upper and lower ones in turns.
void pack_chunk(const ProductLeft& a, const Chunk& chunk, uint16_t* to) {
  const auto tile_row = [&](int64_t row, int64_t k) {
    const int64_t tile = 2 * ((k - chunk.begin) / kStep) + row / kTile;
    return to + tile * kTileNumbers + row % kTile * kStep;
  };
  if (!a.is_transposed) {
    for (int64_t row = 0; row < chunk.rows; ++row) {
      const BFloat16* from = element({a.data, a.row}, chunk.i + row, 0);
      for (int64_t k = chunk.begin; k < chunk.end; k += kStep) {
        const __mmask32 mask = first_bits(smaller(kStep, chunk.end - k));
        _mm512_storeu_si512(tile_row(row, k), _mm512_maskz_loadu_epi16(mask, from + k));
      }
    }
    return;
  }
  Floats totals[kPair] = {};
  for (int64_t k = chunk.begin; k < chunk.end; k += kStep) {
    for (int64_t row = 0; row < chunk.rows; row += kColumns) {
      const BFloat16Rows from{a.data + k * a.row + chunk.i + row, a.row};
      const int64_t count = smaller(kColumns, chunk.rows - row);
      const bool is_whole = k + kStep <= chunk.end && count == kColumns;
      const auto run = is_whole ? transpose_step<true> : transpose_step<false>;
      run(from, chunk.end - k, first_bits(count), tile_row(row, k), totals + row);
    }
  }
  for (int64_t row = 0; a.sums != nullptr && row < chunk.rows; ++row) {
    a.sums[chunk.i + row] += sum_lanes<float>(totals[row]);
  }
}

// Asks the second cache for a chunk of A, a few lines at a time, while another is multiplied: no
// prefetcher follows rows that are far apart.
class Ahead {
 public:
  Ahead(const ProductLeft& a, const Chunk& chunk)
      : from_{a.data, a.row}, row_(a.is_transposed ? chunk.begin : chunk.i),
        end_row_(a.is_transposed ? chunk.end : chunk.i + chunk.rows),
        first_(a.is_transposed ? chunk.i : chunk.begin),
        end_(a.is_transposed ? chunk.i + chunk.rows : chunk.end), column_(first_) {}

  void ask() {
    for (int line = 0; line < kLines && row_ < end_row_; ++line) {
      __builtin_prefetch(element(from_, row_, column_), 0, 2);
      column_ += kStep;
      if (column_ >= end_) column_ = first_, ++row_;
    }
  }

 private:
  static constexpr int kLines = 4;
  BFloat16Rows from_;
  int64_t row_, end_row_, first_, end_, column_;
};

// ---- products -----------------------------------------------------------------------------------

// The sums of up to two tiles of rows by as many of columns, over `steps` of the inner dimension:
// tiles of A, upper and lower in turns, and of a panel.  They are added to those at `sums` [32,
// 32], unless this is the `first` chunk, and written there.
//
// Tiles of a panel are loaded past the first cache, where those of A stay.
template <bool kLower, bool kRight>
void sum_tiles(const uint16_t* a, int64_t steps, const uint32_t* panel, bool first, float* sums,
               Ahead& ahead) {
  __atomic_signal_fence(__ATOMIC_SEQ_CST); // no intrinsic tells the compiler what a tile reads
  constexpr int64_t kRow = kPair * sizeof(float);
  float* const lower_sums = sums + kTile * kPair;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRow);
    if constexpr (kRight) _tile_loadd(1, sums + kTile, kRow);
    if constexpr (kLower) _tile_loadd(2, lower_sums, kRow);
    if constexpr (kLower && kRight) _tile_loadd(3, lower_sums + kTile, kRow);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a, kLine);
    _tile_stream_loadd(6, panel, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight) {
      _tile_stream_loadd(7, panel + kTile * kTile, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    ahead.ask();
    if constexpr (kLower) {
      _tile_loadd(5, a + kTileNumbers, kLine);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRight) _tile_dpbf16ps(3, 5, 7);
    }
    a += 2 * kTileNumbers;
    panel += (kRight ? 2 : 1) * kTile * kTile;
  }
  _tile_stored(0, sums, kRow);
  if constexpr (kRight) _tile_stored(1, sums + kTile, kRow);
  if constexpr (kLower) _tile_stored(2, lower_sums, kRow);
  if constexpr (kLower && kRight) _tile_stored(3, lower_sums + kTile, kRow);
}

void multiply(const ProductLeft& a, int64_t rows, const ProductRight& b, const ProductOutput& out,
              float* scratch) {
  const TileRegisters registers;
  auto* const left = reinterpret_cast<uint16_t*>(scratch);
  float* const sums = scratch + kChunk * kTileNumbers;
  const int64_t steps = b.pairs / kTile, chunks = larger(1, ceil_div(steps, kChunk));
  const auto chunk_of = [&](int64_t number) -> Chunk {
    const int64_t i = number / chunks * kPair, chunk = number % chunks;
    if (i >= rows) return {rows, 0, 0, 0};
    return {i, smaller(kPair, rows - i), chunk * steps / chunks * kStep,
            smaller(b.inner, (chunk + 1) * steps / chunks * kStep)};
  };
  for (int64_t number = 0; number < ceil_div(rows, kPair) * chunks; ++number) {
    const Chunk chunk = chunk_of(number);
    const bool is_first = number % chunks == 0, is_last = number % chunks + 1 == chunks;
    pack_chunk(a, chunk, left);
    Ahead ahead(a, chunk_of(number + 1));
    for (int64_t j = 0; j < b.columns; j += kPair) {
      const int64_t columns = smaller(kPair, b.columns - j), width = round_up(columns);
      const bool has_lower = chunk.rows > kTile, has_right = width > kTile;
      const auto run = has_lower   ? has_right ? sum_tiles<true, true> : sum_tiles<true, false>
                       : has_right ? sum_tiles<false, true>
                                   : sum_tiles<false, false>;
      float* const own = sums + (chunks > 1 ? j / kPair * kSums : 0);
      if (is_last && out.slope_of != nullptr) {
        for (int64_t row = chunk.i; row < chunk.i + chunk.rows; ++row) {
          __builtin_prefetch(out.slope_of + row * out.row + j, 0, 2);
        }
      }
      run(left, ceil_div(chunk.end - chunk.begin, kStep),
          b.words + j * b.pairs + chunk.begin / kStep * kTile * width, is_first, own, ahead);
      // Not a row at a time within the steps: vectors beside them slow both down.
      if (is_last) write(own, kPair, chunk.i, chunk.rows, j, columns, out);
    }
  }
}

int64_t scratch_floats(int64_t columns) {
  return kChunk * kTileNumbers + ceil_div(columns, kPair) * kSums;
}

ProductLeft transpose(const BFloat16Rows& x, int64_t, int64_t, uint32_t*, float* sums) {
  return {x.data, x.row, 0, true, sums};
}

} // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    .step = kStep,
    .panel = kPair,
    .right_bytes = 1200 << 10, // of 2 MiB that a core has
    .items_per_thread = 2,
    .left_panel = 192,
    .left_panels = 4,
    .left_words = 0,
    .right_panels = 12,
    .right_packed = 12,
    .pack = pack,
    .pack_transposed = pack_right_transposed,
    .transpose = transpose,
    .multiply = multiply,
    .scratch_floats = scratch_floats,
    .write = write_row,
};

} // namespace superbert::SUPERBERT_ISA
