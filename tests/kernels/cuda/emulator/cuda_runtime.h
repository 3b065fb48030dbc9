// Stands in for CUDA's header of this name, so that g++ compiles a .cu file and the CPU runs its kernels.
//
// A block's threads are fibers that take turns: each runs until it must wait for the others. As all threads that are left
// wait equally often, a turn of all of them is a barrier. Shared memory is what is static. Blocks come in an order that is
// new in every launch, and so do threads in every turn: what depends on it gives other bits the second time.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline const std::function<void()>* body;
inline std::mt19937 chance;

inline std::vector<unsigned> in_any_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), chance);
  return order;
}

inline void wait() { swapcontext(&current->context, &scheduler); }

inline void run_thread() {
  (*body)();
  current->done = true;
}

inline void run_block(const std::function<void()>& thread) {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  fibers.resize(std::max<size_t>(fibers.size(), count));
  body = &thread;
  for (unsigned t = 0; t < count; ++t) {
    Fiber& f = fibers[t];
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, kStack};
    f.context.uc_link = &scheduler;
    f.done = false;
    makecontext(&f.context, run_thread, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (const unsigned t : in_any_order(count)) {
      if (!fibers[t].done) {
        current = &fibers[t];
        threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        swapcontext(&scheduler, &current->context);
        left = left || !current->done;
      }
    }
  }
}

}  // namespace emulator

inline void __stcg(uint4* to, uint4 words) { *to = words; }

inline void __syncthreads() { emulator::wait(); }

inline float __shfl_down_sync(unsigned, float value, unsigned distance) {
  static float lanes[1024];
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  lanes[thread] = value;
  emulator::wait();
  const float other = thread % 32 + distance < 32 ? lanes[thread + distance] : value;
  emulator::wait();
  return other;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  const bool possible = grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 && grid.y < 65536 && grid.z > 0 && grid.z < 65536;
  if (const unsigned threads = block.x * block.y * block.z; !possible || threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const Params params = *static_cast<const Params*>(arguments[0]);
  gridDim = grid;
  blockDim = block;
  for (const unsigned block : emulator::in_any_order(grid.x * grid.y * grid.z)) {
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    emulator::run_block([&] { kernel(params); });
  }
  return cudaSuccess;
}
