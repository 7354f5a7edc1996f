// The CPU side of the attention ops; kernels/attention/attention.py documents them.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention.h"
#include "attention_torch.h"
#include "check_torch.h"
#include "tensor_torch.h"

namespace superbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::select;
using torch::stable::Tensor;

// ---- options ------------------------------------------------------------------------------------

// The arguments that every op has behind its others: in its schema, and in C++.  They are the
// fields of AttentionOptions in kernels/attention/attention_options.py, and the plan of a GPU's
// kernels.
#define OPTIONS                                                                                    \
  "float softmax_scale, bool causal, float dropout_p, int rng_offset, int window_left, "           \
  "int window_right, Tensor? seed, Tensor? runs=None, Tensor? bounds=None"

struct Arguments : AttentionOptions {
  std::optional<Tensor> runs, bounds;
};

// Keys to one side that a query sees; -1 is no limit.
int64_t parse_limit(const char* name, int64_t keys) {
  check(keys >= -1, name, ": expected a number of keys, or -1 for all, got ", keys);
  return keys == -1 ? kNoLimit : std::min(keys, kNoLimit);
}

Arguments parse_arguments(double softmax_scale, bool causal, double dropout_p, int64_t rng_offset,
                          int64_t window_left, int64_t window_right,
                          const std::optional<Tensor>& seed, const std::optional<Tensor>& runs,
                          const std::optional<Tensor>& bounds) {
  check(std::isfinite(softmax_scale), "softmax_scale: expected a finite number, got ",
        softmax_scale);
  const int64_t left = parse_limit("window_left", window_left);
  const int64_t right = parse_limit("window_right", window_right);
  return {{static_cast<float>(softmax_scale), left, causal ? 0 : right,
           make_dropout(dropout_p, seed, rng_offset)},
          runs,
          bounds};
}

// Op<body>::call() has the arguments of `body` behind its first, then those of parse_arguments().
template <auto body, auto parse = parse_arguments>
struct Op;

template <typename Result, typename... Inputs, Result (*body)(const Arguments&, Inputs...),
          typename... Others, Arguments (*parse)(Others...)>
struct Op<body, parse> {
  static Result call(Inputs... inputs, Others... others) {
    return body(parse(others...), inputs...);
  }
};

// ---- checks -------------------------------------------------------------------------------------

// Checks a stream [rows, heads, width] against q.
void check_heads(const char* name, const Tensor& x, const Tensor& q, int64_t rows) {
  check_shape(name, x, {rows, q.size(1), q.size(2)});
  check_dtype(name, x, q.scalar_type(), "the dtype of q");
  check(x.size(2) == 1 || x.stride(2) == 1, name, ": expected a contiguous last dimension");
  check_data(name, x);
}

void check_streams(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dims("q", q, 3, "[tokens, heads, width]");
  check(q.size(2) >= 1, "q: expected heads of at least one column");
  check_heads("q", q, q, q.size(0));
  check_dims("k", k, 3, "[tokens, heads, width]");
  check_heads("k", k, q, k.size(0));
  check_heads("v", v, q, k.size(0));
}

// The kernels here have no use for a plan.
void check_given_plan(const Arguments& arguments, const Tensor& q, const Tensor& k) {
  check_plan(arguments.runs, arguments.bounds, q.size(0));
  check(!arguments.runs.has_value() || k.size(0) == q.size(0),
        "runs: a plan is of self-attention; expected as many rows of k as of q");
}

void check_packed(const Tensor& qkv) {
  check(qkv.dim() == 4 && qkv.size(1) == 3, "qkv: expected [tokens, 3, heads, width], got ",
        shape_text(qkv.sizes()));
  storage_of("qkv", qkv);
  check(qkv.size(3) == 1 || (qkv.size(3) > 1 && qkv.stride(3) == 1),
        "qkv: expected heads of at least one column, and a contiguous last dimension");
  check_data("qkv", qkv); // torch's select() would stumble on it, without its name
}

// ---- calls --------------------------------------------------------------------------------------

// Rows behind the last sequence belong to nobody; they get a value of their own.
void fill_rows_after(const Tensor& cu_seqlens, Tensor x, double value) {
  const int64_t sequences = cu_seqlens.numel() - 1;
  const int64_t end = static_cast<const int32_t*>(cu_seqlens.const_data_ptr())[sequences];
  if (end == x.size(0)) return;
  Tensor rest = torch::stable::narrow(x, 0, end, x.size(0) - end);
  torch::stable::fill_(rest, value);
}

// Strides of a dimension of size 1 may be anything, but are multiplied by 0 alone.
HeadRows head_rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

Tensor empty_heads(const Tensor& like) {
  return allocate(like, {like.size(0), like.size(1), like.size(2)});
}

