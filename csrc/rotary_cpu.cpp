// The CPU side of the rotary ops; kernels/rotary/rotary.py documents them.
#include "rotary.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check_torch.h"
#include "tensor_torch.h"

namespace superbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockElements = 16384;

// Dimensions of x.
enum { kBatch, kSequence, kGroup, kHead, kColumn };

void check_heads(const Tensor& x) {
  check_dims("x", x, 5, "[batch, sequence, groups, heads, width]");
  check(x.size(kColumn) <= 1 || x.stride(kColumn) == 1, "x: expected a contiguous last dimension");
  check_data("x", x);
}

// Refuses a tensor to be written two elements of which may be one: dimensions by their strides,
// each has to step over all that the smaller ones reach.
void check_elements_apart(const char* name, const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims; // stride, size
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) == 0) return;
    if (x.size(d) > 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  __int128 reach = 0;
  for (const auto& [stride, size] : dims) {
    check(stride > reach, name, ": written in place, expected elements that lie apart");
    reach += static_cast<__int128>(stride) * (size - 1);
  }
}

// The bytes from a tensor's first element to its last, as one run.
Runs reach_of(const Tensor& x) {
  int64_t elements = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) == 0) return {nullptr, 0, 0, 0};
    elements += (x.size(d) - 1) * x.stride(d);
  }
  return {static_cast<const char*>(x.const_data_ptr()), 1,
          elements * static_cast<int64_t>(x.element_size()), 0};
}

Tensor checked_table(const char* name, const Tensor& table, const Tensor& like) {
  check_dims(name, table, 2, "[positions, rotary width / 2]");
  check_shape(name, table, like.sizes());
  check_dtype(name, table, ScalarType::Float, "float32");
  check_data(name, table);
  return as_contiguous(table);
}

// Integers of 32 or 64 bits.
class Numbers {
 public:
  Numbers(const char* name, const Tensor& given, int64_t count) : numbers_(given) {
    const ScalarType type = given.scalar_type();
    check(type == ScalarType::Long || type == ScalarType::Int, name, ": expected int64 or int32");
    check(given.dim() == 1 && given.numel() == count, name, ": expected [", count, "], got ",
          shape_text(given.sizes()));
    check_data(name, given);
    numbers_ = as_contiguous(given);
    is_long_ = type == ScalarType::Long;
  }

  int64_t operator[](int64_t i) const {
    const void* data = numbers_.const_data_ptr();
    return is_long_ ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

 private:
  Tensor numbers_;
  bool is_long_;
};

constexpr int64_t kOutside = -1; // of a row behind the last sequence

struct Stream {
  int64_t batch, sequence;

  int64_t tokens() const { return batch * sequence; }
};

// The position of every token, [batch * sequence], all of them rows of a table of `count`.
std::vector<int64_t> positions_of(const Stream& stream, int64_t count,
                                  const std::optional<Tensor>& position_ids,
                                  const std::optional<Tensor>& cu_seqlens,
                                  const std::optional<Tensor>& seqlen_offsets, int64_t offset) {
  std::vector<int64_t> positions(stream.tokens(), kOutside);
  if (position_ids) {
    check(!cu_seqlens && !seqlen_offsets && offset == 0,
          "position_ids: with them, expected neither cu_seqlens nor seqlen_offsets");
    const Numbers given("position_ids", *position_ids, stream.tokens());
    for (int64_t t = 0; t < stream.tokens(); ++t) {
      positions[t] = given[t];
      check(0 <= given[t] && given[t] < count, "position_ids: expected 0 <= index < ", count,
            ", the rows of cos, got ", given[t], " at ", t);
    }
    return positions;
  }
  std::optional<Numbers> bounds, offsets;
  if (cu_seqlens) {
    check(stream.batch == 1, "cu_seqlens: expected with a packed x alone");
    check(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 &&
              cu_seqlens->scalar_type() == ScalarType::Int,
          "cu_seqlens: expected int32 [sequences + 1]");
    bounds.emplace("cu_seqlens", *cu_seqlens, cu_seqlens->numel());
  }
  const int64_t sequences = bounds ? cu_seqlens->numel() - 1 : stream.batch;
  if (seqlen_offsets) offsets.emplace("seqlen_offsets", *seqlen_offsets, sequences);
  if (bounds) check((*bounds)[0] == 0, "cu_seqlens: expected to start at 0, got ", (*bounds)[0]);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = bounds ? (*bounds)[s] : s * stream.sequence;
    const int64_t end = bounds ? (*bounds)[s + 1] : begin + stream.sequence;
    check(begin <= end, "cu_seqlens: expected ascending offsets, got ", begin, " before ", end,
          " at position ", s);
    check(end <= stream.tokens(), "cu_seqlens: expected to end within the ", stream.tokens(),
          " rows, got ", end);
    const int64_t first = offsets ? (*offsets)[s] : offset;
    // Subtracted, since the sum might overflow.
    check(begin == end || (0 <= first && first <= count - (end - begin)),
          "seqlen_offsets: expected to end within the ", count, " rows of cos, got sequence ", s,
          ", ", end - begin, " tokens from ", first, " on");
    for (int64_t t = begin; t < end; ++t) positions[t] = first + (t - begin);
  }
  return positions;
}

