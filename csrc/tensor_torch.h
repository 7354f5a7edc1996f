// For the CPU operators of attention, layer norm and dropout: storage types, dropout arguments, and
// work divided among torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check_torch.h"
#include "dropout.h"
#include "memory_torch.h"
#include "storage.h"

namespace superbert {

inline Storage storage_of(const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
  case ScalarType::Float:
    return Storage::kFloat32;
  case ScalarType::BFloat16:
    return Storage::kBFloat16;
  case ScalarType::Half:
    return Storage::kFloat16;
  default:
    refuse(name, ": expected float32, bfloat16 or float16");
  }
}

inline Dropout make_dropout(double p, const std::optional<torch::stable::Tensor>& seed,
                            int64_t rng_offset) {
  check(p >= 0 && p < 1, "dropout_p: expected 0 <= p < 1, got ", p);
  check(rng_offset >= 0 && rng_offset <= UINT32_MAX, "rng_offset: expected 32 bits, got ",
        rng_offset);
  if (p == 0) return {};
  check(seed.has_value() && seed->numel() == 1 &&
            seed->scalar_type() == torch::headeronly::ScalarType::Long,
        "seed: dropout needs a tensor of one int64");
  check_data("seed", *seed);
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())),
          static_cast<uint32_t>(rng_offset), static_cast<uint32_t>(p * 4294967296.0),
          static_cast<float>(1 / (1 - p))};
}

// Uninitialised float32 on the CPU.  From torch's allocator, so that the tests fill it with NaN by
// torch.utils.deterministic.fill_uninitialized_memory, as they do outputs.
inline torch::stable::Tensor new_floats(int64_t count) {
  const int64_t shape[] = {count};
  return allocated(Sizes(shape, 1), [&] {
    return torch::stable::empty({count}, torch::headeronly::ScalarType::Float);
  });
}

// Calls work(scratch, item) for each item in 0 .. count, every thread with `floats` of scratch of
// its own.  Threads take the next item when they are free, so that items may differ in size; which
// thread computes an item makes no difference to its result.
template <typename Work>
void parallel_items(int64_t count, int64_t floats, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const torch::stable::Tensor scratch = new_floats(floats);
    float* const own = static_cast<float*>(scratch.data_ptr());
    for (int64_t item = next++; item < count; item = next++) work(own, item);
  });
}

} // namespace superbert
