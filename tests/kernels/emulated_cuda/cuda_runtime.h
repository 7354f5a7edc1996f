// CUDA on the CPU, for tests on machines without a GPU: enough of the language and the runtime to
// run the kernels in csrc/ as they are written.
//
// Every thread of a block is a fiber; blocks run one after another.  Barriers and shuffles switch
// to the next fiber until all have arrived, and a barrier that not all threads reach ends the
// process with a message instead of hanging.  What this cannot show: races between barriers,
// performance, alignment faults (every wide access is checked for alignment instead) and the
// compiler's output.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __shared__ static

using std::expm1;
using std::max;
using std::min;
using std::sqrt;

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- fibers ------------------------------------------------------------------------------------
namespace emulated {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulated CUDA: %s\n", message);
  std::abort();
}

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

class Block {
 public:
  Block(int threads, const std::function<void()>& body) : body_(body), fibers_(threads) {
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[t];
      if (t == static_cast<int>(stacks_.size())) stacks_.emplace_back(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_[t].get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    warps_.resize((threads + 31) / 32);
  }

  void run() {
    current = this;
    int left = static_cast<int>(fibers_.size());
    while (left > 0) {
      const long before = progress_;
      for (running_ = 0; running_ < fibers_.size(); ++running_) {
        if (fibers_[running_].done) continue;
        threadIdx.x = static_cast<unsigned>(running_);
        resume(fibers_[running_]);
        if (fibers_[running_].done) --left, ++progress_;
      }
      if (progress_ == before) fail("not all threads reach a barrier");
    }
  }

  void wait_for_block() { wait(block_, static_cast<int>(fibers_.size())); }

  template <typename T>
  T exchange(T value, int other_lane) {
    Warp& warp = warps_[running_ / 32];
    const int lanes =
        std::min<int>(32, static_cast<int>(fibers_.size()) - static_cast<int>(running_) / 32 * 32);
    std::memcpy(&warp.slots[running_ % 32], &value, sizeof value);
    wait(warp.barrier, lanes);
    T received;
    std::memcpy(&received, &warp.slots[other_lane], sizeof received);
    wait(warp.barrier, lanes);
    return received;
  }

  // Calls use(values) with those of all lanes of the warp.
  template <typename T, typename Use>
  void with_warp(const T& value, const Use& use) {
    static_assert(sizeof(T) <= sizeof(Warp::wide[0]));
    Warp& warp = warps_[running_ / 32];
    std::memcpy(&warp.wide[running_ % 32], &value, sizeof value);
    wait(warp.barrier, 32);
    T values[32];
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&values[lane], &warp.wide[lane], sizeof(T));
    wait(warp.barrier, 32);
    use(values);
  }

  static inline Block* current = nullptr;

 private:
  // A context starts a fiber on its stack; from then on jumps, which are no system calls, switch.
  struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false, done = false;
  };
  struct Warp {
    Barrier barrier;
    double slots[32], wide[32][4];
  };

  static void enter() {
    Block& block = *current;
    block.body_();
    block.fibers_[block.running_].done = true;
    _longjmp(block.scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  void suspend() {
    if (_setjmp(fibers_[running_].place) == 0) _longjmp(scheduler_, 1);
  }

  void wait(Barrier& barrier, int expected) {
    ++progress_;
    const long generation = barrier.generation;
    if (++barrier.arrived == expected) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    while (barrier.generation == generation) suspend();
  }

  static constexpr size_t kStackBytes = 1 << 16;
  static inline std::vector<std::unique_ptr<char[]>> stacks_; // every block's fibers use them again

  const std::function<void()>& body_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier block_;
  jmp_buf scheduler_;
  size_t running_ = 0;
  long progress_ = 0;
};

template <typename T>
const T* aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) fail("misaligned access");
  return p;
}

// m16n8k16 of tensor cores (csrc/cuda_mma.cuh), with one rounding where those cut off bits.
template <typename T, typename Widen>
void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  const Widen& widen) {
  struct Registers {
    unsigned a[4], b[2];
  } own;
  std::copy_n(a, 4, own.a);
  std::copy_n(b, 2, own.b);
  const int group = static_cast<int>(threadIdx.x % 32) / 4, quad = threadIdx.x % 4;
  Block::current->with_warp(own, [&](const Registers(&all)[32]) {
    // Numbers of a row or column, from the lanes 4 * line .. 4 * line + 3 in the given registers.
    const auto number = [&](const unsigned& word, int place) {
      T element;
      std::memcpy(&element, reinterpret_cast<const char*>(&word) + place * sizeof(T), sizeof(T));
      return static_cast<double>(widen(element));
    };
    for (int n = 0; n < 4; ++n) {
      const int row = group, below = n / 2, column = 2 * quad + n % 2;
      double total = sum[n];
      for (int k = 0; k < 16; ++k) {
        const int from = k % 8 / 2, beyond = k / 8;
        total += number(all[4 * row + from].a[2 * beyond + below], k % 2) *
                 number(all[4 * column + from].b[beyond], k % 2);
      }
      sum[n] = static_cast<float>(total);
    }
  });
}

} // namespace emulated

// ---- the language ------------------------------------------------------------------------------
inline void __syncthreads() { emulated::Block::current->wait_for_block(); }
[[noreturn]] inline void __trap() { emulated::fail("trap"); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::Block::current->exchange(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <typename T>
T __ldcs(const T* p) {
  return *emulated::aligned(p);
}
template <typename T>
void __stcs(T* p, T value) {
  *const_cast<T*>(emulated::aligned(p)) = value;
}

// ---- the runtime -------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct Stream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (config->blockDim.x > 1024 || config->gridDim.x == 0) emulated::fail("bad launch shape");
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    emulated::Block(static_cast<int>(blockDim.x), body).run();
  }
  return cudaSuccess;
}
