// Prefix sums that a block keeps in shared memory and looks up.
#ifndef JAXNSA_CUDA_SHARED_SUMS_CUH_
#define JAXNSA_CUDA_SHARED_SUMS_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "parameters.cuh"

namespace jaxnsa {

// The last index whose sum is at most a number, and that sum.
struct Found {
  int32_t index;
  int64_t sum;
};

constexpr int kMostSums = 1024;

using SumsMemory = int64_t[kMostSums + 1];

// 0 and the inclusive prefix sums of `value(0)` to `value(count - 1)`, none of them negative. Where
// there are more than fit, every so many of them; a lookup then adds values up by itself.
template <typename Value>
class SharedSums {
 public:
  // Called by all threads of the block.
  __device__ SharedSums(SumsMemory& memory, int32_t count, Value value)
      : sums_(memory), count_(count), value_(value) {
    constexpr int kItems = kMostSums / kThreads;
    group_ = Max(static_cast<int32_t>(CeilDiv(count, kMostSums)), 1);
    groups_ = static_cast<int32_t>(CeilDiv(count, group_));
    const auto share = static_cast<int32_t>(CeilDiv(groups_, kThreads));  // at most kItems
    const int32_t first = static_cast<int32_t>(threadIdx.x) * share;
    int64_t items[kItems], sum = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      items[k] = k < share && first + k < groups_ && group_ == 1 ? value(first + k) : 0;
    }
    if (group_ > 1) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (k < share && first + k < groups_) items[k] = GroupSum(first + k);
      }
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) sum += items[k];
    using Scan = cub::BlockScan<int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
    __shared__ typename Scan::TempStorage temp;
    int64_t end;
    Scan(temp).InclusiveSum(sum, end, total_);
    int64_t before = end - sum;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k < share && first + k < groups_) sums_[first + k] = before;
      before += items[k];
    }
    if (threadIdx.x == 0) sums_[groups_] = total_;
    __syncthreads();
  }

  __device__ int32_t count() const { return count_; }
  __device__ int64_t total() const { return total_; }

  // The sum before an index, up to that of all.
  __device__ int64_t operator[](int32_t index) const {
    if (group_ == 1) return sums_[index];
    int64_t sum = sums_[index / group_];
    for (int32_t i = index / group_ * group_; i < index; ++i) sum += value_(i);
    return sum;
  }

  // Looks several numbers up at once, none of them negative.
  template <int kNumbers>
  __device__ void Find(const int64_t (&numbers)[kNumbers], Found (&found)[kNumbers]) const {
    int32_t at[kNumbers] = {};
    for (int32_t step = HighestBit(groups_); step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < kNumbers; ++k) {
        const int32_t next = at[k] + step;
        if (next <= groups_ && sums_[next] <= numbers[k]) at[k] = next;
      }
    }
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) {
      found[k] = {at[k], sums_[at[k]]};
      if (group_ > 1) FindInGroup(numbers[k], &found[k]);
    }
  }

 private:
  static __device__ int32_t HighestBit(int32_t x) { return x > 0 ? 1 << (31 - __clz(x)) : 0; }

  __device__ int64_t GroupSum(int32_t group) const {
    int64_t sum = 0;
    const int32_t end = Min((group + 1) * group_, count_);
    for (int32_t i = group * group_; i < end; ++i) sum += value_(i);
    return sum;
  }

  // From the first index of a group on.
  __device__ void FindInGroup(int64_t number, Found* found) const {
    found->index = Min(found->index * group_, count_);
    while (found->index < count_) {
      const int64_t next = found->sum + value_(found->index);
      if (next > number) return;
      found->sum = next;
      ++found->index;
    }
  }

  int64_t* sums_;
  int32_t count_, group_, groups_;
  int64_t total_;
  Value value_;
};

// Of positive numbers, rounded down; 32 bits are divided where that is enough.
__device__ inline int64_t Divide(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_SHARED_SUMS_CUH_
