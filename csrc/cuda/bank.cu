#include "bank.h"

#include "pack.cuh"

#include <limits>

namespace svdiff::cuda {
namespace {

constexpr int kThreads = 256;

// One thread a number, blockIdx.y a sample: all told a model has a megabyte of shifts, so launches are what costs.
__global__ void __launch_bounds__(kThreads) gains_kernel(const GainsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.R) {
    return;
  }
  const float* mix = p.mix + blockIdx.y * p.stride_ms;
  float sum = p.start[blockIdx.y * p.stride_ss + i];
  for (int a = 0; a < p.adapters; ++a) {
    const Deltas& d = p.deltas[a];
    sum += mix[a] * (i < p.split ? d.matrices[i] : d.one_dim[i - p.split]);
  }
  const int64_t at = blockIdx.y * p.R + i;
  if (p.floor != nullptr) {
    const float floor = p.floor[i];
    const bool held = sum <= floor;
    p.held[at] = held;
    sum = held ? floor : sum;  // and not a maximum, which would hide a NaN
  }
  p.gain[at] = sum;
}

// One thread a number, blockIdx.y an adapter.
__global__ void __launch_bounds__(kThreads) gains_backward_kernel(const GainsBackwardParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.R) {
    return;
  }
  const float* mix = p.mix + p.adapters[blockIdx.y];
  float sum = 0;
  for (int64_t s = 0; s < p.S; ++s) {
    const float dgain = p.held[s * p.R + i] ? 0.0f : p.dgain[s * p.R + i];
    sum += mix[s * p.stride_ms] * dgain;
  }
  p.ddelta[blockIdx.y * p.R + i] = sum;
}

template <class Params>
cudaError_t launch_over(void (*kernel)(Params), int64_t rows, const Params& params, cudaStream_t stream) {
  constexpr int64_t kMostRows = 65535;
  const int64_t blocks = ceil_div(params.R, kThreads);
  if (rows == 0 || blocks == 0) {
    return cudaSuccess;
  }
  if (rows > kMostRows || blocks > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  return launch(kernel, dim3(blocks, rows), dim3(kThreads), params, stream);
}

}  // namespace

cudaError_t gains(const GainsParams& params, cudaStream_t stream) {
  return launch_over(gains_kernel, params.S, params, stream);
}

cudaError_t gains_backward(const GainsBackwardParams& params, cudaStream_t stream) {
  return launch_over(gains_backward_kernel, params.count, params, stream);
}

}  // namespace svdiff::cuda
