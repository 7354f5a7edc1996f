// The CPU side of the dropout op; kernels/dropout/dropout.py documents it.
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tensor_torch.h"

namespace superbert {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 16384;

Tensor dropout(Tensor x, double p, Tensor seed, int64_t rng_offset) {
  const Dropout dropout = make_dropout(p, seed, rng_offset);
  const Storage storage = storage_of("x", x);
  check_data("x", x);
  const Tensor from = as_contiguous(x);
  Tensor to = allocate_like(from);
  const int64_t count = from.numel();
  const auto& kernels = dropout_kernels();
  parallel_items((count + kBlock - 1) / kBlock, 0, [&](float*, int64_t block) {
    const int64_t begin = block * kBlock;
    kernels.dropout(storage, dropout, from.data_ptr(), begin,
                    begin + kBlock < count ? begin + kBlock : count, to.data_ptr());
  });
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("dropout(Tensor x, float p, Tensor seed, int rng_offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }

} // namespace
} // namespace superbert
