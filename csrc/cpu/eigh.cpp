// svdiff::eigh on CPUs: each core solves matrices of its own, one after another.
//
// LAPACK's own threads gain next to nothing here, since the reduction to tridiagonal form waits for memory, and lose
// much where another process has one of the cores.

#include "../ops.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

namespace svdiff {

using at::Tensor;

constexpr int64_t kManyThreadsFrom = 2048;

std::tuple<Tensor, Tensor> eigh(const Tensor& G) {
  TORCH_CHECK(
      G.dim() == 3 && G.size(1) == G.size(2) && (G.scalar_type() == at::kDouble || G.scalar_type() == at::kFloat),
      "eigh: expected fp32 or fp64 matrices [B, n, n], not ", G.sizes(), " of ", G.scalar_type());
  Tensor values = G.new_empty({G.size(0), G.size(1)});
  Tensor vectors = at::empty_like(G, at::MemoryFormat::Contiguous);
  // One matrix, too, is solved by one thread: inside of a parallel region LAPACK makes no others.
  const int64_t items = G.size(1) > kManyThreadsFrom ? G.size(0) : std::max<int64_t>(G.size(0), 2);
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_graph;
    for (int64_t i = begin; i < std::min(end, G.size(0)); ++i) {
      const auto [found, columns] = at::linalg_eigh(G[i]);
      values[i].copy_(found);
      vectors[i].copy_(columns);
    }
  });
  return {values, vectors};
}

TORCH_LIBRARY_IMPL(svdiff, CPU, m) { m.impl("eigh", eigh); }

}  // namespace svdiff
