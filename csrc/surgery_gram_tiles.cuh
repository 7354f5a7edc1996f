// Products of more task gradients than a thread can hold sums of: square tiles of sums are dealt
// out to threads, rows pass through shared memory.  surgery_gram.cuh launches it.
//
// A chunk of columns of all rows lies in shared memory as [rows][columns], while the next one is on
// its way into registers.  Thread (pair, slice) sums the products of one pair of row tiles over
// every slices-th 16 bytes of the columns; up to 40 rows the eight threads of a quarter warp share
// a pair and read 128 neighbouring bytes of one row.
#pragma once

#include "cuda_pack.cuh"

namespace superbert {

// ---- which rows -------------------------------------------------------------------------------

// Partial sums are laid out [entry][block].  The upper triangle of row tiles is numbered row by
// row, and entry = (tile pair * tile + i) * tile + j.
struct TilePair {
  int row, column;
};

__device__ __forceinline__ TilePair tile_pair(int index, int tiles) {
  int row = 0;
  while (index >= tiles - row) index -= tiles - row++;
  return {row, row + index};
}

// More rows than kPanelRows are multiplied within panels of so many, and between half panels.
constexpr int kPanelRows = 64;
constexpr int kHalfPanel = kPanelRows / 2;

// Half panels that belong to different panels.
inline int64_t count_half_pairs(int64_t num_rows) {
  const int64_t panels = (num_rows + kPanelRows - 1) / kPanelRows;
  return panels * (panels - 1) / 2 * 4;
}

// First rows of a pair of half panels; the second may lie beyond the last row.
__device__ __forceinline__ TilePair half_pair(int index, int64_t num_rows) {
  const TilePair panels = tile_pair(index / 4, (num_rows + kPanelRows - 1) / kPanelRows - 1);
  return {panels.row * kPanelRows + index / 2 % 2 * kHalfPanel,
          (panels.column + 1) * kPanelRows + index % 2 * kHalfPanel};
}

// ---- products ---------------------------------------------------------------------------------

constexpr int kTileThreads = 160; // most of a block
constexpr int kFewestTileThreads = 96;
constexpr int kTileChain = 128;                        // columns that a thread adds up in float32
constexpr int kTileRegisters = 200;                    // of a thread, so that
constexpr int kThreadsPerProcessor = 2 * kTileThreads; // find room in 65536
constexpr int kBetweenRegisters = 240;                 // likewise, for blocks of 128 threads

// Rows of a tile: a thread keeps the square of it in sums.
template <typename C>
constexpr int kTileRows = 32 / sizeof(C);
template <typename C>
constexpr int kGroup = 16 / sizeof(C);

// Launch shape for K rows whose sums have type C, read in packs of N columns; or, if kBetween, for
// the products between two half panels.
template <typename C, int N, bool kBetween>
struct GramTiles {
  // Lone elements take a register each on their way, so fewer are.
  static constexpr int kChunkElements = (N > 1 ? 512 : 128) * kGroup<C>;
  int tiles, pairs, slices, chunk; // chunk: columns in shared memory

  __host__ __device__ explicit GramTiles(int64_t num_rows)
      : tiles(static_cast<int>(((kBetween ? kPanelRows : num_rows) + kTileRows<C> - 1) /
                               kTileRows<C>)),
        pairs(kBetween ? tiles / 2 * (tiles / 2) : tiles * (tiles + 1) / 2), slices(32),
        chunk(32 * kGroup<C>) {
    while (pairs * slices > kTileThreads) slices /= 2;
    while (chunk * tiles * kTileRows<C> > kChunkElements) chunk /= 2;
  }
  __host__ __device__ int threads() const { // those without a pair only help to load
    const int whole_warps = (pairs * slices + 31) / 32 * 32;
    return whole_warps > kFewestTileThreads ? whole_warps : kFewestTileThreads;
  }
  __host__ __device__ int entries() const { return pairs * kTileRows<C> * kTileRows<C>; }
  __device__ TilePair tiles_of(int pair) const {
    if constexpr (kBetween) return {pair / (tiles / 2), tiles / 2 + pair % (tiles / 2)};
    return tile_pair(pair, tiles);
  }
  // Columns between two foldings of the sums into float64.
  __host__ __device__ int chain() const { return kTileChain * slices; }
};

// The rows that a block multiplies: neighbours, or two half panels that lie `apart` rows further
// apart than neighbours.
template <typename T, bool kBetween>
struct BlockRows {
  DeviceRows<T> rows;
  int64_t apart;

  __device__ __forceinline__ int64_t row(int index) const {
    return kBetween && index >= kHalfPanel ? index + apart : index;
  }
};

// What a thread brings of a chunk: packs of N columns, held as words.
template <typename T, int N, bool kBetween>
class ChunkFetch {
 public:
  using Shape = GramTiles<Compute<T>, N, kBetween>;

