// Marks functions that both the host compiler and nvcc build from one source.
#pragma once

#ifdef __CUDACC__
#define SUPERBERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SUPERBERT_HOST_DEVICE inline
#endif
