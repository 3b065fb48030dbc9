// torch.ops.svdiff_cuda: svdiff's ops on NVIDIA GPUs. Each picks, for the tensors it is given, a GEMM with its own
// epilogue (gemm.h) or a vendor's GEMM with kernels beside it (expand_pointwise.h).
//
// All work goes to the current stream, nothing waits for the host, and memory comes from torch's allocator: a CUDA
// graph may capture any of it.

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "bank.h"
#include "expand_pointwise.h"
#include "gemm.h"

namespace svdiff::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;

// Kernels go to this device, and products keep the types that they are asked for.
struct Scope {
  explicit Scope(c10::Device device) : guard(device) {}
  c10::cuda::CUDAGuard guard;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

bool is_half(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16;
}

bool is_served(at::ScalarType type) {
  return is_half(type) || type == at::kFloat;
}

// Factors may not be converted on the way: U in fp16 with z or dy in bf16 is for another backend.
bool serves_expand(const Tensor& z, const Tensor& U, OptionalType dtype) {
  return z.scalar_type() == U.scalar_type() && is_served(z.scalar_type()) && is_served(dtype.value_or(z.scalar_type()));
}

bool serves_expand_backward(const Tensor& dy, const OptionalTensor& z, const Tensor& U) {
  const auto type = dy.scalar_type();
  return type == U.scalar_type() && (!z || z->scalar_type() == type) && is_served(type);
}

Type type_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? Type::fp32 : t.scalar_type() == at::kHalf ? Type::fp16 : Type::bf16;
}

Half half_of(const Tensor& t) {
  return t.scalar_type() == at::kHalf ? Half::fp16 : Half::bf16;
}

// Is t [B, P, k] with neighbouring rows, not columns, next to one another: what a conv in NCHW is, seen as rows?
bool columns_dense(const Tensor& t) {
  return t.dim() == 3 && t.stride(1) == 1 && t.stride(2) != 1;
}

// t in the layout asked for; a view where it already is.
Tensor dense(const Tensor& t, bool columns) {
  return columns ? t.transpose(1, 2).contiguous().transpose(1, 2) : t.contiguous();
}

// An uninitialised [*, columns], laid out as t is.
Tensor empty_rows_like(const Tensor& t, int64_t columns, at::ScalarType type) {
  if (columns_dense(t)) {
    return at::empty({t.size(0), columns, t.size(1)}, t.options().dtype(type)).transpose(1, 2);
  }
  auto size = t.sizes().vec();
  size.back() = columns;
  return at::empty(size, t.options().dtype(type));
}

int64_t count_rows(const Tensor& t) {
  return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
}

Tensor dense_scale(const Tensor& scale) {
  return scale.to(at::kFloat).contiguous();
}

void check(
    const Tensor& rows, int64_t columns, const Tensor& matrix, const Tensor& scale, int64_t r, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() > 0 && matrix.dim() == 2 && rows.size(-1) == columns, "svdiff_cuda: ", name,
                    " has shape ", rows.sizes(), ", expected [*, ", columns, "]");
  TORCH_CHECK_VALUE(scale.dim() == 2 && scale.size(1) == r, "svdiff_cuda: scale has shape ", scale.sizes(),
                    ", expected [S, ", r, "]");
  const int64_t S = scale.size(0), first = rows.dim() == 1 ? 1 : rows.size(0);
  TORCH_CHECK_VALUE(S > 0 && first % S == 0, "svdiff_cuda: ", S, " samples do not split ", first, " evenly");
}

void check_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others) {
    TORCH_CHECK_VALUE(t == nullptr || t->device() == first.device(), "svdiff_cuda: tensors on ", first.device(),
                      " and ", t->device());
  }
}

const Tensor* pointer(const OptionalTensor& t) {
  return t ? &*t : nullptr;
}

// The GEMMs that the current device has tensor cores for; they serve half precision with dense rows.
struct Gemms {
  decltype(&sm90::product) product = nullptr;
  decltype(&sm90::backward) backward = nullptr;
  decltype(&sm90::backward_tiles) backward_tiles = nullptr;
};

Gemms gemms_of(const Tensor& t) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device()));
#ifdef SVDIFF_SM90
  if (major == 9 && minor == 0) {
    return {sm90::product, sm90::backward, sm90::backward_tiles};
  }
