// The dtypes in which the CPU kernels read and write tensors; they compute in float32.
#pragma once

namespace superbert {

enum class Storage { kFloat32, kBFloat16, kFloat16 };

} // namespace superbert
