// The CPU side of the layer norm ops; kernels/layer_norm.py documents them.
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "layer_norm.h"
#include "tensor_border.h"

namespace superbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Offsets = std::vector<int64_t>;

constexpr int64_t kRowBlock = 64;

// Parameters are few: they are read as float32, whatever their dtype.
struct Parameter {
  std::optional<Tensor> tensor;

  explicit Parameter(const std::optional<Tensor>& parameter) {
    if (parameter)
      tensor = torch::stable::contiguous(torch::stable::to(*parameter, ScalarType::Float));
  }
  const float* data() const {
    return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
  }
};

Tensor new_statistic(const Tensor& x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  return torch::stable::new_empty(x, shape, ScalarType::Float);
}

std::unique_ptr<float[]> new_scratch(int64_t width) {
  return std::make_unique_for_overwrite<float[]>(layer_norm_kernels().scratch_floats(width));
}

// ---- forward ------------------------------------------------------------------------------------

void run_forward(const LayerNormCall& call) {
  const auto& kernels = layer_norm_kernels();
  parallel_items((call.rows + kRowBlock - 1) / kRowBlock, [&] { return new_scratch(call.width); },
                 [&](auto& scratch, int64_t block) {
                   const int64_t begin = block * kRowBlock;
                   const int64_t end =
                       begin + kRowBlock < call.rows ? begin + kRowBlock : call.rows;
                   kernels.forward(call, begin, end, scratch.get());
                 });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps,
                                              std::optional<Tensor>, std::optional<Tensor>, Offsets,
                                              bool) {
  const Tensor rows = torch::stable::contiguous(x);
  const Parameter gamma(weight), beta(bias);
  Tensor out = torch::stable::empty_like(rows);
  Tensor mean = new_statistic(x), rstd = new_statistic(x);
  LayerNormCall call{};
  call.storage = storage_of("x", x);
  call.rows = mean.numel();
  call.width = x.size(x.dim() - 1);
  call.x = rows.data_ptr();
  call.weight = gamma.data();
  call.bias = beta.data();
  call.eps = static_cast<float>(eps);
  call.out = out.data_ptr();
  call.mean = static_cast<float*>(mean.data_ptr());
  call.rstd = static_cast<float*>(rstd.data_ptr());
  run_forward(call);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
dropout_add_layer_norm(Tensor x, Tensor residual, std::optional<Tensor> x_bias,
                       std::optional<Tensor> weight, std::optional<Tensor> bias, double dropout_p,
                       double eps, std::optional<Tensor> seed, int64_t stream,
                       std::optional<Tensor>, std::optional<Tensor>, Offsets, bool) {
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor residual_rows = torch::stable::contiguous(residual);
  const Parameter offset(x_bias), gamma(weight), beta(bias);
  Tensor out = torch::stable::empty_like(rows), hidden = torch::stable::empty_like(rows);
  Tensor mean = new_statistic(x), rstd = new_statistic(x);
  LayerNormCall call{};
  call.storage = storage_of("x", x);
  call.rows = mean.numel();
  call.width = x.size(x.dim() - 1);
  call.x = rows.data_ptr();
  call.residual = residual_rows.data_ptr();
  call.x_bias = offset.data();
  call.weight = gamma.data();
  call.bias = beta.data();
  call.eps = static_cast<float>(eps);
  call.dropout = make_dropout(dropout_p, seed, stream);
  call.out = out.data_ptr();
  call.hidden = hidden.data_ptr();
  call.mean = static_cast<float*>(mean.data_ptr());
  call.rstd = static_cast<float*>(rstd.data_ptr());
  run_forward(call);
  return {out, hidden, mean, rstd};
}

// ---- backward -----------------------------------------------------------------------------------

// Rows of one task, few enough to be one thread's item; task -1 owns the rows that are padding.
struct Chunk {
  int64_t begin, end, task;
};

void append_chunks(int64_t begin, int64_t end, int64_t task, std::vector<Chunk>& chunks) {
  for (; begin < end; begin += kRowBlock) {
    chunks.push_back({begin, begin + kRowBlock < end ? begin + kRowBlock : end, task});
  }
}

// The chunks depend on the offsets alone, not on the number of threads: so do the sums' roundings.
std::vector<Chunk> make_chunks(int64_t rows, const Offsets& offsets) {
  std::vector<Chunk> chunks;
  append_chunks(0, offsets.empty() ? rows : offsets.front(), -1, chunks);
  for (size_t task = 0; task + 1 < offsets.size(); ++task) {
    append_chunks(offsets[task], offsets[task + 1], static_cast<int64_t>(task), chunks);
  }
  if (!offsets.empty()) append_chunks(offsets.back(), rows, -1, chunks);
  return chunks;
}

void check_offsets(const Offsets& offsets, int64_t rows) {
  for (size_t i = 0; i < offsets.size(); ++i) {
    const int64_t least = i == 0 ? 0 : offsets[i - 1];
    STD_TORCH_CHECK(least <= offsets[i] && offsets[i] <= rows,
                    "offsets: expected to ascend from 0 to ", rows, " at most, got ", offsets[i],
                    " at position ", i);
  }
}

// Sums the partials of each task into its rows.
void write_rows(const std::vector<Chunk>& chunks, const float* partials, int64_t width,
                int64_t num_tasks, const std::optional<Tensor>& rows, bool accumulate) {
  if (!rows) return;
  STD_TORCH_CHECK(rows->dim() == 2 && rows->size(0) == num_tasks && rows->size(1) == width &&
                      rows->stride(1) == 1,
                  "rows: expected [", num_tasks, ", ", width, "] with contiguous columns");
  const Storage storage = storage_of("rows", *rows);
  const int64_t row_bytes = rows->stride(0) * static_cast<int64_t>(rows->element_size());
  size_t first = 0;
  while (first < chunks.size() && chunks[first].task < 0) ++first;
  for (int64_t task = 0; task < num_tasks; ++task) {
    size_t last = first;
    while (last < chunks.size() && chunks[last].task == task) ++last;
    const GradientRow row = {storage, static_cast<char*>(rows->data_ptr()) + task * row_bytes,
                             accumulate};
    layer_norm_kernels().sum_partials(partials + first * 2 * width, last - first, 2 * width, width,
                                      row);
    first = last;
  }
}

void run_backward(LayerNormGradients& call, const Tensor& grad_out, const Tensor& hidden,
                  const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                  const std::optional<Tensor>& weight_rows, const std::optional<Tensor>& bias_rows,
                  const Offsets& offsets, bool accumulate, const Tensor& grad_hidden) {
  const Tensor grad_rows = torch::stable::contiguous(grad_out);
  const Tensor hidden_rows = torch::stable::contiguous(hidden);
  const Parameter gamma(weight);
  call.storage = storage_of("hidden", hidden);
  call.rows = mean.numel();
  call.width = hidden.size(hidden.dim() - 1);
  call.grad_out = grad_rows.data_ptr();
  call.hidden = hidden_rows.data_ptr();
  call.weight = gamma.data();
  call.mean = static_cast<const float*>(mean.const_data_ptr());
  call.rstd = static_cast<const float*>(rstd.const_data_ptr());
  call.grad_hidden = grad_hidden.data_ptr();

  check_offsets(offsets, call.rows);
  const bool parameters = weight_rows.has_value() || bias_rows.has_value();
  const std::vector<Chunk> chunks = make_chunks(call.rows, offsets);
  const int64_t stride = 2 * call.width;
  const auto partials =
      std::make_unique_for_overwrite<float[]>(parameters ? chunks.size() * stride : 0);
  const auto& kernels = layer_norm_kernels();
  parallel_items(
      chunks.size(), [&] { return new_scratch(call.width); },
      [&](auto& scratch, int64_t item) {
        const Chunk& chunk = chunks[item];
        float* partial = parameters && chunk.task >= 0 ? partials.get() + item * stride : nullptr;
        kernels.backward(call, chunk.begin, chunk.end, partial, scratch.get());
      });
  const int64_t num_tasks = static_cast<int64_t>(offsets.size()) - 1;
  write_rows(chunks, partials.get(), call.width, num_tasks, weight_rows, accumulate);
  write_rows(chunks, partials.get() + call.width, call.width, num_tasks, bias_rows, accumulate);
}

Tensor layer_norm_backward(Tensor grad_out, Tensor hidden, std::optional<Tensor> weight,
                           Tensor mean, Tensor rstd, std::optional<Tensor> weight_rows,
                           std::optional<Tensor> bias_rows, Offsets offsets, bool accumulate) {
  Tensor grad_hidden = torch::stable::new_empty(hidden, hidden.sizes());
  LayerNormGradients call{};
  run_backward(call, grad_out, hidden, weight, mean, rstd, weight_rows, bias_rows, offsets,
               accumulate, grad_hidden);
  return grad_hidden;
}

std::tuple<Tensor, Tensor>
dropout_add_layer_norm_backward(Tensor grad_out, Tensor hidden, std::optional<Tensor> weight,
                                Tensor mean, Tensor rstd, std::optional<Tensor> weight_rows,
                                std::optional<Tensor> bias_rows, Offsets offsets, bool accumulate,
                                double dropout_p, Tensor seed, int64_t stream) {
  Tensor grad_residual = torch::stable::new_empty(hidden, hidden.sizes());
  Tensor grad_x = torch::stable::new_empty(hidden, hidden.sizes());
  LayerNormGradients call{};
  call.dropout = make_dropout(dropout_p, seed, stream);
  call.grad_x = grad_x.data_ptr();
  run_backward(call, grad_out, hidden, weight, mean, rstd, weight_rows, bias_rows, offsets,
               accumulate, grad_residual);
  return {grad_residual, grad_x};
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? weight_rows, "
        "Tensor? bias_rows, SymInt[] offsets, bool accumulate) "
        "-> (Tensor out, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor grad_out, Tensor hidden, Tensor? weight, Tensor mean, "
        "Tensor rstd, Tensor(a!)? weight_rows, Tensor(b!)? bias_rows, SymInt[] offsets, "
        "bool accumulate) -> Tensor");
  m.def("dropout_add_layer_norm(Tensor x, Tensor residual, Tensor? x_bias, Tensor? weight, "
        "Tensor? bias, float dropout_p, float eps, Tensor? seed, int stream, Tensor? weight_rows, "
        "Tensor? bias_rows, SymInt[] offsets, bool accumulate) "
        "-> (Tensor out, Tensor hidden, Tensor mean, Tensor rstd)");
  m.def("dropout_add_layer_norm_backward(Tensor grad_out, Tensor hidden, Tensor? weight, "
        "Tensor mean, Tensor rstd, Tensor(a!)? weight_rows, Tensor(b!)? bias_rows, "
        "SymInt[] offsets, bool accumulate, float dropout_p, Tensor seed, int stream) "
        "-> (Tensor grad_residual, Tensor grad_x)");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("dropout_add_layer_norm", TORCH_BOX(&dropout_add_layer_norm));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&dropout_add_layer_norm_backward));
}

} // namespace
} // namespace superbert