#endif
#ifdef SVDIFF_SM100
  if (major == 10 && minor == 0) {
    return {sm100::product, sm100::backward, sm100::backward_tiles};
  }
#endif
  return {};
}

// Whether a kernel was launched; one that cannot serve these sizes or addresses says so before that.
bool launched(cudaError_t status) {
  if (status == cudaErrorNotSupported) {
    return false;
  }
  C10_CUDA_CHECK(status);
  return true;
}

// A kernel's workspace comes from torch, and outlives the launch by the order of the stream.
Allocate allocator(const Tensor& like) {
  return [options = like.options().dtype(at::kByte), kept = std::vector<Tensor>()](size_t bytes) mutable {
    kept.push_back(at::empty({static_cast<int64_t>(bytes)}, options));
    return kept.back().mutable_data_ptr();
  };
}

// y = alpha * scale * (x @ W^T) + bias by tensor cores, for dense x [T, K]; nothing where they cannot.
bool fused_product(
    const Tensor& x,
    const Tensor& W,
    const OptionalTensor& scale,
    const OptionalTensor& bias,
    double alpha,
    const Tensor& y) {
  const bool types = is_half(x.scalar_type()) && W.scalar_type() == x.scalar_type() && is_half(y.scalar_type());
  const Gemms gemms = types ? gemms_of(x) : Gemms{};
  if (gemms.product == nullptr) {
    return false;
  }
  ProductParams p{};
  p.in = half_of(x);
  p.out = half_of(y);
  p.x = x.const_data_ptr();
  p.W = W.const_data_ptr();
  p.scale = scale ? scale->const_data_ptr<float>() : nullptr;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.alpha = static_cast<float>(alpha);
  p.S = scale ? scale->size(0) : 1;
  p.P = count_rows(x) / p.S;
  p.M = W.size(0);
  p.K = W.size(1);
  return launched(gemms.product(p, allocator(x), c10::cuda::getCurrentCUDAStream()));
}

// rows @ W in `type`, in the layout of rows, which are dense in it. Of half precision, fp32 is the unrounded sum.
Tensor vendor_product(const Tensor& rows, const Tensor& W, at::ScalarType type) {
  const bool widens = type != rows.scalar_type();
  if (!columns_dense(rows)) {
    const Tensor flat = rows.reshape({-1, rows.size(-1)});
    auto size = rows.sizes().vec();
    size.back() = W.size(1);
    return (widens ? at::mm(flat, W, type) : at::mm(flat, W)).view(size);
  }
  const Tensor left = W.t().expand({rows.size(0), W.size(1), W.size(0)}), right = rows.transpose(1, 2);
  return (widens ? at::bmm(left, right, type) : at::bmm(left, right)).transpose(1, 2);
}

// b, z and out as the kernels see them; all are dense in the same layout, and out is of the type of z, if there is one.
PointwiseParams pointwise_params(const Tensor& b, const OptionalTensor& z, const Tensor& scale, const Tensor& out) {
  PointwiseParams p{};
  p.b_type = type_of(b);
  p.type = type_of(z ? *z : out);
  p.columns_dense = columns_dense(b);
  p.b = b.const_data_ptr();
  p.z = z ? z->const_data_ptr() : nullptr;
  p.scale = scale.const_data_ptr<float>();
  p.out = out.defined() ? out.mutable_data_ptr() : nullptr;
  p.S = scale.size(0);
  p.images = p.columns_dense ? b.size(0) / p.S : 1;
  p.P = p.columns_dense ? b.size(1) : count_rows(b) / p.S;
  p.r = b.size(-1);
  return p;
}

