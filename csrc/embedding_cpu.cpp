// The CPU side of the embedding ops; kernels/embedding and embedding_layer_norm document them.
#include "embedding.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check_torch.h"
#include "layer_norm_torch.h"
#include "tensor_torch.h"

namespace superbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int64_t* index_data(const Tensor& index) {
  return static_cast<const int64_t*>(index.const_data_ptr());
}

void check_index(const char* name, const Tensor& index, int64_t table_rows) {
  check(index.dim() == 1 && index.scalar_type() == ScalarType::Long && index.is_contiguous(), name,
        ": expected contiguous int64 [tokens]");
  check_data(name, index);
  const int64_t* rows = index_data(index);
  for (int64_t t = 0; t < index.numel(); ++t) {
    check(0 <= rows[t] && rows[t] < table_rows, name, ": expected 0 <= index < ", table_rows,
          ", got ", rows[t], " at position ", t);
  }
}

// ---- gradients of a table -----------------------------------------------------------------------

// Stream rows of one task that looked up the same table row: places[first .. first + count].
struct Group {
  int64_t task, table_row, first, count;
};

// Sorts the stream rows of each task by the table row that they looked up.
std::vector<Group> make_groups(const int64_t* index, const Offsets& offsets,
                               std::vector<int64_t>& stream_rows) {
  std::vector<Group> groups;
  std::vector<std::pair<int64_t, int64_t>> lookups;
  for (size_t task = 0; task + 1 < offsets.size(); ++task) {
    lookups.clear();
    for (int64_t t = offsets[task]; t < offsets[task + 1]; ++t) lookups.emplace_back(index[t], t);
    std::sort(lookups.begin(), lookups.end());
    for (const auto& [table_row, stream_row] : lookups) {
      const int64_t place = static_cast<int64_t>(stream_rows.size());
      const bool same = !groups.empty() && groups.back().task == static_cast<int64_t>(task) &&
                        groups.back().table_row == table_row;
      if (!same) groups.push_back({static_cast<int64_t>(task), table_row, place, 0});
      ++groups.back().count;
      stream_rows.push_back(stream_row);
    }
  }
  return groups;
}

void embedding_task_gradients(Tensor grad_output, Tensor index, Tensor rows, Offsets offsets) {
  check(rows.dim() == 3 && (rows.size(2) == 1 || rows.stride(2) == 1) &&
            (rows.size(1) == 1 || rows.stride(1) == rows.size(2)) &&
            (rows.size(0) == 1 || rows.stride(0) >= rows.size(1) * rows.size(2)),
        "rows: expected [tasks, N, H] with contiguous tables that lie apart");
  check_data("rows", rows);
  check(offsets.empty() || static_cast<int64_t>(offsets.size()) == rows.size(0) + 1,
        "offsets: expected tasks + 1 row numbers");
  check_index("index", index, rows.size(1));
  check_shape("grad_output", grad_output, {index.numel(), rows.size(2)});
  check_dtype("grad_output", grad_output, rows.scalar_type(), "the dtype of rows");
  check_data("grad_output", grad_output);
  check_offsets(offsets, index.numel());
  const Tensor gradient = as_contiguous(grad_output);
  const Runs written = runs_of(rows);
  check_apart("rows", written, "grad_output", runs_of(gradient));
  check_apart("rows", written, "index", runs_of(index));
  const int64_t width = rows.size(2);
  const int64_t table_bytes = rows.stride(0) * static_cast<int64_t>(rows.element_size());
  const TableGradient call{storage_of("rows", rows), width, gradient.data_ptr(), rows.data_ptr()};

  std::vector<int64_t> stream_rows;
  stream_rows.reserve(index.numel());
  const std::vector<Group> groups = make_groups(index_data(index), offsets, stream_rows);
  constexpr int64_t kColumns = EmbeddingKernels::kColumns;
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  const auto& kernels = embedding_kernels();
  parallel_items(static_cast<int64_t>(groups.size()) * blocks, 0, [&](float*, int64_t item) {
    const Group& group = groups[item / blocks];
    const int64_t begin = item % blocks * kColumns;
    TableGradient own = call;
    own.table = static_cast<char*>(call.table) + group.task * table_bytes;
    kernels.add_to_row(own, stream_rows.data() + group.first, group.count, group.table_row, begin,
                       std::min(begin + kColumns, width));
  });
}

