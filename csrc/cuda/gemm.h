// GEMMs with svdiff's epilogues on tensor cores, by CUTLASS: what gemm_sm90.cu and gemm_sm100.cu offer. Without torch.
//
// Matrices are dense and row-major. TMA reads them, so their starts must be aligned to 16 bytes and their rows must be a
// multiple of 16 bytes long; what is not gets cudaErrorNotSupported, before anything is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace svdiff::cuda {

enum class Half { fp16, bf16 };

// y [S, P, M] = alpha * scale * (x [S, P, K] @ W [M, K]^T) + bias; rounded once, from fp32.
struct ProductParams {
  Half in;             // of x and W
  Half out;            // of y and bias; where x is bf16, bf16 too
  const void* x;
  const void* W;
  const float* scale;  // [S, M], or null for 1
  const void* bias;    // [M], or null for 0
  void* y;
  float alpha;
  int64_t S, P, M, K;
};

// With b = dy [S, P, M] @ U [M, R], in fp32: dz [S, P, R] = scale * b, and the column sums of z * b over tiles of rows.
struct BackwardParams {
  Half type;           // of dy, z, U and dz
  const void* dy;
  const void* U;
  const void* z;       // [S, P, R]
  const float* scale;  // [S, R]
  void* dz;
  float* partial;      // [S, tiles, stride_pt], tiles and stride_pt as `backward_tiles` says
  int64_t S, P, M, R;
};

struct Tiles {
  int64_t count;   // of a sample
  int64_t stride;  // from one tile's sums to the next: R rounded up
};

// Gives memory on the device that lives until the kernels launched so far have run.
using Allocate = std::function<void*(size_t bytes)>;

namespace sm90 {
cudaError_t product(const ProductParams& params, const Allocate& allocate, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, const Allocate& allocate, cudaStream_t stream);
Tiles backward_tiles(int64_t P, int64_t R);
}  // namespace sm90

namespace sm100 {
cudaError_t product(const ProductParams& params, const Allocate& allocate, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, const Allocate& allocate, cudaStream_t stream);
Tiles backward_tiles(int64_t P, int64_t R);
}  // namespace sm100

}  // namespace svdiff::cuda
