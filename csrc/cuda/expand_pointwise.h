// svdiff::expand beside a vendor's GEMM: what is done to the numbers before it, and in the backward pass after it.
// No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace svdiff::cuda {

enum class Type { fp32, fp16, bf16 };

// out = scale[sample] * b, and the column sums of z * b over tiles of rows, for S samples of `images` images of P rows
// of r columns. Forward, b is z itself; backward, b is dy @ U in fp32.
struct PointwiseParams {
  Type b_type;         // `type`, or fp32
  Type type;           // of out and z
  bool columns_dense;  // [S, images, r, P] in memory, a conv's NCHW; otherwise [S, images, P, r]
  const void* b;
  const void* z;       // null where no sums are wanted
  const float* scale;  // [S, r]
  void* out;           // laid out as b; null where it is not wanted
  float* partial;      // [S, tiles, r], tiles as `pointwise_tiles` says
  int64_t S, images, P, r;
};

// Into how many tiles the rows of a sample are split. It depends on the shape and the pointers' alignment alone, and so
// do the bits of the sums. Pointers count, but are not read.
int64_t pointwise_tiles(const PointwiseParams& params);

cudaError_t pointwise(const PointwiseParams& params, cudaStream_t stream);

struct SumParams {
  const float* partial;  // [S, tiles, stride], of whose rows the first r numbers count
  float* dscale;         // [S, r]
  int64_t S, tiles, stride, r;
};

// dscale = the sum over tiles, always in the same order.
cudaError_t sum_tiles(const SumParams& params, cudaStream_t stream);

}  // namespace svdiff::cuda
