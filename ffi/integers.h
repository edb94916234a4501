// Integer arithmetic that the CPU and the CUDA code share.
#ifndef JAXNSA_INTEGERS_H_
#define JAXNSA_INTEGERS_H_

#include <cstdint>

#ifdef __CUDACC__
#define JAXNSA_HOST_DEVICE __host__ __device__ __forceinline__
#define JAXNSA_APART static __host__ __device__ __noinline__
#else
#define JAXNSA_HOST_DEVICE inline
#define JAXNSA_APART inline
#endif

namespace jaxnsa {

constexpr int32_t kInt32Max = 0x7fffffff, kInt32Min = -kInt32Max - 1;

JAXNSA_HOST_DEVICE int32_t Min(int32_t a, int32_t b) { return a < b ? a : b; }
JAXNSA_HOST_DEVICE int32_t Max(int32_t a, int32_t b) { return a > b ? a : b; }

// Wraps.
JAXNSA_HOST_DEVICE int32_t Add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

// Stops at the ends of int32's range.
JAXNSA_HOST_DEVICE int32_t SaturatingAdd(int32_t a, int32_t b) {
  return b < 0 ? Max(a, kInt32Min - b) + b : Min(a, kInt32Max - b) + b;
}

// A quotient that is rarely wanted: for a GPU its code lies apart from that which always runs.
JAXNSA_APART int32_t RareQuotient(int32_t x, int32_t divisor) { return x / divisor; }

// Rounds towards minus infinity.
JAXNSA_HOST_DEVICE int32_t FloorDiv(int32_t x, int32_t divisor) {
  const int32_t quotient = x / divisor;
  return quotient - (x % divisor < 0);
}

// For a >= 0 and b > 0.
JAXNSA_HOST_DEVICE int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A number of 8 bytes.
JAXNSA_HOST_DEVICE int64_t FromWords(int32_t low, int32_t high) {
  return static_cast<int64_t>(uint64_t{static_cast<uint32_t>(high)} << 32 |
                              static_cast<uint32_t>(low));
}

}  // namespace jaxnsa

#endif  // JAXNSA_INTEGERS_H_
