// Arguments and results of the balancing operators as torch's tensors, for the CPU and CUDA code.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check_torch.h"

namespace superbert {

using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Checks a [K, K] matrix and returns K.
inline int64_t check_square(const Tensor& matrix, const char* name) {
  check(matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.size(0) >= 1 &&
            matrix.is_contiguous() && matrix.scalar_type() == torch::headeronly::ScalarType::Double,
        name, " must be a contiguous float64 [K, K] matrix with K at least 1");
  check_data(name, matrix);
  return matrix.size(0);
}

inline void check_lower(const Tensor& lower, const Tensor& gram) {
  check(lower.dim() == 2 && lower.size(1) == gram.size(0) && lower.is_contiguous() &&
            lower.scalar_type() == torch::headeronly::ScalarType::Double &&
            lower.is_cuda() == gram.is_cuda() &&
            lower.get_device_index() == gram.get_device_index(),
        "lower must be a contiguous float64 [M, K] matrix on the device of gram");
  check_data("lower", lower);
}

} // namespace superbert
