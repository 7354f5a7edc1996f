// Weighted sum of task gradients on CUDA, stored or fed straight into AdamW: one pass over memory.
//
// Segments of columns may have weights of their own (surgery by layer or by tensor): all of them
// are one launch.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda_launch.cuh"
#include "cuda_pack.cuh"

namespace superbert {

constexpr int kCombineThreads = 256;
constexpr int kCombineBlocksPerProcessor = 8;
// Most weights of all groups that lie in shared memory; more are read through the cache.
constexpr int kSharedWeights = 1024;

// ---- parameter groups --------------------------------------------------------------------------

// Segments of neighbouring columns, each of a group with weights of its own.  It is passed by
// value, so that a launch needs no copy to the device: a CUDA graph holds it.
struct SegmentTable {
  static constexpr int kMost = 256; // 3 KB of the 4 KB that a kernel's arguments may have
  int64_t ends[kMost];              // the first column after each
  int32_t groups[kMost];            // its weights; -1: its columns are left alone

  // The segment of a column, which lies behind those that a thread has asked for before.
  __device__ __forceinline__ int of_column(int64_t column, int last) const {
    while (column >= ends[last]) ++last;
    return last;
  }
  __device__ __forceinline__ int64_t group(int segment) const { return groups[segment]; }
};

// All columns have the same weights.
struct OneSegment {
  __device__ __forceinline__ int of_column(int64_t, int) const { return 0; }
  __device__ __forceinline__ int64_t group(int) const { return 0; }
};

// ---- what is done with the sum -----------------------------------------------------------------
// Each has prepare(), run by one thread of a block, and apply(), run for N neighbouring columns.

template <typename C, typename Out>
struct StoreSum {
  Out* out;

  struct Prepared {
    bool skip = false;
  };
  __device__ Prepared prepare() const { return {}; }

  template <int N>
  __device__ __forceinline__ void apply(const Prepared&, int64_t column, const C (&sum)[N]) const {
    store_pack<N>(out + column, sum);
  }
};

// A number on the device; its value is known only when the kernel runs.
struct DeviceScalar {
  enum class Type { kFloat32, kFloat64, kInt64, kBool };
  Type type;
  const void* data; // null: `fallback`
  double fallback;

  __device__ double value() const {
    if (data == nullptr) return fallback;
    switch (type) {
    case Type::kFloat32:
      return *static_cast<const float*>(data);
    case Type::kFloat64:
      return *static_cast<const double*>(data);
    case Type::kInt64:
      return static_cast<double>(*static_cast<const int64_t*>(data));
    default:
      return *static_cast<const bool*>(data);
    }
  }
};

// Stands for the low precision copy where there is none.
struct NoCopy {};

// AdamW (Loshchilov and Hutter, 2019, Algorithm 2) with the sum as its gradient.
template <typename C, typename Copy>
struct UpdateAdamW {
  C *master, *exp_avg, *exp_avg_sq;
  Copy* copy;
  DeviceScalar lr, step, scale, skip;
  double beta1, beta2, log_beta1, log_beta2, eps, weight_decay;
  int64_t decayed; // columns before this one decay

  struct Prepared {
    bool skip;
    C gradient_scale, keep1, add1, keep2, add2, eps;
    C weight_factor, step_size, second_moment_factor;
  };

  // 1 - beta^t as -expm1(t log beta): exact to rounding where beta^t is near one.  Steps count from
  // 1; at 0 the bias correction would divide by 0, and the host, which could raise, must not wait.
  __device__ Prepared prepare() const {
    const double rate = lr.value(), count = step.value();
    const double bias1 = -expm1(count * log_beta1), bias2 = -expm1(count * log_beta2);
    return {skip.value() != 0.0 || !(count >= 1.0),
            static_cast<C>(scale.value()),
            static_cast<C>(beta1),
            static_cast<C>(1.0 - beta1),
            static_cast<C>(beta2),
            static_cast<C>(1.0 - beta2),
            static_cast<C>(eps),
            static_cast<C>(1.0 - rate * weight_decay), // of the columns that decay
            static_cast<C>(rate / bias1),
            static_cast<C>(1.0 / sqrt(bias2))};
  }

