// The CUDA side of the gradient surgery operators, and the kernels of the small problems.  Schemas
// are in surgery_cpu.cpp; nothing here waits for the device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "launch_device_torch.cuh"
#include "memory_torch.h"
#include "surgery_combine.cuh"
#include "surgery_gram.cuh"
#include "surgery_pcgrad.cuh"
#include "surgery_summary.cuh"
#include "surgery_torch.h"

namespace superbert {
namespace {

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
DeviceRows<T> device_rows(const Rows& rows) {
  return {static_cast<const T*>(rows.data), rows.num_rows, rows.row_stride};
}

// Calls f with a null pointer of the element type.
template <typename F>
void with_type(FloatType type, const F& f) {
  switch (type) {
  case FloatType::kFloat32:
    return f(static_cast<float*>(nullptr));
  case FloatType::kFloat64:
    return f(static_cast<double*>(nullptr));
  case FloatType::kBFloat16:
    return f(static_cast<__nv_bfloat16*>(nullptr));
  case FloatType::kFloat16:
    return f(static_cast<__half*>(nullptr));
  }
}

Tensor gram(const Tensor& rows, std::vector<int64_t> offsets) {
  const Rows matrix = check_rows(rows);
  check_offsets(offsets, rows);
  const LaunchDevice device(rows);
  const int64_t num_segments = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t k = matrix.num_rows;
  Tensor result = allocate(rows, {num_segments, k, k}, compute_type(rows));
  with_type(matrix.type, [&]<typename T>(T*) {
    std::optional<Tensor> scratch;
    const auto new_scratch = [&](int64_t count) {
      scratch = allocate(rows, {count}, ScalarType::Double);
      return data<double>(*scratch);
    };
    compute_gram(device_rows<T>(matrix), offsets, device.num_processors(), new_scratch,
                 data<Compute<T>>(result), device.stream());
  });
  return result;
}

Tensor pcgrad_weights(const Tensor& gram, const Tensor& order, bool mean, bool include_self) {
  const int64_t groups = check_gram_and_order(gram, order);
  const LaunchDevice device(gram);
  const int64_t k = gram.size(-1);
  Tensor weights = allocate(gram, gram.sizes().slice(0, gram.dim() - 1), gram.scalar_type());
  if (groups == 0) return weights;
  const auto run = [&]<typename T>(T* result) {
    if (k <= kSolveThreads) {
      launch(pcgrad_kernel<T>, groups, kSolveThreads, device.stream(), data<T>(gram), k,
             data<int64_t>(order), mean, include_self, result);
      return;
    }
    const Tensor coefficients = allocate(gram, {groups, k, k}, ScalarType::Double);
    const int64_t blocks = groups * solve_blocks(k);
    launch(pcgrad_project_kernel<T>, blocks, kSolveThreads, device.stream(), data<T>(gram), k,
           data<int64_t>(order), include_self, data<double>(coefficients));
    launch(pcgrad_sum_kernel<T>, blocks, kSolveThreads, device.stream(), data<double>(coefficients),
           k, mean, result);
  };
  if (gram.scalar_type() == ScalarType::Double) {
    run(data<double>(weights));
  } else {
    run(data<float>(weights));
  }
  return weights;
}

Tensor draw_order(const Tensor& seed, const Tensor& step, int64_t num_tasks) {
  check_counters(seed, step, num_tasks);
  const LaunchDevice device(seed);
  Tensor order = allocate(seed, {num_tasks, num_tasks});
  launch(draw_order_kernel, solve_blocks(num_tasks), kSolveThreads, device.stream(),
         data<int64_t>(seed), data<int64_t>(step), num_tasks, data<int64_t>(order));
  return order;
}

// Whether the first aligned column of the rows is aligned in this tensor too.
template <typename T, typename U>
bool aligned_with(const DeviceRows<T>& rows, const U* other) {
  const int64_t column = first_aligned_column(rows, 0);
  const size_t bytes = sizeof(U) * kCombinePack<T> < 16 ? sizeof(U) * kCombinePack<T> : 16;
  return column >= 0 && reinterpret_cast<uintptr_t>(other + column) % bytes == 0;
}

void combine_out(const Tensor& rows, const Tensor& weights, Tensor out) {
  const Rows matrix = check_rows(rows);
  check_weights(weights, rows);
  check_out(out, rows, weights);
  const LaunchDevice device(rows);
  with_type(matrix.type, [&]<typename T>(T*) {
    with_type(float_type(out, "out"), [&]<typename Out>(Out*) {
      if constexpr (std::is_same_v<Compute<T>, Compute<Out>>) {
        const DeviceRows<T> on_device = device_rows<T>(matrix);
        const StoreSum<Compute<T>, Out> use{data<Out>(out)};
        launch_combine(on_device, data<Compute<T>>(weights), 1, 0, rows.size(1),
                       aligned_with(on_device, use.out), OneSegment{}, device.num_processors(), use,
                       device.stream());
      }
    });
  });
}

Tensor combine(const Tensor& rows, const Tensor& weights) {
  check_rows(rows);
  Tensor out = allocate(rows, {rows.size(1)});
  combine_out(rows, weights, out);
  return out;
}

DeviceScalar device_scalar(const Tensor& value) {
  using Type = DeviceScalar::Type;
  const ScalarType type = value.scalar_type();
  return {type == ScalarType::Float    ? Type::kFloat32
          : type == ScalarType::Double ? Type::kFloat64
          : type == ScalarType::Long   ? Type::kInt64
                                       : Type::kBool,
          value.data_ptr(), 0.0};
}

DeviceScalar device_scalar_or(const std::optional<Tensor>& value, double fallback) {
  if (value) return device_scalar(*value);
  return {DeviceScalar::Type::kFloat64, nullptr, fallback};
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
  const LaunchDevice device(rows);

  with_type(matrix.type, [&]<typename T>(T*) {
    using C = Compute<T>;
    const DeviceRows<T> on_device = device_rows<T>(matrix);
    const auto run = [&]<typename Copy>(Copy* copy) {
      const UpdateAdamW<C, Copy> use{static_cast<C*>(state.master),
                                     static_cast<C*>(state.exp_avg),
                                     static_cast<C*>(state.exp_avg_sq),
                                     copy,
                                     device_scalar(lr),
                                     device_scalar(step),
                                     device_scalar_or(scale, 1.0),
                                     device_scalar_or(skip, 0.0),
                                     beta1,
                                     beta2,
                                     std::log(beta1),
                                     std::log(beta2),
                                     eps,
                                     weight_decay,
                                     decayed};
      const bool aligned = aligned_with(on_device, use.master) &&
                           aligned_with(on_device, use.exp_avg) &&
                           aligned_with(on_device, use.exp_avg_sq) &&
                           (copy == nullptr || aligned_with(on_device, copy));
      launch_combine_segments(on_device, data<C>(weights), num_groups, {ends, groups}, decayed,
                              aligned, device.num_processors(), use, device.stream());
    };
    if (state.low_precision == nullptr) return run(static_cast<NoCopy*>(nullptr));
    if constexpr (std::is_same_v<C, float>) {
      if (state.low_precision_type == FloatType::kBFloat16) {
        return run(static_cast<__nv_bfloat16*>(state.low_precision));
      }
      return run(static_cast<__half*>(state.low_precision));
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
  const LaunchDevice device(gram);
  const int64_t k = gram.size(1);
  const SummaryTensors results{
      allocate(gram, {}), allocate(gram, {}),     allocate(gram, {}, ScalarType::Bool),
      allocate(gram, {}), allocate(gram, {k, k}), allocate(gram, {k})};
  const auto run = [&]<typename T>(T*) {
    const SummaryInputs<T> in =
        summary_inputs<T>(gram, weights, losses, shares, max_norm, loss_scale);
    const SummaryOutputs<T> out = summary_outputs<T>(results);
    launch(summary_kernel<T>, 1, kSummaryThreads, device.stream(), in, out);
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

STABLE_TORCH_LIBRARY_IMPL(superbert, CUDA, m) {
  m.impl("gram", TORCH_BOX(&superbert::gram));
  m.impl("pcgrad_weights", TORCH_BOX(&superbert::pcgrad_weights));
  m.impl("draw_order", TORCH_BOX(&superbert::draw_order));
  m.impl("combine", TORCH_BOX(&superbert::combine));
  m.impl("combine_out", TORCH_BOX(&superbert::combine_out));
  m.impl("combine_adamw_", TORCH_BOX(&superbert::combine_adamw_));
  m.impl("combine_adamw_segments_", TORCH_BOX(&superbert::combine_adamw_segments_));
  m.impl("update_summary", TORCH_BOX(&superbert::update_summary));
}
