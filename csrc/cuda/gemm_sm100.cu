// The GEMMs of gemm.h on Blackwell: TMA and tcgen05. Compiled for sm_100a alone.

#include "gemm.cuh"

namespace svdiff::cuda::sm100 {
namespace {

// One block a cluster: layers of a few thousand rows have too few tiles to give any away to a cluster's rounding.
struct ProductTraits {
  using Arch = cutlass::arch::Sm100;
  using TileShape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<_1, _1, _1>;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecialized1SmSm100;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized1Sm;
};

// Of 128 columns a thread would hold the sums of all: it has one row of the accumulator.
struct BackwardTraits : ProductTraits {
  using TileShape = cute::Shape<cute::_128, cute::_64, cute::_64>;
};

}  // namespace

cudaError_t product(const ProductParams& params, const Allocate& allocate, cudaStream_t stream) {
  return product_with<ProductTraits>(params, allocate, stream);
}

cudaError_t backward(const BackwardParams& params, const Allocate& allocate, cudaStream_t stream) {
  return backward_with<BackwardTraits>(params, allocate, stream);
}

Tiles backward_tiles(int64_t P, int64_t R) {
  return tiles_with<BackwardTraits>(P, R);
}

}  // namespace svdiff::cuda::sm100
