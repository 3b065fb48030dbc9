// What the GEMMs of gemm.h cannot serve they must refuse before anything is launched, which needs no GPU to see. Prints
// each case that was not refused.

#include <cstdio>

#include "gemm.h"

using namespace svdiff::cuda;

namespace {

struct Case {
  const char* name;
  int64_t P, M, K;
  int64_t offset;  // of the factor, in bytes
};

constexpr Case kCases[] = {
    {"rows of x and W of an odd length", 33, 24, 41, 0},
    {"rows of 8 bytes more than a multiple of 16", 33, 24, 44, 0},
    {"rows of y of an odd length", 33, 25, 40, 0},
    {"a factor that starts between two words", 33, 24, 40, 2},
    {"more rows than an int counts", int64_t{1} << 31, 24, 40, 0},
};

alignas(16) char memory[1 << 16];

void expect_refusal(const char* kernel, const Case& c, cudaError_t status) {
  if (status != cudaErrorNotSupported) {
    std::printf("%s, %s: %d\n", kernel, c.name, status);
  }
}

template <class Product, class Backward>
void refuses(const char* kernel, Product product, Backward backward) {
  const Allocate allocate = [](size_t) { return static_cast<void*>(memory); };
  auto* const numbers = reinterpret_cast<float*>(memory);
  for (const Case& c : kCases) {
    for (const Half out : {Half::fp16, Half::bf16}) {
      const ProductParams p{Half::fp16, out, memory, memory + c.offset, numbers, memory, memory, 1, 1, c.P, c.M, c.K};
      expect_refusal(kernel, c, product(p, allocate, nullptr));
      const BackwardParams b{out, memory, memory + c.offset, memory, numbers, memory, numbers, 2, c.P, c.M, c.K};
      expect_refusal(kernel, c, backward(b, allocate, nullptr));
    }
    const ProductParams p{Half::bf16, Half::fp16, memory, memory, nullptr, nullptr, memory, 1, 1, 33, 24, 40};
    expect_refusal(kernel, {"bf16 to fp16"}, product(p, allocate, nullptr));
  }
}

}  // namespace

int main() {
  refuses("sm90", sm90::product, sm90::backward);
  refuses("sm100", sm100::product, sm100::backward);
}
