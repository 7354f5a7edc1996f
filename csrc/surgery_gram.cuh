// Gram matrix of task gradients on CUDA: one pass over memory, no float atomics.
//
// A block sums its own columns in float32 chains of bounded length and hands on float64 partial
// sums; a second kernel adds up the blocks in a fixed order.  So the error does not grow with P,
// and the same launch gives the same bits.
//
//   K <= 8   every thread keeps all K (K + 1) / 2 sums in registers (gram_kernel); the segments of
//            surgery by layer or by tensor share one launch
//   K <= 64  in 16 bits: tensor cores multiply (gram_mma_kernel, surgery_gram_mma.cuh), in one
//            launch for all segments too; in others: square tiles of sums are dealt out to threads,
//            rows pass through shared memory (gram_tiles_kernel, surgery_gram_tiles.cuh)
//   more     every 64 rows for themselves as above, the products between them in pairs of 32 rows
//            (gram_tiles_kernel too, all pairs in one launch)
#pragma once

#include <algorithm>
#include <vector>

#include "cuda_launch.cuh"
#include "cuda_pack.cuh"
#include "surgery_gram_mma.cuh"
#include "surgery_gram_tiles.cuh"

namespace superbert {

constexpr int kGramThreads = 256;
constexpr int kGramSteps = 16; // packs that a thread reads of each row

// Most rows of gram_kernel; float64 rows, which serve as a check, all take the tiles.
template <typename T>
constexpr int kDirectRows = sizeof(T) < 8 ? 8 : 0;

template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// ---- segments of columns -----------------------------------------------------------------------

// Segments that share a launch, and the blocks of each.  It is passed by value, so that a launch
// needs no copy to the device: a CUDA graph holds it.
struct GramTable {
  static constexpr int kMost = 256; // 3 KB of the 4 KB that a kernel's arguments may have
  int64_t columns[kMost + 1];       // segment s is columns[s]:columns[s + 1]
  int32_t blocks[kMost + 1];        // its blocks are blocks[s]:blocks[s + 1]
  int32_t count;

