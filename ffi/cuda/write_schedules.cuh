// How a block of the fused kernel writes one of the schedules to every backend.
#ifndef JAXNSA_CUDA_WRITE_SCHEDULES_CUH_
#define JAXNSA_CUDA_WRITE_SCHEDULES_CUH_

#include <cstdint>

#include "flash_mla.cuh"
#include "item_lengths.cuh"
#include "paged_mqa.cuh"
#include "parameters.cuh"
#include "thread_items.cuh"
#include "topk_plan.cuh"

namespace jaxnsa {

// What stores a row of a schedule's array to equal backends, the `group`th ones.
template <int kCapacity>
__device__ auto StoreTo(const ScheduleParameters<kCapacity>& args, int32_t group,
                        int32_t* ScheduleArrays::* array) {
  return [&args, group, array](int64_t row, const auto& columns) {
    constexpr int kColumns = sizeof(columns) / sizeof(int32_t);
    const int32_t first = group * args.backends_per_block;
#pragma unroll 1
    for (int b = first; b < first + args.backends_per_block; ++b) {
      int32_t* const to = args.arrays[b].*array + row * kColumns;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) to[k] = columns[k];
    }
  };
}

// Not inlined: of the parameters it takes addresses.
template <bool kRagged, int kCapacity>
__device__ __attribute__((noinline)) void WriteFlashMlaSchedule(
    const ScheduleParameters<kCapacity>& parameters, int32_t block) {
  // All parameters are fetched at once: one by one, each would be waited for.
  __shared__ ScheduleParameters<kCapacity> args;
  static_assert(sizeof(args) % sizeof(int4) == 0 && sizeof(args) <= kThreads * sizeof(int4));
  if (threadIdx.x < sizeof(args) / sizeof(int4)) {
    reinterpret_cast<int4*>(&args)[threadIdx.x] =
        reinterpret_cast<const int4*>(&parameters)[threadIdx.x];
  }
  __syncthreads();
  const FlashMlaSchedule& schedule = args.flash_mla;
  const int32_t shares = args.flash_mla_shares.value, group = args.flash_mla_shares.Divide(block);
  const Stride stride(block - group * shares, shares);
  const auto store_row = StoreTo(args, group, &ScheduleArrays::flash_mla_schedule);
  const auto store_splits = StoreTo(args, group, &ScheduleArrays::flash_mla_num_splits);
  if (args.constant_flash_mla != nullptr) {
    const int64_t rows_size = 8 * int64_t{schedule.num_sm_parts}, size = schedule.size(args.rows);
#pragma unroll 4
    for (int64_t k = stride.first; k < size; k += stride.step) {
      const int32_t value[] = {__ldg(args.constant_flash_mla + k)};
      if (k < rows_size) {
        store_row(k, value);
      } else {
        store_splits(k - rows_size, value);
      }
    }
    return;
  }
  const ItemLengths<kRagged> kv_len(args.rows, !schedule.dense(),
                                    args.offsets[group * args.backends_per_block]);
  WriteFlashMla(
      schedule, schedule.items(args.rows), stride,
      [&](int32_t item) { return schedule.length(kv_len(item), args.rules); }, store_row,
      store_splits);
}

// Writes a block's share of one schedule to its backends. `kOffsets`: they may have offsets.
template <bool kRagged, bool kOffsets, int kCapacity>
__device__ __forceinline__ void WriteSchedule(const ScheduleParameters<kCapacity>& args,
                                              int32_t block) {
  if (block < args.flash_mla_blocks) {
    WriteFlashMlaSchedule<kRagged>(args, block);
    return;
  }
  block -= args.flash_mla_blocks;
  const Rows& rows = args.rows;
  const bool is_plan = block >= args.paged_mqa_blocks;
  const int32_t next_n = args.paged_mqa.next_n(rows);
  const auto group = [&] {
    return is_plan ? block - args.paged_mqa_blocks : args.paged_mqa_shares.Divide(block);
  };
  const ItemLengths<kRagged> kv_len(
      rows, is_plan || next_n == 1, kOffsets ? args.offsets[group() * args.backends_per_block] : 0);
  if (is_plan) {
    WriteTopkPlan(args.topk_plan, rows.count, args.is_fresh, kv_len,
                  StoreTo(args, group(), &ScheduleArrays::topk_plan));
    return;
  }
  WritePagedMqaSchedule(
      args.paged_mqa, args.paged_mqa.items(rows), next_n, args.paged_mqa_shares, block,
      [&](int32_t item) { return PagedMqaSchedule::length(kv_len(item), args.rules); },
      [&](int32_t g) { return StoreTo(args, g, &ScheduleArrays::paged_mqa_schedule); });
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_WRITE_SCHEDULES_CUH_