AttentionCall make_call(const AttentionOptions& options, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& out, const Tensor& lse,
                        const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                        const RelativeBias& bias) {
  check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.size(0));
  check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.size(0));
  check(cu_seqlens_q.numel() == cu_seqlens_k.numel(),
        "cu_seqlens_k: expected as many sequences as cu_seqlens_q, ", cu_seqlens_q.numel() - 1,
        ", got ", cu_seqlens_k.numel() - 1);
  AttentionCall call;
  call.storage = storage_of("q", q);
  call.sequences = cu_seqlens_q.numel() - 1;
  call.heads = q.size(1);
  call.width = q.size(2);
  call.total_queries = q.size(0);
  call.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
  call.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  call.options = options;
  call.bias = bias;
  call.q = head_rows(q);
  call.k = head_rows(k);
  call.v = head_rows(v);
  call.out = head_rows(out);
  call.lse = static_cast<float*>(lse.data_ptr());
  return call;
}

// Runs one of the kernels over all heads of all sequences.
template <typename Kernel>
void run(const AttentionCall& call, const Kernel& kernel) {
  const int64_t floats = attention_kernels().scratch_floats(call);
  parallel_items(call.sequences * call.heads, floats,
                 [&](float* scratch, int64_t item) { kernel(item, scratch); });
}

std::tuple<Tensor, Tensor> run_forward(const Arguments& arguments, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, const RelativeBias& bias = {}) {
  check_streams(q, k, v);
  check_given_plan(arguments, q, k);
  Tensor out = empty_heads(q);
  Tensor lse = allocate(q, {q.size(1), q.size(0)}, ScalarType::Float);
  const AttentionCall call =
      make_call(arguments, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, bias);
  fill_rows_after(cu_seqlens_q, out, 0);
  fill_rows_after(cu_seqlens_q, torch::stable::transpose(lse, 0, 1), -INFINITY);
  const auto& kernels = attention_kernels();
  run(call, [&](int64_t item, float* scratch) { kernels.forward(call, item, scratch); });
  return {out, lse};
}

void run_backward(const Arguments& arguments, const Tensor& grad_out, const Tensor& q,
                  const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                  const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const Tensor& grad_q,
                  const Tensor& grad_k, const Tensor& grad_v, const RelativeBias& bias = {},
                  float* grad_bias = nullptr) {
  check_given_plan(arguments, q, k);
  check_shape("grad_out", grad_out, {q.size(0), q.size(1), q.size(2)});
  check_dtype("grad_out", grad_out, q.scalar_type(), "the dtype of q");
  check_data("grad_out", grad_out);
  check_heads("out", out, q, q.size(0));
  check_shape("lse", lse, {q.size(1), q.size(0)});
  check_dtype("lse", lse, ScalarType::Float, "float32");
  check_data("lse", lse);
  const Tensor row_lse = as_contiguous(lse);
  const AttentionCall call =
      make_call(arguments, q, k, v, out, row_lse, cu_seqlens_q, cu_seqlens_k, bias);
  fill_rows_after(cu_seqlens_q, grad_q, 0);
  fill_rows_after(cu_seqlens_k, grad_k, 0);
  fill_rows_after(cu_seqlens_k, grad_v, 0);
  const Tensor d_out = as_contiguous(grad_out);
  const AttentionGradients gradients = {head_rows(d_out), head_rows(grad_q), head_rows(grad_k),
                                        head_rows(grad_v), grad_bias};
  const auto& kernels = attention_kernels();
  run(call,
      [&](int64_t item, float* scratch) { kernels.backward(call, gradients, item, scratch); });
}

// ---- ops ----------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> attention(const Arguments& arguments, const Tensor& q, const Tensor& k,
                                     const Tensor& v, const Tensor& cu_seqlens_q,
                                     const Tensor& cu_seqlens_k, int64_t, int64_t) {
  return run_forward(arguments, q, k, v, cu_seqlens_q, cu_seqlens_k);
}

