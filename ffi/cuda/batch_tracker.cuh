// How the blocks of a launch read and write what table rows hold.
#ifndef JAXNSA_CUDA_BATCH_TRACKER_CUH_
#define JAXNSA_CUDA_BATCH_TRACKER_CUH_

#include <cstdint>

#include "batch_tracker.h"
#include "block_sums.cuh"
#include "parameters.cuh"

namespace jaxnsa {

// Leading tokens that all table rows of request i hold, `count` of them from `first_row` on, of
// which row j gets columns(j) tokens. Called by all threads of the request's gridDim.x blocks; the
// last block that has read the rows writes what they hold after the step.
template <typename Columns>
__device__ int32_t AdvanceTracker(const BatchTracker& tracker, int32_t i, int64_t first_row,
                                  int32_t count, int32_t seq_len, Columns columns) {
  const int64_t id = tracker.request_ids.id(i);
  int32_t held = kInt32Max;
  for (int32_t j = 0; j < count; ++j) held = Min(held, tracker.held(first_row + j, id, seq_len));
  if (!tracker.advances) return held;
  __syncthreads();
  bool is_last = true;
  if (gridDim.x > 1) {
    __shared__ bool is_last_block;
    if (threadIdx.x == 0) {
      __threadfence();  // between this block's reads and what follows the count
      is_last_block = atomicInc(&tracker.readers[i], gridDim.x - 1) == gridDim.x - 1;
      __threadfence();
    }
    __syncthreads();
    is_last = is_last_block;
  }
  if (is_last) {
    for (int32_t j = threadIdx.x; j < count; j += kThreads) {
      tracker.Hold(first_row + j, id, seq_len, columns(j));
    }
  }
  return held;
}

// Forgets the table rows that belong to no request in this step, which no other block looks at; all
// rows where no request is known. Called by all threads of one block.
template <bool kTablesRagged>
__device__ void ForgetOtherRows(const BatchTracker& tracker, const Rows& rows) {
  int64_t first = 0;
  if (tracker.request_ids.data != nullptr) {
    const auto q_of = [&](int64_t i) -> int64_t { return rows.q(i); };
    first = kTablesRagged  ? BlockSum<int64_t>(0, rows.requests, q_of)
            : rows.prefill ? rows.requests
                           : int64_t{rows.requests} * rows.rows_per_request;
    if (kTablesRagged && first > rows.count) first = rows.count;
  }
  for (int64_t row = first + threadIdx.x; row < tracker.count; row += kThreads) {
    tracker.Forget(row);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_BATCH_TRACKER_CUH_
