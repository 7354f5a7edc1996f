// The CUDA operators compiled for the CPU, as operators of the namespace
// superbert_emulated.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// These take the place of torch's own, which know no GPU here.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

} // extern "C"

#define superbert superbert_emulated // another namespace, of C++ and of operators
#define CUDA CPU                     // registered for tensors on the CPU
#include "balancing.cu"
#include "surgery.cu"