  template <int N>
  __device__ __forceinline__ void apply(const Prepared& now, int64_t column,
                                        const C (&sum)[N]) const {
    C weight[N], m[N], v[N];
    load_pack<N>(master + column, weight);
    load_pack<N>(exp_avg + column, m);
    load_pack<N>(exp_avg_sq + column, v);
    const C weight_factor = column < decayed ? now.weight_factor : C{1};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const C gradient = now.gradient_scale * sum[n];
      m[n] = now.keep1 * m[n] + now.add1 * gradient;
      v[n] = now.keep2 * v[n] + now.add2 * gradient * gradient;
      const C denominator = sqrt(v[n]) * now.second_moment_factor + now.eps;
      weight[n] = weight_factor * weight[n] - now.step_size * (m[n] / denominator);
    }
    store_pack<N>(master + column, weight);
    store_pack<N>(exp_avg + column, m);
    store_pack<N>(exp_avg_sq + column, v);
    if constexpr (!std::is_same_v<Copy, NoCopy>) store_pack<N>(copy + column, weight);
  }
};

// ---- the pass ----------------------------------------------------------------------------------
// Adds weights[k] * rows[k] for kRows rows from `row` on to the sum; their own sum comes first, for
// a short chain of additions.
template <int kRows, int N, typename T>
__device__ __forceinline__ void add_rows(const T* row, int64_t stride, const Compute<T>* weights,
                                         Compute<T> (&sum)[N]) {
  Compute<T> x[kRows][N];
#pragma unroll
  for (int k = 0; k < kRows; ++k) load_pack<N>(row + k * stride, x[k]);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    Compute<T> part = weights[0] * x[0][n];
#pragma unroll
    for (int k = 1; k < kRows; ++k) part += weights[k] * x[k][n];
    sum[n] += part;
  }
}

template <int N, typename T>
__device__ __forceinline__ void sum_rows(const DeviceRows<T>& rows, const Compute<T>* weights,
                                         int64_t column, Compute<T> (&sum)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) sum[n] = 0;
  const T* row = rows.data + column;
  int k = 0;
  for (; k + 4 <= rows.num_rows; k += 4, row += 4 * rows.stride) {
    add_rows<4>(row, rows.stride, weights + k, sum);
  }
  switch (rows.num_rows - k) {
  case 1:
    return add_rows<1>(row, rows.stride, weights + k, sum);
  case 2:
    return add_rows<2>(row, rows.stride, weights + k, sum);
  case 3:
    return add_rows<3>(row, rows.stride, weights + k, sum);
  }
}

// Weights are [groups, K].  A pack lies in one segment.
template <typename T, int N, bool kShared, typename Table, typename Use>
__global__ void __launch_bounds__(kCombineThreads, 2)
    combine_kernel(DeviceRows<T> rows, const Compute<T>* weights, int64_t num_groups,
                   Columns columns, const __grid_constant__ Table table, Use use) {
  using C = Compute<T>;
  __shared__ C shared_weights[kShared ? kSharedWeights : 1];
  __shared__ typename Use::Prepared prepared;
  if constexpr (kShared) {
    for (int k = threadIdx.x; k < num_groups * rows.num_rows; k += kCombineThreads) {
      shared_weights[k] = weights[k];
    }
  }
  const C* factors = kShared ? shared_weights : weights;
  if (threadIdx.x == 0) prepared = use.prepare();
  __syncthreads();
  if (prepared.skip) return;

  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kCombineThreads;
  int segment = 0;
  for (int64_t pack = thread; pack < columns.packs; pack += threads) {
    const int64_t column = columns.of_pack<N>(pack);
    segment = table.of_column(column, segment);
    const int64_t group = table.group(segment);
    if (group < 0) continue;
    C sum[N];
    sum_rows<N>(rows, factors + group * rows.num_rows, column, sum);
    use.template apply<N>(prepared, column, sum);
  }
  segment = 0;
  for (int64_t edge = thread; edge < columns.head + columns.tail; edge += threads) {
    const int64_t column = columns.of_edge<N>(edge);
    segment = table.of_column(column, segment);
    const int64_t group = table.group(segment);
    if (group < 0) continue;
    C sum[1];
    sum_rows<1>(rows, factors + group * rows.num_rows, column, sum);
    use.template apply<1>(prepared, column, sum);
  }
}

