// The kernel that is the whole computation, and its launches.
//
// Grid: rows of gridDim.x blocks each, counted by blockIdx.y and, beyond kGridRows, by blockIdx.z.
//   The first rows hold blocks for each schedule that is wanted, which write it to all backends;
//   then the blocks that write lengths and prefix sums, for each backend and every 128 requests so
//   many that each thread has about one row, and those that write keys. After them comes a row of
//   blocks for each request, which share its rows of the page tables: neighbouring blocks write
//   neighbouring memory; where few columns are new, a row of warps. No block waits for another.
// Block: 128 threads.
// Inputs: seq_lens, req_pool_indices, req_to_token, extend_seq_lens where rows are ragged, and
//   written_lens or request_ids where rows may hold columns.
// Outputs: the arrays of every backend that are not null; what rows hold, which is an input too.
#ifndef JAXNSA_CUDA_FUSED_KERNEL_CUH_
#define JAXNSA_CUDA_FUSED_KERNEL_CUH_

#include <algorithm>

#include "fused_launch.cuh"
#include "keys.cuh"
#include "launch.cuh"
#include "lengths.cuh"
#include "parameters.cuh"
#include "tables.cuh"
#include "write_schedules.cuh"

namespace jaxnsa {
namespace {

constexpr const char* kName = "fused_metadata";

// Bounds the registers: copies want many blocks in flight, but none of their registers in memory.
// Schedules' shared memory allows fewer.
template <Refresh kRefresh, bool kSchedules>
constexpr int kBlocksPerMultiprocessor =
    kSchedules ? (kRefresh == Refresh::kAny ? 6 : 8) : (kRefresh == Refresh::kAny ? 7 : 10);

// Blocks that share the tables, within these bounds: one for two tiles, or for four of pages alone
// and where there are then no more than the fewest. Each costs 0.6 nanoseconds of a Hopper GPU,
// whether its columns are live or not.
constexpr int64_t kFewestBlocks = 1024, kMostBlocks = 8192;

constexpr int kGridRows = 32768;

// Blocks of a backend that write lengths, where rows are ragged.
constexpr int64_t kMostLengthBlocks = 1024;

// Blocks that share the rows of a schedule, each of which computes what all of them need.
constexpr int64_t kMostScheduleShares = 16;

// `kSchedules`: schedules or pooled arrays are wanted.
template <int kWidth, bool kRagged, bool kTablesRagged, Refresh kRefresh, int kCapacity,
          bool kSchedules>
__global__ void __launch_bounds__(kThreads, (kBlocksPerMultiprocessor<kRefresh, kSchedules>))
    FusedMetadataKernel(const __grid_constant__ Parameters<kCapacity, kSchedules> args) {
  constexpr int kOwnThreads = kRequestThreads<kRefresh, kTablesRagged>;
  const auto row = static_cast<int32_t>(blockIdx.z * kGridRows + blockIdx.y);
  const int32_t table_row = row - args.length_rows;
  // The compiler lays out first what is done where a condition is false, and instructions are
  // fetched in order: tables come before schedules, and these before lengths.
  if (table_row < 0) {
    const int32_t block = row * gridDim.x + blockIdx.x;
    // Unsigned, and no remainder is taken: small batches wait for this.
    const auto write_lengths = [&](uint32_t block) {
      const uint32_t groups = args.length_groups, shares = kRagged ? args.length_shares : 1;
      const uint32_t blocks = groups * shares;
      const uint32_t b = blocks == 1 ? block : block / blocks;
      if (b < static_cast<uint32_t>(args.num_backends)) {
        const uint32_t rest = block - b * blocks, group = kRagged ? rest / shares : rest;
        RowRules rules = args.row_rules;
        if constexpr (!kSchedules) rules.index_kpool = 1;
        const LengthBlock part{groups, group, shares, rest - group * shares};
        WriteLengths<kRagged, kRagged && !kTablesRagged, kSchedules>(
            args.rows, rules, part, kRefresh == Refresh::kAny ? args.backend_offsets[b] : 0,
            args.lengths[b]);
        if (block == 0 && args.advances_tracker) {
          ForgetOtherRows<kTablesRagged>(args.tracker, args.rows);
        }
      } else if (kRagged && !kTablesRagged) {
        WriteKeys(args, block - args.num_backends * blocks);
      }
    };
    if constexpr (!kSchedules) {
      write_lengths(block);
    } else if (const int32_t behind = block - args.schedules.blocks; behind >= 0) {
      write_lengths(behind);
    } else {
      WriteSchedule<kRagged, kRefresh == Refresh::kAny>(args.schedules, block);
    }
    return;
  }
  int32_t i = table_row;
  if (kOwnThreads < kThreads) i = i * (kThreads / kOwnThreads) + threadIdx.x / kOwnThreads;
  if (i < args.table_requests) WriteTables<kWidth, kTablesRagged, kRefresh>(args, i);
}

// Whether four columns of `page_indices` can be moved at once; without it no columns are.
inline bool AllowsVectors(const FusedMetadataArguments& args) {
  if (args.backends[0].tables.page_indices == nullptr) return true;
  bool allows = args.pool.stride % 4 == 0 && IsAligned(args.pool.req_to_token) &&
                args.tables[kPageIndices].stride % 4 == 0;
  if (args.backends[0].tables.real_page_table != nullptr) {
    allows = allows && args.tables[kRealPageTable].tokens_per_column % 4 == 0;
  }
  for (int b = 0; b < args.num_backends; ++b) {
    allows = allows && IsAligned(args.backends[b].tables.page_indices);
  }
  return allows;
}

// Whether all backends are computed for the same lengths.
inline bool HasEqualOffsets(const FusedMetadataArguments& args) {
  const int32_t* const offsets = args.backend_offsets;
  return std::all_of(offsets, offsets + args.num_backends,
                     [=](int32_t offset) { return offset == offsets[0]; });
}

template <int kCapacity>
void TakeSchedules(const FusedMetadataArguments& args, ScheduleParameters<kCapacity>* parameters) {
  const Schedules& wanted = args.schedules;
  parameters->pages_per_pooled_page = Divisor::Of(args.index_kpool);
  parameters->pooled_page_table_stride = args.tables[kPooledPageTable].stride;
  parameters->rows = args.rows;
  parameters->rules = args.row_rules();
  parameters->backends_per_block = HasEqualOffsets(args) ? args.num_backends : 1;
  const int32_t groups = args.num_backends / parameters->backends_per_block;
  const auto blocks = [&](int64_t rows, Divisor* shares) {
    const int64_t wanted_shares = std::min(CeilDiv(rows, kThreads), kMostScheduleShares);
    *shares = Divisor::Of(static_cast<int32_t>(wanted_shares));
    return groups * shares->value;
  };
  if (wanted.flash_mla.num_sm_parts > 0) {
    const int64_t items = wanted.flash_mla.items(args.rows);
    const int64_t rows = wanted.flash_mla.num_sm_parts + items + 1;
    parameters->flash_mla_blocks = blocks(rows, &parameters->flash_mla_shares);
  }
  if (wanted.paged_mqa.num_sms > 0) {
    const int64_t rows = wanted.paged_mqa.num_sms + 1;
    parameters->paged_mqa_blocks = blocks(rows, &parameters->paged_mqa_shares);
  }
  parameters->blocks = parameters->flash_mla_blocks + parameters->paged_mqa_blocks +
                       (wanted.topk_plan.num_pairs > 0 ? groups : 0);
  parameters->is_fresh = args.is_fresh;
  parameters->constant_flash_mla = args.flash_mla;
  parameters->paged_mqa = wanted.paged_mqa;
  parameters->topk_plan = wanted.topk_plan;
  parameters->flash_mla = wanted.flash_mla;
  for (int b = 0; b < args.num_backends; ++b) {
    parameters->arrays[b] = args.backends[b].schedules;
    parameters->pooled_page_tables[b] = args.backends[b].tables.pooled_page_table;
    parameters->offsets[b] = args.backend_offsets[b];
  }
}

template <int kWidth, bool kRagged, bool kTablesRagged, Refresh kRefresh, int kCapacity,
          bool kSchedules>
void LaunchForRows(Stream stream, const FusedMetadataArguments& args) {
  constexpr int kOwnThreads = kRequestThreads<kRefresh, kTablesRagged>;
  const Rows& rows = args.rows;
  const Tables& wanted = args.backends[0].tables;
  Parameters<kCapacity, kSchedules> parameters{};
  parameters.seq_lens = rows.seq_lens;
  parameters.req_pool_indices = args.req_pool_indices;
  parameters.table_requests = rows.tables_ragged() ? std::max(rows.requests, 1) : rows.requests;
  parameters.rows_per_request = rows.prefill ? 1 : rows.rows_per_request;
  parameters.added_tokens = rows.added_tokens;
  parameters.pool = args.pool;
  parameters.page_indices_stride = args.tables[kPageIndices].stride;
  parameters.real_page_table_stride = args.tables[kRealPageTable].stride;
  parameters.least.live = args.tail == Tail::kCopy ? args.max_len : 0;
  parameters.least.end = args.tail == Tail::kKeep ? 0 : args.max_len;
  parameters.max_len = args.max_len;
  parameters.page_size = Divisor::Of(
      wanted.real_page_table != nullptr ? args.tables[kRealPageTable].tokens_per_column : 1);
  parameters.num_backends = args.num_backends;
  parameters.requests_are_items = args.requests_are_items;
  parameters.is_wide = wanted.page_indices != nullptr;
  parameters.rows = rows;
  parameters.row_rules = args.row_rules();
  parameters.clears_padding = args.tail != Tail::kKeep;
  parameters.advances_tracker = args.tracker.advances;
  for (int b = 0; b < args.num_backends; ++b) {
    const Tables& tables = args.backends[b].tables;
    parameters.tables[b] = {tables.page_indices, tables.real_page_table};
    parameters.lengths[b] = args.backends[b].lengths;
    parameters.backend_offsets[b] = args.backend_offsets[b];
  }
  parameters.least_offset = args.least_offset;
  parameters.greatest_offset =
      *std::max_element(args.backend_offsets, args.backend_offsets + args.num_backends);
  parameters.is_pooled = wanted.pooled_page_table != nullptr;
  parameters.held = args.tracker.request_ids.data != nullptr ? Held::kTracked
                    : args.written_lens.data != nullptr      ? Held::kWrittenLens
                                                             : Held::kNothing;
  parameters.written_lens = args.written_lens;
  parameters.tracker = args.tracker;
  // A tile begins with an access, at or before the first column that is written.
  const int64_t tokens =
      args.may_hold_columns()
          ? std::min(args.max_new_tokens + (parameters.is_wide ? kWidth - 1 : 0), args.max_len)
          : args.max_len;
  const int64_t tile_tokens =
      kOwnThreads * int64_t{parameters.is_wide ? kWidth : parameters.page_size.value};
  const int64_t tiles = std::max<int64_t>(1, CeilDiv(tokens, tile_tokens));
  const int64_t table_rows = CeilDiv(parameters.table_requests, kThreads / kOwnThreads);
  const int64_t all_tiles = table_rows * tiles;
  const bool few = !parameters.is_wide || all_tiles <= 4 * kFewestBlocks;
  const int64_t blocks = std::clamp(all_tiles / (few ? 4 : 2), kFewestBlocks, kMostBlocks);
  dim3 grid;
  grid.x = std::clamp<int64_t>(blocks / std::max<int64_t>(table_rows, 1), 1, tiles);
  if (args.may_hold_columns()) {  // a power of two
    while ((grid.x & (grid.x - 1)) != 0) grid.x &= grid.x - 1;
  }
  const int64_t groups = std::max<int64_t>(1, CeilDiv(rows.requests, kThreads));
  const int64_t most_shares = rows.ragged() ? std::max<int64_t>(1, kMostLengthBlocks / groups) : 1;
  const int64_t shares = std::clamp<int64_t>(CeilDiv(rows.count, kThreads), 1, most_shares);
  parameters.length_groups = static_cast<int32_t>(groups);
  parameters.length_shares = static_cast<int32_t>(shares);
  int64_t key_blocks = 0;
  if (args.backends[0].lengths.flat_page_indices != nullptr) {
    parameters.max_total_keys = args.max_total_keys;
    key_blocks = CeilDiv(args.max_total_keys, kTileKeys);
  }
  int64_t first_blocks = groups * shares * args.num_backends + key_blocks;
  if constexpr (kSchedules) {
    TakeSchedules(args, &parameters.schedules);
    first_blocks += parameters.schedules.blocks;
  }
  parameters.length_rows = CeilDiv(first_blocks, grid.x);
  const int64_t grid_rows = parameters.length_rows + table_rows;
  grid.y = std::min<int64_t>(grid_rows, kGridRows);
  grid.z = CeilDiv(grid_rows, kGridRows);
  Launch(kName, stream,
         FusedMetadataKernel<kWidth, kRagged, kTablesRagged, kRefresh, kCapacity, kSchedules>, grid,
         kThreads, parameters);
}

template <int kWidth, Refresh kRefresh, int kCapacity, bool kSchedules>
void LaunchFusedMetadata(Stream stream, const FusedMetadataArguments& args) {
  const auto launch =
      args.rows.prefill ? LaunchForRows<kWidth, true, false, kRefresh, kCapacity, kSchedules>
      : args.rows.ragged()
          ? LaunchForRows<kWidth, true, true, kRefresh, kCapacity, kSchedules>
          : LaunchForRows<kWidth, false, false, kRefresh, kCapacity, kSchedules>;
  launch(stream, args);
}

}  // namespace

// Each kernel costs seconds of compilation. For the same lengths in all backends there are own ones
// only where columns move four at once, to few backends, and of refreshes only without schedules.
template <int kCapacity, bool kSchedules>
void LaunchForBackends(Stream stream, const FusedMetadataArguments& args) {
  if (!AllowsVectors(args)) {
    LaunchFusedMetadata<1, Refresh::kAny, kCapacity, kSchedules>(stream, args);
    return;
  }
  if constexpr (kCapacity == kFewBackends) {
    if (args.backend_offsets[0] == 0 && HasEqualOffsets(args)) {
      if (!args.may_hold_columns()) {
        LaunchFusedMetadata<4, Refresh::kWhole, kCapacity, kSchedules>(stream, args);
        return;
      }
      if constexpr (!kSchedules) {
        LaunchFusedMetadata<4, Refresh::kNew, kCapacity, kSchedules>(stream, args);
        return;
      }
    }
  }
  LaunchFusedMetadata<4, Refresh::kAny, kCapacity, kSchedules>(stream, args);
}

namespace {

template <int kWidth, Refresh kRefresh, int kCapacity, bool kSchedules>
void LoadForRows() {
  LoadKernels(kName, FusedMetadataKernel<kWidth, false, false, kRefresh, kCapacity, kSchedules>,
              FusedMetadataKernel<kWidth, true, true, kRefresh, kCapacity, kSchedules>,
              FusedMetadataKernel<kWidth, true, false, kRefresh, kCapacity, kSchedules>);
}

}  // namespace

template <int kCapacity, bool kSchedules>
void LoadForBackends() {
  if constexpr (kCapacity == kFewBackends) {
    LoadForRows<4, Refresh::kWhole, kCapacity, kSchedules>();
    if constexpr (!kSchedules) LoadForRows<4, Refresh::kNew, kCapacity, kSchedules>();
  }
  LoadForRows<4, Refresh::kAny, kCapacity, kSchedules>();
  LoadForRows<1, Refresh::kAny, kCapacity, kSchedules>();
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_FUSED_KERNEL_CUH_