// ---- sum of embeddings and layer norm -----------------------------------------------------------

// The tensors of an EmbeddingSum, checked; they live as long as it is used.
class Embedded {
 public:
  Embedded(const Tensor& word_ids, const Tensor& position_ids, const Tensor& token_type_ids,
           const Tensor& word, const Tensor& position, const Tensor& token_type)
      : indices_{word_ids, position_ids, token_type_ids},
        tables_{checked_table("word", word, word), checked_table("position", position, word),
                checked_table("token_type", token_type, word)} {
    static constexpr const char* kNames[] = {"word_ids", "position_ids", "token_type_ids"};
    for (int table = 0; table < EmbeddingSum::kTables; ++table) {
      check_index(kNames[table], indices_[table], tables_[table].size(0));
      check(indices_[table].numel() == rows(), kNames[table], ": expected as many as word_ids");
      sum_.tables[table] = tables_[table].const_data_ptr();
      sum_.indices[table] = index_data(indices_[table]);
    }
  }

  const EmbeddingSum* sum() const { return &sum_; }
  Storage storage() const { return storage_of("word", tables_[0]); }
  int64_t rows() const { return indices_[0].numel(); }
  int64_t width() const { return tables_[0].size(1); }

  // The rows whose lookups give no gradient, -1 for none, are for the backward pass in Python.
  void check_padding(const Offsets& padding) const {
    check(padding.size() == EmbeddingSum::kTables, "padding: expected a row of each table, or -1");
    for (int table = 0; table < EmbeddingSum::kTables; ++table) {
      const int64_t rows = tables_[table].size(0);
      check(-1 <= padding[table] && padding[table] < rows, "padding: expected -1 <= row < ", rows,
            ", got ", padding[table], " for table ", table);
    }
  }

  // Refuses rows for the tables' gradients in the memory of the tables.
  void check_apart_from(const Tensor& rows) const {
    const Runs written = runs_of(rows);
    check_apart("rows", written, "word", runs_of(tables_[0]));
    check_apart("rows", written, "position", runs_of(tables_[1]));
    check_apart("rows", written, "token_type", runs_of(tables_[2]));
  }

 private:
  static Tensor checked_table(const char* name, const Tensor& table, const Tensor& word) {
    check_dims(name, table, 2, "[rows, width]");
    check(table.size(1) == word.size(1) && table.size(1) >= 1, name,
          ": expected the width of word, at least 1, got ", shape_text(table.sizes()));
    check_dtype(name, table, word.scalar_type(), "the dtype of word");
    check_data(name, table);
    return as_contiguous(table);
  }

  Tensor indices_[EmbeddingSum::kTables], tables_[EmbeddingSum::kTables];
  EmbeddingSum sum_;
};

// A plan of the lookups is handed on to the backward pass, which checks its length and values.
void check_plan(const Tensor& plan) {
  check(plan.dim() == 1 && plan.scalar_type() == ScalarType::Long, "plan: expected int64 [n]");
  check_data("plan", plan);
}

std::tuple<Tensor, Tensor, Tensor> embedding_layer_norm(
    Tensor word_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position,
    Tensor token_type, std::optional<Tensor> weight, std::optional<Tensor> bias, double dropout_p,
    double eps, std::optional<Tensor> seed, int64_t rng_offset, std::optional<Tensor> rows,
    Offsets columns, Offsets offsets, bool, std::optional<Tensor> plan, Offsets padding) {
  const Embedded embedded(word_ids, position_ids, token_type_ids, word, position, token_type);
  embedded.check_padding(padding);
  check_number("eps", eps);
  check_task_rows(
      rows, columns, offsets, embedded.rows(),
      {word.numel(), position.numel(), token_type.numel(), embedded.width(), embedded.width()});
  if (rows) embedded.check_apart_from(*rows);
  if (plan) check_plan(*plan);
  const Parameter gamma("weight", weight, embedded.width()), beta("bias", bias, embedded.width());
  Tensor out = allocate(word, {embedded.rows(), embedded.width()});
  Tensor mean = allocate(word, {embedded.rows()}, ScalarType::Float);
  Tensor rstd = allocate(word, {embedded.rows()}, ScalarType::Float);
  LayerNormCall call{};
  call.storage = embedded.storage();
  call.rows = embedded.rows();
  call.width = embedded.width();
  call.embedding = embedded.sum();
  call.weight = gamma.data();
  call.bias = beta.data();
  call.eps = static_cast<float>(eps);
  call.out_dropout = make_dropout(dropout_p, seed, rng_offset);
  call.out = out.data_ptr();
  call.mean = static_cast<float*>(mean.data_ptr());
  call.rstd = static_cast<float*>(rstd.data_ptr());
  run_layer_norm(call);
  return {out, mean, rstd};
}

