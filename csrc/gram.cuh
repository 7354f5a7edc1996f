// Gram matrix of task gradients on CUDA: one pass over memory, no float atomics.
//
// A block sums its own columns in float32 chains of bounded length and hands on float64 partial
// sums; a second kernel adds up the blocks in a fixed order.  So the error does not grow with P,
// and the same launch gives the same bits.
//
//   K <= 8   every thread keeps all K (K + 1) / 2 sums in registers (gram_kernel)
//   K <= 64  square tiles of sums are dealt out to threads, rows pass through shared memory
//            (gram_tiles_kernel)
//   more     every 64 rows for themselves as above, the products between them in pairs of 32 rows
//            (gram_tiles_kernel too, all pairs in one launch)
#pragma once

#include "cuda_launch.cuh"
#include "cuda_pack.cuh"

namespace superbert {

constexpr int kGramThreads = 256;
constexpr int kGramSteps = 16; // packs that a thread reads of each row

// Most rows of gram_kernel; float64 rows, which serve as a check, all take the tiles.
template <typename T>
constexpr int kDirectRows = sizeof(T) < 8 ? 8 : 0;

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

template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// ---- up to eight rows --------------------------------------------------------------------------
template <int K, int N, typename T>
__device__ __forceinline__ void add_products(const DeviceRows<T>& rows, int64_t column,
                                             Compute<T> (&sums)[K][K]) {
  Compute<T> x[K][N];
#pragma unroll
  for (int k = 0; k < K; ++k) load_pack<N>(rows.data + k * rows.stride + column, x[k]);
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = i; j < K; ++j) {
#pragma unroll
      for (int n = 0; n < N; ++n) sums[i][j] += x[i][n] * x[j][n];
    }
  }
}

// Partial sums are laid out [entry][block].
template <typename T, int K, int N>
__global__ void __launch_bounds__(kGramThreads, 2)
    gram_kernel(DeviceRows<T> rows, Columns columns, double* partial) {
  constexpr int kUnroll = K <= 2 ? 4 : K <= 4 ? 2 : 1; // so that 8 loads or so are under way
  Compute<T> sums[K][K] = {};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGramThreads * kGramSteps + threadIdx.x;
  const int64_t left = (columns.packs - first + kGramThreads - 1) / kGramThreads;
  const int steps = left < kGramSteps ? static_cast<int>(left) : kGramSteps;
#pragma unroll kUnroll
  for (int step = 0; step < steps; ++step) {
    const int64_t pack = first + static_cast<int64_t>(step) * kGramThreads;
    add_products<K, N>(rows, columns.of_pack<N>(pack), sums);
  }
  if (blockIdx.x == 0) {
    for (int64_t edge = threadIdx.x; edge < columns.head + columns.tail; edge += kGramThreads) {
      add_products<K, 1>(rows, columns.of_edge<N>(edge), sums);
    }
  }

  __shared__ double of_warp[kGramThreads / 32][K][K];
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = i; j < K; ++j) {
      const Compute<T> sum = sum_of_warp(sums[i][j]);
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][i][j] = sum;
    }
  }
  __syncthreads();
  for (int entry = threadIdx.x; entry < K * K; entry += kGramThreads) {
    const int i = entry / K, j = entry % K;
    if (j < i) continue;
    double sum = 0.0;
    for (int warp = 0; warp < kGramThreads / 32; ++warp) sum += of_warp[warp][i][j];
    partial[static_cast<int64_t>(entry) * gridDim.x + blockIdx.x] = sum;
  }
}

// ---- more rows ---------------------------------------------------------------------------------
// A chunk of columns of all rows lies in shared memory as [rows][columns], while the next one is on
// its way into registers.  Thread (pair, slice) sums the products of one pair of row tiles over
// every slices-th 16 bytes of the columns; up to 40 rows the eight threads of a quarter warp share
// a pair and read 128 neighbouring bytes of one row.
constexpr int kTileThreads = 160; // most of a block
constexpr int kFewestTileThreads = 96;
constexpr int kTileChain = 256;                        // columns that a thread adds up in float32
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

