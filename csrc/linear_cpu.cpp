// Products of linear layers in bfloat16 on the CPU; kernels/linear/linear.py has their mathematics.
//
// Work is divided into blocks that stay in a core's second cache.  The blocks may depend on the
// number of threads, since each element is the sum of the same products in the same order.
#include "linear.h"

#include <algorithm>
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

constexpr int64_t kVector = 16; // columns of a vector

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pairs of the inner dimension of a packed operand.
int64_t packed_pairs(const LinearKernels& own, int64_t inner) {
  return ceil_div(inner, own.step) * own.step / 2;
}

// So many let threads end together.
int64_t wanted_items(const LinearKernels& own) {
  return own.items_per_thread * static_cast<int64_t>(torch::stable::get_num_threads());
}

const LinearKernels& kernels() {
#if defined(__x86_64__)
  if (multiplies_in_tiles()) return amx::linear_kernels;
  if (multiplies_bf16()) return avx512_bf16::linear_kernels;
#endif
  refuse("x: this processor has no bfloat16 products (AVX512_BF16); use torch's");
}

// ---- operands -----------------------------------------------------------------------------------

// A matrix of bfloat16 with dense rows: the tensor's own, or a copy.
Tensor dense_rows(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  check_shape(name, x, {rows, columns});
  check_dtype(name, x, ScalarType::BFloat16, "bfloat16");
  check_data(name, x);
  return columns <= 1 || x.stride(1) == 1 ? x : as_contiguous(x);
}

BFloat16Rows rows_of(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0)};
}

// The left operand of a product: the rows as they lie, or, where they end amid a pair, a copy.
Tensor even_rows(const Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1);
  if (columns % 2 == 0) return x;
  Tensor copy = allocate(x, {rows, columns + 1});
  torch::stable::fill_(copy, 0);
  Tensor part = torch::stable::narrow(copy, 1, 0, columns);
  torch::stable::copy_(part, x);
  return copy;
}

// B, packed.
class Packed {
 public:
  Packed(const LinearKernels& own, int64_t inner, int64_t columns)
      : panel_(own.panel), inner_(inner), pairs_(packed_pairs(own, inner)), columns_(columns),
        words_(new_floats(pairs_ * ceil_div(columns, kVector) * kVector)) {}

  int64_t bytes() const { return 4 * words_.numel(); }
  int64_t panels() const { return ceil_div(columns_, panel_); }
  int64_t first(int64_t panel) const { return std::min(columns_, panel * panel_); }
  int64_t columns(int64_t panel) const { return first(panel + 1) - first(panel); }
  uint32_t* at(int64_t panel) const {
    return static_cast<uint32_t*>(words_.data_ptr()) + first(panel) * pairs_;
  }
  ProductRight panels(int64_t begin, int64_t end) const {
    return {at(begin), inner_, pairs_, first(end) - first(begin)};
  }

 private:
  int64_t panel_, inner_, pairs_, columns_;
  Tensor words_;
};

// ---- forward, and gradients of the input --------------------------------------------------------

uint16_t* bf16_data(const Tensor& x) { return static_cast<uint16_t*>(x.data_ptr()); }

// Multiplies the rows of x by B.  `epilogue` has what else belongs to element (0, 0) of the result,
// whose rows are as long as those of all that it points to.
Tensor multiply(const LinearKernels& own, const Tensor& x, const Packed& b, int64_t columns,
                const ProductOutput& epilogue) {
  const int64_t rows = x.size(0);
  Tensor out = allocate(x, {rows, columns});
  const Tensor left = even_rows(x);
  uint16_t* const data = bf16_data(out);
  // Few rows: their panels are shared out, too.  So are those of a large B.
  const int64_t blocks = ceil_div(rows, kRowBlock);
  const int64_t wanted = std::max(ceil_div(wanted_items(own), std::max<int64_t>(1, blocks)),
                                  ceil_div(b.bytes(), own.right_bytes));
  const int64_t groups = std::min(b.panels(), wanted);
  const int64_t widest = ceil_div(b.panels(), std::max<int64_t>(1, groups)) * own.panel;
  const auto moved = [](auto* p, int64_t elements) { return p == nullptr ? p : p + elements; };
  parallel_items(blocks * groups, own.scratch_floats(widest), [&](float* scratch, int64_t item) {
    const int64_t first = item % blocks * kRowBlock, group = item / blocks;
    const int64_t begin = group * b.panels() / groups, end = (group + 1) * b.panels() / groups;
    const int64_t column = b.first(begin), place = first * columns + column;
    ProductOutput to{Storage::kBFloat16, data + place, columns};
    to.bias = moved(epilogue.bias, column);
    to.slope_of = moved(epilogue.slope_of, place);
    to.activated = moved(epilogue.activated, place);
    const BFloat16Rows a = rows_of(left).at(first, 0);
    own.multiply({a.data, a.row, 2}, std::min(kRowBlock, rows - first), b.panels(begin, end), to,
                 scratch);
  });
  return out;
}

