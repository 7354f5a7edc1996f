// Allocation and torch's threads, with exceptions for Python.
//
// torch's C interface turns every exception into a RuntimeError that names the call.  The calls
// here fail for want of memory alone, so they raise MemoryError.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check_torch.h"

namespace superbert {

// A MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(const std::string& shape)
      : message_("out of memory: torch could not allocate a tensor of shape " + shape) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

template <typename Sizes, typename Allocate>
auto allocated(const Sizes& shape, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    throw OutOfMemory(shape_text(shape));
  }
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Uninitialised, of the shape given, on the device of `like`; of its dtype where none is given.
inline torch::stable::Tensor
allocate(const torch::stable::Tensor& like, Sizes shape,
         std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  return allocated(shape, [&] { return torch::stable::new_empty(like, shape, type); });
}

inline torch::stable::Tensor allocate_like(const torch::stable::Tensor& like) {
  return allocated(like.sizes(), [&] { return torch::stable::empty_like(like); });
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& x) {
  if (x.is_contiguous()) return x;
  return allocated(x.sizes(), [&] { return torch::stable::contiguous(x); });
}

// Calls work(first, last) on torch's threads for parts of begin .. end.  What a thread throws is
// thrown here, as it is.
template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  std::exception_ptr error;
  std::mutex one_at_a_time;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      work(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(one_at_a_time);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

} // namespace superbert
