// svdiff::expand and its backward: the op behind every spectral layer. The formula and the shapes are those of
// svdiff_kernels/ops.py, whose schema these functions implement.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace svdiff {

// y [*, M] = (z * scale[sample]) @ U.T + bias, for z [*, r], U [M, r], scale [S, r], bias [M].
at::Tensor expand(
    const at::Tensor& z, const at::Tensor& U, const at::Tensor& scale, const std::optional<at::Tensor>& bias);

// (dz, dscale) for dy [*, M]; dz is empty unless need_dz, dscale is empty unless z is given.
std::tuple<at::Tensor, at::Tensor> expand_backward(
    const at::Tensor& dy,
    const std::optional<at::Tensor>& z,
    const at::Tensor& U,
    const at::Tensor& scale,
    bool need_dz);

}  // namespace svdiff
