// Layer norm over rows, of a residual and a dropout or of a sum of embeddings, on the CPU. Compiled
// once for each vector unit.  All arithmetic is float32.
#include "layer_norm.h"

#include <type_traits>

#include "dropout_simd.h"
#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {
namespace {

// The scratch of a thread: a row, dropout factors, and the sums of a few rows.
int64_t row_floats(int64_t width) { return width + kWidth; }
int64_t before_sums(int64_t width) { return row_floats(width) + element_factor_floats(width); }
int64_t scratch_floats(int64_t width) { return before_sums(width) + 3 * width; }

// Rows that are summed one after the other, so that rounding errors grow with the number of these
// blocks and not with that of rows.
constexpr int64_t kSummedRows = 8;

// x[i], x null standing for `missing`.
template <typename Lanes>
Floats load_or(float missing, const float* x, int64_t i, Lanes lanes) {
  return x == nullptr ? splat(missing) : lanes.load(x + i);
}

// Two sums over a row.
struct Sums {
  Floats first{}, second{};
};

// Lets f(i, lanes, sums) add to the sums for each vector of a row.  They are summed by blocks of 32
// vectors, so that rounding errors grow with the number of blocks and not with the width.
template <typename F>
Sums sum_row(int64_t width, const F& f) {
  constexpr int64_t kBlock = 32 * kWidth;
  Sums total;
  for (int64_t start = 0; start < width; start += kBlock) {
    Sums block;
    for_row(smaller(kBlock, width - start),
            [&](int64_t i, auto lanes) { f(start + i, lanes, block); });
    total.first += block.first;
    total.second += block.second;
  }
  return total;
}

// h = the row's table rows added up, into `hidden`; returns the sum over h.
template <typename T>
float embed_row(const EmbeddingSum& embedding, int64_t row, int64_t width, float* hidden) {
  const T* parts[EmbeddingSum::kTables];
  for (int table = 0; table < EmbeddingSum::kTables; ++table) {
    parts[table] =
        static_cast<const T*>(embedding.tables[table]) + embedding.indices[table][row] * width;
  }
  Floats total{};
  for_row(width, [&](int64_t i, auto lanes) {
    const Floats h = lanes.load(parts[0] + i) + lanes.load(parts[1] + i) + lanes.load(parts[2] + i);
    lanes.store(hidden + i, h);
    total += lanes.keep(h);
  });
  return sum_of_lanes(total);
}

// The dropout factors of a row, in `buffer`; null: no dropout.
const float* row_factors(const Dropout& dropout, int64_t row, int64_t width, float* buffer) {
  return dropout.active() ? element_factors(dropout, row * width, width, buffer) : nullptr;
}

// ---- forward ------------------------------------------------------------------------------------

// h = residual + dropout(x + x_bias) of one row, into `hidden`; returns its sum.  A pre-norm gives
// h out, too: then it is rounded first, so that the norm and its statistics are those of what is
// kept.
template <typename T>
float combine_row(const LayerNormCall& call, int64_t row, float* factor_buffer, float* hidden) {
  const int64_t start = row * call.width;
  const T* x = static_cast<const T*>(call.x) + start;
  const T* residual =
      call.residual == nullptr ? nullptr : static_cast<const T*>(call.residual) + start;
  const float* factors = row_factors(call.dropout, row, call.width, factor_buffer);
  T* kept = call.prenorm ? static_cast<T*>(call.hidden) + start : nullptr;
  Floats total{};
  for_row(call.width, [&](int64_t i, auto lanes) {
    Floats h = lanes.load(x + i);
    if (call.x_bias != nullptr) h += lanes.load(call.x_bias + i);
    if (factors != nullptr) h *= lanes.load(factors + i);
    if (residual != nullptr) h += lanes.load(residual + i);
    if (kept != nullptr) {
      lanes.store(kept + i, h);
      h = lanes.load(kept + i);
    }
    lanes.store(hidden + i, h);
    total += lanes.keep(h);
  });
  return sum_of_lanes(total);
}

float rstd_of(float variance, float eps) {
  return 1 / __builtin_sqrtf((variance > 0 ? variance : 0 * variance) + eps);
}

// Keeps h - mean for the backward pass, and the statistics of what is kept.  Rounding h itself
// would leave little but rounding errors of a row that is nearly constant, whose rstd magnifies
// them; and where xhat has not mean 0 and its own variance, the terms of dh do not cancel.
template <typename T>
void keep_row(const LayerNormCall& call, int64_t row, const float* hidden) {
  T* kept = static_cast<T*>(call.hidden) + row * call.width;
  const float row_mean = call.mean[row];
  const Sums sums = sum_row(call.width, [&](int64_t i, auto lanes, Sums& to) {
    lanes.store(kept + i, lanes.load(hidden + i) - row_mean);
    const Floats centred = lanes.load(kept + i);
    to.first += centred;
    to.second += centred * centred;
  });
  call.mean[row] = 0;
  if (std::is_same_v<T, float>) return; // nothing was rounded
  const float mean = call.is_rms_norm ? 0 : sum_of_lanes(sums.first) / call.width;
  call.mean[row] = mean;
  call.rstd[row] = rstd_of(sum_of_lanes(sums.second) / call.width - mean * mean, call.eps);
}

template <typename T>
void forward_row(const LayerNormCall& call, int64_t row, float* hidden, float* factor_buffer) {
  const float width = call.width;
  const float sum = call.embedding == nullptr
                        ? combine_row<T>(call, row, factor_buffer, hidden)
                        : embed_row<T>(*call.embedding, row, call.width, hidden);
  const float rough_mean = call.is_rms_norm ? 0 : sum / width;
  // Two passes; the second also corrects the rounding of the first one's mean.
  const Sums sums = sum_row(call.width, [&](int64_t i, auto lanes, Sums& to) {
    const Floats deviation = lanes.keep(lanes.load(hidden + i) - rough_mean);
    to.first += deviation;
    to.second += deviation * deviation;
  });
  const float correction = call.is_rms_norm ? 0 : sum_of_lanes(sums.first) / width;
  const float mean = rough_mean + correction;
  const float variance = sum_of_lanes(sums.second) / width - correction * correction;
  const float rstd = rstd_of(variance, call.eps);
  call.mean[row] = mean;
  call.rstd[row] = rstd;
  T* out = static_cast<T*>(call.out) + row * call.width;
  const float* factors = row_factors(call.out_dropout, row, call.width, factor_buffer);
  for_row(call.width, [&](int64_t i, auto lanes) {
    const Floats h = lanes.load(hidden + i);
    const Floats weight = load_or(1, call.weight, i, lanes);
    const Floats y = (h - mean) * rstd * weight + load_or(0, call.bias, i, lanes);
    lanes.store(out + i, factors == nullptr ? y : y * lanes.load(factors + i));
  });
  if (call.hidden != nullptr && !call.prenorm) keep_row<T>(call, row, hidden);
}

void forward(const LayerNormCall& call, int64_t begin, int64_t end, float* scratch) {
  with_storage(call.storage, [&]<typename T>(const T*) {
    for (int64_t row = begin; row < end; ++row) {
      forward_row<T>(call, row, scratch, scratch + row_floats(call.width));
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------

// With xhat = (h - mean) * rstd and g = dy * weight, means taken over the row:
//     dh = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_sum,  dx = dropout factor * dh
// without mean(g) in RMS norm.
// H is the type in which the row of h is given; the row's terms are added to `all_sums`, when not
// null, for weight, bias and x_bias.
template <typename T, typename H>
void backward_row(const LayerNormGradients& call, int64_t row, const H* hidden, float* all_sums,
                  float* factor_buffer) {
  float* grad_weight = all_sums;
  float* grad_bias = all_sums == nullptr || call.sums < 2 ? nullptr : all_sums + call.width;
  float* grad_x_bias = all_sums == nullptr || call.sums < 3 ? nullptr : all_sums + 2 * call.width;
  const int64_t start = row * call.width;
  const T* dy = static_cast<const T*>(call.grad_out) + start;
  const float mean = call.mean[row], rstd = call.rstd[row];
  const float* out_factors = row_factors(call.out_dropout, row, call.width, factor_buffer);
  const auto load_grad = [&](int64_t i, auto lanes) {
    const Floats grad = lanes.load(dy + i);
    return out_factors == nullptr ? grad : grad * lanes.load(out_factors + i);
  };
  const Sums sums = sum_row(call.width, [&](int64_t i, auto lanes, Sums& to) {
    const Floats grad = load_grad(i, lanes);
    const Floats xhat = (lanes.load(hidden + i) - mean) * rstd;
    const Floats g = grad * load_or(1, call.weight, i, lanes);
    to.first += lanes.keep(g);
    to.second += lanes.keep(g * xhat);
    if (grad_weight != nullptr)
      lanes.store(grad_weight + i, lanes.load(grad_weight + i) + grad * xhat);
    if (grad_bias != nullptr) lanes.store(grad_bias + i, lanes.load(grad_bias + i) + grad);
  });
  const float mean_g = call.is_rms_norm ? 0 : sum_of_lanes(sums.first) / call.width;
  const float mean_gx = sum_of_lanes(sums.second) / call.width;

  const T* grad_sum =
      call.grad_sum == nullptr ? nullptr : static_cast<const T*>(call.grad_sum) + start;
  T* grad_hidden = static_cast<T*>(call.grad_hidden) + start;
  T* grad_x = call.grad_x == nullptr ? nullptr : static_cast<T*>(call.grad_x) + start;
  const float* factors = row_factors(call.dropout, row, call.width, factor_buffer);
  for_row(call.width, [&](int64_t i, auto lanes) {
    const Floats xhat = (lanes.load(hidden + i) - mean) * rstd;
    const Floats g = load_grad(i, lanes) * load_or(1, call.weight, i, lanes);
    Floats grad = (g - mean_g - xhat * mean_gx) * rstd;
    if (grad_sum != nullptr) grad += lanes.load(grad_sum + i);
    lanes.store(grad_hidden + i, grad);
    const Floats own = factors == nullptr ? grad : grad * lanes.load(factors + i);
    if (grad_x != nullptr) lanes.store(grad_x + i, own);
    if (grad_x_bias != nullptr) lanes.store(grad_x_bias + i, lanes.load(grad_x_bias + i) + own);
  });
}

void backward(const LayerNormGradients& call, int64_t begin, int64_t end, float* partial,
              float* scratch) {
  float* factor_buffer = scratch + row_floats(call.width);
  float* sums = partial == nullptr ? nullptr : scratch + before_sums(call.width);
  const int64_t num_sums = call.sums * call.width;
  if (partial != nullptr) fill(partial, num_sums, 0);
  with_storage(call.storage, [&]<typename T>(const T*) {
    for (int64_t row = begin; row < end; ++row) {
      if (sums != nullptr && (row - begin) % kSummedRows == 0) fill(sums, num_sums, 0);
      if (call.embedding != nullptr) {
        embed_row<T>(*call.embedding, row, call.width, scratch);
        backward_row<T>(call, row, scratch, sums, factor_buffer);
      } else {
        const T* hidden = static_cast<const T*>(call.hidden) + row * call.width;
        backward_row<T>(call, row, hidden, sums, factor_buffer);
      }
      const bool last = row + 1 == end || (row + 1 - begin) % kSummedRows == 0;
      if (sums != nullptr && last) {
        for_row(num_sums, [&](int64_t i, auto lanes) {
          lanes.store(partial + i, lanes.load(partial + i) + lanes.load(sums + i));
        });
      }
    }
  });
}

void sum_partials(const float* partials, int64_t count, int64_t stride, int64_t width,
                  const GradientRow& row) {
  with_storage(row.storage, [&]<typename T>(const T*) {
    T* result = static_cast<T*>(row.data);
    for_row(width, [&](int64_t i, auto lanes) {
      Floats total = row.accumulate ? lanes.load(result + i) : Floats{};
      for (int64_t part = 0; part < count; ++part)
        total += lanes.load(partials + part * stride + i);
      lanes.store(result + i, total);
    });
  });
}

} // namespace

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels = {scratch_floats, forward, backward, sum_partials};

} // namespace superbert::SUPERBERT_ISA
