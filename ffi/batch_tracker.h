// What the table rows of one set of destinations hold: jaxnsa/batch_tracker.py in memory that a
// launch both reads and writes, the same in every launch.
#ifndef JAXNSA_BATCH_TRACKER_H_
#define JAXNSA_BATCH_TRACKER_H_

#include <cstdint>

#include "rows.h"

namespace jaxnsa {

// Leading tokens that a table row held of a request after a step that gave it the row.
struct alignas(16) HeldTokens {
  int64_t request_id;
  int32_t tokens;
  uint32_t step;  // its number among those of the row, modulo 2^32

  JAXNSA_HOST_DEVICE int32_t of(int64_t request) const {
    return request_id == request ? tokens : 0;
  }
};

// What a table row held after the last two steps that gave it to a request, in either order. The
// next one is taken down in the place of the earlier one.
struct HeldRow {
  HeldTokens steps[2];

  JAXNSA_HOST_DEVICE bool last_is_second() const {
    return static_cast<int32_t>(steps[1].step - steps[0].step) > 0;
  }
  JAXNSA_HOST_DEVICE HeldTokens last() const { return last_is_second() ? steps[1] : steps[0]; }
  JAXNSA_HOST_DEVICE HeldTokens earlier() const { return last_is_second() ? steps[0] : steps[1]; }
};

struct BatchTracker {
  HeldRow* rows;
  int32_t count;
  Vector request_ids;  // of a step; data is null: rows hold nothing that is known
  bool advances;       // whether the launch is a step's last and writes `rows`

  // What a row holds of a request after a step in which it gets the columns of `kv_len` tokens.
  // Those past the request's own, such as drafts, are new in every step.
  static JAXNSA_HOST_DEVICE int32_t TokensAfter(int32_t kv_len, int32_t seq_len, int32_t max_len) {
    return Min(Min(kv_len, max_len), Max(seq_len, 0));
  }

  // A row of no request in this step.
  JAXNSA_HOST_DEVICE void Forget(int64_t row) const {
    for (HeldTokens& held : rows[row].steps) held.tokens = 0;
  }
};

}  // namespace jaxnsa

#endif  // JAXNSA_BATCH_TRACKER_H_