std::tuple<Tensor, Tensor, Tensor>
attention_backward(const Arguments& arguments, const Tensor& grad_out, const Tensor& q,
                   const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t, int64_t) {
  check_streams(q, k, v);
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(k), grad_v = empty_heads(v);
  run_backward(arguments, grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, grad_q, grad_k,
               grad_v);
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor> attention_qkvpacked(const Arguments& arguments, const Tensor& qkv,
                                               const Tensor& cu_seqlens, int64_t) {
  check_packed(qkv);
  return run_forward(arguments, select(qkv, 1, 0), select(qkv, 1, 1), select(qkv, 1, 2), cu_seqlens,
                     cu_seqlens);
}

Tensor attention_qkvpacked_backward(const Arguments& arguments, const Tensor& grad_out,
                                    const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                    const Tensor& cu_seqlens, int64_t) {
  check_packed(qkv);
  Tensor grad = allocate(qkv, {qkv.size(0), 3, qkv.size(2), qkv.size(3)});
  const Tensor q = select(qkv, 1, 0), k = select(qkv, 1, 1), v = select(qkv, 1, 2);
  check_streams(q, k, v);
  run_backward(arguments, grad_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, select(grad, 1, 0),
               select(grad, 1, 1), select(grad, 1, 2));
  return grad;
}

// ---- with a bias for each distance --------------------------------------------------------------

// A bias [heads, 2 largest + 1] that reaches over the longest sequence.
RelativeBias parse_bias(const Tensor& bias, const Tensor& qkv, const Tensor& cu_seqlens) {
  check_dims("bias", bias, 2, "[heads, distances]");
  check_dtype("bias", bias, ScalarType::Float, "float32");
  check(bias.size(0) == qkv.size(2), "bias: expected ", qkv.size(2), " heads, got ", bias.size(0));
  check(bias.size(1) % 2 == 1, "bias: expected an odd number of distances, got ", bias.size(1));
  check(bias.is_contiguous(), "bias: expected contiguous");
  check_data("bias", bias);
  const RelativeBias parsed = {static_cast<const float*>(bias.const_data_ptr()), bias.size(1) / 2};
  check_cu_seqlens("cu_seqlens", cu_seqlens, qkv.size(0));
  const auto* cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  for (int64_t s = 0; s + 1 < cu_seqlens.numel(); ++s)
    check(cu[s + 1] - cu[s] <= parsed.largest + 1, "bias: expected distances up to ",
          cu[s + 1] - cu[s] - 1, " to both sides, got ", parsed.largest);
  return parsed;
}

// Sums the gradients of all sequences, in their order.
Tensor sum_of_sequences(const AttentionGradients& parts, const Tensor& bias,
                        const Tensor& cu_seqlens) {
  Tensor sum = allocate(bias, {bias.size(0), bias.size(1)});
  const int64_t heads = bias.size(0), row = bias.size(1), largest = row / 2;
  const auto* cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  auto* const numbers = static_cast<float*>(sum.data_ptr());
  parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      float* own = numbers + head * row;
      std::fill(own, own + row, 0.0f);
      for (int64_t s = 0; s + 1 < cu_seqlens.numel(); ++s) {
        const int64_t tokens = cu[s + 1] - cu[s];
        const float* part = parts.bias_of(heads, cu[s], tokens, head);
        float* const first = own + largest - tokens + 1;
        for (int64_t d = 0; d < 2 * tokens - 1; ++d) first[d] += part[d];
      }
    }
  });
  return sum;
}

std::tuple<Tensor, Tensor> relative_attention(const Arguments& arguments, const Tensor& qkv,
                                              const Tensor& bias, const Tensor& cu_seqlens,
                                              int64_t) {
  check_packed(qkv);
  return run_forward(arguments, select(qkv, 1, 0), select(qkv, 1, 1), select(qkv, 1, 2), cu_seqlens,
                     cu_seqlens, parse_bias(bias, qkv, cu_seqlens));
}

std::tuple<Tensor, Tensor> relative_attention_backward(const Arguments& arguments,
                                                       const Tensor& grad_out, const Tensor& qkv,
                                                       const Tensor& bias, const Tensor& out,
                                                       const Tensor& lse, const Tensor& cu_seqlens,
                                                       int64_t) {
  check_packed(qkv);
  Tensor grad = allocate(qkv, {qkv.size(0), 3, qkv.size(2), qkv.size(3)});
  const Tensor q = select(qkv, 1, 0), k = select(qkv, 1, 1), v = select(qkv, 1, 2);
  check_streams(q, k, v);
  const RelativeBias parsed = parse_bias(bias, qkv, cu_seqlens);
  const Tensor parts = new_floats(2 * qkv.size(0) * qkv.size(2));
  AttentionGradients gradients;
  gradients.bias = static_cast<float*>(parts.data_ptr());
  run_backward(arguments, grad_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, select(grad, 1, 0),
               select(grad, 1, 1), select(grad, 1, 2), parsed, gradients.bias);
  return {grad, sum_of_sequences(gradients, bias, cu_seqlens)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, " OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, " OPTIONS
      ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("attention_qkvpacked(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, " OPTIONS
        ") -> (Tensor out, Tensor lse)");
  m.def("attention_qkvpacked_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, "
        "Tensor cu_seqlens, SymInt max_seqlen, " OPTIONS ") -> Tensor");
  m.def("relative_attention(Tensor qkv, Tensor bias, Tensor cu_seqlens, SymInt max_seqlen, " OPTIONS
        ") -> (Tensor out, Tensor lse)");
  m.def("relative_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias, Tensor out, "
        "Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, " OPTIONS
        ") -> (Tensor grad_qkv, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("attention", TORCH_BOX(&Op<attention>::call));
  m.impl("attention_backward", TORCH_BOX(&Op<attention_backward>::call));
  m.impl("attention_qkvpacked", TORCH_BOX(&Op<attention_qkvpacked>::call));
  m.impl("attention_qkvpacked_backward", TORCH_BOX(&Op<attention_qkvpacked_backward>::call));
  m.impl("relative_attention", TORCH_BOX(&Op<relative_attention>::call));
  m.impl("relative_attention_backward", TORCH_BOX(&Op<relative_attention_backward>::call));
}

} // namespace
} // namespace superbert