  __device__ __forceinline__ int segment_of(int block) const {
    int first = 0, beyond = count; // the last segment that begins at or before the block
    while (beyond - first > 1) {
      const int middle = (first + beyond) / 2;
      if (blocks[middle] <= block) {
        first = middle;
      } else {
        beyond = middle;
      }
    }
    return first;
  }
};

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

// Partial sums are laid out [entry][block].  `aligned`: the first aligned column of all.
template <typename T, int K, int N>
__global__ void __launch_bounds__(kGramThreads, 2)
    gram_kernel(DeviceRows<T> rows, int64_t aligned, const __grid_constant__ GramTable table,
                double* partial) {
  const int segment = table.segment_of(blockIdx.x);
  const int64_t block = static_cast<int>(blockIdx.x) - table.blocks[segment];
  const int64_t begin = table.columns[segment];
  const Columns columns =
      cut_columns(begin, table.columns[segment + 1], begin + ((aligned - begin) & (N - 1)), N);
  constexpr int kUnroll = K <= 2 ? 4 : K <= 4 ? 2 : 1; // so that 8 loads or so are under way
  Compute<T> sums[K][K] = {};
  const int64_t first = block * kGramThreads * kGramSteps + threadIdx.x;
  const int64_t left = (columns.packs - first + kGramThreads - 1) / kGramThreads;
  const int steps = left < kGramSteps ? static_cast<int>(left) : kGramSteps;
#pragma unroll kUnroll
  for (int step = 0; step < steps; ++step) {
    const int64_t pack = first + static_cast<int64_t>(step) * kGramThreads;
    add_products<K, N>(rows, columns.of_pack<N>(pack), sums);
  }
  if (block == 0) {
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

// ---- adding up the blocks ----------------------------------------------------------------------
// Where the entries of the partial sums belong: in square tiles of the upper triangle, or in those
// of tensor cores.
struct SquareTiles {
  int tile, tiles;

  __device__ __forceinline__ MmaPlace place(int entry) const {
    const TilePair pair = tile_pair(entry / (tile * tile), tiles);
    return {pair.row * tile + entry / tile % tile, pair.column * tile + entry % tile};
  }
};

struct MmaTiles {
  int groups;

  __device__ __forceinline__ MmaPlace place(int entry) const {
    const MmaPlace first = mma_place(entry / kMmaTile, groups);
    return {first.row + entry % kMmaTile / 8, first.column + entry % 8};
  }
};

// One block for each entry of each segment; the segments' results lie `result_size` apart.
template <typename C, typename Tiles>
__global__ void __launch_bounds__(kGramThreads)
    gram_reduce_kernel(const double* partial, const __grid_constant__ GramTable table,
                       int64_t part_stride, int64_t entry_stride, Tiles tiles, int64_t num_rows,
                       C* result, int64_t result_stride, int64_t result_size) {
  const int entries = gridDim.x / table.count;
  const int entry = blockIdx.x % entries, segment = blockIdx.x / entries;
  const int64_t parts = table.blocks[segment + 1] - table.blocks[segment];
  const auto [row, column] = tiles.place(entry);
  if (row > column || column >= num_rows) return;
  partial += table.blocks[segment] * part_stride;
  result += segment * result_size;

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
  const GramTiles<Compute<T>, 1, false> shape(rows.num_rows); // the same for any pack
  const int64_t chains = columns.packs * pack / shape.chain() + 1;
  const int64_t resident = num_processors * (kThreadsPerProcessor / shape.threads());
  const int64_t blocks = chains < resident ? chains : resident;
  return {columns, packed, blocks, shape.entries()};
}

template <typename T, int K>
void launch_gram_direct(const DeviceRows<T>& rows, const GramTable& table, double* scratch,
                        cudaStream_t stream) {
  if (rows.num_rows != K) {
    if constexpr (K > 1) launch_gram_direct<T, K - 1>(rows, table, scratch, stream);
    return;
  }
  const int64_t aligned = first_aligned_column(rows, 0);
  const auto kernel = aligned >= 0 ? gram_kernel<T, K, 16 / sizeof(T)> : gram_kernel<T, K, 1>;
  launch(kernel, table.blocks[table.count], kGramThreads, stream, rows, aligned, table, scratch);
}

// Calls use(table, first) for the segments in as few launches as the table's size allows; `first`
// is the number of the first one, `blocks(begin, end)` gives the blocks of a segment.
template <typename Blocks, typename Use>
void for_tables(const std::vector<int64_t>& offsets, const Blocks& blocks, const Use& use) {
  const int64_t count = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t first = 0; first < count; first += GramTable::kMost) {
    GramTable table{};
    table.count = static_cast<int32_t>(std::min<int64_t>(count - first, GramTable::kMost));
    table.columns[0] = offsets[first];
    for (int s = 0; s < table.count; ++s) {
      const int64_t begin = offsets[first + s], end = offsets[first + s + 1];
      table.columns[s + 1] = end;
      table.blocks[s + 1] = table.blocks[s] + static_cast<int32_t>(blocks(begin, end));
    }
    use(table, first);
  }
}

// Writes [S, K, K] of the segments `offsets` of up to kDirectRows rows.
template <typename T, typename Allocate>
void compute_gram_direct(const DeviceRows<T>& rows, const std::vector<int64_t>& offsets,
                         const Allocate& allocate, Compute<T>* result, cudaStream_t stream) {
  const int64_t k = rows.num_rows;
  const int64_t aligned = first_aligned_column(rows, 0), pack = aligned >= 0 ? 16 / sizeof(T) : 1;
  const auto blocks = [&](int64_t begin, int64_t end) {
    const int64_t first = begin + ((aligned - begin) & (pack - 1));
    return cut_columns(begin, end, first, pack).packs / (kGramThreads * kGramSteps) + 1;
  };
  for_tables(offsets, blocks, [&](const GramTable& table, int64_t first) {
    const int64_t parts = table.blocks[table.count];
    double* scratch = allocate(parts * k * k);
    launch_gram_direct<T, kDirectRows<T>>(rows, table, scratch, stream);
    const SquareTiles tiles{static_cast<int>(k), 1};
    launch(gram_reduce_kernel<Compute<T>, SquareTiles>, table.count * k * k, kGramThreads, stream,
           scratch, table, 1, parts, tiles, k, result + first * k * k, k, k * k);
  });
}

// Writes the matrices of the segments `offsets` of up to kPanelRows rows in 16 bits: rows of a
// result lie `result_stride` apart, results `result_size`.
template <typename T, typename Allocate>
void compute_gram_mma(const DeviceRows<T>& rows, const std::vector<int64_t>& offsets,
                      const Allocate& allocate, float* result, int64_t result_stride,
                      int64_t result_size, cudaStream_t stream) {
  const int64_t aligned = first_aligned_column(rows, 0), first_pack = aligned >= 0 ? aligned : 0;
  const auto blocks = [&](int64_t begin, int64_t end) {
    const int64_t columns = end - begin + ((begin - first_pack) & 7);
    return columns < 1 ? 1 : (columns + kMmaBlockColumns - 1) / kMmaBlockColumns;
  };
  const int groups = static_cast<int>((rows.num_rows + 15) / 16);
  for_tables(offsets, blocks, [&](const GramTable& table, int64_t first) {
    const auto run = [&](auto num_groups) {
      constexpr int kGroups = num_groups, kEntries = kMmaTiles<kGroups> * kMmaTile;
      const int64_t parts = table.blocks[table.count];
      double* scratch = allocate(parts * kEntries);
      const auto kernel = aligned >= 0 ? gram_mma_kernel<T, kGroups, true, GramTable>
                                       : gram_mma_kernel<T, kGroups, false, GramTable>;
      launch(kernel, parts, kMmaThreads, stream, rows, first_pack, table, scratch);
      launch(gram_reduce_kernel<float, MmaTiles>, table.count * kEntries, kGramThreads, stream,
             scratch, table, 1, parts, MmaTiles{kGroups}, rows.num_rows,
             result + first * result_size, result_stride, result_size);
    };
    switch (groups) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    default:
      return run(std::integral_constant<int, 4>{});
    }
  });
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

// Writes result [K, K] of up to kPanelRows rows by tiles, whose rows lie `result_stride` apart;
// `scratch` has plan.scratch() elements.
template <typename T>
void launch_gram(const DeviceRows<T>& rows, const GramPlan& plan, double* scratch,
                 Compute<T>* result, int64_t result_stride, cudaStream_t stream) {
  using C = Compute<T>;
  launch_gram_tiles<false>(rows, plan, 1, scratch, stream);
  GramTable table{};
  table.count = 1;
  table.blocks[1] = static_cast<int32_t>(plan.blocks);
  const SquareTiles tiles{kTileRows<C>,
                          static_cast<int>((rows.num_rows + kTileRows<C> - 1) / kTileRows<C>)};
  launch(gram_reduce_kernel<C, SquareTiles>, plan.entries, kGramThreads, stream, scratch, table,
         plan.entries, 1, tiles, rows.num_rows, result, result_stride, 0);
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

// Writes result [K, K] of the columns [begin, end) for any K by tiles.  `allocate(n)` gives n
// float64 numbers of scratch, which the launches up to the next call use.
template <typename T, typename Allocate>
void compute_gram_by_tiles(const DeviceRows<T>& rows, int64_t begin, int64_t end,
                           int num_processors, const Allocate& allocate, Compute<T>* result,
                           cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t k = rows.num_rows;
  for (int64_t first = 0; first < k; first += kPanelRows) {
    const int64_t count = k - first < kPanelRows ? k - first : kPanelRows;
    const DeviceRows<T> panel{rows.data + first * rows.stride, count, rows.stride};
    if constexpr (sizeof(T) == 2) {
      compute_gram_mma(panel, {begin, end}, allocate, result + first * (k + 1), k, 0, stream);
    } else {
      const GramPlan plan = plan_gram(panel, begin, end, num_processors);
      launch_gram(panel, plan, allocate(plan.scratch()), result + first * (k + 1), k, stream);
    }
  }
  if (k <= kPanelRows) return;
  const GramPlan plan = plan_gram_between(rows, begin, end, num_processors);
  const int64_t pairs = count_half_pairs(k);
  double* scratch = allocate(pairs * plan.scratch());
  launch_gram_tiles<true>(rows, plan, pairs, scratch, stream);
  launch(gram_reduce_between_kernel<C>, pairs * plan.entries / kGramThreads, kGramThreads, stream,
         scratch, plan.blocks, k, result);
}

// Writes result [S, K, K] of the segments of columns `offsets`.
template <typename T, typename Allocate>
void compute_gram(const DeviceRows<T>& rows, const std::vector<int64_t>& offsets,
                  int num_processors, const Allocate& allocate, Compute<T>* result,
                  cudaStream_t stream) {
  if constexpr (kDirectRows<T> > 0) {
    if (rows.num_rows <= kDirectRows<T>) {
      return compute_gram_direct(rows, offsets, allocate, result, stream);
    }
  }
  if constexpr (sizeof(T) == 2) {
    const int64_t k = rows.num_rows;
    if (k <= kPanelRows) {
      return compute_gram_mma(rows, offsets, allocate, result, k, k * k, stream);
    }
  }
  for (size_t s = 0; s + 1 < offsets.size(); ++s) {
    compute_gram_by_tiles(rows, offsets[s], offsets[s + 1], num_processors, allocate,
                          result + s * rows.num_rows * rows.num_rows, stream);
  }
}

} // namespace superbert
