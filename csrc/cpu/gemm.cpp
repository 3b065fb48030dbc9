#include "gemm.h"

#include <ATen/ATen.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace svdiff {
namespace {

using at::Tensor;

// Elements of a half-precision W that are held in fp32 at a time: they should stay in the shared cache.
constexpr int64_t kTile = 1 << 20;

struct Native {
  bool bf16 = true, fp16 = true;
};

Native detect() {
  Native native;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, d0 = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    d0 = d;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    a1 = a;
  }
  native.bf16 = (a1 >> 5 & 1) || (d0 >> 22 & 1);   // AVX512_BF16, AMX_BF16
  native.fp16 = (d0 >> 23 & 1) || (a1 >> 21 & 1);  // AVX512_FP16, AMX_FP16
#endif
  return native;
}

// The lines of a dense matrix [lines, length] in fp32, a block at a time: use(first, last, block).
template <typename Use>
void for_each_block(const Tensor& matrix, const Use& use) {
  const int64_t lines = matrix.size(0), most = lines_at_a_time(lines, matrix.size(1));
  const Tensor scratch = at::empty({most, matrix.size(1)}, matrix.options().dtype(at::kFloat));
  for (int64_t first = 0; first < lines; first += most) {
    const int64_t last = std::min(first + most, lines);
    Tensor block = scratch.slice(0, 0, last - first);
    block.copy_(matrix.slice(0, first, last));
    use(first, last, block);
  }
}

// y [T, n] = a [T, k] @ W [k, n] in fp32, images of one layer at a time; `transposed` gives y [n, P] for a [k, P].
Tensor wide_mm(const std::vector<Tensor>& inputs, const Tensor& W, bool transposed) {
  const int64_t k = W.size(0), n = W.size(1), rows = inputs.front().size(transposed ? 1 : 0);
  const int64_t images = static_cast<int64_t>(inputs.size());
  const auto options = inputs.front().options();
  Tensor y = transposed ? at::empty({images, n, rows}, options) : at::empty({images, rows, n}, options);
  if (k == 0) {
    return y.zero_();
  }
  const int64_t columns = transposed ? 0 : 1;  // the dimension of inputs that k runs along, and of outputs that n does
  const bool by_outputs = W.stride(0) == 1;  // the transpose is the dense one: its lines are columns of W
  for_each_block(by_outputs ? W.t() : W, [&](int64_t first, int64_t last, const Tensor& block) {
    for (int64_t i = 0; i < images; ++i) {
      if (by_outputs) {
        Tensor part = y[i].slice(columns, first, last);
        transposed ? at::mm_out(part, block, inputs[i]) : at::mm_out(part, inputs[i], block.t());
        continue;
      }
      const Tensor a = inputs[i].slice(columns, first, last);
      Tensor part = y[i];
      const Tensor &left = transposed ? block.t() : a, &right = transposed ? a : block;
      first == 0 ? at::mm_out(part, left, right) : part.addmm_(left, right);
    }
  });
  return y;
}

// `product` in fp32 throughout, for W of half precision.
Tensor wide_product(const Tensor& t, const Tensor& W, const std::optional<Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const bool columns = columns_dense(t);
  const Tensor wide = t.to(at::kFloat);  // strides are kept
  Tensor y = columns ? wide_mm(wide.transpose(1, 2).unbind(0), W, true)
                     : wide_mm({wide.reshape({count_rows(t), t.size(-1)})}, W, false)[0];
  if (bias) {
    y.add_(columns ? bias->to(at::kFloat).unsqueeze(1) : bias->to(at::kFloat));
  }
  if (columns) {
    return y.transpose(1, 2);
  }
  auto sizes = t.sizes().vec();
  sizes.back() = W.size(1);
  return y.view(sizes);
}

}  // namespace

bool widens(at::ScalarType type) {
  static const Native native = detect();
  return (type == at::kBFloat16 && !native.bf16) || (type == at::kHalf && !native.fp16);
}

int64_t lines_at_a_time(int64_t lines, int64_t length) {
  // Never more than a quarter of it, however small it is.
  return std::max<int64_t>(1, std::min(kTile / std::max<int64_t>(1, length), (lines + 3) / 4));
}

Tensor product(const Tensor& t, const Tensor& W, const std::optional<Tensor>& bias, at::ScalarType out) {
  if (t.numel() == 0 && t.size(-1) != 0) {
    auto sizes = t.sizes().vec();
    sizes.back() = W.size(1);
    return at::empty(sizes, t.options().dtype(out));
  }
  if (widens(W.scalar_type()) || t.scalar_type() != W.scalar_type() || out != W.scalar_type()) {
    return wide_product(t, W, bias).to(out);
  }
  if (!columns_dense(t)) {
    const Tensor t2 = t.reshape({count_rows(t), t.size(-1)});
    Tensor y = bias ? at::addmm(*bias, t2, W) : at::mm(t2, W);
    auto sizes = t.sizes().vec();
    sizes.back() = W.size(1);
    return y.view(sizes);
  }
  const Tensor tc = t.transpose(1, 2), Wt = W.t();  // [B, k, P], [n, k]
  if (t.size(0) == 1) {
    const Tensor y = bias ? at::addmm(bias->unsqueeze(1), Wt, tc[0]) : at::mm(Wt, tc[0]);
    return y.unsqueeze(0).transpose(1, 2);
  }
  const Tensor Wb = Wt.expand({t.size(0), Wt.size(0), Wt.size(1)});
  return (bias ? at::baddbmm(bias->unsqueeze(1), Wb, tc) : at::bmm(Wb, tc)).transpose(1, 2);
}

}  // namespace svdiff
