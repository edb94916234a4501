// Prefix sums that a block keeps in shared memory and looks up.
#ifndef JAXNSA_CUDA_SHARED_SUMS_CUH_
#define JAXNSA_CUDA_SHARED_SUMS_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "thread_items.cuh"

namespace jaxnsa {

// The last index whose sum is at most a number, and that sum.
template <typename Sum>
struct FoundSum {
  int32_t index;
  Sum sum;
};

using Found = FoundSum<int64_t>;

constexpr int kLogMostSums = 10, kMostSums = 1 << kLogMostSums;

using SumsMemory = int64_t[kMostSums + 1];

// A block's memory for the sums of the schedule that it writes.
__device__ inline SumsMemory& WorkSums() {
  __shared__ SumsMemory memory;
  return memory;
}

// 0 and the inclusive prefix sums of `count` values `value(index)`, none of them negative. Where
// there are more than fit, those of groups of neighbours; a lookup then adds up values by itself.
//
// A block does this once, and what it waits for are its instructions: loops are not unrolled.
template <typename Value>
class SharedSums {
 public:
  // Called by all threads of the block.
  __device__ SharedSums(SumsMemory& sums, int32_t count, Value value)
      : sums_(sums), count_(count), value_(value) {
    log_group_ = Max(32 - kLogMostSums - __clz(Max(count, 1) - 1), 0);
    groups_ = ((count - 1) >> log_group_) + 1;
    const ThreadItems mine(groups_);
    int64_t sum = 0;
#pragma unroll 1
    for (int32_t g = mine.first; g < mine.end; ++g) {
      sums_[g] = sum;
      int32_t i = g << log_group_, left = Min(1 << log_group_, count - i);
#pragma unroll 1
      do sum += value(i++); while (--left > 0);
    }
    using Scan = cub::BlockScan<int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
    __shared__ typename Scan::TempStorage temp;
    int64_t before;
    Scan(temp).ExclusiveSum(sum, before, total_);
#pragma unroll 1
    for (int32_t g = mine.first; g < mine.end; ++g) sums_[g] += before;
    if (threadIdx.x == 0) sums_[groups_] = total_;
    __syncthreads();
  }

  __device__ int64_t total() const { return total_; }

  __device__ int64_t value(int32_t index) const {
    if (__builtin_expect(log_group_ == 0, 1)) return sums_[index + 1] - sums_[index];
    return value_(index);
  }

  // Looks up a number that is not negative.
  __device__ Found Find(int64_t number) const {
    int32_t at = 0;
#pragma unroll 1
    for (int32_t step = groups_ > 0 ? 1 << (31 - __clz(groups_)) : 0; step > 0; step /= 2) {
      const int32_t next = Min(at + step, groups_);
      at = sums_[next] <= number ? next : at;
    }
    if (__builtin_expect(log_group_ == 0, 1)) return {at, sums_[at]};
    return FindInGroup(at, number);
  }

 private:
  // From the first index of a group on.
  __device__ Found FindInGroup(int32_t group, int64_t number) const {
    if (group == groups_) return {count_, total_};
    Found found{group << log_group_, sums_[group]};
#pragma unroll 1
    for (; found.index < count_; ++found.index) {
      const int64_t next = found.sum + value_(found.index);
      if (next > number) break;
      found.sum = next;
    }
    return found;
  }

  int64_t* sums_;
  int32_t count_, groups_, log_group_;
  int64_t total_;
  Value value_;
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_SHARED_SUMS_CUH_
