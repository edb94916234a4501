// How a block of the fused kernel writes one of the schedules to every backend.
#ifndef JAXNSA_CUDA_WRITE_SCHEDULES_CUH_
#define JAXNSA_CUDA_WRITE_SCHEDULES_CUH_

#include <cstdint>

#include "flash_mla.cuh"
#include "item_lengths.cuh"
#include "parameters.cuh"
#include "schedules.cuh"

namespace jaxnsa {

// Copies parameters to shared memory: fetched one by one, each would be waited for.
template <typename T>
__device__ void Fetch(const T& parameters, T& copy) {
  static_assert(sizeof(T) % 4 == 0);
  for (int k = threadIdx.x; k < static_cast<int>(sizeof(T) / 4); k += kThreads) {
    reinterpret_cast<int32_t*>(&copy)[k] = reinterpret_cast<const int32_t*>(&parameters)[k];
  }
}

// Writes one schedule to the backends of a block. Not inlined: of the parameters it takes addresses.
template <bool kRagged, int kCapacity>
__device__ __attribute__((noinline)) void WriteSchedule(
    const ScheduleParameters<kCapacity>& parameters, const Rows& rows_parameters,
    const RowRules& rules_parameters, int32_t num_backends, int32_t block) {
  __shared__ ScheduleParameters<kCapacity> args;
  __shared__ Rows rows;
  __shared__ RowRules rules;
  Fetch(parameters, args);
  Fetch(rows_parameters, rows);
  Fetch(rules_parameters, rules);
  __shared__ SumsMemory sums, row_sums;
  __shared__ ItemLengthsMemory kept;
  if (threadIdx.x == 0) kept.are_long = false;
  __syncthreads();
  const ScheduleKind kind = args.kinds[block % args.num_kinds];
  const int32_t first = block / args.num_kinds * args.backends_per_block;
  const int32_t end = Min(first + args.backends_per_block, num_backends);
  const int32_t offset = args.offsets[first];
  const auto store = [&](int32_t* ScheduleArrays::* array, int64_t index, int32_t value) {
#pragma unroll 1
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
  const int32_t next_n = wanted.paged_mqa.next_n(rows);
  const bool items_are_rows = kind == ScheduleKind::kPagedMqa   ? next_n == 1
                              : kind == ScheduleKind::kFlashMla ? !flash_mla.dense()
                                                                : true;
  const ItemLengths<kRagged> lengths(kept, row_sums, rows, items_are_rows, offset);
  if (kind == ScheduleKind::kPagedMqa) {
    const auto context_length = [&](int32_t kv_len) {
      return rules.index_kpool == 1 ? kv_len : Max(rules.pooled(kv_len), 1);
    };
    WritePagedMqaSchedule(sums, wanted.paged_mqa, wanted.paged_mqa.items(rows), next_n, lengths,
                          context_length, [&](int64_t index, int32_t value) {
                            store(&ScheduleArrays::paged_mqa_schedule, index, value);
                          });
    return;
  }
  if (kind == ScheduleKind::kTopkPlan) {
    WriteTopkPlan(wanted.topk_plan, rows.count, args.is_fresh, lengths,
                  [&](int64_t index, int32_t value) {
                    store(&ScheduleArrays::topk_plan, index, value);
                  });
    return;
  }
  const int32_t items = flash_mla.items(rows);
  const auto store_row = [&](int32_t part, const int32_t (&row)[8]) {
#pragma unroll 1
    for (int b = first; b < end; ++b) {
      int32_t* const to = args.arrays[b].flash_mla_schedule + 8 * int64_t{part};
#pragma unroll
      for (int k = 0; k < 8; ++k) to[k] = row[k];
    }
  };
  const auto store_splits = [&](int32_t i, int32_t splits) {
    store(&ScheduleArrays::flash_mla_num_splits, i, splits);
  };
  WriteFlashMla(sums, flash_mla, items, lengths,
                [&](int32_t kv_len) { return flash_mla.length(kv_len, rules); }, store_row,
                store_splits);
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_WRITE_SCHEDULES_CUH_
