#include "expand_pointwise.h"

#include "pack.cuh"

#include <algorithm>
#include <limits>

namespace svdiff::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBatch = 4;         // vectors that a thread asks memory for at once
constexpr int kMostTiles = 1024;  // of a sample with dense rows, for `sum_tiles` to add up

template <class B, class T>
struct Arguments {
  const B* b;
  const T* z;
  const float* scale;
  T* out;
  float* partial;
  int64_t S, images, P, r;
  int64_t tiles;  // of a sample with dense rows, of an image with dense columns
  int64_t tile_rows;
};

// A thread's share of `count` vectors, of which it takes kBatch, `stride` apart: out = scale * b, sums += z * b. All
// loads come before the first use, so that it waits for memory once.
template <bool kSums, int N, class B, class T>
__device__ void take(
    const Arguments<B, T>& a,
    int64_t at,
    int64_t stride,
    int count,
    const Pack<float, N>& scale,
    Pack<float, N>& sums) {
  Pack<B, N> b[kBatch];
  Pack<T, N> z[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (i < count) {
      b[i] = load<N>(a.b + at + i * stride);
      if constexpr (kSums) {
        z[i] = load<N>(a.z + at + i * stride);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (i < count) {
      Pack<float, N> wide = widened(b[i]);
      if constexpr (kSums) {
        const Pack<float, N> wide_z = widened(z[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          sums.values[j] += wide_z.values[j] * wide.values[j];
        }
      }
      if (!kSums || a.out != nullptr) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          wide.values[j] *= scale.values[j];
        }
        store<N>(a.out + at + i * stride, wide);
      }
    }
  }
}

// Both kernels may have as many registers as a single block allows: left to itself, ptxas spills to fit more blocks.

// Rows dense: blockIdx.x is a tile of rows of a sample, blockIdx.y a span of columns. A thread keeps N columns, whose
// scales it reads once, and takes every blockDim.y-th row: neighbours in a warp are neighbours in memory, for any r.
template <class B, class T, int N, bool kSums>
__global__ void __launch_bounds__(kThreads, 1) rows_kernel(const Arguments<B, T> a) {
  const int64_t sample = blockIdx.x / static_cast<uint32_t>(a.tiles);
  const int64_t tile = blockIdx.x % static_cast<uint32_t>(a.tiles);
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * blockDim.x * N;
  const int64_t column = first_column + threadIdx.x * N;
  const int64_t last = min((tile + 1) * a.tile_rows, a.P);
  Pack<float, N> sums = {};
  if (column < a.r) {
    const auto scale = load<N>(a.scale + sample * a.r + column);
    for (int64_t row = tile * a.tile_rows + threadIdx.y; row < last; row += kBatch * blockDim.y) {
      const int left = min(last - row, int64_t{kBatch} * blockDim.y);
      const int count = (left + blockDim.y - 1) / blockDim.y;
      take<kSums>(a, (sample * a.P + row) * a.r + column, blockDim.y * a.r, count, scale, sums);
    }
  }
  if constexpr (kSums) {
    __shared__ float shared[kThreads * N];  // [blockDim.y, blockDim.x * N]
    const int width = blockDim.x * N;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      shared[thread * N + i] = sums.values[i];
    }
    __syncthreads();
    for (int c = thread; c < width && first_column + c < a.r; c += blockDim.x * blockDim.y) {
      float sum = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) {
        sum += shared[y * width + c];
      }
      a.partial[(sample * a.tiles + tile) * a.r + first_column + c] = sum;
    }
  }
}

// Columns dense: a warp takes one tile of a line of pixels, which all share a scale.
template <class B, class T, int N, bool kSums>
__global__ void __launch_bounds__(kThreads, 1) columns_kernel(const Arguments<B, T> a) {
  const uint32_t tiles = a.tiles, r = a.r;
  const uint32_t task = blockIdx.x * kWarps + threadIdx.x / kWarp;  // [S * images, r, tiles]
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t line = task / tiles, tile = task % tiles;
  const uint32_t image = line / r, column = line % r;
  if (image >= a.S * a.images) {
    return;
  }
  const uint32_t sample = image / static_cast<uint32_t>(a.images);
  Pack<float, N> scale, sums = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    scale.values[i] = a.scale[static_cast<int64_t>(sample) * r + column];
  }
  const int64_t pixel = (static_cast<int64_t>(tile) * kBatch * kWarp + lane) * N;
  const int left = max(min(a.P - pixel, int64_t{kBatch} * kWarp * N), int64_t{0});
  const int count = (left + kWarp * N - 1) / (kWarp * N);
  take<kSums>(a, line * a.P + pixel, kWarp * N, count, scale, sums);
  if constexpr (kSums) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum += sums.values[i];
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(0xffffffff, sum, distance);
    }
    if (lane == 0) {
      a.partial[(static_cast<int64_t>(image) * tiles + tile) * r + column] = sum;
    }
  }
}

