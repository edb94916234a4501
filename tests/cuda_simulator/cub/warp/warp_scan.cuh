// The parts of CUB's warp-wide prefix sum that the kernels use.
#ifndef JAXNSA_CUDA_SIMULATOR_WARP_SCAN_H_
#define JAXNSA_CUDA_SIMULATOR_WARP_SCAN_H_

#include "cuda_runtime_api.h"

namespace cub {

template <typename T>
class WarpScan {
 public:
  struct TempStorage {};

  explicit WarpScan(TempStorage&) {}

  void InclusiveSum(T value, T& sum) {
    const auto given = cuda_simulator::Exchange(static_cast<uint32_t>(value));
    sum = 0;
    for (unsigned lane = 0; lane <= threadIdx.x % given.size(); ++lane) {
      sum += static_cast<T>(given[lane]);
    }
  }
};

}  // namespace cub

#endif  // JAXNSA_CUDA_SIMULATOR_WARP_SCAN_H_
