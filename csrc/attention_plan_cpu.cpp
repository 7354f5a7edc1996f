// The CPU side of attention_plan; kernels/attention/attention_plan.py documents it.
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention_torch.h"
#include "check_torch.h"
#include "memory_torch.h"

namespace superbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Writes the pairs of a plan's runs, one after the other.
class RunWriter {
 public:
  RunWriter(int32_t* pairs, int64_t most) : pairs_(pairs), left_(most) {}

  void add(int64_t begin, int64_t end) {
    if (begin == end) return;
    check(left_-- > 0, "cu_seqlens: more runs than a plan has place for"); // the bound excludes it
    *pairs_++ = static_cast<int32_t>(begin);
    *pairs_++ = static_cast<int32_t>(end);
  }

  void fill() { std::fill_n(pairs_, 2 * left_, 0); }

 private:
  int32_t* pairs_;
  int64_t left_;
};

// Where a run that begins at a row has to end.
int64_t run_limit(int64_t begin) { return begin / kRunAlignment * kRunAlignment + kRunTokens; }

std::tuple<Tensor, Tensor> attention_plan(const Tensor& cu_seqlens, int64_t total) {
  check(total >= 0 && total <= kMostRows, "total: expected 0 <= total <= 2^30, got ", total);
  check_cu_seqlens("cu_seqlens", cu_seqlens, total);
  const auto* cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t sequences = cu_seqlens.numel() - 1, tokens = cu[sequences];

  Tensor bounds = allocate(cu_seqlens, {2, total}, ScalarType::Int);
  auto* first = static_cast<int32_t*>(bounds.data_ptr());
  auto* last = first + total;
  for (int64_t s = 0; s < sequences; ++s) {
    std::fill(first + cu[s], first + cu[s + 1], cu[s]);
    std::fill(last + cu[s], last + cu[s + 1], cu[s + 1]);
  }
  std::fill(first + tokens, first + total, 0);
  std::fill(last + tokens, last + total, 0);

  Tensor pairs = allocate(cu_seqlens, {max_runs(total), 2}, ScalarType::Int);
  RunWriter runs(static_cast<int32_t*>(pairs.data_ptr()), max_runs(total));
  for (int64_t s = 0; s < sequences;) {
    const int64_t begin = cu[s], limit = run_limit(begin);
    int64_t next = s;
    while (next < sequences && cu[next + 1] <= limit) ++next;
    runs.add(begin, cu[next]);
    s = std::max(next, s + 1); // a sequence that fits into no run is in none
  }
  for (int64_t begin = tokens; begin < total; begin = run_limit(begin))
    runs.add(begin, std::min(total, run_limit(begin)));
  runs.fill();
  return {pairs, bounds};
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("attention_plan(Tensor cu_seqlens, SymInt total) -> (Tensor runs, Tensor bounds)");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("attention_plan", TORCH_BOX(&attention_plan));
}

} // namespace
} // namespace superbert