// b * scale[sample] in `type`.
Tensor scaled(const Tensor& b, const Tensor& scale, at::ScalarType type) {
  const Tensor out = empty_rows_like(b, b.size(-1), type);
  C10_CUDA_CHECK(pointwise(pointwise_params(b, std::nullopt, scale, out), c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor expand(
    const Tensor& z, const Tensor& U, const Tensor& scale, const OptionalTensor& bias, OptionalType dtype) {
  check(z, U.size(-1), U, scale, U.size(-1), "z");
  check_device(z, {&U, &scale, pointer(bias)});
  TORCH_CHECK_TYPE(serves_expand(z, U, dtype), "svdiff_cuda: no kernel of expand for z in ", z.scalar_type(),
                   " and U in ", U.scalar_type());
  const Scope scope(z.device());
  const auto type = z.scalar_type(), out = dtype.value_or(type);
  const bool columns = columns_dense(z);
  if (z.numel() == 0) {
    const Tensor y = empty_rows_like(z, U.size(0), out).zero_();
    return bias ? y.add_(*bias) : y;
  }
  const Tensor zs = scaled(dense(z, columns), dense_scale(scale), type);
  const OptionalTensor b = bias ? OptionalTensor(bias->to(out).contiguous()) : std::nullopt;
  if (!columns) {
    const Tensor y = empty_rows_like(zs, U.size(0), out);
    if (fused_product(zs, U.contiguous(), std::nullopt, b, 1.0, y)) {
      return y;
    }
    if (out == type) {
      return at::linear(zs, U, b);
    }
  } else if (out == type) {
    const Tensor left = U.expand({z.size(0), U.size(0), U.size(1)}), right = zs.transpose(1, 2);
    return (b ? at::baddbmm(b->unsqueeze(1), left, right) : at::bmm(left, right)).transpose(1, 2);
  }
  Tensor y = vendor_product(zs, U.t(), at::kFloat);
  return (bias ? y.add_(*bias) : y).to(out);
}

std::tuple<Tensor, Tensor> expand_backward(
    const Tensor& dy, const OptionalTensor& z, const Tensor& U, const Tensor& scale, bool need_dz) {
  check(dy, U.size(0), U, scale, U.size(-1), "dy");
  check_device(dy, {&U, &scale, pointer(z)});
  TORCH_CHECK_TYPE(serves_expand_backward(dy, z, U), "svdiff_cuda: no kernel of expand_backward for dy in ",
                   dy.scalar_type(), " and U in ", U.scalar_type());
  const Scope scope(dy.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto type = dy.scalar_type();
  const bool columns = columns_dense(dy);
  const Tensor s = dense_scale(scale), rows = dense(dy, columns), none = at::empty({0}, dy.options());
  const int64_t S = s.size(0), r = s.size(1);
  if (!z) {
    return {need_dz ? scaled(vendor_product(rows, U, at::kFloat), s, type) : none, at::empty({0}, scale.options())};
  }
  check(*z, r, U, scale, r, "z");
  TORCH_CHECK_VALUE(z->sizes().slice(0, z->dim() - 1) == dy.sizes().slice(0, dy.dim() - 1), "svdiff_cuda: z has shape ",
                    z->sizes(), ", dy ", dy.sizes());
  const Tensor kept = dense(*z, columns);
  const Tensor dscale = at::empty({S, r}, s.options());
  Tensor dz, partial;
  SumParams sums{};
  const auto finish = [&] {
    sums.partial = partial.const_data_ptr<float>();
    sums.dscale = dscale.mutable_data_ptr<float>();
    sums.S = S;
    sums.r = r;
    C10_CUDA_CHECK(sum_tiles(sums, stream));
    return std::make_tuple(need_dz ? dz : none, dscale.to(scale.scalar_type()));
  };
  const Gemms gemms = is_half(type) && !columns && dy.numel() > 0 && r > 0 ? gemms_of(dy) : Gemms{};
  if (gemms.backward != nullptr) {
    dz = empty_rows_like(rows, r, type);  // the kernel writes it even where it is not wanted
    const int64_t P = count_rows(rows) / S;
    const Tiles tiles = gemms.backward_tiles(P, r);
    partial = at::empty({S, tiles.count, tiles.stride}, s.options());
    const Tensor factor = U.contiguous();
    BackwardParams p{};
    p.type = half_of(dy);
    p.dy = rows.const_data_ptr();
    p.U = factor.const_data_ptr();
    p.z = kept.const_data_ptr();
    p.scale = s.const_data_ptr<float>();
    p.dz = dz.mutable_data_ptr();
    p.partial = partial.mutable_data_ptr<float>();
    p.S = S;
    p.P = P;
    p.M = U.size(0);
    p.R = r;
    sums.tiles = tiles.count;
    sums.stride = tiles.stride;
    if (launched(gemms.backward(p, allocator(dy), stream))) {
      return finish();
    }
  }
  const Tensor b = vendor_product(rows, U, at::kFloat);
  dz = need_dz ? empty_rows_like(rows, r, type) : Tensor();
  PointwiseParams p = pointwise_params(b, kept, s, dz);
  sums.tiles = pointwise_tiles(p);
  sums.stride = r;
  partial = at::empty({S, sums.tiles, r}, s.options());
  p.partial = partial.mutable_data_ptr<float>();
  C10_CUDA_CHECK(pointwise(p, stream));
  return finish();
}

// alpha * scale[sample] * (x @ Vh^T), for x [*, N] and Vh [r, N]: what expand needs, where nothing needs z itself.
Tensor project(const Tensor& x, const Tensor& Vh, const Tensor& scale, OptionalType dtype, double alpha) {
  check(x, Vh.size(-1), Vh, scale, Vh.size(0), "x");
  check_device(x, {&Vh, &scale});
  TORCH_CHECK_TYPE(serves_expand(x, Vh, dtype), "svdiff_cuda: no kernel of project for x in ", x.scalar_type(),
                   " and Vh in ", Vh.scalar_type());
  const Scope scope(x.device());
  const auto type = dtype.value_or(x.scalar_type());
  const Tensor rows = x.contiguous(), s = dense_scale(scale);
  const Tensor y = empty_rows_like(rows, Vh.size(0), type);
  if (y.numel() == 0) {
    return y;
  }
  if (x.numel() == 0) {
    return y.zero_();
  }
  if (fused_product(rows, Vh.contiguous(), s, std::nullopt, alpha, y)) {
    return y;
  }
  return scaled(vendor_product(rows, Vh.t(), at::kFloat), at::mul(s, alpha), type);
}

void check_mix(const Tensor& base, const Tensor& mix, int64_t R) {
  TORCH_CHECK_TYPE(base.scalar_type() == at::kFloat && mix.scalar_type() == at::kFloat,
                   "svdiff_cuda: a bank is in fp32, not ", base.scalar_type(), " with a mix in ", mix.scalar_type());
  TORCH_CHECK_VALUE(mix.dim() == 1 || mix.dim() == 2, "svdiff_cuda: mix has shape ", mix.sizes(),
                    ", expected [A] or [S, A]");
  TORCH_CHECK_VALUE(base.size(-1) == R, "svdiff_cuda: shape ", base.sizes(), ", expected [", R, "]");
}

// See gains in svdiff_kernels/ops.py.
std::tuple<Tensor, Tensor> gains_of(const Tensor& base, const Tensor& floor, const Tensor& mix, at::TensorList deltas) {
  const int64_t R = base.numel(), A = mix.size(-1), S = mix.dim() == 2 ? mix.size(0) : 1;
  check_mix(base, mix, R);
  TORCH_CHECK_VALUE(static_cast<int64_t>(deltas.size()) == 2 * A, "svdiff_cuda: ", deltas.size(),
                    " deltas, expected two for ", A, " adapters");
  check_device(base, {&floor, &mix});
  const Scope scope(base.device());
  const Tensor start = base.contiguous(), bottom = floor.contiguous(), weights = mix.contiguous();
  std::vector<Tensor> kept;
  for (const Tensor& delta : deltas) {
    check_device(base, {&delta});
    TORCH_CHECK_TYPE(delta.scalar_type() == at::kFloat, "svdiff_cuda: a delta in ", delta.scalar_type());
    kept.push_back(delta.contiguous());
  }
  for (int64_t a = 0; a < A; ++a) {
    TORCH_CHECK_VALUE(kept[2 * a].numel() == kept[0].numel() && kept[2 * a].numel() + kept[2 * a + 1].numel() == R,
                      "svdiff_cuda: the deltas of adapter ", a, " have ", kept[2 * a].numel(), " and ",
                      kept[2 * a + 1].numel(), " numbers, expected ", R, " in all");
  }
  auto size = mix.sizes().vec();
  size.back() = R;
  const Tensor gain = at::empty(size, base.options()), held = at::empty(size, base.options().dtype(at::kBool));
  GainsParams p{};
  p.gain = gain.mutable_data_ptr<float>();
  p.held = held.mutable_data_ptr<bool>();
  p.S = S;
  p.R = R;
  p.split = A > 0 ? kept[0].numel() : R;
  p.stride_ms = A;
  int64_t first = 0;
  do {
    const int64_t last = std::min<int64_t>(first + kMostAdapters, A);
    p.start = first == 0 ? start.const_data_ptr<float>() : p.gain;
    p.stride_ss = first == 0 ? 0 : R;
    p.floor = last == A ? bottom.const_data_ptr<float>() : nullptr;
    p.mix = weights.const_data_ptr<float>() + first;
    p.adapters = static_cast<int>(last - first);
    for (int64_t a = first; a < last; ++a) {
      p.deltas[a - first] = {kept[2 * a].const_data_ptr<float>(), kept[2 * a + 1].const_data_ptr<float>()};
    }
    C10_CUDA_CHECK(cuda::gains(p, c10::cuda::getCurrentCUDAStream()));
    first = last;
  } while (first < A);
  return {gain, held};
}

// See gains_backward in svdiff_kernels/ops.py.
Tensor gains_backward_of(const Tensor& dgain, const Tensor& held, const Tensor& mix, at::IntArrayRef adapters) {
  const int64_t R = dgain.size(-1), count = static_cast<int64_t>(adapters.size());
  check_mix(dgain, mix, R);
  TORCH_CHECK_VALUE(held.sizes() == dgain.sizes(), "svdiff_cuda: held has shape ", held.sizes(), ", dgain ",
                    dgain.sizes());
  for (const int64_t a : adapters) {
    TORCH_CHECK_VALUE(a >= 0 && a < mix.size(-1), "svdiff_cuda: there is no adapter ", a, " in a mix of ",
                      mix.size(-1));
  }
  check_device(dgain, {&held, &mix});
  const Scope scope(dgain.device());
  const Tensor d = dgain.contiguous(), mask = held.contiguous(), weights = mix.contiguous();
  const Tensor ddelta = at::empty({count, R}, dgain.options());
  GainsBackwardParams p{};
  p.dgain = d.const_data_ptr<float>();
  p.held = mask.const_data_ptr<bool>();
  p.mix = weights.const_data_ptr<float>();
  p.S = mix.dim() == 2 ? mix.size(0) : 1;
  p.R = R;
  p.stride_ms = mix.size(-1);
  for (int64_t first = 0; first < count; first += kMostAdapters) {
    p.count = static_cast<int>(std::min<int64_t>(kMostAdapters, count - first));
    p.ddelta = ddelta.mutable_data_ptr<float>() + first * R;
    for (int i = 0; i < p.count; ++i) {
      p.adapters[i] = static_cast<int>(adapters[first + i]);
    }
    C10_CUDA_CHECK(cuda::gains_backward(p, c10::cuda::getCurrentCUDAStream()));
  }
  return ddelta;
}

TORCH_LIBRARY(svdiff_cuda, m) {
  m.def("serves_expand(Tensor z, Tensor U, ScalarType? dtype) -> bool", serves_expand);
  m.def("serves_expand_backward(Tensor dy, Tensor? z, Tensor U) -> bool", serves_expand_backward);
  m.def("expand(Tensor z, Tensor U, Tensor scale, Tensor? bias, ScalarType? dtype) -> Tensor");
  m.def("expand_backward(Tensor dy, Tensor? z, Tensor U, Tensor scale, bool need_dz) -> (Tensor, Tensor)");
  m.def("project(Tensor x, Tensor Vh, Tensor scale, ScalarType? dtype=None, float alpha=1.0) -> Tensor");
  m.def("gains(Tensor base, Tensor floor, Tensor mix, Tensor[] deltas) -> (Tensor, Tensor)");
  m.def("gains_backward(Tensor dgain, Tensor held, Tensor mix, int[] adapters) -> Tensor");
}

TORCH_LIBRARY_IMPL(svdiff_cuda, CUDA, m) {
  m.impl("expand", expand);
  m.impl("expand_backward", expand_backward);
  m.impl("project", project);
  m.impl("gains", gains_of);
  m.impl("gains_backward", gains_backward_of);
}

}  // namespace
}  // namespace svdiff::cuda
