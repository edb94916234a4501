// Prefix sums that a block keeps in shared memory and looks up.
#ifndef JAXNSA_CUDA_SHARED_SUMS_CUH_
#define JAXNSA_CUDA_SHARED_SUMS_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "parameters.cuh"

namespace jaxnsa {

// The last index whose sum is at most a number, and that sum.
template <typename T>
struct Found {
  int32_t index;
  T sum;
};

// Of `count` items, those that are this thread's: neighbours, and as many as any other thread's.
struct Share {
  int32_t first;
  int32_t end;

  __device__ explicit Share(int32_t count) {
    const int64_t size = CeilDiv(count, kThreads), begin = threadIdx.x * size;
    first = static_cast<int32_t>(begin < count ? begin : count);
    end = count - first > size ? static_cast<int32_t>(first + size) : count;
  }
};

constexpr int kMostSums = 1024;

using SumsMemory = int64_t[kMostSums + 1];

// 0 and the inclusive prefix sums of `count` values, none of them negative, which
// `values.ForEach(first, end, body)` gives with their indices until body returns false. Where there are
// more than fit, every so many of them; a lookup then adds values up by itself. No sum exceeds T.
//
// One block does this, once, and what it waits for are its instructions: loops are not unrolled, and
// what is seldom called is not inlined.
template <typename T, typename Values>
class SharedSums {
 public:
  // Called by all threads of the block.
  __device__ SharedSums(SumsMemory& memory, int32_t count, Values values)
      : sums_(reinterpret_cast<T*>(memory)), count_(count), values_(values) {
    group_ = Max(static_cast<int32_t>(CeilDiv(count, kMostSums)), 1);
    groups_ = static_cast<int32_t>(CeilDiv(count, group_));
    const Share share(groups_);
    T sum = 0;
    int32_t group = share.first, in_group = 0;
    T group_sum = 0;
    values.ForEach(share.first * group_, AtMost(int64_t{share.end} * group_, count),
                   [&](int32_t, T value) {
                     group_sum += value;
                     sum += value;
                     if (++in_group < group_) return true;
                     sums_[group++] = group_sum;
                     group_sum = 0;
                     in_group = 0;
                     return true;
                   });
    if (in_group > 0) sums_[group] = group_sum;
    using Scan = cub::BlockScan<T, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
    __shared__ typename Scan::TempStorage temp;
    T before;
    Scan(temp).ExclusiveSum(sum, before, total_);
#pragma unroll 4
    for (int32_t g = share.first; g < share.end; ++g) {
      const T next = before + sums_[g];
      sums_[g] = before;
      before = next;
    }
    if (threadIdx.x == 0) sums_[groups_] = total_;
    __syncthreads();
  }

  __device__ T total() const { return total_; }

  // Whether none has to be added up.
  __device__ bool has_all() const { return group_ == 1; }

  // The sum before an index, up to that of all.
  __device__ T operator[](int32_t index) const {
    if (group_ == 1) return sums_[index];
    return sums_[index / group_] + Sum(index / group_ * group_, index);
  }

  // Looks several numbers up at once, none of them negative.
  template <int kNumbers>
  __device__ void Find(const T (&numbers)[kNumbers], Found<T> (&found)[kNumbers]) const {
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

  static __device__ int32_t AtMost(int64_t a, int32_t b) {
    return a < b ? static_cast<int32_t>(a) : b;
  }

  __device__ __attribute__((noinline)) T Sum(int32_t first, int32_t end) const {
    T sum = 0;
    values_.ForEach(first, end, [&](int32_t, T value) {
      sum += value;
      return true;
    });
    return sum;
  }

  // From the first index of a group on.
  __device__ __attribute__((noinline)) void FindInGroup(T number, Found<T>* found) const {
    found->index = Min(found->index * group_, count_);
    values_.ForEach(found->index, count_, [&](int32_t i, T value) {
      const T next = found->sum + value;
      if (next > number) return false;
      *found = {i + 1, next};
      return true;
    });
  }

  T* sums_;
  int32_t count_, group_, groups_;
  T total_;
  Values values_;
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_SHARED_SUMS_CUH_
