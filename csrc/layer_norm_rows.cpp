// Divides the rows of a layer norm among torch's threads, and adds up their sums for its parameters
// by task.
#include <algorithm>

#include <torch/csrc/stable/tensor.h>

#include "check_torch.h"
#include "layer_norm_torch.h"
#include "tensor_torch.h"

namespace superbert {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRowBlock = 64;

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

// Sums the partials of each task, `stride` floats apart, into its rows.
void write_rows(const std::vector<Chunk>& chunks, const float* partials, int64_t stride,
                int64_t width, int64_t num_tasks, const Tensor& rows, bool accumulate) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == num_tasks && rows.size(1) == width &&
                      rows.stride(1) == 1,
                  "rows: expected [", num_tasks, ", ", width, "] with contiguous columns");
  const Storage storage = storage_of("rows", rows);
  const int64_t row_bytes = rows.stride(0) * static_cast<int64_t>(rows.element_size());
  size_t first = 0;
  while (first < chunks.size() && chunks[first].task < 0) ++first;
  for (int64_t task = 0; task < num_tasks; ++task) {
    size_t last = first;
    while (last < chunks.size() && chunks[last].task == task) ++last;
    const GradientRow row = {storage, static_cast<char*>(rows.data_ptr()) + task * row_bytes,
                             accumulate};
    layer_norm_kernels().sum_partials(partials + first * stride, last - first, stride, width, row);
    first = last;
  }
}

} // namespace

void check_offsets(const Offsets& offsets, int64_t rows) {
  for (size_t i = 0; i < offsets.size(); ++i) {
    const int64_t least = i == 0 ? 0 : offsets[i - 1];
    check(least <= offsets[i] && offsets[i] <= rows, "offsets: expected to ascend from 0 to ", rows,
          " at most, got ", offsets[i], " at position ", i);
  }
}

void run_layer_norm(const LayerNormCall& call) {
  const auto& kernels = layer_norm_kernels();
  parallel_items((call.rows + kRowBlock - 1) / kRowBlock, kernels.scratch_floats(call.width),
                 [&](float* scratch, int64_t block) {
                   const int64_t begin = block * kRowBlock;
                   const int64_t end =
                       begin + kRowBlock < call.rows ? begin + kRowBlock : call.rows;
                   kernels.forward(call, begin, end, scratch);
                 });
}

void run_layer_norm_backward(LayerNormGradients call, const ParameterRows& parameters) {
  check_offsets(parameters.offsets, call.rows);
  const auto all = parameters.all();
  const bool wanted = std::any_of(all.begin(), all.end(), [](auto& own) { return own.wanted(); });
  const std::vector<Chunk> chunks = make_chunks(call.rows, parameters.offsets);
  call.sums = all[2].wanted() ? 3 : all[1].wanted() ? 2 : 1;
  const int64_t stride = call.sums * call.width;
  const Tensor sums = new_floats(wanted ? static_cast<int64_t>(chunks.size()) * stride : 0);
  float* const partials = static_cast<float*>(sums.data_ptr());
  const auto& kernels = layer_norm_kernels();
  parallel_items(static_cast<int64_t>(chunks.size()), kernels.scratch_floats(call.width),
                 [&](float* scratch, int64_t item) {
                   const Chunk& chunk = chunks[item];
                   float* partial = wanted && chunk.task >= 0 ? partials + item * stride : nullptr;
                   kernels.backward(call, chunk.begin, chunk.end, partial, scratch);
                 });
  const int64_t num_tasks = static_cast<int64_t>(parameters.offsets.size()) - 1;
  for (size_t sum = 0; sum < all.size(); ++sum) {
    if (all[sum].wanted())
      write_rows(chunks, partials + sum * call.width, stride, call.width, num_tasks, *all[sum].rows,
                 parameters.accumulate);
  }
}

} // namespace superbert
