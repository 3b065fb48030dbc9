// What the autograd formulas of the ops and of whole layers have in common.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace svdiff {

// Factors are constants: a gradient for one would be as large as the weight.
void check_frozen(const at::Tensor& t, const char* what);

// What a convolution's dx needs of its forward, besides the weight.
void save_geometry(
    torch::autograd::AutogradContext* ctx,
    const at::Tensor& x,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation);

// dx of that convolution, for its dy.
at::Tensor conv2d_dx(torch::autograd::AutogradContext* ctx, const at::Tensor& dy, const at::Tensor& weight);

}  // namespace svdiff
