// Whole spectral layers in one call, with one node in the graph of gradients: the compositions of
// svdiff_kernels/scaled.py, where Python and a node per op would take longer than a small layer computes.
//
// Only eager mode calls them. A compiler is shown the composition itself.

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include "autograd.h"
#include "dispatch.h"
#include "ops.h"

namespace svdiff {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor as_rows(const Tensor& scale) {
  return scale.dim() == 2 ? scale : scale.unsqueeze(0);
}

// [B, C, H, W] as [B, H * W, C], and back: views, in either memory format.
Tensor as_rows_of_pixels(const Tensor& t) {
  return t.flatten(2).transpose(1, 2);
}

Tensor as_image(const Tensor& rows, const Tensor& like) {
  return rows.transpose(1, 2).unflatten_symint(2, {like.sym_size(2), like.sym_size(3)});
}

struct ScaledLinear : Function<ScaledLinear> {
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& U,
      const Tensor& scale,
      const Tensor& Vh,
      const OptionalTensor& bias) {
    check_frozen(U, "svdiff::scaled_linear: U");
    check_frozen(Vh, "svdiff::scaled_linear: Vh");
    const bool trained = scale.requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor z = call::frozen_linear(x, Vh, std::nullopt, Vh.scalar_type());
    ctx->save_for_backward({U, scale, Vh, trained ? z : Tensor()});
    return call::expand(z, U, as_rows(scale), bias, x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &U = saved[0], &scale = saved[1], &Vh = saved[2];
    const bool need_dx = ctx->needs_input_grad(0), need_dscale = ctx->needs_input_grad(2);
    const OptionalTensor z = need_dscale ? OptionalTensor(saved[3]) : std::nullopt;
    const auto [dz, dscale] = call::expand_backward(grads[0], z, U, as_rows(scale), need_dx);
    const Tensor dx = need_dx ? call::frozen_linear(dz, Vh.t(), std::nullopt, std::nullopt) : Tensor();
    return {dx, {}, need_dscale ? dscale.view_as(scale) : Tensor(), {}, {}};
  }
};

struct ScaledConv2d : Function<ScaledConv2d> {
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& U,
      const Tensor& scale,
      const Tensor& Vh,
      const OptionalTensor& bias,
      at::IntArrayRef stride,
      at::IntArrayRef padding,
      at::IntArrayRef dilation) {
    check_frozen(U, "svdiff::scaled_conv2d: U");
    check_frozen(Vh, "svdiff::scaled_conv2d: Vh");
    const bool trained = scale.requires_grad();
    save_geometry(ctx, x, stride, padding, dilation);
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor image = call::frozen_conv2d(x, Vh, std::nullopt, stride, padding, dilation, Vh.scalar_type(), false);
    const Tensor z = as_rows_of_pixels(image);
    ctx->save_for_backward({U, scale, Vh, trained ? z : Tensor()});
    return as_image(call::expand(z, U, as_rows(scale), bias, x.scalar_type()), image);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &U = saved[0], &scale = saved[1], &Vh = saved[2];
    const bool need_dx = ctx->needs_input_grad(0), need_dscale = ctx->needs_input_grad(2);
    const OptionalTensor z = need_dscale ? OptionalTensor(saved[3]) : std::nullopt;
    const auto [dz, dscale] = call::expand_backward(as_rows_of_pixels(grads[0]), z, U, as_rows(scale), need_dx);
    const Tensor dx = need_dx ? conv2d_dx(ctx, as_image(dz, grads[0]), Vh) : Tensor();
    return {dx, {}, need_dscale ? dscale.view_as(scale) : Tensor(), {}, {}, {}, {}, {}};
  }
};

}  // namespace

Tensor scaled_linear(
    const Tensor& x, const Tensor& U, const Tensor& scale, const Tensor& Vh, const OptionalTensor& bias) {
  return ScaledLinear::apply(x, U, scale, Vh, bias);
}

Tensor scaled_conv2d(
    const Tensor& x,
    const Tensor& U,
    const Tensor& scale,
    const Tensor& Vh,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  return ScaledConv2d::apply(x, U, scale, Vh, bias, stride, padding, dilation);
}

TORCH_LIBRARY_FRAGMENT(svdiff, m) {
  m.def("scaled_linear(Tensor x, Tensor U, Tensor scale, Tensor Vh, Tensor? bias) -> Tensor");
  m.def(
      "scaled_conv2d(Tensor x, Tensor U, Tensor scale, Tensor Vh, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
}

TORCH_LIBRARY_IMPL(svdiff, CompositeImplicitAutograd, m) {
  m.impl("scaled_linear", scaled_linear);
  m.impl("scaled_conv2d", scaled_conv2d);
}

}  // namespace svdiff
