// The GEMMs of gemm.h on Hopper: TMA and wgmma. Compiled for sm_90a alone.

#include "gemm.cuh"

namespace svdiff::cuda::sm90 {
namespace {

// One block a cluster: layers of a few thousand rows have too few tiles to give any away to a cluster's rounding.
struct ProductTraits {
  using Arch = cutlass::arch::Sm90;
  using TileShape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<_1, _1, _1>;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

// The sums of 128 columns would not fit the registers of a thread beside its accumulator.
struct BackwardTraits : ProductTraits {
  using TileShape = cute::Shape<cute::_128, cute::_64, cute::_64>;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
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

}  // namespace svdiff::cuda::sm90
