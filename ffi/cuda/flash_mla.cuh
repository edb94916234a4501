// How a block of the fused kernel writes FlashMLA's schedule.
//
// FlashMLA hands out blocks part by part. An item costs its blocks and an overhead; a part has room
// for `step` blocks and one overhead. In units of cost, with a boundary before each item and one
// behind the last, a part that begins at p ends at p + step, or on the last boundary up to one
// overhead behind that: it snaps there, and all that follow begin as much later. How much later
// than without snaps a part begins never falls from one to the next: it is the greatest of what the
// parts before it snap by. That may bring its next boundary within reach, to which it then snaps.
#ifndef JAXNSA_CUDA_FLASH_MLA_CUH_
#define JAXNSA_CUDA_FLASH_MLA_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "shared_sums.cuh"
#include "thread_items.cuh"

namespace jaxnsa {

// Where a part begins; behind the last item where no work is left.
struct PartBegin {
  int32_t item;
  int32_t block;
  int32_t inside;  // parts before it that begin inside an item
};

using PartBegins = PartBegin[kMostParts + 1];

// By how much parts begin later than without snaps.
struct Later {
  int32_t by;

  friend __device__ Later operator+(Later a, Later b) { return {Max(a.by, b.by)}; }
};

// Finds where parts begin, 128 at a time, and behind them where the work ends. Called by all
// threads of the block.
template <typename Costs>
__device__ void FindPartBegins(const FlashMlaSchedule& schedule, int32_t items, const Costs& costs,
                               PartBegins& begins) {
  using LaterScan = cub::BlockScan<Later, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  using CountScan = cub::BlockScan<int32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename LaterScan::TempStorage later_temp;
  __shared__ typename CountScan::TempStorage count_temp;
  const int32_t parts = schedule.num_sm_parts, overhead = schedule.fixed_overhead_blocks;
  const int64_t step = CeilDiv(costs.total(), parts);
  int64_t earlier = 0;  // by how much the parts before these begin later
  int32_t inside = 0;
#pragma unroll 1
  for (int32_t first = 0; first <= parts; first += kThreads) {
    const int32_t part = first + static_cast<int32_t>(threadIdx.x);
    const int64_t begin = Min(part, parts) * step + earlier;  // if none of these 128 snaps
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
    Later later, latest;  // this part, if it does not snap, and those behind the 128
#pragma unroll 1
    while (true) {
      LaterScan(later_temp).ExclusiveSum(Later{Max(at, 0)}, later, latest);
      const bool reaches_next = next - later.by <= overhead;
      if (!__syncthreads_or(reaches_next)) break;
      if (!reaches_next) continue;
      ++item;
      at = next;
      reach();
    }
    const int32_t block = item < items ? Max(later.by - at, 0) : 0;
    int32_t before, count;
    CountScan(count_temp).ExclusiveSum(block > 0, before, count);
    if (part <= parts) begins[part] = {item, block, inside + before};
    inside += count;
    earlier += latest.by;
    __syncthreads();
  }
}

// Writes FlashMLA's schedule, those rows of both arrays one behind the other that `stride` has;
// `length(item)` are the keys of an item, and `store_row(row, columns)` and
// `store_splits(row, columns)` store a row.
template <typename Length, typename StoreRow, typename StoreSplits>
__device__ void WriteFlashMla(const FlashMlaSchedule& schedule, int32_t items, Stride stride,
                              Length length, StoreRow store_row, StoreSplits store_splits) {
  __shared__ PartBegins begins;
  const int32_t parts = schedule.num_sm_parts;
  const auto cost = [&](int32_t item) -> int64_t {
    return FlashMlaSchedule::blocks(length(item)) + schedule.fixed_overhead_blocks;
  };
  const SharedSums<decltype(cost)> costs(WorkSums(), items, cost);
  FindPartBegins(schedule, items, costs, begins);
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
