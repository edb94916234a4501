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

// What follows from a schedule and the sum of all costs, of type T.
template <typename T>
struct FlashMlaSteps {
  T step;
  int32_t overhead;
  int32_t items;
  Divisor by_step;

  __device__ FlashMlaSteps(const FlashMlaSchedule& schedule, int32_t items, T total)
      : step((total - 1) / schedule.num_sm_parts + 1),
        overhead(schedule.fixed_overhead_blocks),
        items(items),
        by_step(sizeof(T) == 4 ? Divisor::Of(static_cast<int32_t>(step)) : Divisor{}) {}

  // How many whole steps a cost is.
  __device__ int32_t Whole(T cost) const {
    return static_cast<int32_t>(sizeof(T) == 4 ? by_step.Divide(static_cast<int32_t>(cost))
                                               : cost / step);
  }
  // How many steps a cost needs.
  __device__ int32_t Needed(T cost) const { return Whole(cost - 1) + 1; }
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
template <typename T, typename Costs, typename Length, typename StoreRow, typename StoreSplits>
__device__ void WriteBetweenSnaps(const FlashMlaSchedule& schedule, const FlashMlaSteps<T>& steps,
                                  const Costs& costs, const ListedSnaps& snaps, Length length,
                                  StoreRow store_row, StoreSplits store_splits) {
  const Snap& behind = snaps[snaps.count];
  const auto place = [&](T begin, const Found<T>& at, int32_t since, T base) {
    const auto block = static_cast<int32_t>(begin - at.sum);
    // Parts after the snap that begin in an earlier item, or before this one.
    const int32_t earlier = at.sum > base ? steps.Whole(at.sum - base) : 0;
    return FlashMlaPlace{at.index, block, block > 0 ? since - earlier : 0};
  };
  for (int32_t part = snaps[0].part + static_cast<int32_t>(threadIdx.x); part < behind.part;
       part += kThreads) {
    const int32_t k = snaps.OfPart(part);
    const Snap at = snaps[k], next = snaps[k + 1];
    const T base = costs[at.boundary];
    const int32_t since = part - at.part;
    const T begin = base + since * steps.step;
    const T end = part + 1 == next.part ? costs[next.boundary] : begin + steps.step;
    Found<T> found[2];
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
      inside = Min(steps.Needed(costs[i] - costs[at.boundary]), snaps[k + 1].part - at.part) - 1;
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

// Neighbouring snaps that a warp found.
struct SnapList {
  static constexpr int kSnaps = 256;  // where there are as many, it goes no further

  Snap snaps[kSnaps + kWarpThreads];
  int32_t count;  // without the last one, with which the next list begins
};

// The snap after one, found by a warp that looks at the ends of 32 parts at a time.
template <typename T, typename Sums>
__device__ Snap NextSnap(const Sums& costs, const FlashMlaSteps<T>& steps, Snap at) {
  const T base = costs[at.boundary];
  for (int32_t k = 1 + static_cast<int32_t>(threadIdx.x % kWarpThreads);; k += kWarpThreads) {
    Found<T> found[1];
    const T end = base + k * steps.step;
    costs.Find({end + steps.overhead}, found);
    const bool snaps = found[0].sum >= end || found[0].index == steps.items;
    const uint32_t snapping = __ballot_sync(kWholeWarp, snaps);
    if (snapping == 0) continue;
    const int lane = __ffs(snapping) - 1;
    return {at.part + __shfl_sync(kWholeWarp, k, lane),
            __shfl_sync(kWholeWarp, found[0].index, lane)};
  }
}

// Lists the snaps from one on. Where all sums are kept the warp looks at 32 boundaries at a time: items
// cost more than an overhead, so that the end of a part can snap to but one of them. Parts that follow
// a snap on their very end begin where they would have begun without it: all snaps up to the first
// other one are found at once.
template <typename T, typename Sums>
__device__ void ListSnaps(const Sums& costs, const FlashMlaSteps<T>& steps, Snap at,
                          SnapList& list) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
  int32_t count = 0, next = at.boundary + 1;
  if (lane == 0) list.snaps[0] = at;
#pragma unroll 1
  while (count < SnapList::kSnaps && at.boundary < steps.items) {
    if (!costs.has_all()) {
      at = NextSnap(costs, steps, at);
      ++count;
      if (lane == 0) list.snaps[count] = at;
      continue;
    }
    const int32_t boundary = Min(next + lane, steps.items);
    const bool is_last = boundary == steps.items;
    const T cost = costs[boundary] - costs[at.boundary];
    const int32_t parts = steps.Needed(cost - steps.overhead);
    const T behind = cost - parts * steps.step;  // the end of the last of these parts
    uint32_t snapping = __ballot_sync(kWholeWarp, behind >= 0 || is_last);
    const uint32_t shifting = __ballot_sync(kWholeWarp, behind > 0 || is_last);
    snapping &= shifting ^ (shifting - 1);  // all where none shifts
    const Snap snap{at.part + parts, boundary};
    const int32_t earlier = __popc(snapping & ((1u << lane) - 1));
    if (snapping >> lane & 1) list.snaps[count + earlier + 1] = snap;
    next = shifting == 0 ? next + kWarpThreads : next + __ffs(shifting);
    if (snapping == 0) continue;
    count += __popc(snapping);
    const int last = 31 - __clz(static_cast<int32_t>(snapping));
    at = {__shfl_sync(kWholeWarp, snap.part, last), __shfl_sync(kWholeWarp, snap.boundary, last)};
  }
  if (lane == 0) list.count = count;
}

// Of items of any costs, whose sums are of type T; `length(item)` is its length.
template <typename T, typename Costs, typename Length, typename StoreRow, typename StoreSplits>
__device__ void WriteItems(SumsMemory& memory, const FlashMlaSchedule& schedule, int32_t items,
                           const Costs& costs_of, Length length, StoreRow store_row,
                           StoreSplits store_splits) {
  __shared__ SnapList list;
  const SharedSums<T, Costs> costs(memory, items, costs_of);
  const FlashMlaSteps<T> steps(schedule, items, costs.total());
  Snap at{0, 0};
  int32_t before = 0;
  while (at.boundary < items) {
    __syncthreads();
    if (threadIdx.x < kWarpThreads) ListSnaps(costs, steps, at, list);
    __syncthreads();
    const int32_t count = list.count;
    at = list.snaps[count];
    WriteBetweenSnaps(schedule, steps, costs, ListedSnaps{list.snaps, count, before}, length,
                      store_row, store_splits);
    before += count;
  }
  WritePartsPastTheEnd(schedule, items, at.part, length(items - 1), store_row);
}

// Of items of any lengths, which `of` makes of KV lengths; they are not longer, or all equal.
template <typename Lengths, typename Of, typename StoreRow, typename StoreSplits>
__device__ void WriteFlashMla(SumsMemory& memory, const FlashMlaSchedule& schedule, int32_t items,
                              const Lengths& lengths, Of of, StoreRow store_row,
                              StoreSplits store_splits) {
  if (items == 0) {
    WritePartsPastTheEnd(schedule, 0, 0, 0, store_row);
    if (threadIdx.x == 0) store_splits(0, 0);
    return;
  }
  const auto length = [&](int32_t item) { return of(lengths(item)); };
  const auto cost_of = [&](int32_t kv_len) {
    return FlashMlaSchedule::blocks(of(kv_len)) + schedule.fixed_overhead_blocks;
  };
  const ItemValues<Lengths, decltype(cost_of)> costs{lengths, cost_of};
  // Pooling can make the longest item the cheaper one.
  const int32_t longest = Max(of(Lengths::kShort), Lengths::kShort);
  const int64_t most = FlashMlaSchedule::blocks(longest) + schedule.fixed_overhead_blocks;
  // A warp looks at up to so many steps, which may be past the end.
  if (lengths.HaveShortSum(2 * kWarpThreads * int64_t{items}, most)) {
    WriteItems<int32_t>(memory, schedule, items, costs, length, store_row, store_splits);
  } else {
    WriteItems<int64_t>(memory, schedule, items, costs, length, store_row, store_splits);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_FLASH_MLA_CUH_
