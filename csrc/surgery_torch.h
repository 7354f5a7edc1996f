// Checks the operators' arguments, for the CPU and the CUDA code, and turns them into the plain
// structs that the kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "check_torch.h"
#include "surgery.h"
#include "surgery_summary.h"

namespace superbert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline FloatType float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
  case ScalarType::Float:
    return FloatType::kFloat32;
  case ScalarType::Double:
    return FloatType::kFloat64;
  case ScalarType::BFloat16:
    return FloatType::kBFloat16;
  case ScalarType::Half:
    return FloatType::kFloat16;
  default:
    check(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return FloatType::kFloat32;
}

// The type in which sums over rows of this type are kept.
inline ScalarType compute_type(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Rows check_rows(const Tensor& rows) {
  check(rows.dim() == 2, "rows must have the shape [K, P], not ", rows.dim(), " dimensions");
  const int64_t num_rows = rows.size(0);
  check(num_rows >= 1, "rows must hold at least one task gradient");
  check(rows.size(1) <= 1 || rows.stride(1) == 1,
        "rows must have contiguous columns: stride(1) must be 1, not ", rows.stride(1));
  check(num_rows == 1 || rows.stride(0) >= rows.size(1),
        "rows must not overlap: stride(0) must be at least P");
  check_data("rows", rows);
  return {float_type(rows, "rows"), rows.data_ptr(), num_rows, rows.stride(0)};
}

inline void check_weights(const Tensor& weights, const Tensor& rows) {
  check(weights.dim() == 1 && weights.size(0) == rows.size(0),
        "weights must have the shape [K] with K = ", rows.size(0));
  check(weights.scalar_type() == compute_type(rows),
        "weights must be float32, or float64 where rows are float64");
  check(weights.is_contiguous(), "weights must be contiguous");
  check(same_device(weights, rows), "weights must be on the device of rows");
  check_data("weights", weights);
}

// Weights of one group, [K], or of G, [G, K]; returns G.
inline int64_t check_group_weights(const Tensor& weights, const Tensor& rows) {
  if (weights.dim() == 1) {
    check_weights(weights, rows);
    return 1;
  }
  check(weights.dim() == 2 && weights.size(1) == rows.size(0),
        "weights must have the shape [G, K] with K = ", rows.size(0));
  check(weights.scalar_type() == compute_type(rows),
        "weights must be float32, or float64 where rows are float64");
  check(weights.is_contiguous(), "weights must be contiguous");
  check(same_device(weights, rows), "weights must be on the device of rows");
  check_data("weights", weights);
  return weights.size(0);
}

// Segment s is the columns ends[s - 1]:ends[s], with the weights of groups[s]; -1: left alone.
inline void check_segments(const std::vector<int64_t>& ends, const std::vector<int64_t>& groups,
                           int64_t num_groups, const Tensor& rows) {
  check(!ends.empty() && ends.size() == groups.size(),
        "ends and groups must have one number for each segment, at least one");
  check(ends.front() >= 0 && ends.back() == rows.size(1), "ends must end with P = ", rows.size(1));
  for (size_t s = 1; s < ends.size(); ++s) check(ends[s - 1] <= ends[s], "ends must ascend");
  for (const int64_t group : groups) {
    check(group >= -1 && group < num_groups && group <= INT32_MAX,
          "groups must be numbers of rows of weights, or -1, not ", group);
  }
}

// A [P] tensor beside the rows: contiguous, on their device.
inline void check_vector(const Tensor& vector, const Tensor& rows, const char* name) {
  check(vector.dim() == 1 && vector.size(0) == rows.size(1), name,
        " must have the shape [P] with P = ", rows.size(1));
  check(vector.is_contiguous(), name, " must be contiguous");
  check(same_device(vector, rows), name, " must be on the device of rows");
  check_data(name, vector);
}

inline void check_state(const Tensor& vector, const Tensor& rows, const char* name) {
  check_vector(vector, rows, name);
  check(vector.scalar_type() == compute_type(rows), name,
        " must be float32, or float64 where rows are float64");
}

inline void check_out(const Tensor& out, const Tensor& rows, const Tensor& weights) {
  check_vector(out, rows, "out");
  const bool is_double = float_type(out, "out") == FloatType::kFloat64;
  check(is_double == (compute_type(rows) == ScalarType::Double),
        "out must be float64 exactly where rows are float64");
  check_apart("out", runs_of(out), "rows", runs_of(rows));
  check_apart("out", runs_of(out), "weights", runs_of(weights));
}

inline AdamWState check_adamw(const Tensor& rows, const Tensor& master, const Tensor& exp_avg,
                              const Tensor& exp_avg_sq,
                              const std::optional<Tensor>& low_precision) {
  check_state(master, rows, "master");
  check_state(exp_avg, rows, "exp_avg");
  check_state(exp_avg_sq, rows, "exp_avg_sq");
  AdamWState state{master.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), nullptr,
                   FloatType::kBFloat16};
  if (low_precision) {
    check_vector(*low_precision, rows, "low_precision");
    state.low_precision = low_precision->data_ptr();
    state.low_precision_type = float_type(*low_precision, "low_precision");
    check((state.low_precision_type == FloatType::kBFloat16 ||
           state.low_precision_type == FloatType::kFloat16) &&
              compute_type(rows) == ScalarType::Float,
          "low_precision must be bfloat16 or float16, and rows not float64");
  }
  return state;
}

