// The CPU side of the layer norm ops; kernels/layer_norm/layer_norm.py documents them.
#include "layer_norm_torch.h"

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tensor_torch.h"

namespace superbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor new_statistic(const Tensor& x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  return allocate(x, shape, ScalarType::Float);
}

// ---- forward ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps,
                                              std::optional<Tensor> task_rows, Offsets columns,
                                              Offsets offsets, bool, bool is_rms_norm) {
  check_hidden("x", x);
  check_number("eps", eps);
  const int64_t width = x.size(x.dim() - 1);
  check_task_rows(task_rows, columns, offsets, x.numel() / width, {width, width});
  const Tensor rows = as_contiguous(x);
  const Parameter gamma("weight", weight, width), beta("bias", bias, width);
  Tensor out = allocate_like(rows);
  Tensor mean = new_statistic(x), rstd = new_statistic(x);
  LayerNormCall call{};
  call.storage = storage_of("x", x);
  call.rows = mean.numel();
  call.width = width;
  call.x = rows.data_ptr();
  call.weight = gamma.data();
  call.bias = beta.data();
  call.eps = static_cast<float>(eps);
  call.is_rms_norm = is_rms_norm;
  call.out = out.data_ptr();
  call.mean = static_cast<float*>(mean.data_ptr());
  call.rstd = static_cast<float*>(rstd.data_ptr());
  run_layer_norm(call);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
dropout_add_layer_norm(Tensor x, Tensor residual, std::optional<Tensor> x_bias,
                       std::optional<Tensor> weight, std::optional<Tensor> bias, double dropout_p,
                       double eps, std::optional<Tensor> seed, int64_t rng_offset,
                       std::optional<Tensor> task_rows, Offsets columns, Offsets offsets, bool,
                       bool prenorm, bool is_rms_norm) {
  check_hidden("x", x);
  check_beside("residual", residual, "x", x);
  check_number("eps", eps);
  const int64_t width = x.size(x.dim() - 1);
  check_task_rows(task_rows, columns, offsets, x.numel() / width, {width, width, width});
  const Tensor rows = as_contiguous(x);
  const Tensor residual_rows = as_contiguous(residual);
  const Parameter offset("x_bias", x_bias, width);
  const Parameter gamma("weight", weight, width), beta("bias", bias, width);
  Tensor out = allocate_like(rows), hidden = allocate_like(rows);
  Tensor mean = new_statistic(x), rstd = new_statistic(x);
  LayerNormCall call{};
  call.storage = storage_of("x", x);
  call.rows = mean.numel();
  call.width = width;
  call.x = rows.data_ptr();
  call.residual = residual_rows.data_ptr();
  call.x_bias = offset.data();
  call.weight = gamma.data();
  call.bias = beta.data();
  call.eps = static_cast<float>(eps);
  call.is_rms_norm = is_rms_norm;
  call.prenorm = prenorm;
  call.dropout = make_dropout(dropout_p, seed, rng_offset);
  call.out = out.data_ptr();
  call.hidden = hidden.data_ptr();
  call.mean = static_cast<float*>(mean.data_ptr());
  call.rstd = static_cast<float*>(rstd.data_ptr());
  run_layer_norm(call);
  return {out, hidden, mean, rstd};
}

// ---- backward -----------------------------------------------------------------------------------

// Checks what the two backward ops have in common.
void check_backward(const Tensor& grad_out, const Tensor& hidden, const Tensor& mean,
                    const Tensor& rstd, const std::optional<Tensor>& grad_sum,
                    const ParameterRows& parameters) {
  check_hidden("hidden", hidden);
  check_beside("grad_out", grad_out, "hidden", hidden);
  check_statistic("mean", mean, hidden.sizes());
  check_statistic("rstd", rstd, hidden.sizes());
  if (grad_sum) check_beside("grad_sum", *grad_sum, "hidden", hidden);
  check_parameter_rows(parameters, hidden.size(hidden.dim() - 1));
}

// Fills in what they have in common, and runs.
void run_backward(LayerNormGradients& call, const Tensor& grad_out, const Tensor& hidden,
                  const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                  const std::optional<Tensor>& grad_sum, bool is_rms_norm,
                  const Tensor& grad_hidden, const ParameterRows& parameters) {
  const Tensor grad_rows = as_contiguous(grad_out);
  const Tensor hidden_rows = as_contiguous(hidden);
  std::optional<Tensor> sum_rows;
  if (grad_sum) sum_rows = as_contiguous(*grad_sum);
  const Parameter gamma("weight", weight, hidden.size(hidden.dim() - 1));
  check_rows_apart(parameters, {{"grad_out", &grad_rows},
                                {"hidden", &hidden_rows},
                                {"weight", weight ? &*weight : nullptr},
                                {"mean", &mean},
                                {"rstd", &rstd},
                                {"grad_sum", sum_rows ? &*sum_rows : nullptr}});
  call.storage = storage_of("hidden", hidden);
  call.rows = mean.numel();
  call.width = hidden.size(hidden.dim() - 1);
  call.grad_out = grad_rows.data_ptr();
  call.hidden = hidden_rows.data_ptr();
  call.weight = gamma.data();
  call.mean = static_cast<const float*>(mean.const_data_ptr());
  call.rstd = static_cast<const float*>(rstd.const_data_ptr());
  call.grad_sum = sum_rows ? sum_rows->data_ptr() : nullptr;
  call.is_rms_norm = is_rms_norm;
  call.grad_hidden = grad_hidden.data_ptr();
  run_layer_norm_backward(call, parameters);
}

Tensor layer_norm_backward(Tensor grad_out, Tensor hidden, std::optional<Tensor> weight,
                           Tensor mean, Tensor rstd, Tensor weight_rows, Tensor bias_rows,
                           Tensor x_bias_rows, Offsets offsets, bool accumulate,
                           std::optional<Tensor> grad_sum, bool is_rms_norm) {
  const ParameterRows parameters{weight_rows, bias_rows, &x_bias_rows, offsets, accumulate};
  check_backward(grad_out, hidden, mean, rstd, grad_sum, parameters);
  Tensor grad_hidden = allocate(hidden, hidden.sizes());
  LayerNormGradients call{};
  run_backward(call, grad_out, hidden, weight, mean, rstd, grad_sum, is_rms_norm, grad_hidden,
               parameters);
  return grad_hidden;
}

std::tuple<Tensor, Tensor>
dropout_add_layer_norm_backward(Tensor grad_out, Tensor hidden, std::optional<Tensor> weight,
                                Tensor mean, Tensor rstd, Tensor weight_rows, Tensor bias_rows,
                                Tensor x_bias_rows, Offsets offsets, bool accumulate,
                                double dropout_p, Tensor seed, int64_t rng_offset,
                                std::optional<Tensor> grad_sum, bool is_rms_norm) {
  const ParameterRows parameters{weight_rows, bias_rows, &x_bias_rows, offsets, accumulate};
  check_backward(grad_out, hidden, mean, rstd, grad_sum, parameters);
  check_rows_apart(parameters, {{"seed", &seed}});
  Tensor grad_residual = allocate(hidden, hidden.sizes());
  Tensor grad_x = allocate(hidden, hidden.sizes());
  LayerNormGradients call{};
  call.dropout = make_dropout(dropout_p, seed, rng_offset);
  call.grad_x = grad_x.data_ptr();
  run_backward(call, grad_out, hidden, weight, mean, rstd, grad_sum, is_rms_norm, grad_residual,
               parameters);
  return {grad_residual, grad_x};
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? rows, "
        "SymInt[] columns, SymInt[] offsets, bool accumulate, bool is_rms_norm) "
        "-> (Tensor out, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor grad_out, Tensor hidden, Tensor? weight, Tensor mean, "
        "Tensor rstd, Tensor(a!) weight_rows, Tensor(b!) bias_rows, Tensor(c!) x_bias_rows, "
        "SymInt[] offsets, bool accumulate, Tensor? grad_sum, bool is_rms_norm) -> Tensor");
  m.def("dropout_add_layer_norm(Tensor x, Tensor residual, Tensor? x_bias, Tensor? weight, "
        "Tensor? bias, float dropout_p, float eps, Tensor? seed, int rng_offset, Tensor? rows, "
        "SymInt[] columns, SymInt[] offsets, bool accumulate, bool prenorm, bool is_rms_norm) "
        "-> (Tensor out, Tensor hidden, Tensor mean, Tensor rstd)");
  m.def("dropout_add_layer_norm_backward(Tensor grad_out, Tensor hidden, Tensor? weight, "
        "Tensor mean, Tensor rstd, Tensor(a!) weight_rows, Tensor(b!) bias_rows, "
        "Tensor(c!) x_bias_rows, SymInt[] offsets, bool accumulate, float dropout_p, Tensor seed, "
        "int rng_offset, Tensor? grad_sum, bool is_rms_norm) "
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
