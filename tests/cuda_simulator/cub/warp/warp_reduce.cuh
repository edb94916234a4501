// The parts of CUB's warp-wide reduction that the kernels use.
#ifndef JAXNSA_CUDA_SIMULATOR_WARP_REDUCE_H_
#define JAXNSA_CUDA_SIMULATOR_WARP_REDUCE_H_

#include <cstring>

#include "cuda_runtime_api.h"

namespace cub {

template <typename T>
class WarpReduce {
 public:
  struct TempStorage {};

  explicit WarpReduce(TempStorage&) {}

  // Lane 0 alone receives the sum.
  T Sum(T value) {
    constexpr size_t kWords = sizeof(T) / sizeof(uint32_t);
    uint32_t own[kWords], words[32][kWords];
    std::memcpy(own, &value, sizeof(T));
    for (size_t k = 0; k < kWords; ++k) {
      const auto given = cuda_simulator::Exchange(own[k]);
      for (size_t lane = 0; lane < given.size(); ++lane) words[lane][k] = given[lane];
    }
    if (threadIdx.x % 32 != 0) return value;
    for (size_t lane = 1; lane < 32; ++lane) {
      T other;
      std::memcpy(&other, words[lane], sizeof(T));
      value = value + other;
    }
    return value;
  }
};

}  // namespace cub

#endif  // JAXNSA_CUDA_SIMULATOR_WARP_REDUCE_H_
