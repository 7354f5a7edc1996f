// Gram matrix of task gradients on CUDA: one pass over memory, no float atomics.
//
// A block sums its own columns in float32 chains of bounded length and hands on float64 partial
// sums; a second kernel adds up the blocks in a fixed order.  So the error does not grow with P,
// and the same launch gives the same bits.
//
//   K <= 8   every thread keeps all K (K + 1) / 2 sums in registers (gram_kernel)
//   K <= 64  square tiles of sums are dealt out to threads, rows pass through shared memory
//            (gram_tiles_kernel)
#pragma once

#include "cuda_launch.cuh"
#include "cuda_pack.cuh"
#include "pcgrad_solver.h"

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

// ---- up to 64 rows -----------------------------------------------------------------------------
// A chunk of columns of all rows lies in shared memory as [rows][columns], while the next one is on
// its way into registers.  Thread (pair, slice) sums the products of one pair of row tiles over
// every slices-th 16 bytes of the columns; up to 40 rows the eight threads of a quarter warp share
// a pair and read 128 neighbouring bytes of one row.
constexpr int kTileThreads = 160; // most of a block
constexpr int kFewestTileThreads = 96;
constexpr int kTileChain = 256;                        // columns that a thread adds up in float32
constexpr int kTileRegisters = 200;                    // of a thread, so that
constexpr int kThreadsPerProcessor = 2 * kTileThreads; // find room in 65536

// Rows of a tile: a thread keeps the square of it in sums.
template <typename C>
constexpr int kTileRows = 32 / sizeof(C);
template <typename C>
constexpr int kGroup = 16 / sizeof(C);

// Launch shape for K rows whose sums have type C, read in packs of N columns.
template <typename C, int N>
struct GramTiles {
  // Lone elements take a register each on their way, so fewer are.
  static constexpr int kChunkElements = (N > 1 ? 512 : 128) * kGroup<C>;
  int tiles, pairs, slices, chunk; // chunk: columns in shared memory

  __host__ __device__ explicit GramTiles(int64_t num_rows)
      : tiles(static_cast<int>((num_rows + kTileRows<C> - 1) / kTileRows<C>)),
        pairs(tiles * (tiles + 1) / 2), slices(32), chunk(32 * kGroup<C>) {
    while (pairs * slices > kTileThreads) slices /= 2;
    while (chunk * tiles * kTileRows<C> > kChunkElements) chunk /= 2;
  }
  __host__ __device__ int threads() const { // those without a pair only help to load
    const int whole_warps = (pairs * slices + 31) / 32 * 32;
    return whole_warps > kFewestTileThreads ? whole_warps : kFewestTileThreads;
  }
  __host__ __device__ int entries() const { return pairs * kTileRows<C> * kTileRows<C>; }
  // Columns between two foldings of the sums into float64.
  __host__ __device__ int chain() const { return kTileChain * slices; }
};

// What a thread brings of a chunk: packs of N columns, held as words.
template <typename T, int N>
class ChunkFetch {
 public:
  // Starts to load columns [column, column + shape.chunk); zero beyond `end` and K.
  __device__ __forceinline__ void load(const DeviceRows<T>& rows,
                                       const GramTiles<Compute<T>, N>& shape, int column, int end) {
    const int packs_of_row = shape.chunk / N;
#pragma unroll
    for (int f = 0; f < kPacks; ++f) {
      const int pack = threadIdx.x + f * blockDim.x;
      const int row = pack / packs_of_row, from = column + pack % packs_of_row * N;
      const T* source = rows.data + row * rows.stride + from;
      packs_[f] = {};
      if (row < rows.num_rows && from < end) {
        packs_[f].word = __ldcs(reinterpret_cast<const Word<T, N>*>(source));
      }
    }
  }

