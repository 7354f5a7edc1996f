// Gradient surgery: the operators' schemas and their CPU side.
//
// kernels/surgery/surgery.py has the mathematics of each operator, in plain torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "memory_torch.h"
#include "surgery.h"
#include "surgery_pcgrad.h"
#include "surgery_torch.h"

namespace superbert {
namespace {

// Columns that are worth a thread of their own.
constexpr int64_t kGrainColumns = 32768;
// Gram sums are kept for each span of columns and added up in order: however many threads share the
// spans, the bits are the same.
constexpr int64_t kMaxSpans = 256;
constexpr int64_t kSpanMultiple = 2048;
// Rows are multiplied in pairs of panels, so that the sums of all spans take little memory however
// many rows there are.  A multiple of the kernels' tiles.
constexpr int64_t kPanelRows = 64;

double scalar_value(const Tensor& value) {
  switch (value.scalar_type()) {
  case ScalarType::Float:
    return *static_cast<const float*>(value.data_ptr());
  case ScalarType::Double:
    return *static_cast<const double*>(value.data_ptr());
  case ScalarType::Long:
    return static_cast<double>(*static_cast<const int64_t*>(value.data_ptr()));
  default:
    return *static_cast<const bool*>(value.data_ptr());
  }
}

std::vector<double> weight_values(const Tensor& weights) {
  std::vector<double> values(weights.numel());
  const auto copy = [&](const auto* data) { std::copy_n(data, values.size(), values.begin()); };
  if (weights.scalar_type() == ScalarType::Double) {
    copy(static_cast<const double*>(weights.data_ptr()));
  } else {
    copy(static_cast<const float*>(weights.data_ptr()));
  }
  return values;
}

// ---- gram --------------------------------------------------------------------------------------
struct PanelPair {
  int64_t row, column; // first rows of the two
};

std::vector<PanelPair> panel_pairs(int64_t num_rows) {
  std::vector<PanelPair> pairs;
  for (int64_t row = 0; row < num_rows; row += kPanelRows) {
    for (int64_t column = row; column < num_rows; column += kPanelRows) {
      pairs.push_back({row, column});
    }
  }
  return pairs;
}

Rows panel(const Rows& rows, int64_t first) {
  const int64_t bytes = rows.type == FloatType::kFloat64   ? 8
                        : rows.type == FloatType::kFloat32 ? 4
                                                           : 2;
  return {rows.type, static_cast<const char*>(rows.data) + first * rows.row_stride * bytes,
          std::min(kPanelRows, rows.num_rows - first), rows.row_stride};
}

// Writes the products of a pair of panels, whose sums of each span lie `stride` apart.
template <typename T>
void add_spans(const Rows& rows, const PanelPair& pair, const double* sums, int64_t num_spans,
               int64_t stride, T* result) {
  const int64_t k = rows.num_rows, width = panel(rows, pair.column).num_rows;
  for (int64_t i = 0; i < panel(rows, pair.row).num_rows; ++i) {
    for (int64_t j = pair.row == pair.column ? i : 0; j < width; ++j) {
      double sum = 0.0;
      for (int64_t s = 0; s < num_spans; ++s) sum += sums[s * stride + i * width + j];
      const int64_t row = pair.row + i, column = pair.column + j;
      result[row * k + column] = result[column * k + row] = static_cast<T>(sum);
    }
  }
}

// Writes the [K, K] products of the columns [begin, end).
template <typename T>
void gram_of_segment(const Rows& rows, int64_t begin, int64_t end, T* result) {
  const int64_t k = rows.num_rows, columns = end - begin;
  const int64_t wanted = std::max<int64_t>(1, (columns + kMaxSpans - 1) / kMaxSpans);
  const int64_t span = (wanted + kSpanMultiple - 1) / kSpanMultiple * kSpanMultiple;
  const int64_t num_spans = (columns + span - 1) / span;

  const std::vector<PanelPair> pairs = panel_pairs(k);
  const int64_t num_pairs = static_cast<int64_t>(pairs.size());
  const int64_t at_once = std::min(num_pairs, kMaxSpans / std::max<int64_t>(1, num_spans));
  const int64_t most = std::min(k, kPanelRows) * std::min(k, kPanelRows); // sums of a pair
  std::vector<double> sums;
  for (int64_t done = 0; done < num_pairs; done += at_once) {
    const int64_t count = std::min(at_once, num_pairs - done);
    sums.assign(count * num_spans * most, 0.0);
    parallel_for(0, count * num_spans, std::max<int64_t>(1, kGrainColumns / span),
                 [&](int64_t first, int64_t last) {
                   for (int64_t item = first; item < last; ++item) {
                     const PanelPair& pair = pairs[done + item / num_spans];
                     const int64_t from = begin + item % num_spans * span;
                     surgery_kernels().gram(panel(rows, pair.row), panel(rows, pair.column), from,
                                            std::min(from + span, end), sums.data() + item * most);
                   }
                 });
    for (int64_t p = 0; p < count; ++p) {
      add_spans(rows, pairs[done + p], sums.data() + p * num_spans * most, num_spans, most, result);
    }
  }
}

Tensor gram(const Tensor& rows, std::vector<int64_t> offsets) {
  const Rows matrix = check_rows(rows);
  check_offsets(offsets, rows);
  const int64_t num_segments = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t k = matrix.num_rows;
  Tensor result = allocate(rows, {num_segments, k, k}, compute_type(rows));
  for (int64_t s = 0; s < num_segments; ++s) {
    const auto run = [&](auto* data) {
      gram_of_segment(matrix, offsets[s], offsets[s + 1], data + s * k * k);
    };
    if (compute_type(rows) == ScalarType::Double) {
      run(static_cast<double*>(result.data_ptr()));
    } else {
      run(static_cast<float*>(result.data_ptr()));
    }
  }
  return result;
}

// ---- weights -----------------------------------------------------------------------------------
template <typename T>
void solve_pcgrad(const T* gram, int64_t k, const int64_t* order, bool mean, bool include_self,
                  T* weights) {
  std::vector<double> c(k), sum(k, 0.0);
  for (int64_t task = 0; task < k; ++task) {
    pcgrad_project(gram, k, order + task * k, task, include_self, c.data());
    for (int64_t m = 0; m < k; ++m) sum[m] += c[m];
  }
  for (int64_t m = 0; m < k; ++m) weights[m] = static_cast<T>(mean ? sum[m] / k : sum[m]);
}

// Checks that every row of [K, K] holds each task once.
void check_permutations(const int64_t* order, int64_t k) {
  std::vector<int64_t> last_row(k, -1); // that held the task
  for (int64_t i = 0; i < k * k; ++i) {
    const int64_t task = order[i], row = i / k;
    check(task >= 0 && task < k, "order must hold task ids 0 .. K-1, not ", task);
    check(last_row[task] < row, "order must hold every task once in each row, but row ", row,
          " holds ", task, " twice");
    last_row[task] = row;
  }
}

Tensor pcgrad_weights(const Tensor& gram, const Tensor& order, bool mean, bool include_self) {
  const int64_t groups = check_gram_and_order(gram, order);
  const int64_t k = gram.size(-1);
  const int64_t* tasks = static_cast<const int64_t*>(order.data_ptr());
  check_permutations(tasks, k);
  Tensor weights = allocate(gram, gram.sizes().slice(0, gram.dim() - 1), gram.scalar_type());
  const auto run = [&](auto* result) {
    using T = std::remove_pointer_t<decltype(result)>;
    const T* matrices = static_cast<const T*>(gram.data_ptr());
    for (int64_t g = 0; g < groups; ++g) {
      solve_pcgrad(matrices + g * k * k, k, tasks, mean, include_self, result + g * k);
    }
  };
  if (gram.scalar_type() == ScalarType::Double) {
    run(static_cast<double*>(weights.data_ptr()));
  } else {
    run(static_cast<float*>(weights.data_ptr()));
  }
  return weights;
}

Tensor draw_order(const Tensor& seed, const Tensor& step, int64_t num_tasks) {
  check_counters(seed, step, num_tasks);
  Tensor order = allocate(seed, {num_tasks, num_tasks});
  const uint64_t key = *static_cast<const int64_t*>(seed.data_ptr());
  const uint64_t counter = *static_cast<const int64_t*>(step.data_ptr());
  int64_t* data = static_cast<int64_t*>(order.data_ptr());
  for (int64_t task = 0; task < num_tasks; ++task) {
    draw_permutation(num_tasks, key, counter, static_cast<uint32_t>(task), data + task * num_tasks);
  }
  return order;
}

// ---- combination -------------------------------------------------------------------------------
void combine_out(const Tensor& rows, const Tensor& weights, Tensor out) {
  const Rows matrix = check_rows(rows);
  check_weights(weights, rows);
  check_out(out, rows, weights);
  const std::vector<double> values = weight_values(weights);
  const FloatType out_type = float_type(out, "out");
  parallel_for(0, rows.size(1), kGrainColumns, [&](int64_t begin, int64_t end) {
    surgery_kernels().combine(matrix, values.data(), begin, end, out_type, out.data_ptr());
  });
}

Tensor combine(const Tensor& rows, const Tensor& weights) {
  check_rows(rows);
  Tensor out = allocate(rows, {rows.size(1)});
  combine_out(rows, weights, out);
  return out;
}

void combine_adamw_segments_(const Tensor& rows, const Tensor& weights, Tensor master,
                             Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> low_precision,
                             std::vector<int64_t> ends, std::vector<int64_t> groups,
                             int64_t decayed, const Tensor& lr, const Tensor& step,
                             std::optional<Tensor> scale, std::optional<Tensor> skip, double beta1,
                             double beta2, double eps, double weight_decay) {
  const Rows matrix = check_rows(rows);
  const int64_t num_groups = check_group_weights(weights, rows);
  check_segments(ends, groups, num_groups, rows);
  const AdamWState state = check_adamw(rows, master, exp_avg, exp_avg_sq, low_precision);
  check_scalars(rows, lr, step, scale, skip);
  check_rates(beta1, beta2, eps, weight_decay);
  check_adamw_apart(rows, weights, master, exp_avg, exp_avg_sq, low_precision, lr, step, scale,
                    skip);
  if (skip && scalar_value(*skip) != 0.0) return;

  const double rate = scalar_value(lr), count = scalar_value(step);
  check(count >= 1, "step must be at least 1, the number of the first step, not ", count);
  const AdamWStep with_decay{.gradient_scale = scale ? scalar_value(*scale) : 1.0,
                             .beta1 = beta1,
                             .beta2 = beta2,
                             .eps = eps,
                             .weight_factor = 1.0 - rate * weight_decay,
                             .step_size = rate / (1.0 - std::pow(beta1, count)),
                             .second_moment_factor = 1.0 / std::sqrt(1.0 - std::pow(beta2, count))};
  AdamWStep without_decay = with_decay;
  without_decay.weight_factor = 1.0;
  const std::vector<double> values = weight_values(weights);
  parallel_for(0, rows.size(1), kGrainColumns, [&](int64_t begin, int64_t end) {
    size_t segment = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t from = begin; from < end;) {
      while (ends[segment] <= from) ++segment;
      const bool decays = from < decayed;
      int64_t to = std::min(end, ends[segment]);
      if (decays) to = std::min(to, decayed);
      if (groups[segment] >= 0) {
        const double* own = values.data() + groups[segment] * matrix.num_rows;
        surgery_kernels().combine_adamw(matrix, own, from, to, decays ? with_decay : without_decay,
                                        state);
      }
      from = to;
    }
  });
}

void combine_adamw_(const Tensor& rows, const Tensor& weights, Tensor master, Tensor exp_avg,
                    Tensor exp_avg_sq, std::optional<Tensor> low_precision, const Tensor& lr,
                    const Tensor& step, std::optional<Tensor> scale, std::optional<Tensor> skip,
                    double beta1, double beta2, double eps, double weight_decay) {
  check_rows(rows);
  check_weights(weights, rows);
  combine_adamw_segments_(rows, weights, master, exp_avg, exp_avg_sq, low_precision, {rows.size(1)},
                          {0}, rows.size(1), lr, step, scale, skip, beta1, beta2, eps,
                          weight_decay);
}

// ---- the summary of an update -----------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
update_summary(const Tensor& gram, const Tensor& weights, const Tensor& losses,
               const Tensor& shares, double max_norm, std::optional<Tensor> loss_scale) {
  check_summary(gram, weights, losses, shares, max_norm, loss_scale);
  const int64_t k = gram.size(1);
  const SummaryTensors results{
      allocate(gram, {}), allocate(gram, {}),     allocate(gram, {}, ScalarType::Bool),
      allocate(gram, {}), allocate(gram, {k, k}), allocate(gram, {k})};
  const auto run = [&]<typename T>(T*) {
    const SummaryInputs<T> in =
        summary_inputs<T>(gram, weights, losses, shares, max_norm, loss_scale);
    const SummaryOutputs<T> out = summary_outputs<T>(results);
    double square = 0.0, known = 0.0;
    for (int64_t row = 0; row < in.groups * k; ++row) {
      square += summary_square(in, row);
      known += summary_known(in, row);
    }
    for (int64_t entry = 0; entry < k * k; ++entry) out.gram[entry] = summary_gram(in, entry);
    for (int64_t task = 0; task < k; ++task) out.weights[task] = summary_weight(in, task);
    summarize(in, square, known, out);
  };
  if (gram.scalar_type() == ScalarType::Double) {
    run(static_cast<double*>(nullptr));
  } else {
    run(static_cast<float*>(nullptr));
  }
  return {results.norm,    results.scale, results.skip,
          results.skipped, results.gram,  results.weights};
}

} // namespace
} // namespace superbert

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("gram(Tensor rows, int[] offsets) -> Tensor");
  m.def("pcgrad_weights(Tensor gram, Tensor order, bool mean, bool include_self) -> Tensor");
  m.def("draw_order(Tensor seed, Tensor step, int num_tasks) -> Tensor");
  m.def("combine(Tensor rows, Tensor weights) -> Tensor");
  m.def("combine_out(Tensor rows, Tensor weights, Tensor(a!) out) -> ()");
  m.def("combine_adamw_(Tensor rows, Tensor weights, Tensor(a!) master, Tensor(b!) exp_avg, "
        "Tensor(c!) exp_avg_sq, Tensor(d!)? low_precision, Tensor lr, Tensor step, Tensor? scale, "
        "Tensor? skip, float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("combine_adamw_segments_(Tensor rows, Tensor weights, Tensor(a!) master, "
        "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? low_precision, int[] ends, "
        "int[] groups, int decayed, Tensor lr, Tensor step, Tensor? scale, Tensor? skip, "
        "float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("update_summary(Tensor gram, Tensor weights, Tensor losses, Tensor shares, "
        "float max_norm, Tensor? loss_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("gram", TORCH_BOX(&superbert::gram));
  m.impl("pcgrad_weights", TORCH_BOX(&superbert::pcgrad_weights));
  m.impl("draw_order", TORCH_BOX(&superbert::draw_order));
  m.impl("combine", TORCH_BOX(&superbert::combine));
  m.impl("combine_out", TORCH_BOX(&superbert::combine_out));
  m.impl("combine_adamw_", TORCH_BOX(&superbert::combine_adamw_));
  m.impl("combine_adamw_segments_", TORCH_BOX(&superbert::combine_adamw_segments_));
  m.impl("update_summary", TORCH_BOX(&superbert::update_summary));
}
