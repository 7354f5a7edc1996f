// Gated activations on the CPU.  Compiled once for each vector unit.
//
// An activation is x times a probability, which in its lower tail is tiny but not zero: it is
// computed there as an exponential, and not as 1 less a number near 1.
#include "gated_activation.h"

#include "dropout_simd.h"
#include "simd_math.h"

namespace superbert::SUPERBERT_ISA {
namespace {

constexpr int64_t kBlock = 1024;
// Exponentials carry this factor until they are multiplied by x, so that products with tiny ones
// are rounded once, where they are subnormal.
constexpr float kScale = 18446744073709551616.0f; // 2^64
constexpr float kUnscale = 1 / kScale;
// From here on exp(-x) counts as zero: x exp(-x) is below half of the smallest number.
constexpr float kLargest = 110.0f;

inline Floats magnitude(Floats v) {
  const Ints bits = load_bits<Ints>(&v) & 0x7fffffff;
  return load_bits<Floats>(&bits);
}

// kScale * exp(-(x + rest)), to about one unit in the last place; x is at least 0, rest tiny.
inline Floats scaled_exponential(Floats x, Floats rest) {
  const Floats power = x > kLargest ? splat(-kLargest) : -x; // a NaN stays one
  const Reduced reduced = reduce_exponent(power);
  const Floats value = exponential_of(reduced, reduced.rest - rest, 64);
  return x > kLargest ? Floats{} : value;
}

// An activation's value and its derivative.
struct Activated {
  Floats value, derivative;
};

// x * probability, where `lower` is kScale * the tail's probability at -|x|.
inline Floats times_probability(Floats x, Floats lower) {
  return x < 0 ? (x * lower) * kUnscale : x * (1.0f - lower * kUnscale);
}

// x Phi(x).  With t = |x|, Phi(-t) = exp(-t^2 / 2) R(t), where R(t) (t + 4) is a polynomial in
// (t - 4) / (t + 4), to 2^-26: R has no scale of its own, whatever t is.
inline Activated gelu(Floats x) {
  constexpr float kMost = 15.0f; // exp(-t^2 / 2) is zero
  const Floats size = magnitude(x);
  const Floats t = size > kMost ? splat(kMost) : size;
  // The square in two parts: a rounding of it would be one of the exponential, 87 times as large.
  const Ints high_bits = load_bits<Ints>(&t) & static_cast<int32_t>(0xfffff000);
  const Floats high = load_bits<Floats>(&high_bits);
  const Floats density = scaled_exponential(high * high * 0.5f, (t - high) * (t + high) * 0.5f);
  const Floats inverse = 1.0f / (t + 4.0f);
  const Floats q = (t - 4.0f) * inverse;
  Floats p = splat(-1.23515358e-4f);
  p = p * q + 1.93591067e-4f;
  p = p * q + 1.56878482e-3f;
  p = p * q + -3.52305197e-3f;
  p = p * q + -7.52683328e-3f;
  p = p * q + 6.04064167e-2f;
  p = p * q + -1.86523065e-1f;
  p = p * q + 3.87136668e-1f;
  p = p * q + -6.07896626e-1f;
  p = p * q + 7.55285144e-1f;
  const Floats ratio = p * inverse;
  const Floats slope = density * (ratio - t * 0.398942280f) * kUnscale; // Phi(-t) - t phi(t)
  return {times_probability(x, density * ratio), x < 0 ? slope : 1.0f - slope};
}

// x sigmoid(w), of which w and its derivative by x are given; x as large as where sigmoid(w) is 0
// or 1 at most.
inline Activated times_sigmoid(Floats x, Floats bounded, Floats w, Floats w_derivative) {
  const Floats scaled = scaled_exponential(magnitude(w), Floats{});
  const Floats sum = 1.0f + scaled * kUnscale, inverse = 1.0f / sum;
  const Floats lower = scaled * kUnscale * inverse; // sigmoid(-|w|)
  const Floats sigmoid = w < 0 ? lower : inverse;
  return {x < 0 ? x * scaled / sum * kUnscale : x / sum,
          sigmoid + bounded * w_derivative * lower * inverse};
}

inline Floats clamped(Floats x, float most) {
  return x > most ? splat(most) : x < -most ? splat(-most) : x;
}

// x (1 + tanh(w / 2)) / 2, w = 2 sqrt(2 / pi) (x + 0.044715 x^3)
inline Activated gelu_tanh(Floats x) {
  constexpr float kTwice = 1.59576912f, kCubed = 0.044715f;
  const Floats bounded = clamped(x, 30.0f), square = bounded * bounded;
  return times_sigmoid(x, bounded, bounded * kTwice * (1.0f + kCubed * square),
                       kTwice * (1.0f + 3 * kCubed * square));
}

inline Activated silu(Floats x) {
  const Floats bounded = clamped(x, 2 * kLargest);
  return times_sigmoid(x, bounded, bounded, splat(1.0f));
}

// Calls f with a function of vectors.
template <typename F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
  case Activation::kGelu:
    return f([](Floats x) { return gelu(x); });
  case Activation::kGeluTanh:
    return f([](Floats x) { return gelu_tanh(x); });
  case Activation::kSilu:
    return f([](Floats x) { return silu(x); });
  }
}