  // Starts to load columns [column, column + shape.chunk); zero beyond `end` and K.
  __device__ __forceinline__ void load(const BlockRows<T, kBetween>& block, const Shape& shape,
                                       int column, int end) {
    const DeviceRows<T>& rows = block.rows;
    const int packs_of_row = shape.chunk / N;
#pragma unroll
    for (int f = 0; f < kPacks; ++f) {
      const int pack = threadIdx.x + f * blockDim.x;
      const int64_t row = block.row(pack / packs_of_row);
      const int from = column + pack % packs_of_row * N;
      const T* source = rows.data + row * rows.stride + from;
      packs_[f] = {};
      if (row < rows.num_rows && from < end) {
        packs_[f].word = __ldcs(reinterpret_cast<const Word<T, N>*>(source));
      }
    }
  }

  __device__ __forceinline__ void store(const Shape& shape, Compute<T>* chunk) const {
#pragma unroll
    for (int f = 0; f < kPacks; ++f) {
      const int pack = threadIdx.x + f * blockDim.x;
      if (pack * N >= shape.tiles * kTileRows<Compute<T>> * shape.chunk) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) chunk[pack * N + n] = widen(packs_[f].elements[n]);
    }
  }

 private:
  static constexpr int kPacks =
      (Shape::kChunkElements / N + kFewestTileThreads - 1) / kFewestTileThreads;
  union {
    Word<T, N> word;
    T elements[N];
  } packs_[kPacks];
};

// Products of 16 bytes of columns of two row tiles.
template <typename C>
__device__ __forceinline__ void add_tile(const C* a, const C* b, int row_length,
                                         C (&sums)[kTileRows<C>][kTileRows<C>]) {
  constexpr int R = kTileRows<C>, N = kGroup<C>;
  C x[R][N];
#pragma unroll
  for (int i = 0; i < R; ++i) load_shared(a + i * row_length, x[i]);
#pragma unroll
  for (int j = 0; j < R; ++j) {
    C y[N];
    load_shared(b + j * row_length, y);
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) sums[i][j] += x[i][n] * y[n];
    }
  }
}

// Each block adds to its own partial sums [part][entry], which the launcher has set to zero; if
// kBetween, `here` blocks a pair of half panels, whose partial sums are [pair][parts][entry].  The
// columns are whole packs.
template <typename T, int N, bool kBetween>
__global__ void __maxnreg__(kBetween ? kBetweenRegisters : kTileRegisters)
    gram_tiles_kernel(DeviceRows<T> rows, int64_t begin, int64_t end, int64_t here, int64_t parts,
                      double* partial) {
  using C = Compute<T>;
  constexpr int R = kTileRows<C>;
  alignas(16) __shared__ C chunk[GramTiles<C, N, kBetween>::kChunkElements];
  const GramTiles<C, N, kBetween> shape(rows.num_rows);
  const int pair = threadIdx.x / shape.slices, slice = threadIdx.x % shape.slices;
  const bool working = pair < shape.pairs;
  const TilePair at = shape.tiles_of(working ? pair : 0);
  int64_t part = blockIdx.x, part_of_all = blockIdx.x, apart = 0;
  if constexpr (kBetween) {
    const TilePair halves = half_pair(static_cast<int>(blockIdx.x / here), rows.num_rows);
    if (halves.column >= rows.num_rows) return;
    part = blockIdx.x % here;
    part_of_all = blockIdx.x / here * parts + part;
    apart = halves.column - halves.row - kHalfPanel;
    rows = {rows.data + halves.row * rows.stride, rows.num_rows - halves.row, rows.stride};
  }
  const C* a = chunk + at.row * R * shape.chunk;
  const C* b = chunk + at.column * R * shape.chunk;

  const int chain = shape.chain();
  for (int64_t from = begin + part * chain; from < end; from += here * chain) {
    C sums[R][R] = {};
    const BlockRows<T, kBetween> block{{rows.data + from, rows.num_rows, rows.stride}, apart};
    const int columns = end - from < chain ? static_cast<int>(end - from) : chain;
    ChunkFetch<T, N, kBetween> fetch;
    fetch.load(block, shape, 0, columns);
    for (int column = 0; column < columns; column += shape.chunk) {
      __syncthreads(); // the chunk before has been used
      fetch.store(shape, chunk);
      __syncthreads();
      if (column + shape.chunk < columns) fetch.load(block, shape, column + shape.chunk, columns);
      for (int at_column = slice * kGroup<C>; working && at_column < shape.chunk;
           at_column += shape.slices * kGroup<C>) {
        add_tile(a + at_column, b + at_column, shape.chunk, sums);
      }
    }
    double* mine = partial + part_of_all * shape.entries() + pair * R * R;
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        double sum = sums[i][j];
#pragma unroll 1 // between half panels the count is known; all sums at once would be spilled
        for (int lane = shape.slices / 2; lane > 0; lane /= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        }
        if (working && slice == 0) mine[i * R + j] += sum;
      }
    }
  }
}

} // namespace superbert
