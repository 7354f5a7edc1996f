// Checks of the operators' arguments.
//
// Operators of torch.ops are public, and tensors that autograd saved for a backward pass may have
// been changed (torch.autograd.graph.saved_tensors_hooks).  So every operator checks everything
// that its kernels rely on, whatever Python has checked before.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

namespace superbert {

// Raises ValueError in Python, with the parts put together as its message.
template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    refuse(parts...);
}

// A setting that has a size.
inline void check_number(const char* name, double value) {
  check(value >= 0 && std::isfinite(value), name, ": expected a finite number of at least 0, got ",
        value);
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* before = "[";
  for (const int64_t size : sizes) {
    text << before << size;
    before = ", ";
  }
  text << (sizes.size() == 0 ? "[]" : "]");
  return text.str();
}

template <typename Sizes>
void check_shape(const char* name, const torch::stable::Tensor& x, const Sizes& shape) {
  const auto sizes = x.sizes();
  bool same = sizes.size() == shape.size();
  auto wanted = shape.begin();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] == *wanted++;
  if (!same) [[unlikely]]
    refuse(name, ": expected the shape ", shape_text(shape), ", got ", shape_text(sizes));
}

inline void check_shape(const char* name, const torch::stable::Tensor& x,
                        std::initializer_list<int64_t> shape) {
  check_shape<std::initializer_list<int64_t>>(name, x, shape);
}

inline void check_dims(const char* name, const torch::stable::Tensor& x, int64_t dims,
                       const char* expected) {
  if (x.dim() != dims) [[unlikely]]
    refuse(name, ": expected ", expected, ", got ", shape_text(x.sizes()));
}

inline void check_dtype(const char* name, const torch::stable::Tensor& x,
                        torch::headeronly::ScalarType type, const char* expected) {
  check(x.scalar_type() == type, name, ": expected ", expected);
}

// Refuses a tensor whose storage does not reach to its last element.  FSDP, and others that save
// memory, free what a parameter held by untyped_storage().resize_(0); the tensor stays, and its
// pointer is null.
inline void check_data(const char* name, const torch::stable::Tensor& x) {
  // Wider than int64: the strides of a tensor may say anything once its storage is another one.
  __int128 elements = x.storage_offset() + int64_t{1};
  const auto sizes = x.sizes(), strides = x.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    elements += static_cast<__int128>(sizes[d] - 1) * strides[d];
  }
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &held));
  const __int128 bytes = elements * static_cast<int64_t>(x.element_size());
  if (bytes > held) [[unlikely]]
    refuse(name, ": its storage holds ", held, " of ", static_cast<int64_t>(bytes),
           " bytes; was it freed, as FSDP frees parameters while their module does not run?");
}

// ---- memory that must not be shared -----------------------------------------------------------

// Where the elements of a tensor lie: runs of `bytes` without gaps, `stride` bytes apart.
struct Runs {
  const char* begin;
  int64_t count, bytes, stride;

  const char* at(int64_t run) const { return begin + run * stride; }
  bool empty() const { return count * bytes == 0; }
  const char* end() const { return at(count - 1) + bytes; }
};

// Of a tensor that is contiguous but for the stride of its first dimension.
inline Runs runs_of(const torch::stable::Tensor& x) {
  const char* begin = static_cast<const char*>(x.const_data_ptr());
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (bytes == 0 || x.is_contiguous()) return {begin, 1, bytes, 0};
  return {begin, x.size(0), bytes / x.size(0),
          x.stride(0) * static_cast<int64_t>(x.element_size())};
}

inline bool share_memory(const Runs& a, const Runs& b) {
  if (a.empty() || b.empty() || a.end() <= b.begin || b.end() <= a.begin) return false;
  for (int64_t i = 0, j = 0; i < a.count && j < b.count;) { // columns of one buffer may interleave
    if (a.at(i) + a.bytes <= b.at(j)) {
      ++i;
    } else if (b.at(j) + b.bytes <= a.at(i)) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

inline void check_apart(const char* name, const Runs& written, const char* other_name,
                        const Runs& other) {
  check(!share_memory(written, other), name, ": written, and so must not overlap ", other_name);
}

} // namespace superbert
