// svdiff::frozen_linear and svdiff::frozen_conv2d on CPUs.
//
// torch's own would do in fp32 but for two things: its conv has oneDNN reorder the whole weight in every call, which few
// pixels do not pay back, and half precision is slow where the CPU has no instructions for it.

#include "../ops.h"
#include "gemm.h"

#include <ATen/ATen.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <vector>

namespace svdiff {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kFewPixels = 128;  // up to here one GEMM over unfolded patches beats a direct convolution

bool is_few(const Tensor& t, IntArrayRef size) {
  const int64_t pixels = t.size(0) * size[0] * size[1];
  return pixels > 0 && pixels <= kFewPixels && (!c10::isReducedFloatingType(t.scalar_type()) || widens(t.scalar_type()));
}

std::vector<int64_t> output_size(
    const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  std::vector<int64_t> size(2);
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = dilation[i] * (weight.size(i + 2) - 1) + 1;
    size[i] = (x.size(i + 2) + 2 * padding[i] - reach) / stride[i] + 1;
  }
  return size;
}

// The kernel in blocks of output channels, each small enough to be held in fp32.
std::vector<Tensor> tiles(const Tensor& weight) {
  return weight.split(lines_at_a_time(weight.size(0), c10::multiply_integers(weight.sizes().slice(1))));
}

// Other types mix: under autocast, the residual form has its weight in fp32 and x and dy in half precision.
bool both_or_neither_fp64(const Tensor& x, const Tensor& weight) {
  return (x.scalar_type() == at::kDouble) == (weight.scalar_type() == at::kDouble);
}

Tensor laid_out_as(const Tensor& y, const Tensor& x) {
  const bool channels_last = x.stride(1) == 1 && x.size(1) > 1;
  return y.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

}  // namespace

Tensor frozen_linear(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    std::optional<at::ScalarType> dtype,
    double alpha) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() > 0 && x.size(-1) == weight.size(1), "svdiff::frozen_linear: x has shape ",
                    x.sizes(), ", expected [*, ", weight.size(-1), "]");
  TORCH_CHECK_VALUE(both_or_neither_fp64(x, weight), "svdiff::frozen_linear: x is ", x.scalar_type(), " but weight is ",
                    weight.scalar_type());
  const Tensor rows = alpha == 1 ? x : x * alpha;
  return product(rows.contiguous(), weight.t(), bias, dtype.value_or(x.scalar_type()));
}

Tensor frozen_conv2d(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    IntArrayRef stride,
    IntArrayRef padding,
    IntArrayRef dilation,
    std::optional<at::ScalarType> dtype,
    bool exact) {
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && x.size(1) == weight.size(1), "svdiff::frozen_conv2d: x has shape ",
                    x.sizes(), ", expected [B, ", weight.size(1), ", H, W]");
  TORCH_CHECK_VALUE(both_or_neither_fp64(x, weight), "svdiff::frozen_conv2d: x is ", x.scalar_type(), " but weight is ",
                    weight.scalar_type());
  const auto type = x.scalar_type();
  const auto out = dtype.value_or(type);
  const auto size = output_size(x, weight, stride, padding, dilation);
  if (!exact && is_few(x, size)) {
    // All images at once, so that the weight is read a single time: [1, pixels, patch], pixels dense.
    const auto wide_x = c10::isReducedFloatingType(type) ? x.to(at::kFloat) : x;
    const Tensor patches = at::im2col(wide_x, weight.sizes().slice(2), dilation, padding, stride);  // [B, patch, P]
    const Tensor rows = patches.transpose(0, 1).reshape({1, patches.size(1), -1}).transpose(1, 2);
    const Tensor y = product(rows, weight.flatten(1).t(), bias, out).transpose(1, 2);  // [1, C_out, pixels]
    return laid_out_as(y.view({-1, x.size(0), size[0], size[1]}).transpose(0, 1), x);
  }
  if (out == type && weight.scalar_type() == type && !widens(type)) {
    return at::conv2d(x, weight, bias, stride, padding, dilation);
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor wide_x = x.to(at::kFloat);
  std::vector<Tensor> parts;
  for (const Tensor& tile : tiles(weight)) {
    parts.push_back(at::conv2d(wide_x, tile.to(at::kFloat), {}, stride, padding, dilation));
  }
  Tensor y = at::cat(parts, 1);
  if (bias) {
    y.add_(bias->to(at::kFloat).view({-1, 1, 1}));
  }
  return laid_out_as(y.to(out), x);
}

Tensor frozen_conv2d_backward(
    const Tensor& dy,
    const Tensor& weight,
    IntArrayRef size,
    IntArrayRef stride,
    IntArrayRef padding,
    IntArrayRef dilation) {
  const auto type = dy.scalar_type();
  if (is_few(dy, dy.sizes().slice(2))) {
    const Tensor rows = dy.flatten(2).transpose(1, 2).contiguous();  // [B, P, C_out]
    const auto full = c10::isReducedFloatingType(type) ? at::kFloat : type;
    const Tensor patches = product(rows, weight.flatten(1), std::nullopt, full).transpose(1, 2);
    return at::col2im(patches, size, weight.sizes().slice(2), dilation, padding, stride).to(type);
  }
  const auto dx_of = [&](const Tensor& part, const Tensor& kernel) {
    // Of x only the shape and layout are read. A transposed convolution says the same, but torch takes a slow path for one
    // with few numbers in dy, such as the last of a UNet.
    const Tensor x = at::empty({dy.size(0), weight.size(1), size[0], size[1]}, part.options(), part.suggest_memory_format());
    return std::get<0>(at::convolution_backward(part, x, kernel, std::nullopt, stride, padding, dilation, false, {0, 0}, 1,
                                                {true, false, false}));
  };
  if (weight.scalar_type() == type && !widens(type)) {
    return dx_of(dy, weight);
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor wide_dy = dy.to(at::kFloat);
  Tensor dx;
  int64_t first = 0;
  for (const Tensor& tile : tiles(weight)) {
    const Tensor part = dx_of(wide_dy.slice(1, first, first + tile.size(0)), tile.to(at::kFloat));
    dx = dx.defined() ? dx.add_(part) : part;
    first += tile.size(0);
  }
  return dx.to(type);
}

TORCH_LIBRARY_IMPL(svdiff, CPU, m) {
  m.impl("frozen_linear", frozen_linear);
  m.impl("frozen_conv2d", frozen_conv2d);
  m.impl("frozen_conv2d_backward", frozen_conv2d_backward);
}

}  // namespace svdiff