// blockIdx.x is a sample and 32 of its columns. Each of kWarps rows of threads adds up a run of tiles, and the first row
// the sums of all.
__global__ void __launch_bounds__(kThreads) sum_kernel(const SumParams p) {
  __shared__ float shared[kWarps][kWarp];
  const uint32_t spans = (p.r + kWarp - 1) / kWarp;
  const int64_t sample = blockIdx.x / spans;
  const int64_t column = static_cast<int64_t>(blockIdx.x % spans) * kWarp + threadIdx.x;
  const int64_t run = (p.tiles + kWarps - 1) / kWarps;
  const int64_t last = min((threadIdx.y + 1) * run, p.tiles);
  float sum = 0;
  if (column < p.r) {
#pragma unroll 8
    for (int64_t tile = threadIdx.y * run; tile < last; ++tile) {
      sum += p.partial[(sample * p.tiles + tile) * p.stride + column];
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < p.r) {
    for (int y = 1; y < kWarps; ++y) {
      sum += shared[y][threadIdx.x];
    }
    p.dscale[sample * p.r + column] = sum;
  }
}

struct Geometry {
  bool vectors;  // all of 16 bytes of `type`
  dim3 grid, block;
  int64_t tiles, tile_rows;
};

bool fits(int64_t blocks) {
  return blocks <= std::numeric_limits<int32_t>::max();
}

Geometry geometry_of(const PointwiseParams& p) {
  Geometry g{};
  const int vector = p.type == Type::fp32 ? 4 : 8;
  const bool starts = aligned(p.b) && aligned(p.z) && aligned(p.out) && aligned(p.scale);
  g.vectors = starts && (p.columns_dense ? p.P : p.r) % vector == 0;
  const int N = g.vectors ? vector : 1;
  if (p.columns_dense) {
    g.tiles = ceil_div(p.P, kWarp * N * kBatch);
    g.block = dim3(kThreads);
    const int64_t blocks = ceil_div(p.S * p.images * p.r * g.tiles, kWarps);
    g.grid = dim3(fits(blocks * kWarps) ? blocks : 0);
  } else {
    const int64_t rows = p.images * p.P;
    const int64_t vectors = ceil_div(p.r, N);
    const int64_t spans = std::max<int64_t>(1, ceil_div(vectors, kThreads));
    g.block.x = std::max<int64_t>(1, ceil_div(vectors, spans));
    g.block.y = kThreads / g.block.x;
    g.tile_rows = g.block.y * std::max<int64_t>(kBatch, ceil_div(rows, int64_t{g.block.y} * kMostTiles));
    g.tiles = ceil_div(rows, g.tile_rows);
    g.grid = dim3(fits(p.S * g.tiles) ? p.S * g.tiles : 0, spans);
  }
  return g;
}

template <class B, class T, int N, bool kSums>
cudaError_t run(const PointwiseParams& p, const Geometry& g, cudaStream_t stream) {
  Arguments<B, T> a{static_cast<const B*>(p.b), static_cast<const T*>(p.z), p.scale, static_cast<T*>(p.out), p.partial,
                    p.S, p.images, p.P, p.r, g.tiles, g.tile_rows};
  if (p.columns_dense) {
    return launch(columns_kernel<B, T, N, kSums>, g.grid, g.block, a, stream);
  }
  a.P *= a.images;  // all rows of a sample are one
  a.images = 1;
  return launch(rows_kernel<B, T, N, kSums>, g.grid, g.block, a, stream);
}

template <class T>
cudaError_t run_as(const PointwiseParams& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Geometry g = geometry_of(p);
  if (g.grid.x == 0) {
    return cudaErrorInvalidConfiguration;
  }
  const bool sums = p.z != nullptr;
  if (p.b_type == Type::fp32 && sums) {
    return g.vectors ? run<float, T, kVector, true>(p, g, stream) : run<float, T, 1, true>(p, g, stream);
  }
  if (p.b_type == Type::fp32) {
    return g.vectors ? run<float, T, kVector, false>(p, g, stream) : run<float, T, 1, false>(p, g, stream);
  }
  if (p.b_type == p.type && !sums) {
    return g.vectors ? run<T, T, kVector, false>(p, g, stream) : run<T, T, 1, false>(p, g, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace

int64_t pointwise_tiles(const PointwiseParams& params) {
  return geometry_of(params).tiles * (params.columns_dense ? params.images : 1);
}

cudaError_t pointwise(const PointwiseParams& params, cudaStream_t stream) {
  if (params.S * params.images * params.P * params.r == 0) {
    return cudaSuccess;
  }
  switch (params.type) {
    case Type::fp32:
      return run_as<float>(params, stream);
    case Type::fp16:
      return run_as<__half>(params, stream);
    case Type::bf16:
      return run_as<__nv_bfloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t sum_tiles(const SumParams& params, cudaStream_t stream) {
  const int64_t blocks = params.S * ceil_div(params.r, kWarp);
  if (blocks == 0) {
    return cudaSuccess;
  }
  return fits(blocks) ? launch(sum_kernel, dim3(blocks), dim3(kWarp, kWarps), params, stream)
                      : cudaErrorInvalidConfiguration;
}

}  // namespace svdiff::cuda
