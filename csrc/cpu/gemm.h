// Products with frozen matrices, in the two layouts of svdiff::expand.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace svdiff {

// Is t [B, P, k] with neighbouring rows, not columns, next to one another: what a conv in NCHW is, seen as rows?
inline bool columns_dense(const at::Tensor& t) {
  return t.dim() == 3 && t.stride(1) == 1 && t.stride(2) != 1;
}

inline int64_t count_rows(const at::Tensor& t) {
  return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
}

// Whether large fp32 products are oneDNN's: on CPUs of other makers than Intel MKL, which torch's own layers multiply with,
// leaves half of the speed unused. torch.backends.mkldnn.enabled has the last word.
bool prefers_onednn();

// Whether a product with a matrix of this type is better computed in fp32: half precision where the CPU has no
// instructions for it, and vendor GEMMs fall to a quarter of fp32's speed (bf16) or a hundredth (fp16).
bool widens(at::ScalarType type);

// How many lines of a half-precision matrix [lines, length] to hold in fp32 at a time.
int64_t lines_at_a_time(int64_t lines, int64_t length);

// t @ W (+ bias), for t [*, k] dense in either layout and W [k, n]; the result is laid out as t is.
// Its type is `out`. t may be fp32 where W is of half precision: then nothing is rounded on the way.
at::Tensor product(
    const at::Tensor& t, const at::Tensor& W, const std::optional<at::Tensor>& bias, at::ScalarType out);

}  // namespace svdiff
