// Prefix sums that each warp keeps in its registers and looks up.
#ifndef JAXNSA_CUDA_WARP_SUMS_CUH_
#define JAXNSA_CUDA_WARP_SUMS_CUH_

#include <cstdint>
#include <cub/warp/warp_scan.cuh>

#include "shared_sums.cuh"

namespace jaxnsa {

// What SharedSums is for, of `count` values that a warp has lanes for and whose sum is an int32:
// no thread waits for another warp's.
class WarpSums {
 public:
  // Called by all threads of the warp.
  template <typename Value>
  __device__ WarpSums(int32_t count, const Value& value) : count_(count) {
    const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
    const int32_t own = lane < count ? value(lane) : 0;
    total_ = static_cast<int32_t>(__reduce_add_sync(kWholeWarp, static_cast<uint32_t>(own)));
    using Scan = cub::WarpScan<int32_t>;
    __shared__ typename Scan::TempStorage temp[kThreads / kWarpThreads];
    Scan(temp[threadIdx.x / kWarpThreads]).InclusiveSum(own, sum_);
  }

  __device__ int32_t total() const { return total_; }

  // Looks up a number that is not negative. Called by all threads of the warp. In two steps, each
  // of which waits once: for every eighth lane's sum, and for eight lanes' sums.
  __device__ FoundSum<int32_t> Find(int32_t number) const {
    int32_t at = 0;
#pragma unroll
    for (int lane = 7; lane < kWarpThreads - 1; lane += 8) at += SumOf(lane) <= number ? 8 : 0;
    int32_t below = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) below += SumOf(at + k) <= number;
    at = Min(at + below, count_);
    const int32_t sum = SumOf(Max(at - 1, 0));
    return {at, at == 0 ? 0 : sum};
  }

 private:
  // Of the values up to a lane's.
  __device__ int32_t SumOf(int32_t lane) const { return __shfl_sync(kWholeWarp, sum_, lane); }

  int32_t count_;
  int32_t sum_;  // of the values up to this lane's
  int32_t total_;
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_WARP_SUMS_CUH_
