#include "gemm.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace svdiff {
namespace {

using at::Tensor;

// Elements of a half-precision W that are held in fp32 at a time: they should stay in the shared cache.
constexpr int64_t kTile = 1 << 20;

// Operations below which a product is over before oneDNN has prepared it.
constexpr int64_t kPreparing = 8'000'000;

// Up to here an image has so few pixels that a product of its own is slow.
constexpr int64_t kFewPixels = 32;

// From here on a product is worth copying images into one matrix and out of it, if that makes it faster.
constexpr int64_t kWorthCopying = 256;

struct Native {
  bool bf16 = true, fp16 = true;
  bool intel = true;  // where MKL, which torch multiplies fp32 with, uses all that the CPU has
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
  if (__get_cpuid(0, &a, &b, &c, &d)) {
    char vendor[12];
    std::memcpy(vendor, &b, 4);
    std::memcpy(vendor + 4, &d, 4);
    std::memcpy(vendor + 8, &c, 4);
    native.intel = std::memcmp(vendor, "GenuineIntel", 12) == 0;
  }
#endif
  return native;
}

const Native& native() {
  static const Native found = detect();
  return found;
}

bool suits_onednn(at::ScalarType type, int64_t operations) {
  return type == at::kFloat && operations >= kPreparing && prefers_onednn();
}

int64_t operations_of(const Tensor& a, const Tensor& b) {
  return 2 * a.size(0) * a.size(1) * b.size(1);
}

// a @ b + bias by oneDNN, of which torch has no other door for fp32; undefined if this torch does not have that either.
Tensor by_onednn(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  static const auto linear = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!linear) {
    return {};
  }
  c10::Stack stack{a, b.t(), bias, "none", c10::List<std::optional<at::Scalar>>(), ""};
  linear->callBoxed(stack);
  return stack.front().toTensor();
}

// a [m, k] @ b [k, n] (+ bias [n]).
Tensor gemm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias = std::nullopt) {
  if (suits_onednn(a.scalar_type(), operations_of(a, b))) {
    if (Tensor y = by_onednn(a, b, bias); y.defined()) {
      return y;
    }
  }
  return bias ? at::addmm(*bias, a, b) : at::mm(a, b);
}

// y = a @ b, or if not `fresh` y += a @ b.
void gemm_into(Tensor& y, const Tensor& a, const Tensor& b, bool fresh) {
  if (suits_onednn(a.scalar_type(), operations_of(a, b))) {
    const Tensor product = gemm(a, b);
    fresh ? y.copy_(product) : y.add_(product);
  } else {
    fresh ? at::mm_out(y, a, b) : y.addmm_(a, b);
  }
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
        transposed ? gemm_into(part, block, inputs[i], true) : gemm_into(part, inputs[i], block.t(), true);
        continue;
      }
      const Tensor a = inputs[i].slice(columns, first, last);
      Tensor part = y[i];
      const Tensor &left = transposed ? block.t() : a, &right = transposed ? a : block;
      gemm_into(part, left, right, first == 0);
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

bool prefers_onednn() {
  static const bool faster = !native().intel && at::hasMKL() && at::hasMKLDNN();
  return faster && at::globalContext().userEnabledMkldnn();
}

bool widens(at::ScalarType type) {
  return (type == at::kBFloat16 && !native().bf16) || (type == at::kHalf && !native().fp16);
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
    const Tensor y = gemm(t.reshape({count_rows(t), t.size(-1)}), W, bias);
    auto sizes = t.sizes().vec();
    sizes.back() = W.size(1);
    return y.view(sizes);
  }
  const int64_t B = t.size(0), P = t.size(1), k = t.size(2), n = W.size(1);
  const Tensor Wt = W.t(), tc = t.transpose(1, 2);  // [n, k], [B, k, P]
  const int64_t operations = 2 * B * P * k * n;
  const bool large = std::min(k, n) >= kWorthCopying && operations >= kPreparing;
  if (B == 1 || (large && (P <= kFewPixels || suits_onednn(W.scalar_type(), operations)))) {
    // One product for all images: their columns side by side.
    const Tensor joined = gemm(Wt, tc.transpose(0, 1).reshape({k, B * P})).view({n, B, P}).transpose(0, 1);
    Tensor y = B == 1 ? joined : at::empty({B, n, P}, t.options());
    if (bias) {
      at::add_out(y, joined, bias->unsqueeze(1));
    } else if (B > 1) {
      y.copy_(joined);
    }
    return y.transpose(1, 2);
  }
  const Tensor Wb = Wt.expand({B, n, k});
  return (bias ? at::baddbmm(bias->unsqueeze(1), Wb, tc) : at::bmm(Wb, tc)).transpose(1, 2);
}

}  // namespace svdiff
