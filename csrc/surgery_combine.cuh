// Weighted sum of task gradients on CUDA, stored or fed straight into AdamW: one pass over memory.
#pragma once

#include "cuda_launch.cuh"
#include "cuda_pack.cuh"

namespace superbert {

constexpr int kCombineThreads = 256;
constexpr int kCombineBlocksPerProcessor = 8;
// Most weights that lie in shared memory; more are read through the cache.
constexpr int kSharedWeights = 64;

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
            static_cast<C>(1.0 - rate * weight_decay),
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
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const C gradient = now.gradient_scale * sum[n];
      m[n] = now.keep1 * m[n] + now.add1 * gradient;
      v[n] = now.keep2 * v[n] + now.add2 * gradient * gradient;
      const C denominator = sqrt(v[n]) * now.second_moment_factor + now.eps;
      weight[n] = now.weight_factor * weight[n] - now.step_size * (m[n] / denominator);
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

template <typename T, int N, bool kShared, typename Use>
__global__ void __launch_bounds__(kCombineThreads, 2)
    combine_kernel(DeviceRows<T> rows, const Compute<T>* weights, Columns columns, Use use) {
  using C = Compute<T>;
  __shared__ C shared_weights[kShared ? kSharedWeights : 1];
  __shared__ typename Use::Prepared prepared;
  if (kShared && threadIdx.x < rows.num_rows) shared_weights[threadIdx.x] = weights[threadIdx.x];
  const C* factors = kShared ? shared_weights : weights;
  if (threadIdx.x == 0) prepared = use.prepare();
  __syncthreads();
  if (prepared.skip) return;

  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kCombineThreads;
  for (int64_t pack = thread; pack < columns.packs; pack += threads) {
    const int64_t column = columns.of_pack<N>(pack);
    C sum[N];
    sum_rows<N>(rows, factors, column, sum);
    use.template apply<N>(prepared, column, sum);
  }
  for (int64_t edge = thread; edge < columns.head + columns.tail; edge += threads) {
    const int64_t column = columns.of_edge<N>(edge);
    C sum[1];
    sum_rows<1>(rows, factors, column, sum);
    use.template apply<1>(prepared, column, sum);
  }
}

// Columns that one thread takes at a time, where every tensor is aligned: 16 bytes of each row.
template <typename T>
constexpr int kCombinePack = 16 / sizeof(T);

// `same_alignment`: the first aligned column of the rows is one of every other tensor too.
template <typename T, typename Use>
void launch_combine(const DeviceRows<T>& rows, const Compute<T>* weights, int64_t num_columns,
                    bool same_alignment, int num_processors, const Use& use, cudaStream_t stream) {
  const int64_t aligned = first_aligned_column(rows, 0);
  const bool packed = aligned >= 0 && same_alignment;
  const Columns columns =
      cut_columns(0, num_columns, packed ? aligned : 0, packed ? kCombinePack<T> : 1);
  int64_t blocks = (columns.packs + kCombineThreads - 1) / kCombineThreads;
  const int64_t most = static_cast<int64_t>(kCombineBlocksPerProcessor) * num_processors;
  blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
  const auto run = [&](auto shared) {
    const auto kernel = packed ? combine_kernel<T, kCombinePack<T>, shared, Use>
                               : combine_kernel<T, 1, shared, Use>;
    launch(kernel, blocks, kCombineThreads, stream, rows, weights, columns, use);
  };
  if (rows.num_rows <= kSharedWeights) return run(std::true_type{});
  run(std::false_type{});
}

} // namespace superbert