  __device__ __forceinline__ void store(const GramTiles<Compute<T>, N>& shape,
                                        Compute<T>* chunk) const {
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
      (GramTiles<Compute<T>, N>::kChunkElements / N + kFewestTileThreads - 1) / kFewestTileThreads;
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

// Each block adds to its own partial sums [part][entry], which the launcher has set to zero.  The
// columns are whole packs.
template <typename T, int N>
__global__ void __maxnreg__(kTileRegisters)
    gram_tiles_kernel(DeviceRows<T> rows, int64_t begin, int64_t end, double* partial) {
  using C = Compute<T>;
  constexpr int R = kTileRows<C>;
  alignas(16) __shared__ C chunk[GramTiles<C, N>::kChunkElements];
  const GramTiles<C, N> shape(rows.num_rows);
  const int pair = threadIdx.x / shape.slices, slice = threadIdx.x % shape.slices;
  const bool working = pair < shape.pairs;
  const TilePair at = tile_pair(working ? pair : 0, shape.tiles);
  const C* a = chunk + at.row * R * shape.chunk;
  const C* b = chunk + at.column * R * shape.chunk;

  const int chain = shape.chain();
  for (int64_t from = begin + static_cast<int64_t>(blockIdx.x) * chain; from < end;
       from += static_cast<int64_t>(gridDim.x) * chain) {
    C sums[R][R] = {};
    const DeviceRows<T> here{rows.data + from, rows.num_rows, rows.stride};
    const int columns = end - from < chain ? static_cast<int>(end - from) : chain;
    ChunkFetch<T, N> fetch;
    fetch.load(here, shape, 0, columns);
    for (int column = 0; column < columns; column += shape.chunk) {
      __syncthreads(); // the chunk before has been used
      fetch.store(shape, chunk);
      __syncthreads();
      if (column + shape.chunk < columns) fetch.load(here, shape, column + shape.chunk, columns);
      for (int at_column = slice * kGroup<C>; working && at_column < shape.chunk;
           at_column += shape.slices * kGroup<C>) {
        add_tile(a + at_column, b + at_column, shape.chunk, sums);
      }
    }
    double* mine = partial + static_cast<int64_t>(blockIdx.x) * shape.entries() + pair * R * R;
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        double sum = sums[i][j];
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
                       int64_t entry_stride, int tile, int tiles, int64_t num_rows, C* result) {
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
  const GramTiles<Compute<T>, 1> shape(rows.num_rows); // what follows does not depend on the pack
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

template <typename T, int N>
void launch_gram_tiles(const DeviceRows<T>& rows, int64_t begin, int64_t end, int64_t blocks,
                       double* scratch, cudaStream_t stream) {
  if (begin == end) return;
  const GramTiles<Compute<T>, N> shape(rows.num_rows);
  launch(gram_tiles_kernel<T, N>, blocks, shape.threads(), stream, rows, begin, end, scratch);
}

// Writes result [K, K] of the columns of the plan; `scratch` has plan.scratch() elements.
template <typename T>
void launch_gram(const DeviceRows<T>& rows, const GramPlan& plan, double* scratch,
                 Compute<T>* result, cudaStream_t stream) {
  using C = Compute<T>;
  const auto reduce = [&](int64_t part_stride, int64_t entry_stride, int64_t tile, int64_t tiles) {
    launch(gram_reduce_kernel<C>, plan.entries, kGramThreads, stream, scratch, plan.blocks,
           part_stride, entry_stride, tile, tiles, rows.num_rows, result);
  };
  if constexpr (kDirectRows<T> > 0) {
    if (rows.num_rows <= kDirectRows<T>) {
      launch_gram_direct<T, kDirectRows<T>>(rows, plan, scratch, stream);
      return reduce(1, plan.blocks, rows.num_rows, 1);
    }
  }
  set_to_zero(scratch, plan.scratch() * sizeof(double), stream);
  const int64_t begin = plan.columns.begin, first = begin + plan.columns.head;
  if (plan.packed) {
    constexpr int N = 16 / sizeof(T);
    const int64_t last = first + plan.columns.packs * N;
    launch_gram_tiles<T, 1>(rows, begin, first, 1, scratch, stream);
    launch_gram_tiles<T, N>(rows, first, last, plan.blocks, scratch, stream);
    launch_gram_tiles<T, 1>(rows, last, last + plan.columns.tail, 1, scratch, stream);
  } else {
    launch_gram_tiles<T, 1>(rows, first, first + plan.columns.packs, plan.blocks, scratch, stream);
  }
  reduce(plan.entries, 1, kTileRows<C>, (rows.num_rows + kTileRows<C> - 1) / kTileRows<C>);
}

} // namespace superbert