// What a tensor of this type would hold.
inline Floats rounded(const float*, Floats v) { return v; }
template <typename T>
inline Floats rounded(const T*, Floats v) {
  T lanes[kWidth];
  store(lanes, v);
  return load(lanes);
}

// Calls f(column, place in the output, columns) for the pieces of rows that make up [begin, end).
template <typename F>
void for_pieces(int64_t width, int64_t begin, int64_t end, const F& f) {
  int64_t column = width == 0 ? 0 : begin % width;
  for (int64_t place = begin; place < end;) {
    const int64_t count = smaller(kBlock, smaller(width - column, end - place));
    f(column, place, count);
    place += count;
    column = column + count == width ? 0 : column + count;
  }
}

void forward(Storage storage, Activation activation, const Dropout& dropout, const void* from,
             int64_t width, int64_t begin, int64_t end, void* to) {
  float buffer[element_factor_floats(kBlock)];
  with_storage(storage, [&]<typename T>(const T* type) {
    with_activation(activation, [&](auto activate) {
      for_pieces(width, begin, end, [&](int64_t column, int64_t place, int64_t count) {
        const T* x = static_cast<const T*>(from) + 2 * place - column;
        T* out = static_cast<T*>(to) + place;
        const auto gated = [&](int64_t i, auto lanes) {
          return activate(lanes.load(x + i)).value * lanes.load(x + width + i);
        };
        if (!dropout.active()) {
          return for_row(count,
                         [&](int64_t i, auto lanes) { lanes.store(out + i, gated(i, lanes)); });
        }
        const float* factors = element_factors(dropout, place, count, buffer);
        for_row(count, [&](int64_t i, auto lanes) {
          // Rounded before, as where dropout is a pass of its own.
          lanes.store(out + i, rounded(type, gated(i, lanes)) * lanes.load(factors + i));
        });
      });
    });
  });
}

void backward(Storage storage, Activation activation, const Dropout& dropout, const void* grad,
              const void* from, int64_t width, int64_t begin, int64_t end, void* to) {
  float buffer[element_factor_floats(kBlock)];
  with_storage(storage, [&]<typename T>(const T* type) {
    with_activation(activation, [&](auto activate) {
      for_pieces(width, begin, end, [&](int64_t column, int64_t place, int64_t count) {
        const T* grad_out = static_cast<const T*>(grad) + place;
        const T* x = static_cast<const T*>(from) + 2 * place - column;
        T* grad_x = static_cast<T*>(to) + 2 * place - column;
        const auto write = [&](int64_t i, auto lanes, Floats dy) {
          const Activated activated = activate(lanes.load(x + i));
          lanes.store(grad_x + i, dy * lanes.load(x + width + i) * activated.derivative);
          lanes.store(grad_x + width + i, dy * activated.value);
        };
        if (!dropout.active()) {
          return for_row(count,
                         [&](int64_t i, auto lanes) { write(i, lanes, lanes.load(grad_out + i)); });
        }
        const float* factors = element_factors(dropout, place, count, buffer);
        for_row(count, [&](int64_t i, auto lanes) {
          write(i, lanes, rounded(type, lanes.load(grad_out + i) * lanes.load(factors + i)));
        });
      });
    });
  });
}

} // namespace

extern const GatedActivationKernels gated_activation_kernels;
const GatedActivationKernels gated_activation_kernels = {forward, backward};

} // namespace superbert::SUPERBERT_ISA
