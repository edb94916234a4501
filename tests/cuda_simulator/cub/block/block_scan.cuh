// The parts of CUB's block-wide prefix sum that the kernels use.
#ifndef JAXNSA_CUDA_SIMULATOR_BLOCK_SCAN_H_
#define JAXNSA_CUDA_SIMULATOR_BLOCK_SCAN_H_

#include "cuda_runtime_api.h"

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <typename T, int kThreads, BlockScanAlgorithm = BLOCK_SCAN_RAKING>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
  };

  explicit BlockScan(TempStorage& temp) : temp_(temp) {}

  void ExclusiveSum(T value, T& before) { before = Before(value, nullptr); }

  void ExclusiveSum(T value, T& before, T& total) { before = Before(value, &total); }

  void InclusiveSum(T value, T& sum) { sum = Before(value, nullptr) + value; }

  void InclusiveSum(T value, T& sum, T& total) { sum = Before(value, &total) + value; }

  template <int kItems>
  void InclusiveSum(T (&items)[kItems], T (&sums)[kItems]) {
    T all{};
    for (int k = 0; k < kItems; ++k) all = all + items[k];
    T sum = Before(all, nullptr);
    for (int k = 0; k < kItems; ++k) sums[k] = sum = sum + items[k];
  }

 private:
  T Before(T value, T* total) {
    temp_.values[threadIdx.x] = value;
    __syncthreads();
    T before{}, all{};
    for (int k = 0; k < kThreads; ++k) {
      if (k == static_cast<int>(threadIdx.x)) before = all;
      all = all + temp_.values[k];
    }
    if (total != nullptr) *total = all;
    return before;
  }

  TempStorage& temp_;
};

}  // namespace cub

#endif  // JAXNSA_CUDA_SIMULATOR_BLOCK_SCAN_H_
