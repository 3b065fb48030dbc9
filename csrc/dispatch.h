// The ops by way of torch's dispatcher, which picks the implementation for the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace svdiff {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;

namespace call {

Tensor expand(
    const Tensor& z, const Tensor& U, const Tensor& scale, const OptionalTensor& bias, OptionalType dtype);

std::tuple<Tensor, Tensor> expand_backward(
    const Tensor& dy, const OptionalTensor& z, const Tensor& U, const Tensor& scale, bool need_dz);

Tensor frozen_linear(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, OptionalType dtype, double alpha = 1);

Tensor frozen_conv2d(
    const Tensor& x,
    const Tensor& weight,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    OptionalType dtype,
    bool exact);

Tensor frozen_conv2d_backward(
    const Tensor& dy,
    const Tensor& weight,
    at::SymIntArrayRef size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation);

}  // namespace call
}  // namespace svdiff
