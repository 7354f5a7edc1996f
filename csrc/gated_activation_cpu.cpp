// The CPU side of the gated activations; kernels/gated_activation/gated_activation.py documents
// them.
#include "gated_activation.h"

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tensor_torch.h"

namespace superbert {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 16384;

Activation gelu_of(bool tanh) { return tanh ? Activation::kGeluTanh : Activation::kGelu; }

// Half of the last dimension of x.
int64_t width_of(const Tensor& x) {
  const bool is_even = x.dim() > 0 && x.size(x.dim() - 1) % 2 == 0;
  check(is_even, "x: expected [..., 2 I], got ", shape_text(x.sizes()));
  return x.size(x.dim() - 1) / 2;
}

std::vector<int64_t> out_shape(const Tensor& x, int64_t width) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = width;
  return shape;
}

// Calls work(begin, end) for blocks of the output's elements on torch's threads.
template <typename Work>
void parallel_blocks(int64_t count, const Work& work) {
  parallel_items((count + kBlock - 1) / kBlock, 0, [&](float*, int64_t block) {
    work(block * kBlock, std::min(count, (block + 1) * kBlock));
  });
}

Tensor forward(const Tensor& x, Activation activation, double dropout_p,
               const std::optional<Tensor>& seed, int64_t rng_offset) {
  const Dropout dropout = make_dropout(dropout_p, seed, rng_offset);
  const Storage storage = storage_of("x", x);
  const int64_t width = width_of(x);
  check_data("x", x);
  const Tensor from = as_contiguous(x);
  const std::vector<int64_t> shape = out_shape(x, width);
  Tensor out = allocate(from, Sizes(shape.data(), shape.size()));
  const auto& kernels = gated_activation_kernels();
  parallel_blocks(out.numel(), [&](int64_t begin, int64_t end) {
    kernels.forward(storage, activation, dropout, from.const_data_ptr(), width, begin, end,
                    out.data_ptr());
  });
  return out;
}

Tensor backward(const Tensor& grad_out, const Tensor& x, Activation activation, double dropout_p,
                const std::optional<Tensor>& seed, int64_t rng_offset) {
  const Dropout dropout = make_dropout(dropout_p, seed, rng_offset);
  const Storage storage = storage_of("x", x);
  const int64_t width = width_of(x);
  check_data("x", x);
  check_shape("grad_out", grad_out, out_shape(x, width));
  check_dtype("grad_out", grad_out, x.scalar_type(), "the dtype of x");
  check_data("grad_out", grad_out);
  const Tensor from = as_contiguous(x), grad = as_contiguous(grad_out);
  Tensor grad_x = allocate_like(from);
  const auto& kernels = gated_activation_kernels();
  parallel_blocks(grad.numel(), [&](int64_t begin, int64_t end) {
    kernels.backward(storage, activation, dropout, grad.const_data_ptr(), from.const_data_ptr(),
                     width, begin, end, grad_x.data_ptr());
  });
  return grad_x;
}

Tensor geglu(Tensor x, bool tanh, double dropout_p, std::optional<Tensor> seed,
             int64_t rng_offset) {
  return forward(x, gelu_of(tanh), dropout_p, seed, rng_offset);
}

Tensor geglu_backward(Tensor grad_out, Tensor x, bool tanh, double dropout_p,
                      std::optional<Tensor> seed, int64_t rng_offset) {
  return backward(grad_out, x, gelu_of(tanh), dropout_p, seed, rng_offset);
}

Tensor swiglu(Tensor x, double dropout_p, std::optional<Tensor> seed, int64_t rng_offset) {
  return forward(x, Activation::kSilu, dropout_p, seed, rng_offset);
}

Tensor swiglu_backward(Tensor grad_out, Tensor x, double dropout_p, std::optional<Tensor> seed,
                       int64_t rng_offset) {
  return backward(grad_out, x, Activation::kSilu, dropout_p, seed, rng_offset);
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("geglu(Tensor x, bool tanh, float dropout_p, Tensor? seed, int rng_offset) -> Tensor");
  m.def("geglu_backward(Tensor grad_out, Tensor x, bool tanh, float dropout_p, Tensor? seed, "
        "int rng_offset) -> Tensor");
  m.def("swiglu(Tensor x, float dropout_p, Tensor? seed, int rng_offset) -> Tensor");
  m.def("swiglu_backward(Tensor grad_out, Tensor x, float dropout_p, Tensor? seed, "
        "int rng_offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

} // namespace
} // namespace superbert
