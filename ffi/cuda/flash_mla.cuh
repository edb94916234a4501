// How a block of the fused kernel writes FlashMLA's schedule.
//
// FlashMLA hands out blocks part by part. An item costs its blocks and an overhead; a part has room
// for `step` blocks and one overhead. In units of cost, with a boundary before each item and one
// behind the last, a part that begins at p ends at p + step, or on the last boundary up to one
// overhead behind that: it snaps there, and it always does on the last boundary. Between snaps parts
// begin `step` apart, so that all that has to be followed one by one are snaps; parts and items
// find what they need in a list of these.
#ifndef JAXNSA_CUDA_FLASH_MLA_CUH_
#define JAXNSA_CUDA_FLASH_MLA_CUH_

#include <cstdint>

#include "item_lengths.cuh"
#include "schedules.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

// A part that begins on an item's boundary.
struct Snap {
  int32_t part;
  int32_t boundary;
};

// What follows from a schedule and the sum of all costs.
struct FlashMlaSteps {
  int64_t step;
  int64_t overhead;
  int64_t total;
  int32_t items;

  __device__ FlashMlaSteps(const FlashMlaSchedule& schedule, int32_t items, int64_t total)
      : step(Divide(total + schedule.num_sm_parts - 1, schedule.num_sm_parts)),
        overhead(schedule.fixed_overhead_blocks),
        total(total),
        items(items) {}

  // Whether the end of a part snaps to a boundary, the last one up to one overhead behind it.
  __device__ bool Snaps(int64_t end, const Found& boundary) const {
    return boundary.sum >= end || boundary.index == items;
  }
};

// Some neighbouring snaps, in shared memory.
struct ListedSnaps {
  const Snap* list;
  int32_t count;    // without the one behind them
  int32_t earlier;  // snaps before the list

  __device__ Snap operator[](int32_t k) const { return list[k]; }
  __device__ int32_t OfPart(int32_t part) const {
    return Last([&](const Snap& snap) { return snap.part <= part; });
  }
  __device__ int32_t OfBoundary(int32_t boundary) const {
    return Last([&](const Snap& snap) { return snap.boundary <= boundary; });
  }

