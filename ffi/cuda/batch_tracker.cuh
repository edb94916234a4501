// How the threads of a launch read and write what table rows hold.
#ifndef JAXNSA_CUDA_BATCH_TRACKER_CUH_
#define JAXNSA_CUDA_BATCH_TRACKER_CUH_

#include <cstdint>

#include "batch_tracker.h"
#include "block_sums.cuh"
#include "parameters.cuh"

namespace jaxnsa {

// Loads a table row's state. 16 aligned bytes move at once: a step is seen as a whole or not.
__device__ inline HeldRow LoadHeldRow(const HeldRow* row) {
  HeldRow held;
  const auto* const from = reinterpret_cast<const int4*>(row);
  const int4 words[] = {__ldcg(from), __ldcg(from + 1)};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    held.steps[k] = {FromWords(words[k].x, words[k].y), words[k].z,
                     static_cast<uint32_t>(words[k].w)};
  }
  return held;
}

// Leading tokens of a request that a row held before the step after which it holds `tokens` of it.
// Nobody waits for anybody: the step may have been taken down already, or not. Where the last step
// on record says just that, the earlier one is asked, as far as it still holds.
__device__ inline int32_t TokensBefore(const HeldRow& row, int64_t request_id, int32_t tokens) {
  const int32_t last = row.last().of(request_id);
  if (last != tokens) return last;
  return Min(row.earlier().of(request_id), tokens);
}

// The state of one request's table rows, `count` of them from `first` on, which all threads read
// that write these rows, and one of them writes.
class TrackedRows {
 public:
  // Loads nothing if `exist` is false.
  __device__ TrackedRows(const BatchTracker& tracker, bool exist, int32_t request, int64_t first,
                         int32_t count)
      : tracker_(tracker), rows_(tracker.rows + first), count_(exist ? count : 0) {
    if (count_ == 0) return;
    row_ = LoadHeldRow(rows_);
    id_words_ = tracker.request_ids.words(request);
  }

  // Leading tokens that all of them held before the step; row j holds tokens_after(j) after it.
  template <typename TokensAfter>
  __device__ int32_t held(TokensAfter tokens_after) const {
    if (count_ == 0) return 0;
    const int64_t id = tracker_.request_ids.id(id_words_);
    int32_t least = TokensBefore(row_, id, tokens_after(0));
#pragma unroll 1
    for (int32_t j = 1; j < count_; ++j) {
      least = Min(least, TokensBefore(LoadHeldRow(rows_ + j), id, tokens_after(j)));
    }
    return least;
  }

  // Takes down what they hold after it: every `threads`th row from `thread` on.
  template <typename TokensAfter>
  __device__ void Advance(int32_t thread, int32_t threads, TokensAfter tokens_after) const {
    const int64_t id = tracker_.request_ids.id(id_words_);
#pragma unroll 1
    for (int32_t j = thread; j < count_; j += threads) {
      const HeldRow row = j == 0 ? row_ : LoadHeldRow(rows_ + j);
      __stcg(reinterpret_cast<int4*>(rows_[j].steps + !row.last_is_second()),
             make_int4(static_cast<int32_t>(id), static_cast<int32_t>(id >> 32),
                       tokens_after(j), static_cast<int32_t>(row.last().step + 1)));
    }
  }

 private:
  const BatchTracker& tracker_;
  HeldRow* rows_;
  int32_t count_;
  HeldRow row_;  // the first
  Vector::Words id_words_;
};

// Forgets the table rows that belong to no request in this step, which no other block looks at; all
// rows where no request is known. Called by all threads of one block.
template <bool kTablesRagged>
__device__ void ForgetOtherRows(const BatchTracker& tracker, const Rows& rows) {
  int64_t first = 0;
  if (tracker.request_ids.data != nullptr) {
    if constexpr (kTablesRagged) {
      const auto q_of = [&](int64_t i) -> int64_t { return rows.q(i); };
      const auto of_request = [](int64_t, int64_t q) { return q; };
      first = SumOfThreads(ThreadSum<int64_t>(rows.requests, q_of, of_request));
      if (first > rows.count) first = rows.count;
    } else {
      first = rows.prefill ? rows.requests : int64_t{rows.requests} * rows.rows_per_request;
    }
  }
  for (int64_t row = first + threadIdx.x; row < tracker.count; row += kThreads) {
    tracker.Forget(row);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_BATCH_TRACKER_CUH_