// x W^T + b.  Sets `activated`, unless that is null, to gelu of it.
Tensor multiply_by_weight(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          Tensor* activated) {
  const LinearKernels& own = kernels();
  check_dims("x", x, 2, "[rows, inputs]");
  check_dims("weight", weight, 2, "[outputs, inputs]");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const Tensor left = dense_rows("x", x, x.size(0), inputs);
  const Tensor right = dense_rows("weight", weight, outputs, inputs);
  ProductOutput epilogue{};
  std::optional<Tensor> added;
  if (bias.has_value()) {
    check_shape("bias", *bias, {outputs});
    check_dtype("bias", *bias, ScalarType::BFloat16, "bfloat16");
    check_data("bias", *bias);
    added = as_contiguous(*bias);
    epilogue.bias = bf16_data(*added);
  }
  if (activated != nullptr) {
    *activated = allocate(left, {x.size(0), outputs});
    epilogue.activated = bf16_data(*activated);
  }
  const Packed packed(own, inputs, outputs);
  parallel_items(packed.panels(), 0, [&](float*, int64_t panel) {
    own.pack_transposed(rows_of(right).at(packed.first(panel), 0), inputs, packed.columns(panel),
                        packed.at(panel));
  });
  return multiply(own, left, packed, outputs, epilogue);
}

Tensor linear_bf16(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  return multiply_by_weight(x, weight, bias, nullptr);
}

std::tuple<Tensor, Tensor> linear_bf16_gelu(const Tensor& x, const Tensor& weight,
                                            std::optional<Tensor> bias) {
  Tensor activated = x;
  Tensor out = multiply_by_weight(x, weight, bias, &activated);
  return {out, activated};
}

// dy W, times gelu' of `slope_of` where that is given.
Tensor multiply_by_transposed(const Tensor& grad_output, const Tensor& weight,
                              const std::optional<Tensor>& slope_of) {
  const LinearKernels& own = kernels();
  check_dims("grad_output", grad_output, 2, "[rows, outputs]");
  check_dims("weight", weight, 2, "[outputs, inputs]");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const Tensor left = dense_rows("grad_output", grad_output, grad_output.size(0), outputs);
  const Tensor right = dense_rows("weight", weight, outputs, inputs);
  ProductOutput epilogue{};
  std::optional<Tensor> slopes;
  if (slope_of.has_value()) {
    check_shape("x", *slope_of, {grad_output.size(0), inputs});
    check_dtype("x", *slope_of, ScalarType::BFloat16, "bfloat16");
    check_data("x", *slope_of);
    slopes = as_contiguous(*slope_of);
    epilogue.slope_of = bf16_data(*slopes);
  }
  const Packed packed(own, outputs, inputs);
  // Several panels each: the rows of a single one are short pieces far apart.
  const int64_t groups = std::min(packed.panels(), wanted_items(own));
  parallel_items(groups, 0, [&](float*, int64_t group) {
    const int64_t begin = group * packed.panels() / groups;
    const int64_t first = packed.first(begin);
    const int64_t end = packed.first((group + 1) * packed.panels() / groups);
    own.pack(rows_of(right).at(0, first), outputs, end - first, packed.at(begin));
  });
  return multiply(own, left, packed, inputs, epilogue);
}

Tensor linear_bf16_grad_input(const Tensor& grad_output, const Tensor& weight) {
  return multiply_by_transposed(grad_output, weight, std::nullopt);
}

Tensor linear_bf16_gelu_grad_input(const Tensor& grad_output, const Tensor& weight,
                                   const Tensor& x) {
  return multiply_by_transposed(grad_output, weight, x);
}

// ---- gradients of weights and biases ------------------------------------------------------------

// Where the gradients of a parameter are written, those of a task [outputs, inputs].
struct GradientRows {
  char* data = nullptr; // null: not wanted
  Storage storage{};
  int64_t task = 0, row = 0, bytes = 0;
  Runs memory{};

