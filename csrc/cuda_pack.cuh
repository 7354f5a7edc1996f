// Device side of the storage types: packs of neighbouring elements moved 16 bytes at a time, and
// their conversion to the type that sums are kept in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace superbert {

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

// The widest word that kBytes are a multiple of; a lone element is its own word.
template <typename T, int N>
using Word = std::conditional_t<
    N == 1, T,
    std::conditional_t<sizeof(T) * N % 16 == 0, uint4,
                       std::conditional_t<sizeof(T) * N % 8 == 0, uint2, unsigned>>>;

// Elements p[0 .. N), aligned to their word.  Everything here is read and written once in a pass
// that is larger than the cache, hence the streaming hint.
template <int N, typename T>
__device__ __forceinline__ void load_pack(const T* p, Compute<T> (&values)[N]) {
  using W = Word<T, N>;
  union Buffer {
    W words[sizeof(T) * N / sizeof(W)];
    T elements[N];
  } buffer;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) * N / sizeof(W)); ++i) {
    buffer.words[i] = __ldcs(reinterpret_cast<const W*>(p) + i);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = widen(buffer.elements[n]);
}

template <int N, typename T>
__device__ __forceinline__ void store_pack(T* p, const Compute<T> (&values)[N]) {
  using W = Word<T, N>;
  union Buffer {
    W words[sizeof(T) * N / sizeof(W)];
    T elements[N];
  } buffer;
#pragma unroll
  for (int n = 0; n < N; ++n) narrow(values[n], buffer.elements[n]);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) * N / sizeof(W)); ++i) {
    __stcs(reinterpret_cast<W*>(p) + i, buffer.words[i]);
  }
}

// 16 aligned bytes of shared memory.
template <int N, typename C>
__device__ __forceinline__ void load_shared(const C* p, C (&values)[N]) {
  static_assert(sizeof(C) * N == 16);
  union {
    uint4 word;
    C elements[N];
  } buffer;
  buffer.word = *reinterpret_cast<const uint4*>(p);
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = buffer.elements[n];
}

// Task gradients [num_rows, P] on the device; `stride` counts elements.
template <typename T>
struct DeviceRows {
  const T* data;
  int64_t num_rows;
  int64_t stride;
};

// A range of columns cut into packs of N and the few before and after them ("edges").
struct Columns {
  int64_t begin;
  int64_t head;  // columns before the first aligned pack
  int64_t packs; // whole packs
  int64_t tail;  // columns after the last

  template <int N>
  __device__ __forceinline__ int64_t of_pack(int64_t pack) const {
    return begin + head + pack * N;
  }
  template <int N>
  __device__ __forceinline__ int64_t of_edge(int64_t edge) const {
    return edge < head ? begin + edge : begin + packs * N + edge;
  }
};

__host__ __device__ inline Columns cut_columns(int64_t begin, int64_t end, int64_t first_aligned,
                                               int64_t pack) {
  const int64_t head = first_aligned < end ? first_aligned - begin : end - begin;
  const int64_t packs = (end - begin - head) / pack;
  return {begin, head, packs, end - begin - head - packs * pack};
}

// The first column from `begin` on at which p is 16-byte aligned, or -1 if there is none.
template <typename T>
int64_t first_aligned_column(const T* p, int64_t begin) {
  for (int64_t column = begin; column < begin + 16; ++column) {
    if (reinterpret_cast<uintptr_t>(p + column) % 16 == 0) return column;
  }
  return -1;
}

// That column for all rows at once: only if they are a multiple of 16 bytes apart.
template <typename T>
int64_t first_aligned_column(const DeviceRows<T>& rows, int64_t begin) {
  const bool apart = rows.num_rows == 1 || rows.stride * sizeof(T) % 16 == 0;
  return apart ? first_aligned_column(rows.data, begin) : -1;
}

} // namespace superbert
