// Prefix sums on the CPU: all variants are the same loop.
#include "computations.h"

namespace jaxnsa {

void PrefixSum(Stream, PrefixSumVariant, const int32_t* x, int64_t n, int32_t* out) {
  int32_t sum = 0;
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) out[i + 1] = sum = Add(sum, x[i]);
}

}  // namespace jaxnsa
