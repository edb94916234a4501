// How the blocks of a launch read and write what table rows hold.
#ifndef JAXNSA_CUDA_BATCH_TRACKER_CUH_
#define JAXNSA_CUDA_BATCH_TRACKER_CUH_

#include <cstdint>

#include "batch_tracker.h"
#include "block_sums.cuh"
#include "parameters.cuh"

namespace jaxnsa {

// The table rows of one request, `count` of them from `first` on, which gridDim.x blocks read; of
// those the last to have read them writes what they hold after the step.
struct TrackedRows {
  const BatchTracker& tracker;
  int32_t request;
  int64_t first;
  int32_t count;
  int32_t seq_len;

  // Leading tokens that all of them hold.
  __device__ int32_t held() const {
    const int64_t id = tracker.request_ids.id(request);
    int32_t least = kInt32Max;
    for (int32_t j = 0; j < count; ++j) least = Min(least, tracker.held(first + j, id, seq_len));
    return least;
  }

  // Counts this block as one that has read them. Called by all threads; returns, in the first, how
  // many blocks had before. It is long until that is known: only `Advance` waits for it.
  __device__ uint32_t Arrive() const {
    __syncthreads();
    if (gridDim.x == 1 || threadIdx.x > 0) return 0;
    __threadfence();  // between this block's reads and what follows the count
    return atomicInc(&tracker.readers[request], gridDim.x - 1);
  }

  // Called by all threads at the end; row j got columns(j) tokens.
  template <typename Columns>
  __device__ void Advance(uint32_t arrived_before, Columns columns) const {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
      is_last = arrived_before == gridDim.x - 1;
      __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    const int64_t id = tracker.request_ids.id(request);
    for (int32_t j = threadIdx.x; j < count; j += kThreads) {
      tracker.Hold(first + j, id, seq_len, columns(j));
    }
  }
};

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
