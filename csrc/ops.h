// The ops behind every spectral layer. Formulas and shapes are those of svdiff_kernels/ops.py, whose schemas these
// functions implement.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace svdiff {

// Wherever a dtype may be given for the result, it is otherwise that of the first argument.

// y [*, M] = (z * scale[sample]) @ U.T + bias, for z [*, r], U [M, r], scale [S, r], bias [M].
at::Tensor expand(
    const at::Tensor& z,
    const at::Tensor& U,
    const at::Tensor& scale,
    const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> dtype = std::nullopt);

// (dz, dscale) for dy [*, M]; dz is empty unless need_dz, dscale is empty unless z is given.
std::tuple<at::Tensor, at::Tensor> expand_backward(
    const at::Tensor& dy,
    const std::optional<at::Tensor>& z,
    const at::Tensor& U,
    const at::Tensor& scale,
    bool need_dz);

// y [*, M] = alpha * x [*, N] @ weight.T + bias. Its backward is itself, with the transposed weight.
at::Tensor frozen_linear(
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> dtype = std::nullopt,
    double alpha = 1);

// The convolution of x [B, C_in, H, W] with weight [C_out, C_in, kh, kw]; as torch sums it if exact.
at::Tensor frozen_conv2d(
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    std::optional<at::ScalarType> dtype = std::nullopt,
    bool exact = false);

// dx [B, C_in, *size] for dy [B, C_out, H', W'], in the dtype of dy.
at::Tensor frozen_conv2d_backward(
    const at::Tensor& dy,
    const at::Tensor& weight,
    at::IntArrayRef size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation);

// (values [B, n] ascending, vectors [B, n, n]) of the symmetric G [B, n, n], fp32 or fp64.
std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& G);

// Whole layers, differentiable: U (scale * (Vh x)) + bias, for x [*, N], or [B, C_in, H, W] and Vh [r, C_in, kh, kw].
// scale is [r], or [S, r] for S samples that split x's first dimension evenly.
at::Tensor scaled_linear(
    const at::Tensor& x,
    const at::Tensor& U,
    const at::Tensor& scale,
    const at::Tensor& Vh,
    const std::optional<at::Tensor>& bias);

at::Tensor scaled_conv2d(
    const at::Tensor& x,
    const at::Tensor& U,
    const at::Tensor& scale,
    const at::Tensor& Vh,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation);

}  // namespace svdiff
