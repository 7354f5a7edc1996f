// Rotary position embedding on the CPU.  Compiled once for each vector unit.
#include "rotary.h"

#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {
namespace {

struct Pair {
  Floats first, second;
};

inline Pair rotated(Floats first, Floats second, Floats cos, Floats sin) {
  return {first * cos - second * sin, second * cos + first * sin};
}

// Columns i and i + half.
template <typename T>
inline void rotate_halves(const T* x, const float* cos, const float* sin, float sign, int64_t half,
                          T* out) {
  for_row(half, [&](int64_t i, auto lanes) {
    const Pair pair = rotated(lanes.load(x + i), lanes.load(x + half + i), lanes.load(cos + i),
                              lanes.load(sin + i) * sign);
    lanes.store(out + i, pair.first);
    lanes.store(out + half + i, pair.second);
  });
}

// The columns 2i and 2i + 1 of a vector of pairs.
template <typename T>
inline void rotate_vector(const T* x, Floats cos, Floats sin, T* out) {
  const Floats low = load(x), high = load(x + kWidth);
  const Ints even = 2 * lane_numbers();
  const Pair pair =
      rotated(__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, even + 1), cos, sin);
  // Lane 2i takes lane i of the first, lane 2i + 1 that of the second.
  const Ints from = (lane_numbers() >> 1) + (lane_numbers() & 1) * kWidth;
  store(out, __builtin_shuffle(pair.first, pair.second, from));
  store(out + kWidth, __builtin_shuffle(pair.first, pair.second, from + kWidth / 2));
}

template <typename T>
inline void rotate_neighbours(const T* x, const float* cos, const float* sin, float sign,
                              int64_t half, T* out) {
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    rotate_vector(x + 2 * i, load(cos + i), load(sin + i) * sign, out + 2 * i);
  }
  if (i < half) {
    const int64_t rest = half - i;
    T pairs[2 * kWidth] = {};
    std::memcpy(pairs, x + 2 * i, 2 * rest * sizeof(T));
    rotate_vector(pairs, load_first(cos + i, rest), load_first(sin + i, rest) * sign, pairs);
    std::memcpy(out + 2 * i, pairs, 2 * rest * sizeof(T));
  }
}

void rotate(const RotaryCall& call, const void* from, const float* cos, const float* sin,
            void* to) {
  with_storage(call.storage, [&]<typename T>(const T*) {
    const int64_t half = cos == nullptr ? 0 : call.half;
    for (int64_t group = 0; group < call.groups; ++group) {
      for (int64_t head = 0; head < call.heads; ++head) {
        const T* x = static_cast<const T*>(from) + group * call.x_group + head * call.x_head;
        T* out = static_cast<T*>(to) + group * call.out_group + head * call.out_head;
        if (call.interleaved) {
          rotate_neighbours(x, cos, sin, call.sign, half, out);
        } else {
          rotate_halves(x, cos, sin, call.sign, half, out);
        }
        if (!call.in_place) {
          std::memcpy(out + 2 * half, x + 2 * half, (call.width - 2 * half) * sizeof(T));
        }
      }
    }
  });
}

} // namespace

extern const RotaryKernels rotary_kernels;
const RotaryKernels rotary_kernels = {rotate};

} // namespace superbert::SUPERBERT_ISA
