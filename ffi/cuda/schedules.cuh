// How a block of the fused kernel writes DeepGEMM's schedule, and how one writes the top-k plan.
#ifndef JAXNSA_CUDA_SCHEDULES_CUH_
#define JAXNSA_CUDA_SCHEDULES_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "item_lengths.cuh"
#include "parameters.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

constexpr int kWarpThreads = 32;
constexpr uint32_t kWholeWarp = 0xffffffff;

// Writes DeepGEMM's schedule of items of so many units; `segments(item)` are its segments, and
// `store(index, value)` stores a number. T is the type of sums of units.
template <typename T, typename Units, typename Segments, typename Store>
__device__ void WriteUnits(SumsMemory& memory, const PagedMqaSchedule& schedule, int32_t items,
                           int32_t units, const Units& units_of, Segments segments, Store store) {
  const SharedSums<T, Units> starts(memory, items, units_of);
  const T quotient = starts.total() / schedule.num_sms;
  const auto remainder = static_cast<int32_t>(starts.total() - quotient * schedule.num_sms);
#pragma unroll 1
  for (int32_t s = threadIdx.x; s <= schedule.num_sms; s += kThreads) {
    const T unit = schedule.first_unit<T>(s, quotient, remainder);
    Found<T> found[1];
    starts.Find({unit}, found);
    const int32_t i = found[0].index;
    const PagedMqaRow row = schedule.row(i, static_cast<int32_t>(unit - found[0].sum),
                                         i < items ? segments(i) : 0, units);
    store(2 * int64_t{s}, row.item);
    store(2 * int64_t{s} + 1, row.segment);
  }
}

// Of items of next_n rows; `of` makes an item's context length, which is not longer, of its KV length.
template <typename Lengths, typename Of, typename Store>
__device__ void WritePagedMqaSchedule(SumsMemory& memory, const PagedMqaSchedule& schedule,
                                      int32_t items, int32_t next_n, const Lengths& lengths, Of of,
                                      Store store) {
  const int32_t units = schedule.units_per_segment(next_n);
  const auto of_length = [&](int32_t kv_len) {
    return int64_t{PagedMqaSchedule::segments(of(kv_len))} * units;
  };
  const ItemValues<Lengths, decltype(of_length)> units_of{lengths, of_length};
  const auto segments = [&](int32_t item) { return PagedMqaSchedule::segments(of(lengths(item))); };
  if (lengths.HaveShortSum(items, of_length(Lengths::kShort))) {
    WriteUnits<int32_t>(memory, schedule, items, units, units_of, segments, store);
  } else {
    WriteUnits<int64_t>(memory, schedule, items, units, units_of, segments, store);
  }
}

// The threshold of a top-k plan, which every thread receives.
template <typename Lengths>
__device__ int32_t TopkThreshold(const TopkPlan& plan, int32_t rows, const Lengths& lengths) {
  constexpr int kWarps = kThreads / kWarpThreads;
  __shared__ int32_t counts[kWarps][kWarpThreads];
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
  int32_t count = 0;  // of the rows that this warp sees, those longer than this lane's threshold
#pragma unroll 1
  for (int32_t first = 0; first < rows; first += kThreads) {
    const auto row = first + static_cast<int32_t>(threadIdx.x);
    const int32_t n = row < rows ? lengths(row) : 0;
#pragma unroll 1
    for (int k = 0; k < plan.num_pairs; ++k) {
      const int32_t longer = __popc(__ballot_sync(kWholeWarp, n > plan.thresholds[k]));
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
  return Max(plan.thresholds[pair], plan.floor);
}

// Writes a top-k plan; `store(index, value)` stores a number.
template <typename Lengths, typename Store>
__device__ void WriteTopkPlan(const TopkPlan& plan, int32_t rows, bool is_fresh,
                              const Lengths& lengths, Store store) {
  const int32_t threshold = TopkThreshold(plan, rows, lengths);
  const Share share(rows);
  int32_t longer = 0;
  lengths.ForEach(share.first, share.end, [&](int32_t, int32_t kv_len) {
    longer += kv_len > threshold;
    return true;
  });
  using Scan = cub::BlockScan<int32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage temp;
  int32_t before, planned;
  Scan(temp).ExclusiveSum(longer, before, planned);
  int64_t place = before;
  if (longer > 0) {
    lengths.ForEach(share.first, share.end, [&](int32_t row, int32_t kv_len) {
      if (kv_len <= threshold) return true;
      ++place;
      store(2 * place, row);
      store(2 * place + 1, kv_len);
      return true;
    });
  }
  if (threadIdx.x == 0) {
    store(0, threshold);
    store(1, planned);
  }
  if (!is_fresh) return;
  const int64_t size = 2 * (int64_t{rows} + 1);
  for (int64_t k = 2 * (int64_t{planned} + 1) + threadIdx.x; k < size; k += kThreads) store(k, 0);
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_SCHEDULES_CUH_