// Columns that one thread takes at a time, where every tensor is aligned: 16 bytes of each row.
template <typename T>
constexpr int kCombinePack = 16 / sizeof(T);

// Columns [begin, end) with weights [num_groups, K].  `in_packs`: the first aligned column of the
// rows is one of every other tensor too, and each pack from there on lies in one segment.
template <typename T, typename Table, typename Use>
void launch_combine(const DeviceRows<T>& rows, const Compute<T>* weights, int64_t num_groups,
                    int64_t begin, int64_t end, bool in_packs, const Table& table,
                    int num_processors, const Use& use, cudaStream_t stream) {
  const int64_t aligned = first_aligned_column(rows, begin);
  const bool packed = aligned >= 0 && in_packs;
  const Columns columns =
      cut_columns(begin, end, packed ? aligned : begin, packed ? kCombinePack<T> : 1);
  int64_t blocks = (columns.packs + kCombineThreads - 1) / kCombineThreads;
  const int64_t most = static_cast<int64_t>(kCombineBlocksPerProcessor) * num_processors;
  blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
  const auto run = [&](auto shared) {
    const auto kernel = packed ? combine_kernel<T, kCombinePack<T>, shared, Table, Use>
                               : combine_kernel<T, 1, shared, Table, Use>;
    launch(kernel, blocks, kCombineThreads, stream, rows, weights, num_groups, columns, table, use);
  };
  if (num_groups * rows.num_rows <= kSharedWeights) return run(std::true_type{});
  run(std::false_type{});
}

// Which columns have which weights, on the host: S ascending ends, from column 0 on, and groups.
struct Segments {
  std::vector<int64_t> ends, groups;
};

// The same for segments, in as few launches as the table's size allows.
template <typename T, typename Use>
void launch_combine_segments(const DeviceRows<T>& rows, const Compute<T>* weights,
                             int64_t num_groups, const Segments& segments, int64_t decayed,
                             bool same_alignment, int num_processors, const Use& use,
                             cudaStream_t stream) {
  const int64_t aligned = first_aligned_column(rows, 0), count = segments.ends.size();
  const int64_t num_columns = segments.ends.back();
  const auto between_packs = [&](int64_t border) {
    return border <= 0 || border >= num_columns || (border - aligned) % kCombinePack<T> == 0;
  };
  const bool in_packs = same_alignment && between_packs(decayed) &&
                        std::all_of(segments.ends.begin(), segments.ends.end(), between_packs);
  for (int64_t first = 0; first < count; first += SegmentTable::kMost) {
    const int64_t last = std::min<int64_t>(count, first + SegmentTable::kMost);
    SegmentTable table{};
    std::copy(segments.ends.begin() + first, segments.ends.begin() + last, table.ends);
    std::copy(segments.groups.begin() + first, segments.groups.begin() + last, table.groups);
    const int64_t begin = first == 0 ? 0 : segments.ends[first - 1], end = segments.ends[last - 1];
    if (begin == end && first > 0) continue;
    launch_combine(rows, weights, num_groups, begin, end, in_packs, table, num_processors, use,
                   stream);
  }
}

} // namespace superbert
