// Sums that all threads of a block take together.
#ifndef JAXNSA_CUDA_BLOCK_SUMS_CUH_
#define JAXNSA_CUDA_BLOCK_SUMS_CUH_

#include <cstdint>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "parameters.cuh"

namespace jaxnsa {

// The sum of `value(i)` over this thread's share of [begin, end).
template <typename T, typename Value>
__device__ T ThreadSum(int64_t begin, int64_t end, Value value) {
  T sum{};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum = sum + value(i);
  return sum;
}

// The sum of the values of all threads, which every thread receives.
template <typename T>
__device__ T SumOfThreads(T value) {
  using Reduce = cub::BlockReduce<T, kThreads>;
  __shared__ typename Reduce::TempStorage temp;
  __shared__ T result;
  const T sum = Reduce(temp).Sum(value);
  if (threadIdx.x == 0) result = sum;
  __syncthreads();
  value = result;
  __syncthreads();
  return value;
}

// The sum of `value(i)` over [begin, end), which every thread receives.
template <typename T, typename Value>
__device__ T BlockSum(int64_t begin, int64_t end, Value value) {
  return begin < end ? SumOfThreads(ThreadSum<T>(begin, end, value)) : T{};
}

// The sum of the values of the threads before this one.
template <typename T>
__device__ T SumBeforeThread(T value) {
  using Scan = cub::BlockScan<T, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage temp;
  T before;
  Scan(temp).ExclusiveSum(value, before);
  __syncthreads();
  return before;
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_BLOCK_SUMS_CUH_
