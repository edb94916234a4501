// What the consumers of a step want beside its metadata: jaxnsa/schedules.py in C++. Plain data, so
// that it can be a kernel parameter. A number of 0 says that a schedule is not wanted.
#ifndef JAXNSA_SCHEDULES_H_
#define JAXNSA_SCHEDULES_H_

#include <cstdint>

#include "integers.h"
#include "rows.h"

namespace jaxnsa {

constexpr int kKeysPerSegment = 256;    // of DeepGEMM's paged MQA logits
constexpr int kKeysPerBlock = 64;       // of FlashMLA
constexpr int kMaxPairs = 32;           // of a top-k plan
constexpr int kMostParts = 1024;        // that work is split between
constexpr int kMostOverhead = 1 << 16;  // of beginning an item of FlashMLA's, in blocks

// These are in the order of jaxnsa/schedules.py.
enum class PagedMqaLayout : int32_t { kLegacy, kAtoms, kSm90, kSm100 };
enum class FlashMlaLengths : int32_t { kTopk, kNsaCacheSeqlens, kCacheSeqlens };
enum class FlashMlaLayout : int32_t { kCurrent, kLegacy };

// Where a multiprocessor begins.
struct PagedMqaRow {
  int32_t item;
  int32_t segment;
};

struct PagedMqaSchedule {
  int32_t num_sms;
  PagedMqaLayout layout;
  bool per_row;

  // Rows of an item; items are rows where it is 1, and requests otherwise.
  JAXNSA_HOST_DEVICE int32_t next_n(const Rows& rows) const {
    return per_row || rows.ragged() ? 1 : rows.rows_per_request;
  }

  JAXNSA_HOST_DEVICE int32_t items(const Rows& rows) const {
    return next_n(rows) == 1 ? rows.count : rows.requests;
  }

  // Units of work that a segment of an item counts as.
  JAXNSA_HOST_DEVICE int32_t units_per_segment(int32_t next_n) const {
    if (layout == PagedMqaLayout::kLegacy) return 1;
    return layout == PagedMqaLayout::kSm100 ? next_n : (next_n + 1) / 2;
  }

  // The context length of an item whose last row sees `kv_len` tokens.
  static JAXNSA_HOST_DEVICE int32_t length(int32_t kv_len, const RowRules& rules) {
    return rules.index_kpool == 1 ? kv_len : Max(rules.pooled(kv_len), 1);
  }

  static JAXNSA_HOST_DEVICE int32_t segments(int32_t length) {
    return static_cast<int32_t>(CeilDiv(length, kKeysPerSegment));
  }

  // The first unit of multiprocessor s, of which each has `quotient` and `remainder` one more.
  template <typename T>
  JAXNSA_HOST_DEVICE T first_unit(int32_t s, T quotient, int32_t remainder) const {
    const bool last_ones = layout == PagedMqaLayout::kSm90;
    return s * quotient + (last_ones ? Max(0, s - (num_sms - remainder)) : Min(s, remainder));
  }

  // What begins at a unit, `offset` units into an item of `segments`; past the end both are 0.
  JAXNSA_HOST_DEVICE PagedMqaRow row(int32_t item, int64_t offset, int32_t segments,
                                     int32_t units) const {
    if (units == 1) return {item, static_cast<int32_t>(offset)};
    if (layout == PagedMqaLayout::kSm100) {
      return {item * units, static_cast<int32_t>(offset / units)};
    }
    if (segments == 0) return {item * units, 0};
    return {item * units + static_cast<int32_t>(offset / segments),
            static_cast<int32_t>(offset % segments)};
  }
};

struct TopkPlan {
  int32_t num_pairs;
  int32_t floor;
  int32_t thresholds[kMaxPairs];  // ascending
  int32_t capacities[kMaxPairs];
};

// Where a part begins: in which item, at which of its blocks, and which of its splits that is.
struct FlashMlaPlace {
  int32_t item;
  int32_t block;
  int32_t split;
};

struct FlashMlaSchedule {
  int32_t num_sm_parts;
  FlashMlaLengths lengths;
  int32_t fixed_overhead_blocks;
  FlashMlaLayout layout;

  JAXNSA_HOST_DEVICE bool dense() const { return lengths == FlashMlaLengths::kCacheSeqlens; }

  JAXNSA_HOST_DEVICE int32_t items(const Rows& rows) const {
    return dense() ? rows.requests : rows.count;
  }

  // Elements of both arrays.
  JAXNSA_HOST_DEVICE int64_t size(const Rows& rows) const {
    return 8 * int64_t{num_sm_parts} + items(rows) + 1;
  }

  // Whether it follows from the number of items alone.
  bool constant() const { return num_sm_parts > 0 && lengths == FlashMlaLengths::kTopk; }

  // Keys of an item, a request or a row that sees `kv_len` tokens.
  JAXNSA_HOST_DEVICE int32_t length(int32_t kv_len, const RowRules& rules) const {
    if (dense()) return kv_len;
    return lengths == FlashMlaLengths::kTopk ? rules.nsa_index_topk
                                             : Max(rules.nsa_cache_seqlen(kv_len), 1);
  }

  static JAXNSA_HOST_DEVICE int32_t blocks(int32_t length) {
    return Max(length - 1, 0) / kKeysPerBlock + 1;
  }

  // The item that a part ends in, where the next one begins at `next`.
  static JAXNSA_HOST_DEVICE int32_t end_item(const FlashMlaPlace& next) {
    return next.block > 0 ? next.item : next.item - 1;
  }

  // Writes a part's 8 numbers; `length` is that of the item it ends in, 0 where there is none.
  JAXNSA_HOST_DEVICE void Write(const FlashMlaPlace& begin, const FlashMlaPlace& next,
                                int32_t length, int32_t (&row)[8]) const {
    const int32_t end = end_item(next), whole = blocks(length);
    const int32_t end_block = next.block > 0 ? next.block : length == 0 ? 0 : whole;
    bool first_is_split = begin.block > 0, last_is_split = length != 0 && end_block != whole;
    if (begin.item == end) first_is_split = last_is_split = first_is_split || last_is_split;
    const bool current = layout == FlashMlaLayout::kCurrent;
    row[0] = begin.item;
    row[1] = current ? end : begin.block;
    row[2] = current ? begin.block : end;
    row[3] = end_block;
    row[4] = begin.split;
    row[5] = current && first_is_split;
    row[6] = current && last_is_split;
    row[7] = 0;
  }
};

struct Schedules {
  PagedMqaSchedule paged_mqa;
  TopkPlan topk_plan;
  FlashMlaSchedule flash_mla;

  bool any() const {
    return paged_mqa.num_sms > 0 || topk_plan.num_pairs > 0 || flash_mla.num_sm_parts > 0;
  }
};

}  // namespace jaxnsa

#endif  // JAXNSA_SCHEDULES_H_