  GradientRows(const char* name, const Tensor& rows, std::initializer_list<int64_t> shape) {
    if (rows.numel() == 0) return;
    check_shape(name, rows, shape);
    storage = storage_of(name, rows);
    check(storage != Storage::kFloat16, name, ": expected bfloat16 or float32");
    bool is_dense = true;
    int64_t elements = 1; // of a task
    for (int64_t d = rows.dim() - 1; d > 0; --d) {
      is_dense = is_dense && (rows.size(d) == 1 || rows.stride(d) == elements);
      elements *= rows.size(d);
    }
    check(is_dense && (rows.size(0) == 1 || rows.stride(0) >= elements), name,
          ": expected rows that lie apart, each contiguous");
    check_data(name, rows);
    memory = runs_of(rows);
    data = static_cast<char*>(rows.data_ptr());
    bytes = storage == Storage::kFloat32 ? 4 : 2;
    task = rows.stride(0);
    row = rows.dim() == 3 ? rows.size(2) : 0;
  }

  void check_apart_from(const char* name, const char* other_name, const Runs& other) const {
    check_apart(name, memory, other_name, other);
  }

  ProductOutput at(int64_t k, int64_t output, int64_t input) const {
    return {storage, data + (k * task + output * row + input) * bytes, row};
  }
};

struct TaskGradients {
  const LinearKernels& own;
  BFloat16Rows grad, x;
  int64_t outputs, inputs;
  GradientRows weight, bias;
  const std::vector<int64_t>& offsets;
  bool accumulate;
  int64_t left_panels = own.left_panels; // of an item

  int64_t tasks() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t left_columns() const { return left_panels * own.left_panel; }
  int64_t right_columns() const { return std::min(own.right_panels * own.panel, inputs); }
  int64_t left_blocks() const { return ceil_div(outputs, left_columns()); }
  int64_t right_blocks() const {
    return weight.data == nullptr || inputs == 0 ? 1 : ceil_div(inputs, right_columns());
  }
  int64_t items() const { return tasks() * left_blocks() * right_blocks(); }

  // A thread's scratch, in floats.
  int64_t packed_columns() const { return own.right_packed * own.panel; }
  int64_t right_words() const { return packed_columns() * kTokenBlock / 2; }
  int64_t floats() const {
    return left_panels * own.left_words + right_words() + left_columns() * (3 + right_columns()) +
           own.scratch_floats(packed_columns());
  }

  // Writes a block of one task's gradients.
  void run(int64_t item, float* scratch) const {
    const int64_t k = item / (left_blocks() * right_blocks());
    const int64_t output = item / right_blocks() % left_blocks() * left_columns();
    const int64_t input = item % right_blocks() * right_columns();
    const int64_t last_output = std::min(outputs, output + left_columns());
    const int64_t last_input =
        weight.data == nullptr ? input : std::min(inputs, input + right_columns());
    auto* const left = reinterpret_cast<uint32_t*>(scratch);
    auto* const right = left + left_panels * own.left_words;
    auto* const sums = reinterpret_cast<float*>(right + right_words()); // of columns, in a block
    auto* const totals = reinterpret_cast<double*>(sums + left_columns());
    float* const part = sums + 3 * left_columns();
    float* const products = part + left_columns() * right_columns();
    const bool sums_columns = bias.data != nullptr && input == 0;
    std::fill(totals, totals + left_columns(), 0.0);
    std::vector<ProductLeft> lefts(left_panels);

    const int64_t end = offsets[k + 1];
    int64_t begin = offsets[k];
    for (bool is_first = true; is_first || begin < end; is_first = false, begin += kTokenBlock) {
      const int64_t tokens = std::min(kTokenBlock, end - begin);
      const int64_t pairs = packed_pairs(own, tokens);
      const bool is_last = begin + tokens == end;
      std::fill(sums, sums + left_columns(), 0.0f);
      for (int64_t i = output, panel = 0; i < last_output; i += own.left_panel, ++panel) {
        lefts[panel] = own.transpose(
            grad.at(begin, i), tokens, std::min(own.left_panel, last_output - i),
            left + panel * own.left_words, sums_columns ? sums + i - output : nullptr);
      }
      int64_t j = input;
      do { // once without inputs, too, for the sums
        const int64_t end_packed = std::min(last_input, j + packed_columns());
        own.pack(x.at(begin, j), tokens, end_packed - j, right);
        const ProductRight b{right, tokens, pairs, end_packed - j};
        for (int64_t i = output, panel = 0; i < last_output; i += own.left_panel, ++panel) {
          float* const own_part = part + (i - output) * right_columns() + j - input;
          ProductOutput out{Storage::kFloat32, own_part, right_columns()};
          if (is_last && weight.data != nullptr) {
            out = weight.at(k, i, j);
            out.rounds = weight.storage == Storage::kFloat32; // as a product of bfloat16 would
            out.accumulates = accumulate;
          }
          if (!is_first) out.part = own_part, out.part_row = right_columns();
          own.multiply(lefts[panel], std::min(own.left_panel, last_output - i), b, out, products);
          lefts[panel].sums = nullptr; // they are added up
        }
        j = end_packed;
      } while (j < last_input);
      for (int64_t i = 0; i < left_columns(); ++i) totals[i] += sums[i];
    }
    if (!sums_columns) return;
    std::copy(totals, totals + left_columns(), sums);
    ProductOutput out = bias.at(k, 0, output);
    out.accumulates = accumulate;
    own.write(sums, last_output - output, out);
  }
};

