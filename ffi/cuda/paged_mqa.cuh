// How a block of the fused kernel writes DeepGEMM's schedule of the paged MQA logits.
#ifndef JAXNSA_CUDA_PAGED_MQA_CUH_
#define JAXNSA_CUDA_PAGED_MQA_CUH_

#include <cstdint>

#include "shared_sums.cuh"
#include "thread_items.cuh"
#include "warp_sums.cuh"

namespace jaxnsa {

// Writes DeepGEMM's schedule of items of next_n rows: the rows of one of the blocks of several
// groups, each of which shares the schedule between `shares` blocks. `length(item)` is a context
// length, and `store_to(group)` is what stores a row of the array.
template <typename Length, typename StoreTo>
__device__ void WritePagedMqaSchedule(const PagedMqaSchedule& schedule, int32_t items,
                                      int32_t next_n, const Divisor& shares, int32_t block,
                                      Length length, StoreTo store_to) {
  const int32_t num_sms = schedule.num_sms, unit_count = schedule.units_per_segment(next_n);
  const auto segments = [&](int32_t item) { return PagedMqaSchedule::segments(length(item)); };
  const auto write = [&](const auto& starts, int32_t units) {
    const auto total = starts.total() * units, quotient = total / num_sms;
    const auto remainder = static_cast<int32_t>(total - quotient * num_sms);
    const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
    const int32_t group = shares.Divide(block);
    const Stride stride(block - group * shares.value, shares.value);
    const auto store = store_to(group);
    // A warp looks its rows up together: until none of them is left.
#pragma unroll 1
    for (auto s = static_cast<int32_t>(stride.first); s - lane <= num_sms;
         s += static_cast<int32_t>(stride.step)) {
      const auto unit = schedule.first_unit(Min(s, num_sms), quotient, remainder);
      const auto found = starts.Find(units == 1 ? unit : unit / units);
      const int32_t i = found.index;
      if (s > num_sms) continue;
      const PagedMqaRow begin = schedule.row(i, unit - found.sum * units,
                                             units > 1 && i < items ? segments(i) : 0, units);
      const int32_t columns[] = {begin.item, begin.segment};
      store(s, columns);
    }
  };
  if (unit_count > 1 || items > kWarpThreads) {
    write(SharedSums<decltype(segments)>(WorkSums(), items, segments), unit_count);
  } else {
    write(WarpSums(items, segments), 1);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_PAGED_MQA_CUH_
