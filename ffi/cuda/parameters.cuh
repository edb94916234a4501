// The parameters of the fused kernel, and how it reaches every backend's.
#ifndef JAXNSA_CUDA_PARAMETERS_CUH_
#define JAXNSA_CUDA_PARAMETERS_CUH_

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "computations.h"

namespace jaxnsa {

// Threads of a block.
constexpr int kThreads = 128;

constexpr int kWarpThreads = 32;
constexpr uint32_t kWholeWarp = 0xffffffff;

// So many backends or fewer have a kernel of their own.
constexpr int kFewBackends = 8;

// Division by multiplication: T. Granlund and P. Montgomery, "Division by invariant integers using
// multiplication" (1994), for dividends below 2^31.
struct Divisor {
  int32_t value;
  int32_t shift;
  uint32_t multiplier;

  static JAXNSA_HOST_DEVICE Divisor Of(int32_t value) {
    int32_t bits = 0;
    while ((int64_t{1} << bits) < value) ++bits;
    const uint64_t multiplier = (uint64_t{1} << (31 + bits)) / value + 1;
    return {value, 31 + bits, static_cast<uint32_t>(multiplier)};
  }

  // Rounds towards minus infinity.
  __device__ int32_t Divide(int32_t x) const {
    const uint32_t sign = x < 0 ? 0xffffffffu : 0u;
    const uint64_t magnitude = static_cast<uint32_t>(x) ^ sign;
    return static_cast<int32_t>(static_cast<uint32_t>((magnitude * multiplier) >> shift) ^ sign);
  }

  // Rounds upwards, for x >= 0.
  __device__ int32_t DivideUp(int32_t x) const {
    const int32_t quotient = Divide(x);
    return quotient + (quotient * value < x);
  }
};

// What a row of a table gets: columns below `live` from the pool, then 0 below `end`; in tokens.
struct RowContent {
  int32_t live;
  int32_t end;
};

// What a launch writes of its tables: whole rows, or the columns that they do not hold; for equal
// lengths in all backends, or for any.
enum class Refresh { kWhole, kNew, kAny };

// Threads that share the tables' rows of a request: a block, or a warp where few columns are new.
// Where rows are ragged always a block, which adds up those of earlier requests.
template <Refresh kRefresh, bool kTablesRagged>
constexpr int kRequestThreads =
    kRefresh == Refresh::kNew && !kTablesRagged ? kWarpThreads : kThreads;

// How a launch knows which columns its rows hold.
enum class Held : uint8_t { kNothing, kWrittenLens, kTracked };

// What only launches have that write schedules or pooled arrays, in the order in which the blocks
// of DeepGEMM's schedule need it. Blocks of FlashMLA's come first, those of top-k plans last.
template <int kCapacity>
struct alignas(16) ScheduleParameters {
  int32_t blocks;
  int32_t flash_mla_blocks;
  int32_t paged_mqa_blocks;
  PagedMqaSchedule paged_mqa;
  Rows rows;  // extend_seq_lens in the next 64 bytes

  RowRules rules;
  Divisor paged_mqa_shares;    // blocks that share the rows of an array
  int32_t backends_per_block;  // that the blocks of a schedule write: all equal ones
  bool is_fresh;

  ScheduleArrays arrays[kCapacity];
  int32_t offsets[kCapacity];
  TopkPlan topk_plan;
  FlashMlaSchedule flash_mla;
  Divisor flash_mla_shares;
  const int32_t* constant_flash_mla;  // both arrays where they are constant, one behind the other

  Divisor pages_per_pooled_page;
  int64_t pooled_page_table_stride;
  int32_t* pooled_page_tables[kCapacity];
};

struct NoScheduleParameters {};

// The tables that every launch may write; null: not wanted.
struct PageTables {
  int32_t* page_indices;
  int32_t* real_page_table;
};

// In the order in which the blocks that write tables need them. A multiprocessor fetches parameters
// 64 bytes at once and waits for each fetch; the first 16 of the first 64 hold no parameters.
template <int kCapacity, bool kSchedules>
struct Parameters {
  Vector seq_lens;
  Vector req_pool_indices;
  int32_t length_rows;     // of the grid, before those of requests
  int32_t table_requests;  // requests; at least one where padding rows are to be cleared
  Pool pool;

  int32_t added_tokens;
  int32_t max_len;
  RowContent least;  // of any row
  int32_t rows_per_request;
  Divisor page_size;
  int64_t page_indices_stride;
  int32_t num_backends;
  bool requests_are_items;
  bool is_wide;    // page_indices is wanted
  bool is_pooled;  // pooled_page_table is wanted
  Held held;

  int64_t real_page_table_stride;
  PageTables tables[kCapacity];
  Vector written_lens;
  int32_t least_offset;
  int32_t greatest_offset;
  int32_t backend_offsets[kCapacity];

  Rows rows;
  RowRules row_rules;
  bool clears_padding;
  bool advances_tracker;
  int32_t length_groups;  // groups of 128 requests, of a backend
  int32_t length_shares;  // blocks that share the rows of a group
  int32_t max_total_keys;
  Lengths lengths[kCapacity];
  BatchTracker tracker;

  std::conditional_t<kSchedules, ScheduleParameters<kCapacity>, NoScheduleParameters> schedules;
};

using FewParameters = Parameters<kFewBackends, false>;
static_assert(offsetof(FewParameters, pool.stride) == 64 - 16);
static_assert(offsetof(FewParameters, real_page_table_stride) == 128 - 16);
static_assert(offsetof(FewParameters, rows) == 320 - 16);
static_assert(offsetof(ScheduleParameters<kFewBackends>, rows.extend_seq_lens) == 64);
static_assert(offsetof(ScheduleParameters<kFewBackends>, arrays) == 128 - sizeof(void*) * 2);

// Calls `body` with every backend's part and its index. A few are taken one by one rather than in a
// loop: then their pointers are operands of the instructions, and no indexed load comes first.
template <int kCapacity, typename Part, typename Body>
__device__ __forceinline__ void ForEach(const Part (&backends)[kCapacity], int count, Body body) {
  if constexpr (kCapacity == kFewBackends) {
#pragma unroll
    for (int b = 0; b < kCapacity; ++b) {
      if (b >= count) return;
      body(backends[b], b);
    }
  } else {
#pragma unroll 2
    for (int b = 0; b < count; ++b) body(backends[b], b);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_PARAMETERS_CUH_
