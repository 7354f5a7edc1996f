// What the CPU operators of attention share: checks of boundaries and of a plan.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "check_torch.h"

namespace superbert {

// The numbers of kernels/attention/attention_plan.py, which says what a plan is.
constexpr int64_t kRunTokens = 64, kRunAlignment = 4, kMostRows = int64_t{1} << 30;

inline int64_t max_runs(int64_t total) {
  return total / ((kRunTokens - kRunAlignment + 2) / 2) + 2;
}

inline void check_cu_seqlens(const char* name, const torch::stable::Tensor& cu_seqlens,
                             int64_t total) {
  check(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 && cu_seqlens.is_contiguous() &&
            cu_seqlens.scalar_type() == torch::headeronly::ScalarType::Int,
        name, ": expected contiguous int32 [sequences + 1]");
  check_data(name, cu_seqlens);
  const auto* cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t sequences = cu_seqlens.numel() - 1;
  check(cu[0] == 0, name, ": expected to start at 0, got ", cu[0]);
  for (int64_t s = 0; s < sequences; ++s)
    check(cu[s] <= cu[s + 1], name, ": expected ascending offsets, got ", cu[s], " before ",
          cu[s + 1], " at position ", s);
  check(cu[sequences] <= total, name, ": expected to end within the ", total, " rows, got ",
        cu[sequences]);
}

// A plan for a stream of `total` rows that is queries and keys at once, or none.
inline void check_plan(const std::optional<torch::stable::Tensor>& runs,
                       const std::optional<torch::stable::Tensor>& bounds, int64_t total) {
  using torch::headeronly::ScalarType;
  check(runs.has_value() == bounds.has_value(), "runs, bounds: expected both or neither");
  if (!runs.has_value()) return;
  check_shape("runs", *runs, {max_runs(total), 2});
  check_shape("bounds", *bounds, {2, total});
  check_dtype("runs", *runs, ScalarType::Int, "int32");
  check_dtype("bounds", *bounds, ScalarType::Int, "int32");
  check(runs->is_contiguous(), "runs: expected contiguous");
  check(bounds->is_contiguous(), "bounds: expected contiguous");
  check_data("runs", *runs);
  check_data("bounds", *bounds);
}

} // namespace superbert
