#include "dispatch.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace svdiff {
namespace {

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

namespace call {

Tensor expand(
    const Tensor& z, const Tensor& U, const Tensor& scale, const OptionalTensor& bias, OptionalType dtype) {
  static const auto call = op<Tensor(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, OptionalType)>("svdiff::expand");
  return call.call(z, U, scale, bias, dtype);
}

std::tuple<Tensor, Tensor> expand_backward(
    const Tensor& dy, const OptionalTensor& z, const Tensor& U, const Tensor& scale, bool need_dz) {
  static const auto call = op<std::tuple<Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool)>("svdiff::expand_backward");
  return call.call(dy, z, U, scale, need_dz);
}

Tensor frozen_linear(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, OptionalType dtype, double alpha) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, OptionalType, double)>("svdiff::frozen_linear");
  return call.call(x, weight, bias, dtype, alpha);
}

Tensor frozen_conv2d(
    const Tensor& x,
    const Tensor& weight,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    OptionalType dtype,
    bool exact) {
  static const auto call = op<Tensor(
      const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, OptionalType,
      bool)>(
      "svdiff::frozen_conv2d");
  return call.call(x, weight, bias, stride, padding, dilation, dtype, exact);
}

Tensor frozen_conv2d_backward(
    const Tensor& dy,
    const Tensor& weight,
    at::SymIntArrayRef size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  static const auto call = op<Tensor(
      const Tensor&, const Tensor&, at::SymIntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef)>(
      "svdiff::frozen_conv2d_backward");
  return call.call(dy, weight, size, stride, padding, dilation);
}

}  // namespace call
}  // namespace svdiff
