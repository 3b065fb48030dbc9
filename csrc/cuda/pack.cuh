// Numbers as the kernels read and write them: a few at once, and in fp32 in between.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace svdiff::cuda {

// N neighbouring numbers.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__half x) { return __half2float(x); }
inline __device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to the nearest even.
inline __device__ void from_float(float x, float& to) { to = x; }
inline __device__ void from_float(float x, __half& to) { to = __float2half_rn(x); }
inline __device__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

template <int N, class T>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ Pack<float, N> widened(const Pack<T, N>& numbers) {
  Pack<float, N> wide;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    wide.values[i] = to_float(numbers.values[i]);
  }
  return wide;
}

template <int N, class T>
__device__ void store(T* to, const Pack<float, N>& numbers) {
  Pack<T, N> rounded;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    from_float(numbers.values[i], rounded.values[i]);
  }
  if constexpr (sizeof(rounded) % sizeof(uint4) == 0) {  // in so many words, or nvcc takes the numbers apart
#pragma unroll
    for (size_t i = 0; i < sizeof(rounded) / sizeof(uint4); ++i) {
      __stcg(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&rounded)[i]);
    }
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = rounded;
  }
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A kernel of one struct by value; grids beyond the hardware's come back as an error.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, cudaStream_t stream) {
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(kernel, grid, block, arguments, 0, stream);
}

}  // namespace svdiff::cuda