inline void check_offsets(const std::vector<int64_t>& offsets, const Tensor& rows) {
  check(offsets.size() >= 2 && offsets.front() >= 0 && offsets.back() <= rows.size(1),
        "offsets must be at least two column numbers within 0 .. P");
  for (size_t s = 1; s < offsets.size(); ++s) {
    check(offsets[s - 1] <= offsets[s], "offsets must ascend");
  }
}

// Refuses what is no matrix [K, K], or G of them, [G, K, K], or no order for them; returns G.
inline int64_t check_gram_and_order(const Tensor& gram, const Tensor& order) {
  check((gram.dim() == 2 || gram.dim() == 3) && gram.size(-1) == gram.size(-2) &&
            gram.size(-1) >= 1 && gram.is_contiguous(),
        "gram must be a contiguous [K, K] matrix with K at least 1, or [G, K, K]");
  check(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double,
        "gram must be float32 or float64");
  check(order.dim() == 2 && order.size(0) == gram.size(-1) && order.size(1) == gram.size(-1) &&
            order.is_contiguous() && order.scalar_type() == ScalarType::Long,
        "order must be a contiguous int64 [K, K] matrix with K = ", gram.size(-1));
  check(same_device(gram, order), "order must be on the device of gram");
  check_data("gram", gram);
  check_data("order", order);
  return gram.dim() == 2 ? 1 : gram.size(0);
}

// A bounded draw of 32 random bits serves no more, and a [K, K] matrix no memory.
constexpr int64_t kMostTasks = int64_t{1} << 24;

inline void check_counters(const Tensor& seed, const Tensor& step, int64_t num_tasks) {
  check(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long,
        "seed must be one int64 number");
  check(step.numel() == 1 && step.scalar_type() == ScalarType::Long && same_device(seed, step),
        "step must be one int64 number on the device of seed");
  check_data("seed", seed);
  check_data("step", step);
  check(num_tasks >= 1, "num_tasks must be at least 1, not ", num_tasks);
  check(num_tasks <= kMostTasks, "num_tasks must be at most ", kMostTasks, ", not ", num_tasks);
}

struct SummaryTensors {
  Tensor norm, scale, skip, skipped, gram, weights;
};

// Checks what the summary of an update is made of: gram [G, K, K] and weights [G, K].
inline void check_summary(const Tensor& gram, const Tensor& weights, const Tensor& losses,
                          const Tensor& shares, double max_norm,
                          const std::optional<Tensor>& loss_scale) {
  check(gram.dim() == 3 && gram.size(1) == gram.size(2) && gram.size(1) >= 1 && gram.size(0) >= 1 &&
            gram.is_contiguous(),
        "gram must be contiguous [G, K, K] with G and K at least 1");
  check(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double,
        "gram must be float32 or float64");
  check_data("gram", gram);
  const auto check_one = [&](const Tensor& x, const char* name,
                             std::initializer_list<int64_t> shape) {
    check_shape(name, x, shape);
    check(x.scalar_type() == gram.scalar_type(), name, " must have the dtype of gram");
    check(x.is_contiguous(), name, " must be contiguous");
    check(same_device(x, gram), name, " must be on the device of gram");
    check_data(name, x);
  };
  check_one(weights, "weights", {gram.size(0), gram.size(1)});
  check_one(losses, "losses", {gram.size(1)});
  check_one(shares, "shares", {gram.size(0)});
  if (loss_scale) check_one(*loss_scale, "loss_scale", {});
  check(max_norm >= 0, "max_norm: expected a number of at least 0, got ", max_norm);
}

