#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                             \
  do {                                                                   \
    const cudaError_t emulated = (call);                                  \
    TORCH_CHECK(emulated == cudaSuccess, "CUDA error ", static_cast<int>(emulated)); \
  } while (0)
