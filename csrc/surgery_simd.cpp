// CPU kernels of gradient surgery: one pass over memory each.  Compiled once for each vector unit.
#include "surgery.h"

#include "simd.h"

namespace superbert::SUPERBERT_ISA {
namespace {

// Calls f with a null pointer of the rows' element type.
template <typename F>
void with_type(FloatType type, const F& f) {
  switch (type) {
  case FloatType::kFloat32:
    return f(static_cast<const float*>(nullptr));
  case FloatType::kFloat64:
    return f(static_cast<const double*>(nullptr));
  case FloatType::kBFloat16:
    return f(static_cast<const BFloat16*>(nullptr));
  case FloatType::kFloat16:
    return f(static_cast<const Half*>(nullptr));
  }
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Gram matrix -------------------------------------------------------------------------------
// The matrix is cut into tiles of at most 4 x 4 rows, whose sums fill the vector registers.  A
// block of columns goes through all tiles while it is in the cache, so memory is read once.
//
// The error does not grow with the number of columns: a float32 chain is at most kChain additions
// long, the chains of a block are added up, and the blocks in float64.
constexpr int kTile = 4;
constexpr int64_t kBlockColumns = 2048;
constexpr int64_t kChain = 32;
constexpr int64_t kCacheLine = 64;

// bfloat16 rows are widened, not multiplied by vdpbf16ps: that instruction makes zeros of inputs
// and results below float32's normal numbers, so all products of rows around 1e-19 would be lost,
// though many of them add up to a normal number.  With few rows memory sets the pace either way.
//
// Rows of 16-bit elements ask the cache for their columns of the next block.  A block of such a row
// is a page long, where the processor's own prefetching ends, and with many rows memory would stand
// idle while they are multiplied from the cache.  Rows of float32 gained nothing from it.
template <int kRows, typename T>
inline void prefetch_next_block(const T* rows, int64_t row_stride) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) __builtin_prefetch(rows + i * row_stride + kBlockColumns);
}

// What products are added up as.  Without an instruction that multiplies and adds, a product below
// float32's normal numbers would lose digits before it is added.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
template <typename T>
using Sum = Compute<T>;
#else
template <typename T>
using Sum = double;
#endif

// Adds the tile of rows a[0..I) x b[0..J) over `count` columns.  On the diagonal a == b, j >= i.
template <int I, int J, bool kDiagonal, typename T>
void add_tile(const T* a, const T* b, int64_t row_stride, int64_t count, double* gram,
              int64_t gram_stride) {
  using C = Compute<T>;
  using Sums = typename VectorOf<Sum<T>, kLanes<C> * sizeof(Sum<T>)>::type;
  const auto widened = [](Vec<C> v) { return __builtin_convertvector(v, Sums); };
  Sums totals[I][J] = {};
  int64_t column = 0;
  while (column < count) {
    Sums chains[I][J] = {};
    const auto accumulate = [&](const auto& load_row) {
      Vec<C> x[I], y[J];
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) x[i] = load_row(a + i * row_stride);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) y[j] = kDiagonal ? x[j] : load_row(b + j * row_stride);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
        for (int j = kDiagonal ? i : 0; j < J; ++j) chains[i][j] += widened(x[i]) * widened(y[j]);
      }
    };
    const int64_t chain_end = smaller(column + kChain * kLanes<C>, count);
    if constexpr (sizeof(T) == 2) {
      constexpr int64_t kLine = kCacheLine / sizeof(T);
      for (; column + kLine <= chain_end; column += kLine) {
        prefetch_next_block<I>(a + column, row_stride);
        if constexpr (!kDiagonal) prefetch_next_block<J>(b + column, row_stride);
#pragma GCC unroll 8
        for (int64_t lane = 0; lane < kLine; lane += kLanes<C>) {
          accumulate([&](const T* row) { return load(row + column + lane); });
        }
      }
    }
    for (; column + kLanes<C> <= chain_end; column += kLanes<C>) {
      accumulate([&](const T* row) { return load(row + column); });
    }
    if (column < chain_end) {
      accumulate([&](const T* row) { return load_first(row + column, chain_end - column); });
      column = chain_end;
    }
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
      for (int j = kDiagonal ? i : 0; j < J; ++j) totals[i][j] += chains[i][j];
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = kDiagonal ? i : 0; j < J; ++j) {
      gram[i * gram_stride + j] += sum_lanes<Sum<T>>(totals[i][j]);
    }
  }
}

