// The device and the stream that a CUDA operator runs on: those of its tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_launch.cuh"

namespace superbert {

class LaunchDevice {
 public:
  explicit LaunchDevice(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaDeviceGetAttribute(&num_processors_, cudaDevAttrMultiProcessorCount,
                                      tensor.get_device_index()));
  }
  cudaStream_t stream() const { return stream_; }
  int num_processors() const { return num_processors_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int num_processors_ = 0;
};

} // namespace superbert
