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

// Writes a block's share of one schedule to its backends. Not inlined: of the parameters it takes
// addresses.
template <bool kRagged, int kCapacity>
__device__ __attribute__((noinline)) void WriteSchedule(
    const ScheduleParameters<kCapacity>& parameters, int32_t block) {
  // All parameters are fetched at once: one by one, each would be waited for.
  __shared__ ScheduleParameters<kCapacity> args;
  static_assert(sizeof(args) % sizeof(int4) == 0 && sizeof(args) <= kThreads * sizeof(int4));
  if (threadIdx.x < sizeof(args) / sizeof(int4)) {
    reinterpret_cast<int4*>(&args)[threadIdx.x] =
        reinterpret_cast<const int4*>(&parameters)[threadIdx.x];
  }
  __syncthreads();
  const int32_t of_kind = args.num_kinds.Divide(block);
  const ScheduleKind kind = args.kinds[block - of_kind * args.num_kinds.value];
  const int32_t group = args.shares.Divide(of_kind);
  const int32_t share = of_kind - group * args.shares.value;
  const Stride stride(share, args.shares.value);
  const int32_t first = group * args.backends_per_block;
  const int32_t end = Min(first + args.backends_per_block, args.num_backends);
  const Rows& rows = args.rows;
  const RowRules& rules = args.rules;
  // What stores a row of an array.
  const auto store = [&](int32_t* ScheduleArrays::* array) {
    return [&, array](int64_t row, const auto& columns) {
      constexpr int kColumns = sizeof(columns) / sizeof(int32_t);
#pragma unroll 1
      for (int b = first; b < end; ++b) {
        int32_t* const to = args.arrays[b].*array + row * kColumns;
#pragma unroll
        for (int k = 0; k < kColumns; ++k) to[k] = columns[k];
      }
    };
  };
  const auto store_row = store(&ScheduleArrays::flash_mla_schedule);
  const auto store_splits = store(&ScheduleArrays::flash_mla_num_splits);
  const FlashMlaSchedule& flash_mla = args.schedules.flash_mla;
  if (kind == ScheduleKind::kFlashMla && args.flash_mla != nullptr) {
    const int64_t rows_size = 8 * int64_t{flash_mla.num_sm_parts}, size = flash_mla.size(rows);
#pragma unroll 4
    for (int64_t k = stride.first; k < size; k += stride.step) {
      const int32_t value[] = {__ldg(args.flash_mla + k)};
      if (k < rows_size) {
        store_row(k, value);
      } else {
        store_splits(k - rows_size, value);
      }
    }
    return;
  }
  const PagedMqaSchedule& paged_mqa = args.schedules.paged_mqa;
  const int32_t next_n = paged_mqa.next_n(rows);
  const bool items_are_rows = kind == ScheduleKind::kPagedMqa   ? next_n == 1
                              : kind == ScheduleKind::kFlashMla ? !flash_mla.dense()
                                                                : true;
  __shared__ SumsMemory sums;
  const ItemLengths<kRagged> kv_len(rows, items_are_rows, args.offsets[first]);
  if (kind == ScheduleKind::kPagedMqa) {
    WritePagedMqaSchedule(
        sums, paged_mqa, paged_mqa.items(rows), next_n, stride,
        [&](int32_t item) { return PagedMqaSchedule::length(kv_len(item), rules); },
        store(&ScheduleArrays::paged_mqa_schedule));
  } else if (kind == ScheduleKind::kTopkPlan) {
    if (share > 0) return;
    WriteTopkPlan(args.schedules.topk_plan, rows.count, args.is_fresh, kv_len,
                  store(&ScheduleArrays::topk_plan));
  } else {
    WriteFlashMla(
        sums, flash_mla, flash_mla.items(rows), stride,
        [&](int32_t item) { return flash_mla.length(kv_len(item), rules); }, store_row,
        store_splits);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_WRITE_SCHEDULES_CUH_
