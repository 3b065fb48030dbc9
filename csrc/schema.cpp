// The schema of svdiff_kernels/ops.py, for programs that load the kernels without Python.

#include <torch/library.h>

TORCH_LIBRARY(svdiff, m) {
  m.def("expand(Tensor z, Tensor U, Tensor scale, Tensor? bias) -> Tensor");
  m.def("expand_backward(Tensor dy, Tensor? z, Tensor U, Tensor scale, bool need_dz) -> (Tensor, Tensor)");
}
