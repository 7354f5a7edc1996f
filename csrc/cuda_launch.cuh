// Launches on a stream; nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

namespace superbert {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline void set_to_zero(void* data, int64_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(data, 0, bytes, stream));
}

} // namespace superbert