template <typename T>
SummaryInputs<T> summary_inputs(const Tensor& gram, const Tensor& weights, const Tensor& losses,
                                const Tensor& shares, double max_norm,
                                const std::optional<Tensor>& loss_scale) {
  const auto data = [](const Tensor& x) { return static_cast<const T*>(x.data_ptr()); };
  return {data(gram),
          data(weights),
          data(losses),
          data(shares),
          loss_scale ? data(*loss_scale) : nullptr,
          gram.size(0),
          gram.size(1),
          max_norm};
}

template <typename T>
SummaryOutputs<T> summary_outputs(const SummaryTensors& results) {
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.data_ptr()); };
  return {data(results.norm),    data(results.scale),
          data(results.skipped), static_cast<bool*>(results.skip.data_ptr()),
          data(results.gram),    data(results.weights)};
}

// Scalars that change from step to step (learning rate, step, loss scale, skip flag) are tensors,
// so that a CUDA graph can replay with new values.
inline void check_scalar(const Tensor& value, const Tensor& rows, const char* name) {
  check(value.numel() == 1, name, " must be one number");
  check(same_device(value, rows), name, " must be on the device of rows");
  const ScalarType type = value.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Long ||
            type == ScalarType::Bool,
        name, " must be float32, float64, int64 or bool");
  check_data(name, value);
}

inline void check_scalars(const Tensor& rows, const Tensor& lr, const Tensor& step,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& skip) {
  check_scalar(lr, rows, "lr");
  check_scalar(step, rows, "step");
  if (scale) check_scalar(*scale, rows, "scale");
  if (skip) check_scalar(*skip, rows, "skip");
}

inline void check_rates(double beta1, double beta2, double eps, double weight_decay) {
  check(beta1 >= 0 && beta1 < 1, "beta1 must be within 0 <= beta1 < 1, not ", beta1);
  check(beta2 >= 0 && beta2 < 1, "beta2 must be within 0 <= beta2 < 1, not ", beta2);
  check_number("eps", eps);
  check_number("weight_decay", weight_decay);
}

// Refuses what combine_adamw_ writes where it overlaps another of its arguments.
inline void check_adamw_apart(const Tensor& rows, const Tensor& weights, const Tensor& master,
                              const Tensor& exp_avg, const Tensor& exp_avg_sq,
                              const std::optional<Tensor>& low_precision, const Tensor& lr,
                              const Tensor& step, const std::optional<Tensor>& scale,
                              const std::optional<Tensor>& skip) {
  const auto pointer = [](const auto& tensor) { return tensor ? &*tensor : nullptr; };
  const std::pair<const char*, const Tensor*> arguments[] = {
      {"master", &master},
      {"exp_avg", &exp_avg},
      {"exp_avg_sq", &exp_avg_sq},
      {"low_precision", pointer(low_precision)},
      {"rows", &rows},
      {"weights", &weights},
      {"lr", &lr},
      {"step", &step},
      {"scale", pointer(scale)},
      {"skip", pointer(skip)}};
  constexpr size_t kWritten = 4; // the first of them
  for (size_t out = 0; out < kWritten; ++out) {
    const auto& [name, written] = arguments[out];
    if (written == nullptr) continue;
    for (size_t other = out + 1; other < std::size(arguments); ++other) {
      const auto& [other_name, tensor] = arguments[other];
      if (tensor != nullptr) check_apart(name, runs_of(*written), other_name, runs_of(*tensor));
    }
  }
}

} // namespace superbert