// ---- adding up the blocks ----------------------------------------------------------------------
// One block for each entry.
template <typename C>
__global__ void __launch_bounds__(kGramThreads)
    gram_reduce_kernel(const double* partial, int64_t parts, int64_t part_stride,
                       int64_t entry_stride, int tile, int tiles, int64_t num_rows, C* result,
                       int64_t result_stride) {
  const int entry = blockIdx.x;
  const TilePair pair = tile_pair(entry / (tile * tile), tiles);
  const int64_t row = pair.row * tile + entry / tile % tile;
  const int64_t column = pair.column * tile + entry % tile;
  if (row > column || column >= num_rows) return;

  double sum = 0.0;
  for (int64_t part = threadIdx.x; part < parts; part += kGramThreads) {
    sum += partial[entry * entry_stride + part * part_stride];
  }
  __shared__ double of_warp[kGramThreads / 32];
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0;
  for (int warp = 0; warp < kGramThreads / 32; ++warp) sum += of_warp[warp];
  result[row * result_stride + column] = result[column * result_stride + row] = static_cast<C>(sum);
}

// One thread for each entry of a pair of half panels.
template <typename C>
__global__ void __launch_bounds__(kGramThreads)
    gram_reduce_between_kernel(const double* partial, int64_t parts, int64_t num_rows, C* result) {
  constexpr int R = kTileRows<C>, kTiles = kHalfPanel / R, kEntries = kHalfPanel * kHalfPanel;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kGramThreads + threadIdx.x;
  const int64_t pair = index / kEntries;
  const int entry = index % kEntries, tiles = entry / (R * R);
  const TilePair halves = half_pair(static_cast<int>(pair), num_rows);
  const int64_t row = halves.row + tiles / kTiles * R + entry / R % R;
  const int64_t column = halves.column + tiles % kTiles * R + entry % R;
  if (column >= num_rows) return;
  double sum = 0.0;
  for (int64_t part = 0; part < parts; ++part) {
    sum += partial[(pair * parts + part) * kEntries + entry];
  }
  result[row * num_rows + column] = result[column * num_rows + row] = static_cast<C>(sum);
}

// ---- launchers ---------------------------------------------------------------------------------
// How a Gram matrix of some columns is computed, and the float64 scratch that it takes.
struct GramPlan {
  Columns columns;
  bool packed;
  int64_t blocks, entries;

  int64_t scratch() const { return blocks * entries; }
};

template <typename T>
GramPlan plan_gram(const DeviceRows<T>& rows, int64_t begin, int64_t end, int num_processors) {
  const int64_t aligned = first_aligned_column(rows, begin);
  const bool packed = aligned >= 0;
  const int64_t pack = packed ? 16 / sizeof(T) : 1;
  const Columns columns = cut_columns(begin, end, packed ? aligned : begin, pack);
  if (rows.num_rows <= kDirectRows<T>) {
    const int64_t blocks = columns.packs / (kGramThreads * kGramSteps) + 1;
    return {columns, packed, blocks, rows.num_rows * rows.num_rows};
  }
  const GramTiles<Compute<T>, 1, false> shape(rows.num_rows); // the same for any pack
  const int64_t chains = columns.packs * pack / shape.chain() + 1;
  const int64_t resident = num_processors * (kThreadsPerProcessor / shape.threads());
  const int64_t blocks = chains < resident ? chains : resident;
  return {columns, packed, blocks, shape.entries()};
}

template <typename T, int K>
void launch_gram_direct(const DeviceRows<T>& rows, const GramPlan& plan, double* scratch,
                        cudaStream_t stream) {
  if (rows.num_rows != K) {
    if constexpr (K > 1) launch_gram_direct<T, K - 1>(rows, plan, scratch, stream);
    return;
  }
  const auto kernel = plan.packed ? gram_kernel<T, K, 16 / sizeof(T)> : gram_kernel<T, K, 1>;
  launch(kernel, plan.blocks, kGramThreads, stream, rows, plan.columns, scratch);
}

