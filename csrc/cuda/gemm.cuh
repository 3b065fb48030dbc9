// The GEMMs of gemm.h as CUTLASS 3 kernels, for any architecture whose traits name tiles and schedules. Both are warp
// specialised: TMA fills shared memory, tensor cores multiply, a tree of visitors makes the result of the accumulator.
#pragma once

#include "gemm.h"
#include "pack.cuh"

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include <limits>

namespace svdiff::cuda {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kAlignment = 8;  // elements in 16 bytes
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using Accumulator = cutlass::epilogue::fusion::Sm90AccFetch;
using PerColumn = cute::Stride<_0, _1, int64_t>;  // one row of numbers for each sample

template <template <class> class Op, class Out, class... Inputs>
using Compute = fusion::Sm90EVT<fusion::Sm90Compute<Op, Out, float, kRound>, Inputs...>;

// One kernel of D [S, P, M] from A [S, P, K] and B, with C read where it is not void.
template <class Traits, class A, class LayoutB, class C, class D, class Visitor>
struct Gemm {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Traits::Arch, cutlass::arch::OpClassTensorOp, typename Traits::TileShape, typename Traits::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, C, RowMajor, kAlignment, D, RowMajor, kAlignment,
      typename Traits::EpilogueSchedule, Visitor>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Traits::Arch, cutlass::arch::OpClassTensorOp, A, RowMajor, kAlignment, A, LayoutB, kAlignment, float,
      typename Traits::TileShape, typename Traits::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Traits::MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Shape = typename Kernel::ProblemShape;
};

// Of a single batch the stride is 0: so all samples read the same factor.
template <class Stride>
Stride packed(int64_t rows, int64_t columns, int64_t batches) {
  return cutlass::make_cute_packed_stride(
      Stride{}, cute::make_shape(static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(batches)));
}

template <class... Sizes>
bool fits_int(Sizes... sizes) {
  return ((sizes <= std::numeric_limits<int>::max()) && ...);
}

template <class Device>
cudaError_t run(typename Device::Arguments& arguments, const Allocate& allocate, cudaStream_t stream) {
  if (Device::can_implement(arguments) != cutlass::Status::kSuccess) {
    return cudaErrorNotSupported;
  }
  const size_t bytes = Device::get_workspace_size(arguments);
  void* workspace = bytes > 0 ? allocate(bytes) : nullptr;
  Device device;
  const auto status = device.run(arguments, workspace, stream);
  if (status == cutlass::Status::kSuccess) {
    return cudaSuccess;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? cudaErrorUnknown : error;
}

// What the tile scheduler wants to know of the current device.
inline cutlass::KernelHardwareInfo hardware() {
  cutlass::KernelHardwareInfo info;
  cudaGetDevice(&info.device_id);
  cudaDeviceGetAttribute(&info.sm_count, cudaDevAttrMultiProcessorCount, info.device_id);
  return info;
}

template <class Traits, class In, class Out>
cudaError_t product_as(const ProductParams& p, const Allocate& allocate, cudaStream_t stream) {
  using Tile = typename Traits::TileShape;
  // Without a pointer a broadcast gives its default: scale 1, bias 0.
  using Scale = Compute<cutlass::multiplies, float, fusion::Sm90ScalarBroadcast<float>,
                        fusion::Sm90RowBroadcast<0, Tile, float, float, PerColumn>>;
  using Bias = fusion::Sm90RowBroadcast<0, Tile, Out, float>;
  using Visitor = Compute<cutlass::homogeneous_multiply_add, Out, Scale, Accumulator, Bias>;
  using G = Gemm<Traits, In, ColumnMajor, void, Out, Visitor>;
  using Kernel = typename G::Kernel;
  if (!fits_int(p.S, p.P, p.M, p.K) || !aligned(p.x) || !aligned(p.W) || !aligned(p.y)) {
    return cudaErrorNotSupported;
  }
  typename G::Device::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(p.P), static_cast<int>(p.M), static_cast<int>(p.K), static_cast<int>(p.S)},
      {static_cast<const In*>(p.x), packed<typename Kernel::StrideA>(p.P, p.K, p.S), static_cast<const In*>(p.W),
       packed<typename Kernel::StrideB>(p.M, p.K, 1)},
      {{{{{p.alpha}}, {p.scale, 1.0f, {_0{}, _1{}, p.M}}, {}}, {}, {static_cast<const Out*>(p.bias), Out(0)}, {}},
       nullptr, {}, static_cast<Out*>(p.y), packed<typename Kernel::StrideD>(p.P, p.M, p.S)},
      hardware()};
  return run<typename G::Device>(arguments, allocate, stream);
}

