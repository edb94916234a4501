// What the table rows of one set of destinations hold: jaxnsa/batch_tracker.py in memory that a
// launch both reads and writes, the same in every launch.
#ifndef JAXNSA_BATCH_TRACKER_H_
#define JAXNSA_BATCH_TRACKER_H_

#include <cstdint>

#include "rows.h"

namespace jaxnsa {

// The request of a table row in the last step, and leading tokens that the row holds of it.
struct alignas(16) HeldRow {
  int64_t request_id;
  int64_t tokens;
};

struct BatchTracker {
  HeldRow* rows;
  int32_t count;
  uint32_t* readers;   // [requests], blocks of a launch that have read a request's rows; 0 outside
  Vector request_ids;  // of a step; data is null: rows hold nothing that is known
  bool advances;       // whether the launch is a step's last and writes `rows`

  // Leading tokens that a table row holds of a request, before the step.
  JAXNSA_HOST_DEVICE int32_t held(int64_t row, int64_t request_id, int32_t seq_len) const {
    const HeldRow before = rows[row];
    if (before.request_id != request_id) return 0;
    return Min(static_cast<int32_t>(before.tokens), Max(seq_len, 0));
  }

  // What it holds after the step, in which it gets the columns of `tokens`. Those past the
  // request's own, such as drafts, are new in every step.
  JAXNSA_HOST_DEVICE void Hold(int64_t row, int64_t request_id, int32_t seq_len,
                               int32_t tokens) const {
    rows[row] = {request_id, Min(tokens, Max(seq_len, 0))};
  }

  // A row of no request in this step.
  JAXNSA_HOST_DEVICE void Forget(int64_t row) const { rows[row].tokens = 0; }
};

}  // namespace jaxnsa

#endif  // JAXNSA_BATCH_TRACKER_H_
