// Arguments and results of the balancing operators as torch's tensors, for the CPU and CUDA code.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "check_torch.h"

namespace superbert {

using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Problems of one operator: a matrix [K, K], or G of them, [G, K, K].
struct Problems {
  int64_t count, k;
  bool batched; // whether results have the dimension G

  // The shape of a result that is [K], or [K, K], for one problem.
  std::vector<int64_t> shape(int dims) const {
    std::vector<int64_t> sizes(dims, k);
    if (batched) sizes.insert(sizes.begin(), count);
    return sizes;
  }
};

inline Problems check_square(const Tensor& matrix, const char* name) {
  const int64_t dims = matrix.dim();
  check((dims == 2 || dims == 3) && matrix.size(-1) == matrix.size(-2) && matrix.size(-1) >= 1 &&
            matrix.is_contiguous() && matrix.scalar_type() == torch::headeronly::ScalarType::Double,
        name, " must be a contiguous float64 [K, K] matrix with K at least 1, or [G, K, K]");
  check_data(name, matrix);
  return {dims == 2 ? 1 : matrix.size(0), matrix.size(-1), dims == 3};
}

inline void check_lower(const Tensor& lower, const Tensor& gram) {
  check(lower.dim() == gram.dim() && lower.size(-1) == gram.size(-1) &&
            (gram.dim() == 2 || lower.size(0) == gram.size(0)) && lower.is_contiguous() &&
            lower.scalar_type() == torch::headeronly::ScalarType::Double &&
            lower.is_cuda() == gram.is_cuda() &&
            lower.get_device_index() == gram.get_device_index(),
        "lower must be a contiguous float64 [M, K] matrix on the device of gram, or [G, M, K]");
  check_data("lower", lower);
}

} // namespace superbert
