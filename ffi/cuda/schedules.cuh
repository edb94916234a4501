// How a block of the fused kernel writes DeepGEMM's schedule, and how one writes the top-k plan.
#ifndef JAXNSA_CUDA_SCHEDULES_CUH_
#define JAXNSA_CUDA_SCHEDULES_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "parameters.cuh"
#include "item_lengths.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

constexpr int kWarpThreads = 32;
constexpr uint32_t kWholeWarp = 0xffffffff;

// Writes DeepGEMM's schedule of items of next_n rows; `of` makes an item's context length of its KV
// length, and `store(index, value)` stores a number.
template <typename Lengths, typename Of, typename Store>
__device__ void WritePagedMqaSchedule(SumsMemory& memory, const PagedMqaSchedule& schedule,
                                      int32_t items, int32_t next_n, const Lengths& lengths, Of of,
                                      Store store) {
  const int32_t units = schedule.units_per_segment(next_n);
  const auto units_of = [&](int32_t kv_len) {
    return int64_t{PagedMqaSchedule::segments(of(kv_len))} * units;
  };
  using Units = ItemValues<Lengths, decltype(units_of)>;
  const SharedSums<Units> starts(memory, items, Units{lengths, units_of});
  const int64_t quotient = Divide(starts.total(), schedule.num_sms);
  const auto remainder = static_cast<int32_t>(starts.total() - quotient * schedule.num_sms);
  for (int32_t first = threadIdx.x; first <= schedule.num_sms; first += 2 * kThreads) {
    const int64_t numbers[2] = {
        schedule.first_unit(first, quotient, remainder),
        schedule.first_unit(Min(first + kThreads, schedule.num_sms), quotient, remainder)};
    Found found[2];
    starts.Find(numbers, found);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int32_t s = first + k * kThreads, i = found[k].index;
      if (s > schedule.num_sms) return;
      const int32_t segments = i < items ? PagedMqaSchedule::segments(of(lengths(i))) : 0;
      const PagedMqaRow row =
          schedule.row(i, static_cast<int32_t>(numbers[k] - found[k].sum), segments, units);
      store(2 * int64_t{s}, row.item);
      store(2 * int64_t{s} + 1, row.segment);
    }
  }
}

// Writes a top-k plan; `store(index, value)` stores a number.
template <typename Lengths, typename Store>
__device__ void WriteTopkPlan(const TopkPlan& plan, int32_t rows, bool is_fresh,
                              const Lengths& lengths, Store store) {
  // Neighbouring rows are one thread's, so that all threads go through them in few steps.
  constexpr int32_t kTile = kItems * kThreads;
  int32_t kv_lens[kItems];
  const auto first_of_thread = [](int32_t first) {
    return first + static_cast<int32_t>(threadIdx.x) * kItems;
  };
  const auto longer_than = [&](int32_t threshold) {
    int32_t longer = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) longer += kv_lens[k] > threshold;
    return longer;
  };

  constexpr int kWarps = kThreads / kWarpThreads;
  __shared__ int32_t counts[kWarps][kWarpThreads];
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
  int32_t count = 0;  // of the rows that this warp sees, those longer than this lane's threshold
  for (int32_t first = 0; first < rows; first += kTile) {
    lengths.Load(first_of_thread(first), rows, kv_lens);
    for (int k = 0; k < plan.num_pairs; ++k) {
      const auto longer = static_cast<int32_t>(
          __reduce_add_sync(kWholeWarp, static_cast<uint32_t>(longer_than(plan.thresholds[k]))));
      if (longer == 0) break;
      if (lane == k) count += longer;
    }
  }
  counts[threadIdx.x / kWarpThreads][lane] = count;
  __syncthreads();
  count = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) count += counts[w][lane];
  const bool is_full = lane < plan.num_pairs && count > plan.capacities[lane];
  const uint32_t full = __ballot_sync(kWholeWarp, is_full);
  const int pair = full == 0 ? 0 : Min(32 - __clz(full), plan.num_pairs - 1);
  const int32_t threshold = Max(plan.thresholds[pair], plan.floor);

  using Scan = cub::BlockScan<int32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage temp;
  int64_t planned = 0;
  for (int32_t first = 0; first < rows; first += kTile) {
    const int32_t here = first_of_thread(first);
    if (rows > kTile) lengths.Load(here, rows, kv_lens);
    const int32_t longer = longer_than(threshold);
    int32_t end, all;
    Scan(temp).InclusiveSum(longer, end, all);
    int64_t place = planned + end - longer;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (kv_lens[k] <= threshold) continue;
      ++place;
      store(2 * place, here + k);
      store(2 * place + 1, kv_lens[k]);
    }
    planned += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    store(0, threshold);
    store(1, static_cast<int32_t>(planned));
  }
  if (!is_fresh) return;
  const int64_t size = 2 * (int64_t{rows} + 1);
  for (int64_t k = 2 * (planned + 1) + threadIdx.x; k < size; k += kThreads) store(k, 0);
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_SCHEDULES_CUH_
