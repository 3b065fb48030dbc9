// The gradients of the ops, for every device, as svdiff_kernels/ops.py states them. In C++ because the same in Python
// costs more per call than a small layer computes.

#include "autograd.h"

#include <torch/library.h>

#include "dispatch.h"

namespace svdiff {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

at::ScalarType type_of_x(AutogradContext* ctx) {
  return static_cast<at::ScalarType>(ctx->saved_data["type"].toInt());
}

struct Expand : Function<Expand> {
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& z,
      const Tensor& U,
      const Tensor& scale,
      const OptionalTensor& bias,
      OptionalType dtype) {
    check_frozen(U, "svdiff::expand: U");
    // z is wanted for dscale alone, and it is the only tensor of activation size that is kept.
    ctx->save_for_backward({U, scale, scale.requires_grad() ? z : Tensor()});
    ctx->saved_data["need_dbias"] = bias && bias->requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    return call::expand(z, U, scale, bias, dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const bool need_dz = ctx->needs_input_grad(0), need_dscale = ctx->needs_input_grad(2);
    Tensor dz, dscale, dbias;
    if (need_dz || need_dscale) {
      const OptionalTensor z = need_dscale ? OptionalTensor(saved[2]) : std::nullopt;
      std::tie(dz, dscale) = call::expand_backward(grads[0], z, saved[0], saved[1], need_dz);
    }
    if (ctx->saved_data["need_dbias"].toBool()) {
      dbias = grads[0].flatten(0, -2).sum(0);
    }
    return {need_dz ? dz : Tensor(), Tensor(), need_dscale ? dscale : Tensor(), dbias, Tensor()};
  }
};

struct FrozenLinear : Function<FrozenLinear> {
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& weight,
      const OptionalTensor& bias,
      OptionalType dtype,
      double alpha) {
    check_frozen(weight, "svdiff::frozen_linear: weight");
    ctx->save_for_backward({weight});
    ctx->saved_data["type"] = static_cast<int64_t>(x.scalar_type());
    ctx->saved_data["alpha"] = alpha;
    const at::AutoDispatchBelowADInplaceOrView below;
    return call::frozen_linear(x, weight, bias, dtype, alpha);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor weight = ctx->get_saved_variables()[0];
    const double alpha = ctx->saved_data["alpha"].toDouble();
    return {call::frozen_linear(grads[0].to(type_of_x(ctx)), weight.t(), std::nullopt, std::nullopt, alpha), {}, {}, {}, {}};
  }
};

struct FrozenConv2d : Function<FrozenConv2d> {
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& weight,
      const OptionalTensor& bias,
      at::IntArrayRef stride,
      at::IntArrayRef padding,
      at::IntArrayRef dilation,
      OptionalType dtype,
      bool exact) {
    check_frozen(weight, "svdiff::frozen_conv2d: weight");
    ctx->save_for_backward({weight});
    ctx->saved_data["type"] = static_cast<int64_t>(x.scalar_type());
    save_geometry(ctx, x, stride, padding, dilation);
    const at::AutoDispatchBelowADInplaceOrView below;
    return call::frozen_conv2d(x, weight, bias, stride, padding, dilation, dtype, exact);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {conv2d_dx(ctx, grads[0].to(type_of_x(ctx)), ctx->get_saved_variables()[0]), {}, {}, {}, {}, {}, {}, {}};
  }
};

TORCH_LIBRARY_IMPL(svdiff, Autograd, m) {
  m.impl("expand", [](const Tensor& z, const Tensor& U, const Tensor& scale, const OptionalTensor& bias,
                      OptionalType dtype) {
    return Expand::apply(z, U, scale, bias, dtype);
  });
  m.impl("frozen_linear", [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, OptionalType dtype,
                             double alpha) {
    return FrozenLinear::apply(x, weight, bias, dtype, alpha);
  });
  m.impl("frozen_conv2d", [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, OptionalType dtype,
                             bool exact) {
    return FrozenConv2d::apply(x, weight, bias, stride, padding, dilation, dtype, exact);
  });
}

}  // namespace

void check_frozen(const Tensor& t, const char* what) {
  TORCH_CHECK_VALUE(!t.requires_grad(), what, " requires grad, but the factors of a spectral layer are frozen");
}

void save_geometry(
    AutogradContext* ctx, const Tensor& x, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  ctx->saved_data["height"] = x.sym_size(2);
  ctx->saved_data["width"] = x.sym_size(3);
  ctx->saved_data["stride"] = stride.vec();
  ctx->saved_data["padding"] = padding.vec();
  ctx->saved_data["dilation"] = dilation.vec();
}

Tensor conv2d_dx(AutogradContext* ctx, const Tensor& dy, const Tensor& weight) {
  auto& data = ctx->saved_data;
  const std::vector<c10::SymInt> size{data["height"].toSymInt(), data["width"].toSymInt()};
  return call::frozen_conv2d_backward(dy, weight, size, data["stride"].toIntVector(), data["padding"].toIntVector(),
                                      data["dilation"].toIntVector());
}

}  // namespace svdiff
