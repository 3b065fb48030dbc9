// svdiff_kernels._C: loading it registers the kernels; what it exports says how they were built.

#include "cpu/gemm.h"

#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(SVDIFF_CUDA)
  info["cuda"] = SVDIFF_CUDA;
#else
  info["cuda"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of svdiff_kernels";
  m.def("build_info", &build_info, "What the extension was compiled with.");
  m.def("prefers_onednn", &svdiff::prefers_onednn, "Whether large fp32 products on this CPU are oneDNN's, not MKL's.");
}
