// A CPU build of torch has CUDA's headers but for this one, which its build would make.
#pragma once

#define C10_CUDA_BUILD_SHARED_LIBS