void run(const Tensor& x, const Tensor& cos, const Tensor& sin,
         const std::optional<Tensor>& position_ids, const std::optional<Tensor>& cu_seqlens,
         const std::optional<Tensor>& seqlen_offsets, int64_t offset, bool interleaved,
         bool conjugate, int64_t groups, const Tensor& out, bool in_place) {
  const Tensor cosines = checked_table("cos", cos, cos), sines = checked_table("sin", sin, cos);
  const int64_t half = cos.size(1);
  check(0 < half && 2 * half <= x.size(kColumn), "cos: expected 1 to half of x's ", x.size(kColumn),
        " columns, got ", half);
  const Stream stream{x.size(kBatch), x.size(kSequence)};
  const std::vector<int64_t> positions =
      positions_of(stream, cos.size(0), position_ids, cu_seqlens, seqlen_offsets, offset);
  const RotaryCall call{.storage = storage_of("x", x),
                        .groups = groups,
                        .heads = x.size(kHead),
                        .width = x.size(kColumn),
                        .half = half,
                        .x_group = x.stride(kGroup),
                        .x_head = x.stride(kHead),
                        .out_group = out.stride(kGroup),
                        .out_head = out.stride(kHead),
                        .interleaved = interleaved,
                        .sign = conjugate ? -1.0f : 1.0f,
                        .in_place = in_place};
  const int64_t of_token = groups * call.heads * call.width;
  if (of_token == 0) return;
  const int64_t block = std::max<int64_t>(1, kBlockElements / of_token);
  const int64_t bytes = x.element_size();
  const auto place = [&](const Tensor& tensor, int64_t token) {
    return bytes * (token / stream.sequence * tensor.stride(kBatch) +
                    token % stream.sequence * tensor.stride(kSequence));
  };
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const float* cos_rows = static_cast<const float*>(cosines.const_data_ptr());
  const float* sin_rows = static_cast<const float*>(sines.const_data_ptr());
  const auto& kernels = rotary_kernels();
  parallel_items((stream.tokens() + block - 1) / block, 0, [&](float*, int64_t item) {
    const int64_t end = std::min((item + 1) * block, stream.tokens());
    for (int64_t t = item * block; t < end; ++t) {
      const bool inside = positions[t] != kOutside;
      if (!inside && in_place) continue;
      kernels.rotate(call, from + place(x, t), inside ? cos_rows + positions[t] * half : nullptr,
                     inside ? sin_rows + positions[t] * half : nullptr, to + place(out, t));
    }
  });
}

Tensor rotary(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> position_ids,
              std::optional<Tensor> cu_seqlens, std::optional<Tensor> seqlen_offsets,
              int64_t offset, bool interleaved, bool conjugate) {
  check_heads(x);
  storage_of("x", x);
  Tensor out = allocate(x, x.sizes());
  run(x, cos, sin, position_ids, cu_seqlens, seqlen_offsets, offset, interleaved, conjugate,
      x.size(kGroup), out, false);
  return out;
}

void rotary_(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> position_ids,
             std::optional<Tensor> cu_seqlens, std::optional<Tensor> seqlen_offsets, int64_t offset,
             bool interleaved, bool conjugate, int64_t groups) {
  check_heads(x);
  check(0 <= groups && groups <= x.size(kGroup), "groups: expected at most x's ", x.size(kGroup),
        ", got ", groups);
  check_elements_apart("x", x);
  const Runs written = reach_of(x);
  const auto check_other = [&](const char* name, const Tensor& other) {
    check_apart("x", written, name, reach_of(other));
  };
  check_other("cos", cos);
  check_other("sin", sin);
  if (position_ids) check_other("position_ids", *position_ids);
  if (cu_seqlens) check_other("cu_seqlens", *cu_seqlens);
  if (seqlen_offsets) check_other("seqlen_offsets", *seqlen_offsets);
  run(x, cos, sin, position_ids, cu_seqlens, seqlen_offsets, offset, interleaved, conjugate, groups,
      x, true);
}

#define ARGUMENTS                                                                                  \
  "Tensor cos, Tensor sin, Tensor? position_ids, Tensor? cu_seqlens, Tensor? seqlen_offsets, "     \
  "SymInt offset, bool interleaved, bool conjugate"

STABLE_TORCH_LIBRARY_FRAGMENT(superbert, m) {
  m.def("rotary(Tensor x, " ARGUMENTS ") -> Tensor");
  m.def("rotary_(Tensor(a!) x, " ARGUMENTS ", int groups) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(superbert, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_", TORCH_BOX(&rotary_));
}

} // namespace
} // namespace superbert