template <class Traits>
cudaError_t product_with(const ProductParams& p, const Allocate& allocate, cudaStream_t stream) {
  using cutlass::bfloat16_t;
  using cutlass::half_t;
  if (p.in == Half::bf16) {
    return p.out == Half::bf16 ? product_as<Traits, bfloat16_t, bfloat16_t>(p, allocate, stream)
                               : cudaErrorNotSupported;
  }
  return p.out == Half::bf16 ? product_as<Traits, half_t, bfloat16_t>(p, allocate, stream)
                             : product_as<Traits, half_t, half_t>(p, allocate, stream);
}

template <class Traits, class T>
cudaError_t backward_as(const BackwardParams& p, const Allocate& allocate, cudaStream_t stream) {
  using Tile = typename Traits::TileShape;
  // Not final: each tile of rows writes its own sums, for a later kernel to add up in order. What lies outside of the
  // matrices is read as zero, so that no sum needs to ask.
  using Sums = fusion::Sm90EVT<
      fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRound,
                               cute::Stride<_0, _1, _0>, 4, /*EnableNullptr=*/false, /*FinalReduction=*/false,
                               /*VisitCheckOOB=*/false>,
      Compute<cutlass::multiplies, float, fusion::Sm90SrcFetch<T>, fusion::Sm90SplitTreeFetch>>;
  using Scaled = Compute<cutlass::multiplies, T, fusion::Sm90RowBroadcast<0, Tile, float, float, PerColumn, 4, false>,
                         fusion::Sm90SplitTreeFetch>;
  using G = Gemm<Traits, T, RowMajor, T, T, fusion::Sm90SplitTreeVisitor<Accumulator, Scaled, Sums>>;
  using Kernel = typename G::Kernel;
  if (!fits_int(p.S, p.P, p.M, p.R) || !aligned(p.dy) || !aligned(p.U) || !aligned(p.z) || !aligned(p.dz)) {
    return cudaErrorNotSupported;
  }
  const auto stride = packed<typename Kernel::StrideD>(p.P, p.R, p.S);
  typename G::Device::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(p.P), static_cast<int>(p.R), static_cast<int>(p.M), static_cast<int>(p.S)},
      {static_cast<const T*>(p.dy), packed<typename Kernel::StrideA>(p.P, p.M, p.S), static_cast<const T*>(p.U),
       packed<typename Kernel::StrideB>(p.R, p.M, 1)},
      {{{}, {{{}, {}, {}}, {p.partial}}, {{p.scale, 1.0f, {_0{}, _1{}, p.R}}, {}, {}}},
       static_cast<const T*>(p.z), stride, static_cast<T*>(p.dz), stride},
      hardware()};
  return run<typename G::Device>(arguments, allocate, stream);
}

template <class Traits>
cudaError_t backward_with(const BackwardParams& p, const Allocate& allocate, cudaStream_t stream) {
  return p.type == Half::fp16 ? backward_as<Traits, cutlass::half_t>(p, allocate, stream)
                              : backward_as<Traits, cutlass::bfloat16_t>(p, allocate, stream);
}

template <class Traits>
Tiles tiles_with(int64_t P, int64_t R) {
  constexpr typename Traits::TileShape tile;
  constexpr int64_t rows = cute::size<0>(tile), columns = cute::size<1>(tile);
  return {ceil_div(P, rows), ceil_div(R, columns) * columns};
}

}  // namespace svdiff::cuda