 private:
  // The last one up to the one behind the list that fulfils a condition, as the first does.
  template <typename Condition>
  __device__ int32_t Last(Condition condition) const {
    int32_t low = 0, high = count;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (condition(list[middle])) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Writes the parts from the first snap up to the last, and the splits up to the items from the
// first's boundary up to the last's.
template <typename Costs, typename Length, typename StoreRow, typename StoreSplits>
__device__ void WriteBetweenSnaps(const FlashMlaSchedule& schedule, const FlashMlaSteps& steps,
                                  const Costs& costs, const ListedSnaps& snaps, Length length,
                                  StoreRow store_row, StoreSplits store_splits) {
  const Snap& behind = snaps[snaps.count];
  const auto place = [&](int64_t begin, const Found& at, int32_t since, int64_t base) {
    const auto block = static_cast<int32_t>(begin - at.sum);
    // Parts after the snap that begin in an earlier item, or before this one.
    const auto earlier = static_cast<int32_t>(Divide(at.sum > base ? at.sum - base : 0, steps.step));
    return FlashMlaPlace{at.index, block, block > 0 ? since - earlier : 0};
  };
  for (int32_t part = snaps[0].part + static_cast<int32_t>(threadIdx.x); part < behind.part;
       part += kThreads) {
    const int32_t k = snaps.OfPart(part);
    const Snap at = snaps[k], next = snaps[k + 1];
    const int64_t base = costs[at.boundary];
    const int32_t since = part - at.part;
    const int64_t begin = base + since * steps.step;
    const int64_t end = part + 1 == next.part ? costs[next.boundary] : begin + steps.step;
    Found found[2];
    costs.Find({begin, end}, found);
    const FlashMlaPlace first = place(begin, found[0], since, base);
    const FlashMlaPlace last = place(end, found[1], since + 1, base);
    int32_t row[8];
    schedule.Write(first, last, length(FlashMlaSchedule::end_item(last)), row);
    store_row(part, row);
  }
  const int32_t last = behind.boundary;
  for (int32_t i = snaps[0].boundary + static_cast<int32_t>(threadIdx.x);
       i < last + (last == steps.items); i += kThreads) {
    const int32_t k = snaps.OfBoundary(i);
    const Snap at = snaps[k];
    int32_t inside = 0;  // parts after the snap that begin before this boundary
    if (i > at.boundary) {
      const int64_t distance = costs[i] - costs[at.boundary];
      inside = Min(static_cast<int32_t>(Divide(distance - 1, steps.step)),
                   snaps[k + 1].part - at.part - 1);
    }
    store_splits(i, i + at.part - (snaps.earlier + k) + inside);
  }
}

// Parts that begin past the work, whose last item has a length; 0 where there is none.
template <typename StoreRow>
__device__ void WritePartsPastTheEnd(const FlashMlaSchedule& schedule, int32_t items,
                                     int32_t first_part, int32_t length, StoreRow store_row) {
  const FlashMlaPlace past{items, 0, 0};
  int32_t row[8];
  schedule.Write(past, past, length, row);
  for (int32_t part = first_part + static_cast<int32_t>(threadIdx.x);
       part < schedule.num_sm_parts; part += kThreads) {
    store_row(part, row);
  }
}

// The snap that follows each boundary where it is one of the next parts'.
struct NearSnaps {
  static constexpr int kParts = 4;

  // Of a boundary, the next one and behind it the parts between; 0 where it is further.
  uint32_t hops[kMostSums];

  template <typename Sums>
  __device__ void Find(const Sums& costs, const FlashMlaSteps& steps) {
    for (int32_t i = threadIdx.x; i < steps.items; i += kThreads) {
      int64_t numbers[kParts];
      Found found[kParts];
      const int64_t base = costs[i];
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        numbers[k] = base + (k + 1) * steps.step + steps.overhead;
      }
      costs.Find(numbers, found);
      uint32_t hop = 0;
#pragma unroll
      for (int k = kParts - 1; k >= 0; --k) {
        if (!steps.Snaps(numbers[k] - steps.overhead, found[k])) continue;
        hop = static_cast<uint32_t>(found[k].index) << 8 | (k + 1);
      }
      hops[i] = hop;
    }
  }
};

// The snap after one, found by a warp that looks at 32 parts at a time.
template <typename Sums>
__device__ Snap NextSnap(const Sums& costs, const FlashMlaSteps& steps, Snap at, int32_t first) {
  const int64_t base = costs[at.boundary];
  for (int32_t k = first + static_cast<int32_t>(threadIdx.x % kWarpThreads);; k += kWarpThreads) {
    Found found[1];
    const int64_t end = base + k * steps.step;
    costs.Find({end + steps.overhead}, found);
    const uint32_t snaps = __ballot_sync(kWholeWarp, steps.Snaps(end, found[0]));
    if (snaps == 0) continue;
    const int lane = __ffs(snaps) - 1;
    return {at.part + __shfl_sync(kWholeWarp, k, lane),
            __shfl_sync(kWholeWarp, found[0].index, lane)};
  }
}

// Of items of any lengths, which `of` makes of KV lengths.
template <typename Lengths, typename Of, typename StoreRow, typename StoreSplits>
__device__ void WriteFlashMla(SumsMemory& memory, const FlashMlaSchedule& schedule, int32_t items,
                              const Lengths& lengths, Of of, StoreRow store_row,
                              StoreSplits store_splits) {
  if (items == 0) {
    WritePartsPastTheEnd(schedule, 0, 0, 0, store_row);
    if (threadIdx.x == 0) store_splits(0, 0);
    return;
  }
  constexpr int kSnaps = 256;  // that are listed at a time
  const int32_t overhead = schedule.fixed_overhead_blocks;
  const auto length = [&](int32_t item) { return of(lengths(item)); };
  const auto cost_of = [&](int32_t kv_len) -> int64_t {
    return FlashMlaSchedule::blocks(of(kv_len)) + overhead;
  };
  using Costs = ItemValues<Lengths, decltype(cost_of)>;
  __shared__ NearSnaps near;
  __shared__ Snap list[kSnaps + 1];
  __shared__ int32_t count;
  const SharedSums<Costs> costs(memory, items, Costs{lengths, cost_of});
  const FlashMlaSteps steps(schedule, items, costs.total());
  const bool knows_near = items <= kMostSums;
  if (knows_near) near.Find(costs, steps);
  Snap at{0, 0};
  int32_t before = 0;
  while (at.boundary < items) {
    __syncthreads();
    if (threadIdx.x < kWarpThreads) {
      int32_t k = 0;
      for (; k < kSnaps && at.boundary < items; ++k) {
        if (threadIdx.x == 0) list[k] = at;
        const uint32_t hop = knows_near ? near.hops[at.boundary] : 0;
        if (hop != 0) {
          at = {at.part + static_cast<int32_t>(hop & 0xff), static_cast<int32_t>(hop >> 8)};
        } else {
          at = NextSnap(costs, steps, at, knows_near ? NearSnaps::kParts + 1 : 1);
        }
      }
      if (threadIdx.x == 0) {
        list[k] = at;
        count = k;
      }
    }
    __syncthreads();
    at = list[count];
    WriteBetweenSnaps(schedule, steps, costs, ListedSnaps{list, count, before}, length, store_row,
                      store_splits);
    before += count;
  }
  WritePartsPastTheEnd(schedule, items, at.part, length(items - 1), store_row);
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_FLASH_MLA_CUH_