Tensor embedding_layer_norm_backward(Tensor grad_out, Tensor word_ids, Tensor position_ids,
                                     Tensor token_type_ids, Tensor word, Tensor position,
                                     Tensor token_type, std::optional<Tensor> weight, Tensor mean,
                                     Tensor rstd, Tensor weight_rows, Tensor bias_rows,
                                     Offsets offsets, bool accumulate, double dropout_p,
                                     std::optional<Tensor> seed, int64_t rng_offset) {
  const Embedded embedded(word_ids, position_ids, token_type_ids, word, position, token_type);
  const int64_t shape[] = {embedded.rows(), embedded.width()};
  check_shape("grad_out", grad_out, {shape[0], shape[1]});
  check_dtype("grad_out", grad_out, word.scalar_type(), "the dtype of word");
  check_data("grad_out", grad_out);
  check_statistic("mean", mean, Sizes(shape, 2));
  check_statistic("rstd", rstd, Sizes(shape, 2));
  const ParameterRows parameters{weight_rows, bias_rows, nullptr, offsets, accumulate};
  check_parameter_rows(parameters, embedded.width());
  const Tensor grad_rows = as_contiguous(grad_out);
  const Parameter gamma("weight", weight, embedded.width());
  check_rows_apart(parameters, {{"grad_out", &grad_rows},
                                {"word_ids", &word_ids},
                                {"position_ids", &position_ids},
                                {"token_type_ids", &token_type_ids},
                                {"weight", weight ? &*weight : nullptr},
                                {"mean", &mean},
                                {"rstd", &rstd},
                                {"seed", seed ? &*seed : nullptr}});
  if (weight_rows.numel() > 0) embedded.check_apart_from(weight_rows);
  if (bias_rows.numel() > 0) embedded.check_apart_from(bias_rows);
  Tensor grad_sum = allocate(word, Sizes(shape, 2));
  LayerNormGradients call{};
  call.storage = embedded.storage();
  call.rows = embedded.rows();
  call.width = embedded.width();
  call.grad_out = grad_rows.data_ptr();
  call.embedding = embedded.sum();
  call.weight = gamma.data();
  call.mean = static_cast<const float*>(mean.const_data_ptr());
  call.rstd = static_cast<const float*>(rstd.const_data_ptr());
  call.out_dropout = make_dropout(dropout_p, seed, rng_offset);
  call.grad_hidden = grad_sum.data_ptr();
  run_layer_norm_backward(call, parameters);
  return grad_sum;
}

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("embedding_task_gradients_(Tensor grad_output, Tensor index, Tensor(a!) rows, "
        "SymInt[] offsets) -> ()");
  m.def("embedding_layer_norm(Tensor word_ids, Tensor position_ids, Tensor token_type_ids, "
        "Tensor word, Tensor position, Tensor token_type, Tensor? weight, Tensor? bias, "
        "float dropout_p, float eps, Tensor? seed, int rng_offset, Tensor? rows, "
        "SymInt[] columns, SymInt[] offsets, bool accumulate, Tensor? plan, int[] padding) -> "
        "(Tensor out, Tensor mean, Tensor rstd)");
  m.def("embedding_layer_norm_backward(Tensor grad_out, Tensor word_ids, Tensor position_ids, "
        "Tensor token_type_ids, Tensor word, Tensor position, Tensor token_type, Tensor? weight, "
        "Tensor mean, Tensor rstd, Tensor(a!) weight_rows, Tensor(b!) bias_rows, "
        "SymInt[] offsets, bool accumulate, float dropout_p, Tensor? seed, int rng_offset) -> "
        "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("embedding_task_gradients_", TORCH_BOX(&embedding_task_gradients));
  m.impl("embedding_layer_norm", TORCH_BOX(&embedding_layer_norm));
  m.impl("embedding_layer_norm_backward", TORCH_BOX(&embedding_layer_norm_backward));
}

} // namespace
} // namespace superbert
