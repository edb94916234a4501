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

// Neighbouring items that a thread looks at together.
constexpr int kItems = 8;

constexpr int kMostSums = kItems * kThreads;

using SumsMemory = int64_t[kMostSums + 1];

// 0 and the inclusive prefix sums of `value(0)` to `value(count - 1)`, none of them negative, which
// `value.Load(first, end, values)` loads kItems at a time. Where there are more than fit, every so many
// of them; a lookup then adds values up by itself.
template <typename Value>
class SharedSums {
 public:
  // Called by all threads of the block.
  __device__ SharedSums(SumsMemory& memory, int32_t count, Value value)
      : sums_(memory), count_(count), value_(value) {
    group_ = Max(static_cast<int32_t>(CeilDiv(count, kMostSums)), 1);
    groups_ = static_cast<int32_t>(CeilDiv(count, group_));
    const int32_t first = static_cast<int32_t>(threadIdx.x) * kItems;
    int64_t items[kItems], sum = 0;
    if (group_ == 1) {
      value.Load(first, count, items);
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        items[k] = first + k < groups_ ? Sum((first + k) * group_, group_) : 0;
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
      if (first + k < groups_) sums_[first + k] = before;
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
    return sums_[index / group_] + Sum(index / group_ * group_, index % group_);
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

  // Of at most `count` values from the first on. Like the next function it is called from many places,
  // and seldom: inlined, it would be most of a kernel's code.
  __device__ __attribute__((noinline)) int64_t Sum(int32_t first, int32_t count) const {
    int64_t sum = 0;
    for (int32_t i = first; i < count_ && i - first < count; ++i) sum += value_(i);
    return sum;
  }

  // From the first index of a group on.
  __device__ __attribute__((noinline)) void FindInGroup(int64_t number, Found* found) const {
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
