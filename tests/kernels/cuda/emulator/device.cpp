// A device that is not there: it has the compute capability that `svdiff_emulate` gives it, and the GEMMs of gemm.h for
// Hopper are plain loops, as slow and as exact as can be.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>

#include "gemm.h"

namespace {

int capability[2] = {8, 0};
int fused = 0;

}  // namespace

extern "C" void svdiff_emulate(int major, int minor) {
  capability[0] = major;
  capability[1] = minor;
}

extern "C" int svdiff_fused() {
  return fused;
}

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = capability[attribute == cudaDevAttrComputeCapabilityMinor];
  return cudaSuccess;
}

namespace svdiff::cuda {
namespace {

constexpr int64_t kTileRows = 128, kTileColumns = 64;

double read(Half type, const void* from, int64_t at) {
  return type == Half::fp16 ? __half2float(static_cast<const __half*>(from)[at])
                            : __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
}

void write(Half type, void* to, int64_t at, double number) {
  if (type == Half::fp16) {
    static_cast<__half*>(to)[at] = __double2half(number);
  } else {
    static_cast<__nv_bfloat16*>(to)[at] = __double2bfloat16(number);
  }
}

bool can_read(std::initializer_list<const void*> starts, std::initializer_list<int64_t> lengths) {
  bool can = true;
  for (const void* start : starts) {
    can = can && reinterpret_cast<uintptr_t>(start) % 16 == 0;
  }
  for (const int64_t length : lengths) {
    can = can && length % 8 == 0;
  }
  return can;
}

}  // namespace

namespace sm90 {

cudaError_t product(const ProductParams& p, const Allocate& allocate, cudaStream_t) {
  if (!can_read({p.x, p.W, p.y}, {p.K, p.M})) {
    return cudaErrorNotSupported;
  }
  allocate(1);
  ++fused;
  for (int64_t row = 0; row < p.S * p.P; ++row) {
    for (int64_t m = 0; m < p.M; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < p.K; ++k) {
        sum += read(p.in, p.x, row * p.K + k) * read(p.in, p.W, m * p.K + k);
      }
      const double scale = p.scale == nullptr ? 1 : p.scale[row / p.P * p.M + m];
      const double bias = p.bias == nullptr ? 0 : read(p.out, p.bias, m);
      write(p.out, p.y, row * p.M + m, p.alpha * scale * sum + bias);
    }
  }
  return cudaSuccess;
}

cudaError_t backward(const BackwardParams& p, const Allocate& allocate, cudaStream_t) {
  if (!can_read({p.dy, p.U, p.z, p.dz}, {p.M, p.R})) {
    return cudaErrorNotSupported;
  }
  allocate(1);
  ++fused;
  const Tiles tiles = backward_tiles(p.P, p.R);
  std::fill_n(p.partial, p.S * tiles.count * tiles.stride, 0.0f);
  for (int64_t row = 0; row < p.S * p.P; ++row) {
    const int64_t sample = row / p.P, tile = sample * tiles.count + row % p.P / kTileRows;
    for (int64_t r = 0; r < p.R; ++r) {
      double b = 0;
      for (int64_t m = 0; m < p.M; ++m) {
        b += read(p.type, p.dy, row * p.M + m) * read(p.type, p.U, m * p.R + r);
      }
      p.partial[tile * tiles.stride + r] += read(p.type, p.z, row * p.R + r) * b;
      write(p.type, p.dz, row * p.R + r, p.scale[sample * p.R + r] * b);
    }
  }
  return cudaSuccess;
}

Tiles backward_tiles(int64_t P, int64_t R) {
  return {(P + kTileRows - 1) / kTileRows, (R + kTileColumns - 1) / kTileColumns * kTileColumns};
}

}  // namespace sm90
}  // namespace svdiff::cuda
