// What the operators that end in a layer norm share at the border to torch: layer_norm_cpu.cpp,
// which defines it, and embedding_cpu.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "layer_norm.h"

namespace superbert {

using Offsets = std::vector<int64_t>;

// Weights and biases are few: they are read as float32, whatever their dtype.
class Parameter {
 public:
  explicit Parameter(const std::optional<torch::stable::Tensor>& parameter) {
    using torch::headeronly::ScalarType;
    if (parameter)
      tensor_ = torch::stable::contiguous(torch::stable::to(*parameter, ScalarType::Float));
  }
  const float* data() const {
    return tensor_ ? static_cast<const float*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<torch::stable::Tensor> tensor_;
};

// Where the gradients of weight and bias go: row k of [K, width] gets those of the rows
// offsets[k] .. offsets[k + 1].  A tensor without elements stands for one that is not wanted, since
// Inductor cannot compile an operator whose outputs are all None.
struct ParameterRows {
  const torch::stable::Tensor& weight;
  const torch::stable::Tensor& bias;
  const Offsets& offsets;
  bool accumulate;
};

void check_offsets(const Offsets& offsets, int64_t rows);

// Both share the rows of a call out over torch's threads.
void run_layer_norm(const LayerNormCall& call);
void run_layer_norm_backward(const LayerNormGradients& call, const ParameterRows& parameters);

} // namespace superbert
