// The schemas of svdiff_kernels/ops.py, for programs that load the kernels without Python.

#include <torch/library.h>

TORCH_LIBRARY(svdiff, m) {
  m.def("expand(Tensor z, Tensor U, Tensor scale, Tensor? bias, ScalarType? dtype) -> Tensor");
  m.def("expand_backward(Tensor dy, Tensor? z, Tensor U, Tensor scale, bool need_dz) -> (Tensor, Tensor)");
  m.def("frozen_linear(Tensor x, Tensor weight, Tensor? bias, ScalarType? dtype, float alpha) -> Tensor");
  m.def(
      "frozen_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "ScalarType? dtype, bool exact) -> Tensor");
  m.def(
      "frozen_conv2d_backward(Tensor dy, Tensor weight, SymInt[2] size, int[2] stride, int[2] padding, int[2] dilation) "
      "-> Tensor");
  m.def("eigh(Tensor G) -> (Tensor, Tensor)");
}