// The tile on the diagonal of `rows` rows from a on.
template <typename T>
void add_diagonal(const T* a, int64_t rows, int64_t row_stride, int64_t count, double* gram,
                  int64_t gram_stride) {
  switch (rows) {
  case 1:
    return add_tile<1, 1, true>(a, a, row_stride, count, gram, gram_stride);
  case 2:
    return add_tile<2, 2, true>(a, a, row_stride, count, gram, gram_stride);
  case 3:
    return add_tile<3, 3, true>(a, a, row_stride, count, gram, gram_stride);
  default:
    return add_tile<4, 4, true>(a, a, row_stride, count, gram, gram_stride);
  }
}

// The tiles of four rows a and each of `rows` rows from b on.
template <typename T>
void add_beside(const T* a, const T* b, int64_t rows, int64_t row_stride, int64_t count,
                double* gram, int64_t gram_stride) {
  for (int64_t j = 0; j < rows; j += kTile, b += kTile * row_stride) {
    switch (rows - j) {
    case 1:
      add_tile<4, 1, false>(a, b, row_stride, count, gram + j, gram_stride);
      break;
    case 2:
      add_tile<4, 2, false>(a, b, row_stride, count, gram + j, gram_stride);
      break;
    case 3:
      add_tile<4, 3, false>(a, b, row_stride, count, gram + j, gram_stride);
      break;
    default:
      add_tile<4, 4, false>(a, b, row_stride, count, gram + j, gram_stride);
      break;
    }
  }
}

void gram(const Rows& rows, const Rows& others, int64_t begin, int64_t end, double* result) {
  const int64_t k = others.num_rows, stride = rows.row_stride;
  const bool same = rows.data == others.data;
  with_type(rows.type, [&](auto type) {
    for (int64_t column = begin; column < end; column += kBlockColumns) {
      const int64_t count = smaller(kBlockColumns, end - column);
      const auto* a = static_cast<decltype(type)>(rows.data) + column;
      const auto* b = static_cast<decltype(type)>(others.data) + column;
      for (int64_t i = 0; i < rows.num_rows; i += kTile, a += kTile * stride) {
        if (same) add_diagonal(a, k - i, stride, count, result + i * k + i, k);
        const int64_t j = same ? i + kTile : 0; // the first row beside
        add_beside(a, b + j * stride, k - j, stride, count, result + i * k + j, k);
      }
    }
  });
}

// ---- combination -------------------------------------------------------------------------------
// Rows are added up at most kStreams at a time, block by block of columns, with the sums so far in
// the cache: a processor follows only so many streams of memory at once.
constexpr int64_t kStreams = 8;
constexpr int64_t kSumColumns = 1024;

// Calls use(column, lanes, gradient) for each vector of sum_k weights[k] * rows[k]; fewer lanes
// than a vector has only at the end.
template <typename T, typename F>
void for_combined(const Rows& rows, const double* weights, int64_t begin, int64_t end,
                  const F& use) {
  using C = Compute<T>;
  const T* data = static_cast<const T*>(rows.data);
  const int64_t stride = rows.row_stride;
  const int64_t num_rows = rows.num_rows;
  Vec<C> broadcast[kStreams];

  // Adds up `count` rows from `row` on, four at a time: a short chain of additions, for the error's
  // sake and the pipeline's.
  const auto sum_rows = [&](const T* row, int64_t count, const auto& load_row) {
    Vec<C> sum{};
    int64_t k = 0;
    for (; k + 4 <= count; k += 4, row += 4 * stride) {
      sum += (broadcast[k] * load_row(row) + broadcast[k + 1] * load_row(row + stride)) +
             (broadcast[k + 2] * load_row(row + 2 * stride) +
              broadcast[k + 3] * load_row(row + 3 * stride));
    }
    switch (count - k) {
    case 3:
      sum += broadcast[k + 2] * load_row(row + 2 * stride);
      [[fallthrough]];
    case 2:
      sum += broadcast[k + 1] * load_row(row + stride);
      [[fallthrough]];
    case 1:
      sum += broadcast[k] * load_row(row);
    }
    return sum;
  };
  // Calls use_sum(column, lanes, sum) with the sum of the rows first .. last, kStreams at most.
  const auto for_sums = [&](int64_t first, int64_t last, int64_t from, int64_t to,
                            const auto& use_sum) {
    const int64_t count = last - first;
    for (int64_t k = 0; k < count; ++k) {
      broadcast[k] = Vec<C>{} + static_cast<C>(weights[first + k]);
    }
    const T* rows_here = data + first * stride;
    int64_t column = from;
    for (; column + kLanes<C> <= to; column += kLanes<C>) {
      use_sum(column, kLanes<C>,
              sum_rows(rows_here, count, [&](const T* row) { return load(row + column); }));
    }
    if (column < to) {
      const int64_t lanes = to - column;
      use_sum(column, lanes, sum_rows(rows_here, count, [&](const T* row) {
                return load_first(row + column, lanes);
              }));
    }
  };

  if (num_rows <= kStreams) return for_sums(0, num_rows, begin, end, use);
  C sums[kSumColumns];
  for (int64_t from = begin; from < end; from += kSumColumns) {
    const int64_t to = smaller(from + kSumColumns, end);
    for_sums(0, kStreams, from, to,
             [&](int64_t column, int64_t, Vec<C> sum) { store(sums + (column - from), sum); });
    int64_t k = kStreams;
    for (; k + kStreams < num_rows; k += kStreams) {
      for_sums(k, k + kStreams, from, to, [&](int64_t column, int64_t, Vec<C> sum) {
        store(sums + (column - from), load(sums + (column - from)) + sum);
      });
    }
    for_sums(k, num_rows, from, to, [&](int64_t column, int64_t lanes, Vec<C> sum) {
      use(column, lanes, load(sums + (column - from)) + sum);
    });
  }
}

