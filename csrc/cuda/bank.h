// The gains of a whole model in one launch, and their gradient: see svdiff_kernels/bank.py. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace svdiff::cuda {

constexpr int kMostAdapters = 32;  // in one launch, by value: no copy to the device, and a CUDA graph keeps them

// An adapter's shifts are two allocations: `split` numbers for matrices, then R - split for 1-D weights.
struct Deltas {
  const float* matrices;
  const float* one_dim;
};

// sum = start + the sum over adapters of mix[s, a] * delta_a; then, unless floor is null, held = sum <= floor and
// gain = held ? floor : sum. More than kMostAdapters take several launches, of which the last has a floor.
struct GainsParams {
  const float* start;  // [S, R] by stride_ss: base, with stride 0, or the gain of the launch before
  const float* floor;  // [R], or null
  const float* mix;    // [S, adapters] by stride_ms, from the first of these adapters on
  float* gain;         // [S, R]
  bool* held;          // [S, R]
  int64_t S, R, split, stride_ss, stride_ms;
  int adapters;
  Deltas deltas[kMostAdapters];
};

cudaError_t gains(const GainsParams& params, cudaStream_t stream);

// ddelta[i] [R] = the sum over samples of mix[s, adapters[i]] * dgain[s], where it is not held.
struct GainsBackwardParams {
  const float* dgain;  // [S, R]
  const bool* held;    // [S, R]
  const float* mix;    // [S, any number] by stride_ms
  float* ddelta;       // [count, R]
  int64_t S, R, stride_ms;
  int count;
  int adapters[kMostAdapters];
};

cudaError_t gains_backward(const GainsBackwardParams& params, cudaStream_t stream);

}  // namespace svdiff::cuda
