// How a block of the fused kernel writes DeepGEMM's schedule of the paged MQA logits.
#ifndef JAXNSA_CUDA_PAGED_MQA_CUH_
#define JAXNSA_CUDA_PAGED_MQA_CUH_

#include <cstdint>

#include "shared_sums.cuh"
#include "thread_items.cuh"

namespace jaxnsa {

// Writes DeepGEMM's schedule of items of next_n rows, those rows of it that `stride` has;
// `length(item)` is a context length, and `store(row, columns)` stores a row of the array.
template <typename Length, typename Store>
__device__ void WritePagedMqaSchedule(SumsMemory& memory, const PagedMqaSchedule& schedule,
                                      int32_t items, int32_t next_n, Stride stride, Length length,
                                      Store store) {
  const int32_t units = schedule.units_per_segment(next_n), num_sms = schedule.num_sms;
  const auto segments = [&](int32_t item) { return PagedMqaSchedule::segments(length(item)); };
  const auto units_of = [&](int32_t item) { return int64_t{segments(item)} * units; };
  const SharedSums<decltype(units_of)> starts(memory, items, units_of);
  const int64_t quotient = starts.total() / num_sms;
  const auto remainder = static_cast<int32_t>(starts.total() - quotient * num_sms);
#pragma unroll 1
  for (int64_t row = stride.first; row <= num_sms; row += stride.step) {
    const auto s = static_cast<int32_t>(row);
    const int64_t unit = schedule.first_unit(s, quotient, remainder);
    const Found found = starts.Find(unit);
    const int32_t i = found.index;
    const PagedMqaRow begin =
        schedule.row(i, unit - found.sum, units > 1 && i < items ? segments(i) : 0, units);
    const int32_t columns[] = {begin.item, begin.segment};
    store(s, columns);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_PAGED_MQA_CUH_
