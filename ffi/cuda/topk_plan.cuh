// How a block of the fused kernel writes the plan of the fused top-k.
#ifndef JAXNSA_CUDA_TOPK_PLAN_CUH_
#define JAXNSA_CUDA_TOPK_PLAN_CUH_

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "thread_items.cuh"

namespace jaxnsa {

// Writes a top-k plan; `length(row)` is what a row sees, and `store(row, columns)` stores a row of
// the array. Few rows are the first warp's, which waits for no other.
template <typename Length, typename Store>
__device__ void WriteTopkPlan(const TopkPlan& plan, int32_t rows, bool is_fresh, Length length,
                              Store store) {
  constexpr int kWarps = kThreads / kWarpThreads;
  __shared__ int32_t counts[kWarps][kWarpThreads];
  const bool is_one_warp = rows <= kWarpThreads;
  if (is_one_warp && threadIdx.x >= kWarpThreads) return;
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpThreads);
  const ThreadItems mine(rows);
  int32_t count = 0;  // of the rows that this warp sees, those longer than this lane's threshold
#pragma unroll 1
  for (int32_t k = 0; k < mine.size; ++k) {
    const int32_t row = mine.first + k, n = row < mine.end ? length(row) : 0;
#pragma unroll 1
    for (int pair = 0; pair < plan.num_pairs; ++pair) {
      const int32_t longer = __popc(__ballot_sync(kWholeWarp, n > plan.thresholds[pair]));
      if (longer == 0) break;
      if (lane == pair) count += longer;
    }
  }
  if (!is_one_warp) {
    counts[threadIdx.x / kWarpThreads][lane] = count;
    __syncthreads();
    count = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count += counts[w][lane];
  }
  const bool is_full = lane < plan.num_pairs && count > plan.capacities[lane];
  const uint32_t full = __ballot_sync(kWholeWarp, is_full);
  const int pair = full == 0 ? 0 : Min(32 - __clz(full), plan.num_pairs - 1);
  const int32_t threshold = Max(plan.thresholds[pair], plan.floor);

  int32_t planned = 0;
  if (__ballot_sync(kWholeWarp, count > 0) != 0) {
    int32_t longer = 0;
#pragma unroll 1
    for (int32_t row = mine.first; row < mine.end; ++row) longer += length(row) > threshold;
    int32_t place;
    if (is_one_warp) {
      const uint32_t all = __ballot_sync(kWholeWarp, longer != 0);
      place = __popc(all & ((1u << lane) - 1));
      planned = __popc(all);
    } else {
      using Scan = cub::BlockScan<int32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
      __shared__ typename Scan::TempStorage temp;
      Scan(temp).ExclusiveSum(longer, place, planned);
    }
#pragma unroll 1
    for (int32_t row = mine.first; longer > 0; ++row) {
      const int32_t columns[] = {row, length(row)};
      if (columns[1] <= threshold) continue;
      --longer;
      store(++place, columns);
    }
  }
  if (threadIdx.x == 0) {
    const int32_t columns[] = {threshold, planned};
    store(0, columns);
  }
  if (!is_fresh) return;
  const int32_t zeros[] = {0, 0};
#pragma unroll 1
  for (int64_t row = int64_t{planned} + 1 + threadIdx.x; row <= rows; row += kThreads) {
    store(row, zeros);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_TOPK_PLAN_CUH_
