// The whole computation in one launch.
//
// Grid: rows of gridDim.x blocks each, counted by blockIdx.y and, beyond kGridRows, by blockIdx.z.
//   The first rows hold a block for each schedule that is wanted, which writes it to all backends,
//   and then the blocks that write lengths and prefix sums: for each backend one block for every 128
//   requests. After them comes a row of blocks for each request, which share its rows of the page
//   tables: neighbouring blocks write neighbouring memory. No block waits for another.
// Block: 128 threads.
// Inputs: seq_lens, req_pool_indices, req_to_token, and extend_seq_lens where rows are ragged.
// Outputs: the arrays of every backend that are not null.
#include <algorithm>

#include "launch.cuh"
#include "lengths.cuh"
#include "parameters.cuh"
#include "tables.cuh"
#include "write_schedules.cuh"

namespace jaxnsa {
namespace {

constexpr const char* kName = "fused_metadata";

// Bounds the registers: copies want many blocks in flight.
constexpr int kBlocksPerMultiprocessor = 10;

// Blocks that share the tables: half as many as there are tiles, within these bounds. Each costs
// 0.6 nanoseconds of a Hopper GPU, whether its columns are live or not.
constexpr int64_t kFewestBlocks = 1024, kMostBlocks = 8192;

constexpr int kGridRows = 32768;

template <int kWidth, bool kRagged, int kCapacity, bool kSchedules>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    FusedMetadataKernel(const __grid_constant__ Parameters<kCapacity, kSchedules> args) {
  const auto row = static_cast<int32_t>(blockIdx.z * kGridRows + blockIdx.y);
  const int32_t i = row - args.length_rows;
  if (i >= args.table_requests) return;
  if (__builtin_expect(i < 0, 0)) {
    uint32_t block = row * gridDim.x + blockIdx.x;
    if constexpr (kSchedules) {
      const uint32_t schedules = args.schedules.count;
      if (block < schedules) {
        WriteSchedule<kRagged>(args.schedules, args.rows, args.row_rules, args.num_backends,
                               args.schedules.kinds[block]);
        return;
      }
      block -= schedules;
    }
    const uint32_t blocks = args.length_blocks;
    const uint32_t b = blocks == 1 ? block : block / blocks;
    if (b < static_cast<uint32_t>(args.num_backends)) {
      WriteLengths<kRagged>(args.rows, args.row_rules, blocks, block - b * blocks,
                            args.lengths[b]);
    }
    return;
  }
  WriteTables<kWidth, kRagged>(args, i);
}

// Whether four columns of every table can be moved at once.
bool AllowsVectors(const FusedMetadataArguments& args) {
  bool allows = args.pool.stride % 4 == 0 && IsAligned(args.pool.req_to_token);
  if (args.backends[0].tables.page_indices != nullptr) {
    allows = allows && args.tables[kPageIndices].stride % 4 == 0;
  }
  if (args.backends[0].tables.real_page_table != nullptr) {
    allows = allows && args.tables[kRealPageTable].tokens_per_column % 4 == 0;
  }
  for (int b = 0; b < args.num_backends; ++b) {
    allows = allows && IsAligned(args.backends[b].tables.page_indices);
  }
  return allows;
}

template <int kCapacity>
void TakeSchedules(const FusedMetadataArguments& args, ScheduleParameters<kCapacity>* parameters) {
  const Schedules& wanted = args.schedules;
  parameters->pages_per_pooled_page = Divisor::Of(args.index_kpool);
  parameters->pooled_page_table_stride = args.tables[kPooledPageTable].stride;
  const auto add = [&](ScheduleKind kind) { parameters->kinds[parameters->count++] = kind; };
  if (wanted.flash_mla.num_sm_parts > 0) add(ScheduleKind::kFlashMla);
  if (wanted.paged_mqa.num_sms > 0) add(ScheduleKind::kPagedMqa);
  if (wanted.topk_plan.num_pairs > 0) add(ScheduleKind::kTopkPlan);
  parameters->is_fresh = args.is_fresh;
  parameters->schedules = wanted;
  for (int b = 0; b < args.num_backends; ++b) parameters->arrays[b] = args.backends[b].schedules;
}

template <int kWidth, int kCapacity, bool kSchedules>
void LaunchFusedMetadata(Stream stream, const FusedMetadataArguments& args) {
  const Rows& rows = args.rows;
  const Tables& wanted = args.backends[0].tables;
  Parameters<kCapacity, kSchedules> parameters{};
  parameters.seq_lens = rows.seq_lens;
  parameters.req_pool_indices = args.req_pool_indices;
  parameters.table_requests = rows.ragged() ? std::max(rows.requests, 1) : rows.requests;
  parameters.rows_per_request = rows.rows_per_request;
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
  parameters.request_columns = args.request_columns;
  parameters.rows = rows;
  parameters.row_rules = args.row_rules();
  parameters.clears_padding = args.tail != Tail::kKeep;
  for (int b = 0; b < args.num_backends; ++b) {
    parameters.tables[b] = args.backends[b].tables;
    parameters.lengths[b] = args.backends[b].lengths;
  }
  const bool wide = wanted.page_indices != nullptr;
  const int64_t tiles = wide ? CeilDiv(args.max_len, kTileColumns)
                             : CeilDiv(args.columns(kRealPageTable), kThreads);
  const int64_t table_requests = parameters.table_requests;
  const int64_t blocks = std::clamp(table_requests * tiles / 2, kFewestBlocks, kMostBlocks);
  dim3 grid;
  grid.x = std::clamp<int64_t>(blocks / std::max<int64_t>(table_requests, 1), 1, tiles);
  parameters.length_blocks = std::max<int64_t>(1, CeilDiv(rows.requests, kThreads));
  int64_t first_blocks = int64_t{parameters.length_blocks} * args.num_backends;
  if constexpr (kSchedules) {
    TakeSchedules(args, &parameters.schedules);
    first_blocks += parameters.schedules.count;
  }
  parameters.length_rows = CeilDiv(first_blocks, grid.x);
  const int64_t grid_rows = parameters.length_rows + table_requests;
  grid.y = std::min<int64_t>(grid_rows, kGridRows);
  grid.z = CeilDiv(grid_rows, kGridRows);
  const auto kernel = rows.ragged() ? FusedMetadataKernel<kWidth, true, kCapacity, kSchedules>
                                    : FusedMetadataKernel<kWidth, false, kCapacity, kSchedules>;
  Launch(kName, stream, kernel, grid, kThreads, parameters);
}

template <int kCapacity, bool kSchedules>
void LaunchForBackends(Stream stream, const FusedMetadataArguments& args) {
  if (AllowsVectors(args)) {
    LaunchFusedMetadata<4, kCapacity, kSchedules>(stream, args);
  } else {
    LaunchFusedMetadata<1, kCapacity, kSchedules>(stream, args);
  }
}

template <int kCapacity, bool kSchedules>
void LoadForBackends() {
  LoadKernels(kName, FusedMetadataKernel<4, false, kCapacity, kSchedules>,
              FusedMetadataKernel<4, true, kCapacity, kSchedules>,
              FusedMetadataKernel<1, false, kCapacity, kSchedules>,
              FusedMetadataKernel<1, true, kCapacity, kSchedules>);
}

// Whether a launch writes schedules or pooled arrays.
bool WantsSchedules(const FusedMetadataArguments& args) {
  const Schedules& wanted = args.schedules;
  return args.index_kpool > 1 || wanted.paged_mqa.num_sms > 0 || wanted.topk_plan.num_pairs > 0 ||
         wanted.flash_mla.num_sm_parts > 0;
}

}  // namespace

void FusedMetadata(Stream stream, const FusedMetadataArguments& args) {
  const bool few = args.num_backends <= kFewBackends, schedules = WantsSchedules(args);
  const auto launch = few ? schedules ? LaunchForBackends<kFewBackends, true>
                                      : LaunchForBackends<kFewBackends, false>
                      : schedules ? LaunchForBackends<kMaxBackends, true>
                                  : LaunchForBackends<kMaxBackends, false>;
  launch(stream, args);
}

void LoadFusedMetadata() {
  LoadForBackends<kFewBackends, false>();
  LoadForBackends<kMaxBackends, false>();
  LoadForBackends<kFewBackends, true>();
  LoadForBackends<kMaxBackends, true>();
}

bool IsCurrentDevice(int device) {
  int current;
  return cudaGetDevice(&current) == cudaSuccess && current == device;
}

}  // namespace jaxnsa
