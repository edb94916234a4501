// The parts of CUB's block-wide reduction that the kernels use.
#ifndef JAXNSA_CUDA_SIMULATOR_BLOCK_REDUCE_H_
#define JAXNSA_CUDA_SIMULATOR_BLOCK_REDUCE_H_

#include "cuda_runtime_api.h"

namespace cub {

template <typename T, int kThreads>
class BlockReduce {
 public:
  struct TempStorage {
    T values[kThreads];
  };

  explicit BlockReduce(TempStorage& temp) : temp_(temp) {}

  // Thread 0 alone receives the sum.
  T Sum(T value) {
    temp_.values[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x > 0) return value;
    for (int k = 1; k < kThreads; ++k) value = value + temp_.values[k];
    return value;
  }

 private:
  TempStorage& temp_;
};

}  // namespace cub

#endif  // JAXNSA_CUDA_SIMULATOR_BLOCK_REDUCE_H_
