// Products of small matrices by the tensor cores of one warp.
#pragma once

#include <type_traits>

#include "cuda_pack.cuh"

namespace superbert {

// sum [16, 8] += a [16, 16] b [16, 8], by m16n8k16: products are exact, their sums float32.
//
// A register of a and b holds two neighbours along the 16 that are summed over, of T, bfloat16 or
// half.  With g = lane / 4 and q = lane % 4, lane has
//
//   a    rows g, g + 8, g, g + 8, at 2 q, 2 q, 2 q + 8, 2 q + 8
//   b    column g, at 2 q and 2 q + 8
//   sum  (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1)
//
// so that the registers of eight rows serve as half an a, and as b of the product with themselves.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emulated::multiply_add<T>(sum, a, b, [](T x) { return widen(x); });
#endif
}

} // namespace superbert
