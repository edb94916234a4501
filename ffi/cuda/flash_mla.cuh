// How a block of the fused kernel writes FlashMLA's schedule.
//
// FlashMLA hands out blocks part by part. An item costs its blocks and an overhead; a part has room
// for `step` blocks and one overhead. In units of cost, with a boundary before each item and one
// behind the last, a part that begins at p ends at p + step, or on the last boundary up to one
// overhead behind that: it snaps there, and all that follow begin as much later. Parts that snap
// begin ever later than without snaps: one part begins as much later as, of those before it, the
// last that snaps, the greatest of all. It may so have its next boundary in reach, and snap there.
#ifndef JAXNSA_CUDA_FLASH_MLA_CUH_
#define JAXNSA_CUDA_FLASH_MLA_CUH_

#include <cstdint>

#include "schedules.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

// Where a part begins; behind the last item where no work is left.
struct PartBegin {
  int32_t item;
  int32_t block;
  int32_t inside;  // parts before it that begin inside an item
};

using PartBegins = PartBegin[kMostParts + 1];

// Finds where parts begin, 32 at a time, and behind them where the work ends. Called by one warp.
template <typename Costs>
__device__ void FindPartBegins(const FlashMlaSchedule& schedule, int32_t items, const Costs& costs,
                               PartBegins& begins) {
  const int32_t parts = schedule.num_sm_parts, overhead = schedule.fixed_overhead_blocks;
  const int64_t step = CeilDiv(costs.total(), parts);
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
  int64_t begin = lane * step;  // if none of these 32 snaps
  int32_t inside = 0;
#pragma unroll 1
  for (int32_t part = lane; part - lane <= parts; part += kWarpThreads) {
    const Found found = costs.Find(begin + overhead);
    int32_t item = found.index;
    // How far the item's boundary is behind `begin`, and the next one.
    auto at = static_cast<int32_t>(found.sum - begin);
    int32_t next = 0;
    const auto reach = [&] {
      next = item < items ? at + static_cast<int32_t>(costs.value(item)) : kInt32Max;
      if (item == items) at = 0;
    };
    reach();
    int32_t later, latest;  // than `begin`: this part, if it does not snap, and those behind the 32
#pragma unroll 1
    while (true) {
      later = Max(at, 0);
#pragma unroll
      for (int distance = 1; distance < kWarpThreads; distance *= 2) {
        const int32_t before = __shfl_sync(kWholeWarp, later, (lane - distance) & 31);
        if (lane >= distance) later = Max(later, before);
      }
      latest = __shfl_sync(kWholeWarp, later, kWarpThreads - 1);
      later = __shfl_sync(kWholeWarp, later, (lane - 1) & 31);
      if (lane == 0) later = 0;
      const bool reaches_next = next - later <= overhead;
      if (__ballot_sync(kWholeWarp, reaches_next) == 0) break;
      if (!reaches_next) continue;
      ++item;
      at = next;
      reach();
    }
    const int32_t block = item < items ? Max(later - at, 0) : 0;
    const uint32_t are_inside = __ballot_sync(kWholeWarp, block > 0);
    const int32_t before = __popc(are_inside & ((1u << lane) - 1));
    if (part <= parts) begins[part] = {item, block, inside + before};
    inside += __popc(are_inside);
    begin += kWarpThreads * step + latest;
  }
}

// Writes FlashMLA's schedule, those rows of both arrays one behind the other that `stride` has;
// `length(item)` are the keys of an item, and `store_row(row, columns)` and
// `store_splits(row, columns)` store a row.
template <typename Length, typename StoreRow, typename StoreSplits>
__device__ void WriteFlashMla(SumsMemory& memory, const FlashMlaSchedule& schedule, int32_t items,
                              Stride stride, Length length, StoreRow store_row,
                              StoreSplits store_splits) {
  __shared__ PartBegins begins;
  const int32_t parts = schedule.num_sm_parts;
  const auto cost = [&](int32_t item) -> int64_t {
    return FlashMlaSchedule::blocks(length(item)) + schedule.fixed_overhead_blocks;
  };
  const SharedSums<decltype(cost)> costs(memory, items, cost);
  if (threadIdx.x < kWarpThreads) FindPartBegins(schedule, items, costs, begins);
  __syncthreads();
#pragma unroll 1
  for (int64_t k = stride.first; k <= int64_t{parts} + items; k += stride.step) {
    const bool is_part = k < parts;
    const int32_t item = is_part ? begins[k].item : static_cast<int32_t>(k - parts);
    int32_t at = 0;  // the first part that begins in this item or behind it
#pragma unroll 1
    for (int32_t step = 1 << (31 - __clz(parts)); step > 0; step /= 2) {
      const int32_t next = Min(at + step, parts);
      at = begins[next - 1].item < item ? next : at;
    }
    const int32_t inside = begins[at].inside;  // earlier items
    if (!is_part) {
      const int32_t columns[] = {item + inside};
      store_splits(item, columns);
      continue;
    }
    const PartBegin begin = begins[k], next = begins[k + 1];
    const int32_t split = begin.block > 0 ? begin.inside - inside + 1 : 0;
    const FlashMlaPlace end{next.item, next.block, 0};
    const int32_t end_length = items > 0 ? length(FlashMlaSchedule::end_item(end)) : 0;
    int32_t row[8];
    schedule.Write({begin.item, begin.block, split}, end, end_length, row);
    store_row(k, row);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_FLASH_MLA_CUH_
