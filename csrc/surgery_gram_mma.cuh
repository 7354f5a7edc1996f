// Gram matrix of 9 to 64 task gradients in 16 bits, by tensor cores.  surgery_gram.cuh launches it.
//
// A column of K rows is 2 K bytes and K (K + 1) / 2 products: of 32 rows an H200 reads 67 columns a
// nanosecond, more products than its float32 units have.  Tensor cores sum 16 columns of a 16 x 8
// tile of products at once.
//
// A warp takes 32 columns of all rows at a time, straight from memory into registers: lane (g, q)
// the 16 bytes q of rows g, g + 8, ...  Which of the columns a register stands for does not matter,
// as long as it is the same for both factors; so the same registers are both, and nothing goes
// through shared memory.  The tiles on and above the diagonal are summed over these 32 columns from
// zero, and then added to float32 sums, since tensor cores cut off the last bits of what they add
// to.  How columns are shared out does not depend on the GPU.
#pragma once

#include <cstdint>

#include "cuda_mma.cuh"
#include "cuda_pack.cuh"

namespace superbert {

constexpr int kMmaThreads = 128;
constexpr int kMmaStep = 32; // columns that a warp takes at a time
constexpr int kMmaSteps = 128;
constexpr int kMmaBlockColumns = kMmaThreads / 32 * kMmaStep * kMmaSteps;
constexpr int kMmaTile = 16 * 8; // sums

// Tiles of kGroups groups of 16 rows: group i with the halves j >= 2 i of groups.
template <int kGroups>
constexpr int kMmaTiles = kGroups * (kGroups + 1);

// The first row and column of tile number `tile`, row by row.
struct MmaPlace {
  int row, column;
};

__device__ __forceinline__ MmaPlace mma_place(int tile, int groups) {
  int group = 0, of_group = 2 * groups;
  for (; tile >= of_group; of_group -= 2, ++group) tile -= of_group;
  return {group * 16, (2 * group + tile) * 8};
}

// Columns [column, column + 8) of a row; zero outside of [begin, end).
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_columns(const T* row, int64_t column, int64_t begin,
                                              int64_t end) {
  union {
    uint4 word;
    T elements[8];
  } pack;
  if (kAligned && column >= begin && column + 8 <= end) {
    return __ldcs(reinterpret_cast<const uint4*>(row + column));
  }
  pack.word = {};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (column + n >= begin && column + n < end) pack.elements[n] = __ldcs(row + column + n);
  }
  return pack.word;
}

// Partial sums are laid out [entry][block].  `first`: the column that each segment's packs of 8
// are counted from is the last one up to its begin that differs from it by a multiple of 8.
template <typename T, int kGroups, bool kAligned, typename Table>
__global__ void __launch_bounds__(kMmaThreads, kGroups <= 2 ? 5 : 3)
    gram_mma_kernel(DeviceRows<T> rows, int64_t first, const __grid_constant__ Table table,
                    double* partial) {
  constexpr int kHalves = 2 * kGroups, kTiles = kMmaTiles<kGroups>;
  constexpr int kUnroll = kGroups == 1 ? 4 : kGroups == 2 ? 2 : 1;
  const int segment = table.segment_of(blockIdx.x);
  const int64_t block = static_cast<int>(blockIdx.x) - table.blocks[segment];
  const int64_t begin = table.columns[segment], end = table.columns[segment + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own_row = lane / 4;
  const int64_t from = begin - ((begin - first) & 7) + block * kMmaBlockColumns + warp * kMmaStep;
  const T* own = rows.data + own_row * rows.stride;

  float sums[kTiles][4] = {};
#pragma unroll kUnroll
  for (int step = 0; step < kMmaSteps; ++step) {
    const int64_t column = from + step * (kMmaThreads / 32 * kMmaStep);
    if (column >= end) break;
    uint4 packs[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      packs[half] = {};
      if (half * 8 + own_row < rows.num_rows) {
        packs[half] = load_columns<T, kAligned>(own + half * 8 * rows.stride, column + lane % 4 * 8,
                                                begin, end);
      }
    }
    int tile = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint4 upper = packs[2 * i], lower = packs[2 * i + 1];
#pragma unroll
      for (int j = 2 * i; j < kHalves; ++j) {
        float products[4] = {};
        multiply_add<T>(products, {upper.x, lower.x, upper.y, lower.y}, {packs[j].x, packs[j].y});
        multiply_add<T>(products, {upper.z, lower.z, upper.w, lower.w}, {packs[j].z, packs[j].w});
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[tile][n] += products[n];
        ++tile;
      }
    }
  }

  __shared__ float of_warps[kMmaThreads / 32][kMmaTile];
  const int place = own_row * 8 + lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    __syncthreads(); // the tile before has been added up
    of_warps[warp][place] = sums[tile][0];
    of_warps[warp][place + 1] = sums[tile][1];
    of_warps[warp][place + 64] = sums[tile][2];
    of_warps[warp][place + 65] = sums[tile][3];
    __syncthreads();
    double sum = 0.0;
    for (int w = 0; w < kMmaThreads / 32; ++w) sum += of_warps[w][threadIdx.x];
    const int64_t entry = tile * kMmaTile + threadIdx.x;
    partial[entry * gridDim.x + blockIdx.x] = sum;
  }
}

} // namespace superbert