void linear_bf16_task_gradients_(const Tensor& grad_output, const Tensor& x, Tensor weight_rows,
                                 Tensor bias_rows, std::vector<int64_t> offsets, bool accumulate) {
  check_dims("grad_output", grad_output, 2, "[tokens, outputs]");
  check_dims("x", x, 2, "[tokens, inputs]");
  const int64_t tokens = x.size(0), outputs = grad_output.size(1), inputs = x.size(1);
  const int64_t tasks = static_cast<int64_t>(offsets.size()) - 1;
  check(tasks >= 0 && offsets.front() >= 0 && offsets.back() <= tokens,
        "offsets: expected row numbers within 0 .. ", tokens);
  check(std::is_sorted(offsets.begin(), offsets.end()), "offsets: expected to ascend");
  const Tensor grad = dense_rows("grad_output", grad_output, tokens, outputs);
  const Tensor stream = dense_rows("x", x, tokens, inputs);
  TaskGradients gradients{kernels(),
                          rows_of(grad),
                          rows_of(stream),
                          outputs,
                          inputs,
                          GradientRows("weight_rows", weight_rows, {tasks, outputs, inputs}),
                          GradientRows("bias_rows", bias_rows, {tasks, outputs}),
                          offsets,
                          accumulate};
  gradients.weight.check_apart_from("weight_rows", "grad_output", runs_of(grad));
  gradients.weight.check_apart_from("weight_rows", "x", runs_of(stream));
  gradients.weight.check_apart_from("weight_rows", "bias_rows", gradients.bias.memory);
  gradients.bias.check_apart_from("bias_rows", "grad_output", runs_of(grad));
  gradients.bias.check_apart_from("bias_rows", "x", runs_of(stream));
  if (gradients.weight.data == nullptr && gradients.bias.data == nullptr) return;
  while (gradients.left_panels > 1 && gradients.items() < wanted_items(gradients.own))
    --gradients.left_panels;
  parallel_items(gradients.items(), gradients.floats(),
                 [&](float* scratch, int64_t item) { gradients.run(item, scratch); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_bf16_grad_input(Tensor grad_output, Tensor weight) -> Tensor");
  m.def(
      "linear_bf16_gelu(Tensor x, Tensor weight, Tensor? bias) -> (Tensor out, Tensor activated)");
  m.def("linear_bf16_gelu_grad_input(Tensor grad_output, Tensor weight, Tensor x) -> Tensor");
  m.def("linear_bf16_task_gradients_(Tensor grad_output, Tensor x, Tensor(a!) weight_rows, "
        "Tensor(b!) bias_rows, SymInt[] offsets, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("linear_bf16", TORCH_BOX(&linear_bf16));
  m.impl("linear_bf16_grad_input", TORCH_BOX(&linear_bf16_grad_input));
  m.impl("linear_bf16_gelu", TORCH_BOX(&linear_bf16_gelu));
  m.impl("linear_bf16_gelu_grad_input", TORCH_BOX(&linear_bf16_gelu_grad_input));
  m.impl("linear_bf16_task_gradients_", TORCH_BOX(&linear_bf16_task_gradients_));
}

} // namespace
} // namespace superbert
