// Sums that all threads of a block take together.
#ifndef JAXNSA_CUDA_BLOCK_SUMS_CUH_
#define JAXNSA_CUDA_BLOCK_SUMS_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>

#include "parameters.cuh"

namespace jaxnsa {

// The sum of `value(i, load(i))` over this thread's share of the first `count` requests. So many
// loads at once are waited for together.
template <typename T, int kLoads = 4, typename Load, typename Value>
__device__ T ThreadSum(int32_t count, Load load, Value value) {
  const auto end = static_cast<uint32_t>(count);
  T sum{};
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < end; first += kLoads * kThreads) {
    const auto request = [&](int k) { return first + k * kThreads; };
    decltype(load(0)) loaded[kLoads]{};
#pragma unroll
    for (int k = 0; k < kLoads && request(k) < end; ++k) loaded[k] = load(request(k));
#pragma unroll
    for (int k = 0; k < kLoads && request(k) < end; ++k) {
      sum = sum + value(request(k), loaded[k]);
    }
  }
  return sum;
}

// The sum of the values of all threads, which every thread receives.
template <typename T>
__device__ T SumOfThreads(T value) {
  using Reduce = cub::WarpReduce<T>;
  constexpr int kWarps = kThreads / kWarpThreads;
  __shared__ typename Reduce::TempStorage temp[kWarps];
  __shared__ T sums[kWarps];
  const T sum = Reduce(temp[threadIdx.x / kWarpThreads]).Sum(value);
  if (threadIdx.x % kWarpThreads == 0) sums[threadIdx.x / kWarpThreads] = sum;
  __syncthreads();
  value = sums[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = value + sums[w];
  __syncthreads();
  return value;
}

// The sum of the values of the threads before this one, and that of all.
template <typename T>
__device__ T SumBeforeThread(T value, T* all) {
  using Scan = cub::BlockScan<T, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage temp;
  T before;
  Scan(temp).ExclusiveSum(value, before, *all);
  __syncthreads();
  return before;
}

template <typename T>
__device__ T SumBeforeThread(T value) {
  T all;
  return SumBeforeThread(value, &all);
}

// What comes before a request or a group, and behind it.
template <typename T>
struct Around {
  T before;
  T behind;

  friend __device__ Around operator+(Around a, Around b) {
    return {a.before + b.before, a.behind + b.behind};
  }
};

// Two sums that are taken together.
template <typename First, typename Second>
struct SumPair {
  First first;
  Second second;

  friend __device__ SumPair operator+(SumPair a, SumPair b) {
    return {a.first + b.first, a.second + b.second};
  }
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_BLOCK_SUMS_CUH_
