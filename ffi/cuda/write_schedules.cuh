// How a block of the fused kernel writes one of the schedules to every backend.
#ifndef JAXNSA_CUDA_WRITE_SCHEDULES_CUH_
#define JAXNSA_CUDA_WRITE_SCHEDULES_CUH_

#include <cstdint>

#include "flash_mla.cuh"
#include "parameters.cuh"
#include "row_lengths.cuh"
#include "schedules.cuh"

namespace jaxnsa {

// Writes one schedule to the backends of a block. Not inlined: many kernels share its code.
template <bool kRagged, int kCapacity>
__device__ __attribute__((noinline)) void WriteSchedule(const ScheduleParameters<kCapacity>& args,
                                                        const Rows& rows, const RowRules& rules,
                                                        int32_t num_backends, int32_t block) {
  __shared__ SumsMemory sums, row_sums;
  const ScheduleKind kind = args.kinds[block % args.num_kinds];
  const int32_t first = block / args.num_kinds * args.backends_per_block;
  const int32_t end = Min(first + args.backends_per_block, num_backends);
  const int32_t offset = args.offsets[first];
  const auto store = [&](int32_t* ScheduleArrays::* array, int64_t index, int32_t value) {
    for (int b = first; b < end; ++b) (args.arrays[b].*array)[index] = value;
  };
  const Schedules& wanted = args.schedules;
  const FlashMlaSchedule& flash_mla = wanted.flash_mla;
  if (kind == ScheduleKind::kFlashMla && args.flash_mla != nullptr) {
    const int64_t rows_size = 8 * int64_t{flash_mla.num_sm_parts}, size = flash_mla.size(rows);
#pragma unroll 4
    for (int64_t k = threadIdx.x; k < size; k += kThreads) {
      const int32_t value = __ldg(args.flash_mla + k);
      if (k < rows_size) {
        store(&ScheduleArrays::flash_mla_schedule, k, value);
      } else {
        store(&ScheduleArrays::flash_mla_num_splits, k - rows_size, value);
      }
    }
    return;
  }
  const RowLengths<kRagged> row_lengths(row_sums, rows, offset);
  if (kind == ScheduleKind::kPagedMqa) {
    const int32_t next_n = wanted.paged_mqa.next_n(rows);
    const auto length = [&](int32_t i) {
      const int32_t kv_len = next_n == 1 ? row_lengths(i) : rows.cache_seqlen(i, offset);
      return rules.index_kpool == 1 ? kv_len : Max(rules.pooled(kv_len), 1);
    };
    WritePagedMqaSchedule(sums, wanted.paged_mqa, wanted.paged_mqa.items(rows), next_n, length,
                          [&](int64_t index, int32_t value) {
                            store(&ScheduleArrays::paged_mqa_schedule, index, value);
                          });
    return;
  }
  if (kind == ScheduleKind::kTopkPlan) {
    WriteTopkPlan(wanted.topk_plan, rows.count, args.is_fresh, row_lengths,
                  [&](int64_t index, int32_t value) {
                    store(&ScheduleArrays::topk_plan, index, value);
                  });
    return;
  }
  const int32_t items = flash_mla.items(rows);
  const auto store_row = [&](int32_t part, const int32_t (&row)[8]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      store(&ScheduleArrays::flash_mla_schedule, 8 * int64_t{part} + k, row[k]);
    }
  };
  const auto store_splits = [&](int32_t i, int32_t splits) {
    store(&ScheduleArrays::flash_mla_num_splits, i, splits);
  };
  const auto length = [&](int32_t i) {
    return flash_mla.length(flash_mla.dense() ? rows.cache_seqlen(i, offset) : row_lengths(i), rules);
  };
  WriteFlashMla(sums, flash_mla, items, length, store_row, store_splits);
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_WRITE_SCHEDULES_CUH_