// Adds the products of the columns of the plan to the partial sums of `pairs` pairs of half panels,
// or, without kBetween, of all rows.
template <bool kBetween, typename T>
void launch_gram_tiles(const DeviceRows<T>& rows, const GramPlan& plan, int64_t pairs,
                       double* scratch, cudaStream_t stream) {
  set_to_zero(scratch, pairs * plan.scratch() * sizeof(double), stream);
  const auto run = [&](auto pack, int64_t begin, int64_t end, int64_t blocks) {
    if (begin == end) return;
    constexpr int N = pack;
    const GramTiles<Compute<T>, N, kBetween> shape(rows.num_rows);
    launch(gram_tiles_kernel<T, N, kBetween>, pairs * blocks, shape.threads(), stream, rows, begin,
           end, blocks, plan.blocks, scratch);
  };
  constexpr std::integral_constant<int, 1> single;
  constexpr std::integral_constant<int, 16 / sizeof(T)> wide;
  const Columns& columns = plan.columns;
  const int64_t first = columns.begin + columns.head;
  if (!plan.packed) return run(single, first, first + columns.packs, plan.blocks);
  const int64_t last = first + columns.packs * wide;
  run(single, columns.begin, first, 1);
  run(wide, first, last, plan.blocks);
  run(single, last, last + columns.tail, 1);
}

// Writes result [K, K] of up to kPanelRows rows, whose rows lie `result_stride` apart; `scratch`
// has plan.scratch() elements.
template <typename T>
void launch_gram(const DeviceRows<T>& rows, const GramPlan& plan, double* scratch,
                 Compute<T>* result, int64_t result_stride, cudaStream_t stream) {
  using C = Compute<T>;
  const auto reduce = [&](int64_t part_stride, int64_t entry_stride, int64_t tile, int64_t tiles) {
    launch(gram_reduce_kernel<C>, plan.entries, kGramThreads, stream, scratch, plan.blocks,
           part_stride, entry_stride, tile, tiles, rows.num_rows, result, result_stride);
  };
  if constexpr (kDirectRows<T> > 0) {
    if (rows.num_rows <= kDirectRows<T>) {
      launch_gram_direct<T, kDirectRows<T>>(rows, plan, scratch, stream);
      return reduce(1, plan.blocks, rows.num_rows, 1);
    }
  }
  launch_gram_tiles<false>(rows, plan, 1, scratch, stream);
  reduce(plan.entries, 1, kTileRows<C>, (rows.num_rows + kTileRows<C> - 1) / kTileRows<C>);
}

// The products between half panels: the blocks of a processor are shared out to all pairs.
template <typename T>
GramPlan plan_gram_between(const DeviceRows<T>& rows, int64_t begin, int64_t end,
                           int num_processors) {
  const int64_t aligned = first_aligned_column(rows, begin);
  const int64_t pack = aligned >= 0 ? 16 / sizeof(T) : 1;
  const Columns columns = cut_columns(begin, end, aligned >= 0 ? aligned : begin, pack);
  const GramTiles<Compute<T>, 1, true> shape(rows.num_rows);
  const int64_t chains = columns.packs * pack / shape.chain() + 1;
  const int64_t resident = num_processors * (kThreadsPerProcessor / shape.threads());
  const int64_t of_pair = resident / count_half_pairs(rows.num_rows) + 1;
  return {columns, aligned >= 0, chains < of_pair ? chains : of_pair, shape.entries()};
}

// Writes result [K, K] of the columns [begin, end) for any K.  `allocate(n)` gives n float64
// numbers of scratch, which the launches up to the next call use.
template <typename T, typename Allocate>
void compute_gram(const DeviceRows<T>& rows, int64_t begin, int64_t end, int num_processors,
                  const Allocate& allocate, Compute<T>* result, cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t k = rows.num_rows;
  for (int64_t first = 0; first < k; first += kPanelRows) {
    const int64_t count = k - first < kPanelRows ? k - first : kPanelRows;
    const DeviceRows<T> panel{rows.data + first * rows.stride, count, rows.stride};
    const GramPlan plan = plan_gram(panel, begin, end, num_processors);
    launch_gram(panel, plan, allocate(plan.scratch()), result + first * (k + 1), k, stream);
  }
  if (k <= kPanelRows) return;
  const GramPlan plan = plan_gram_between(rows, begin, end, num_processors);
  const int64_t pairs = count_half_pairs(k);
  double* scratch = allocate(pairs * plan.scratch());
  launch_gram_tiles<true>(rows, plan, pairs, scratch, stream);
  launch(gram_reduce_between_kernel<C>, pairs * plan.entries / kGramThreads, kGramThreads, stream,
         scratch, plan.blocks, k, result);
}

} // namespace superbert