template <typename T, typename V>
void store_lanes(T* p, V v, int64_t lanes) {
  if (lanes == kLanes<Compute<T>>) {
    store(p, v);
  } else {
    store_first(p, v, lanes);
  }
}

template <typename T>
auto load_lanes(const T* p, int64_t lanes) {
  return lanes == kLanes<Compute<T>> ? load(p) : load_first(p, lanes);
}

void combine(const Rows& rows, const double* weights, int64_t begin, int64_t end,
             FloatType out_type, void* out) {
  with_type(rows.type, [&]<typename T>(const T*) {
    with_type(out_type, [&]<typename Out>(const Out*) {
      if constexpr (sizeof(Compute<T>) == sizeof(Compute<Out>)) {
        Out* result = static_cast<Out*>(out);
        for_combined<T>(rows, weights, begin, end, [&](int64_t column, int64_t lanes, auto sum) {
          store_lanes(result + column, sum, lanes);
        });
      }
    });
  });
}

// Stands for the low precision copy where there is none.
struct NoCopy {};

template <typename T, typename Copy>
void combine_adamw_as(const Rows& rows, const double* weights, int64_t begin, int64_t end,
                      const AdamWStep& step, const AdamWState& state, Copy* copy) {
  using C = Compute<T>;
  C* master = static_cast<C*>(state.master);
  C* exp_avg = static_cast<C*>(state.exp_avg);
  C* exp_avg_sq = static_cast<C*>(state.exp_avg_sq);
  const C gradient_scale = step.gradient_scale, eps = step.eps;
  const C keep1 = step.beta1, add1 = 1.0 - step.beta1;
  const C keep2 = step.beta2, add2 = 1.0 - step.beta2;
  const C weight_factor = step.weight_factor, step_size = step.step_size;
  const C second_moment_factor = step.second_moment_factor;

  for_combined<T>(rows, weights, begin, end, [&](int64_t column, int64_t lanes, Vec<C> gradient) {
    gradient *= gradient_scale;
    const Vec<C> m = keep1 * load_lanes(exp_avg + column, lanes) + add1 * gradient;
    const Vec<C> v = keep2 * load_lanes(exp_avg_sq + column, lanes) + add2 * gradient * gradient;
    const Vec<C> denominator = square_root(v) * second_moment_factor + eps;
    const Vec<C> weight =
        weight_factor * load_lanes(master + column, lanes) - step_size * (m / denominator);
    store_lanes(exp_avg + column, m, lanes);
    store_lanes(exp_avg_sq + column, v, lanes);
    store_lanes(master + column, weight, lanes);
    if constexpr (!__is_same(Copy, NoCopy)) store_lanes(copy + column, weight, lanes);
  });
}

void combine_adamw(const Rows& rows, const double* weights, int64_t begin, int64_t end,
                   const AdamWStep& step, const AdamWState& state) {
  with_type(rows.type, [&]<typename T>(const T*) {
    const auto run = [&](auto* copy) {
      combine_adamw_as<T>(rows, weights, begin, end, step, state, copy);
    };
    if (state.low_precision == nullptr) return run(static_cast<NoCopy*>(nullptr));
    if constexpr (sizeof(Compute<T>) == sizeof(float)) {
      if (state.low_precision_type == FloatType::kBFloat16) {
        return run(static_cast<BFloat16*>(state.low_precision));
      }
      return run(static_cast<Half*>(state.low_precision));
    }
  });
}

} // namespace

extern const SurgeryKernels surgery_kernels;
const SurgeryKernels surgery_kernels = {gram, combine, combine_adamw};

} // namespace superbert::SUPERBERT_ISA
