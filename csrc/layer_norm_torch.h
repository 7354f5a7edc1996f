// Checks and tensors of the operators that end in a layer norm, for layer_norm_cpu.cpp, which
// defines them, and embedding_cpu.cpp.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "layer_norm.h"
#include "tensor_torch.h"

namespace superbert {

using Offsets = std::vector<int64_t>;

// Weights and biases are few: they are read as float32, whatever their dtype.
class Parameter {
 public:
  // Checks that it is [width].
  Parameter(const char* name, const std::optional<torch::stable::Tensor>& parameter,
            int64_t width) {
    using torch::headeronly::ScalarType;
    if (!parameter) return;
    check_shape(name, *parameter, {width});
    if (parameter->scalar_type() != ScalarType::Double) storage_of(name, *parameter);
    check_data(name, *parameter);
    tensor_ = allocated(parameter->sizes(), [&] {
      return torch::stable::contiguous(torch::stable::to(*parameter, ScalarType::Float));
    });
  }
  const float* data() const {
    return tensor_ ? static_cast<const float*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<torch::stable::Tensor> tensor_;
};

// Where the gradients of the parameters go: row k of [K, width] gets those of the rows
// offsets[k] .. offsets[k + 1].  A tensor without elements stands for one that is not wanted, since
// Inductor cannot compile an operator whose outputs are all None.
struct ParameterRows {
  struct Named {
    const char* name;
    const torch::stable::Tensor* rows;
    bool wanted() const { return rows != nullptr && rows->numel() > 0; }
  };
  static constexpr int kParameters = 3;

  const torch::stable::Tensor& weight;
  const torch::stable::Tensor& bias;
  const torch::stable::Tensor* x_bias; // null for an operator that has none
  const Offsets& offsets;
  bool accumulate;

  // In the order of a partial's sums.
  std::array<Named, kParameters> all() const {
    return {{{"weight_rows", &weight}, {"bias_rows", &bias}, {"x_bias_rows", x_bias}}};
  }
};

// ---- checks -------------------------------------------------------------------------------------

// Rows [..., width] that a norm is taken of.
inline void check_hidden(const char* name, const torch::stable::Tensor& x) {
  check(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, name, ": expected [..., width], got ",
        shape_text(x.sizes()));
  storage_of(name, x);
  check_data(name, x);
}

// Rows beside others.
inline void check_beside(const char* name, const torch::stable::Tensor& x, const char* other_name,
                         const torch::stable::Tensor& other) {
  check_shape(name, x, other.sizes());
  check(x.scalar_type() == other.scalar_type(), name, ": expected the dtype of ", other_name);
  check_data(name, x);
}

// Mean or rstd of the rows that a shape [..., width] has.
inline void check_statistic(const char* name, const torch::stable::Tensor& x, Sizes rows) {
  check_shape(name, x, Sizes(rows.data(), rows.size() - 1));
  check_dtype(name, x, torch::headeronly::ScalarType::Float, "float32");
  check(x.is_contiguous(), name, ": expected a contiguous tensor");
  check_data(name, x);
}

inline void check_parameter_rows(const ParameterRows& parameters, int64_t width) {
  const int64_t tasks = static_cast<int64_t>(parameters.offsets.size()) - 1;
  const auto check_rows = [&](const char* name, const torch::stable::Tensor& rows) {
    check(tasks >= 1, "offsets: expected tasks + 1 row numbers");
    check_shape(name, rows, {tasks, width});
    storage_of(name, rows);
    check((width == 1 || rows.stride(1) == 1) && (tasks == 1 || rows.stride(0) >= width), name,
          ": expected rows that lie apart, with contiguous columns");
    check_data(name, rows);
  };
  const auto all = parameters.all();
  for (const auto& own : all)
    if (own.wanted()) check_rows(own.name, *own.rows);
  for (size_t first = 0; first < all.size(); ++first) {
    for (size_t second = first + 1; second < all.size(); ++second) {
      if (!all[first].wanted() || !all[second].wanted()) continue;
      // One parameter may be weight and bias at once: its rows then get the sum.
      const bool one = parameters.accumulate &&
                       all[first].rows->const_data_ptr() == all[second].rows->const_data_ptr();
      if (!one)
        check_apart(all[first].name, runs_of(*all[first].rows), all[second].name,
                    runs_of(*all[second].rows));
    }
  }
}

// Refuses gradient rows in the memory of what the kernels read.
inline void
check_rows_apart(const ParameterRows& parameters,
                 std::initializer_list<std::pair<const char*, const torch::stable::Tensor*>> read) {
  for (const auto& [name, tensor] : read) {
    if (tensor == nullptr) continue;
    for (const auto& own : parameters.all()) {
      if (own.wanted()) check_apart(own.name, runs_of(*own.rows), name, runs_of(*tensor));
    }
  }
}

void check_offsets(const Offsets& offsets, int64_t rows);

// The arguments of forward passes that say where the backward pass writes the gradients of
// parameters of these sizes: kernels/layer_norm/layer_norm_parameters.py.
inline void check_task_rows(const std::optional<torch::stable::Tensor>& rows,
                            const Offsets& columns, const Offsets& offsets, int64_t stream,
                            std::initializer_list<int64_t> sizes) {
  if (!rows) return;
  check(!offsets.empty(), "offsets: expected tasks + 1 row numbers");
  check_offsets(offsets, stream);
  const int64_t tasks = static_cast<int64_t>(offsets.size()) - 1;
  check(rows->dim() == 2 && rows->size(0) == tasks && (rows->size(1) <= 1 || rows->stride(1) == 1),
        "rows: expected [", tasks, " tasks, columns] with contiguous rows, got ",
        shape_text(rows->sizes()));
  storage_of("rows", *rows);
  check_data("rows", *rows);
  check(columns.size() == sizes.size(), "columns: expected ", sizes.size(), " column numbers");
  auto size = sizes.begin();
  for (const int64_t column : columns) {
    check(column == -1 || (column >= 0 && column <= rows->size(1) - *size),
          "columns: expected within the ", rows->size(1), " columns of rows, got ", column);
    ++size;
  }
}

// Both share the rows of a call out over torch's threads.
void run_layer_norm(const LayerNormCall& call);
void run_layer_norm_backward(LayerNormGradients call, const ParameterRows& parameters);

} // namespace superbert
