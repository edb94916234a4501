// The lengths of a draft-extend step: the variants that the source documents compare.
//
// Inputs of all kernels: seq_lens, extend_seq_lens. Outputs: the arrays of [rows], total_tokens.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "computations.h"
#include "launch.cuh"

namespace jaxnsa {
namespace {

constexpr int kExpandThreads = 256;

// Writes a row: row j of request i, or a padding row where there is no request i.
__device__ void WriteRow(const FillDraftExtendMetadataArguments& args, int64_t row, int64_t i,
                         int64_t j) {
  const Rows& rows = args.rows;
  if (i >= rows.requests && !args.clears_padding) return;
  int32_t kv_len = 0;
  if (i < rows.requests) {
    kv_len = Rows::kv_len(rows.cache_seqlen(i), rows.q(i), static_cast<int32_t>(j));
  }
  Store(args.lengths, row, RowValuesOf(kv_len, {}, {args.nsa_index_topk, 1, false}));
}

// Everything in one launch.
// Grid: a block for every 256 rows. Block: 256 threads, one for each row. A block scans the
// requests tile by tile until they reach its last row, and each thread looks its row up in the tile
// that holds it; the first block scans all of them, for the total.
__global__ void __launch_bounds__(kExpandThreads)
    FillDraftExtendMetadataKernel(const __grid_constant__ FillDraftExtendMetadataArguments args) {
  using Scan = cub::BlockScan<int64_t, kExpandThreads>;
  __shared__ typename Scan::TempStorage temp;
  __shared__ int64_t ends[kExpandThreads];
  const Rows& rows = args.rows;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kExpandThreads;
  const int64_t row = first_row + threadIdx.x;
  const bool sums_all = blockIdx.x == 0;  // this block also writes the total

  int64_t before = 0, request = rows.requests, token = 0;
  for (int64_t first = 0; first < rows.requests; first += kExpandThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t end, total;
    Scan(temp).InclusiveSum(i < rows.requests ? rows.q(i) : 0, end, total);
    ends[threadIdx.x] = before + end;
    __syncthreads();
    if (row >= before && row < before + total) {
      int low = 0, high = kExpandThreads - 1;  // the first request that ends after this row
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > row) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      request = first + low;
      token = row - (low > 0 ? ends[low - 1] : before);
    }
    before += total;
    __syncthreads();
    if (!sums_all && before > first_row + kExpandThreads) break;
  }
  if (row < rows.count) WriteRow(args, row, request, token);
  if (sums_all && threadIdx.x == 0) *args.total_tokens = static_cast<int32_t>(before);
}

// The first of two launches: the first row of each request, at most the capacity, and the total.
// Grid: one block, of 256 threads. Also an output: offsets.
__global__ void OffsetsKernel(const __grid_constant__ FillDraftExtendMetadataArguments args) {
  using Scan = cub::BlockScan<int64_t, kExpandThreads>;
  __shared__ typename Scan::TempStorage temp;
  const Rows& rows = args.rows;
  int64_t before = 0;
  if (threadIdx.x == 0) args.offsets[0] = 0;
  for (int64_t first = 0; first < rows.requests; first += kExpandThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t end, total;
    Scan(temp).InclusiveSum(i < rows.requests ? rows.q(i) : 0, end, total);
    if (i < rows.requests) {
      args.offsets[i + 1] =
          static_cast<int32_t>(before + end < rows.count ? before + end : rows.count);
    }
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) *args.total_tokens = static_cast<int32_t>(before);
}

constexpr int kLinearSearchLimit = 16;  // requests up to which "adaptive" searches linearly

// The second of two launches: the rows. Also an input: offsets.
// Grid: a block for every 256 rows. Block: 256 threads, one for each row.
template <bool kAdaptive>
__global__ void ExpandKernel(const __grid_constant__ FillDraftExtendMetadataArguments args) {
  const Rows& rows = args.rows;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows.count) return;
  int64_t i = 0;
  if (kAdaptive && rows.requests <= kLinearSearchLimit) {
    while (i < rows.requests && args.offsets[i + 1] <= row) ++i;
  } else {
    int64_t high = rows.requests;
    while (i < high) {
      const int64_t middle = (i + high) / 2;
      if (args.offsets[middle + 1] > row) {
        high = middle;
      } else {
        i = middle + 1;
      }
    }
  }
  WriteRow(args, row, i, row - args.offsets[i]);
}

}  // namespace

void FillDraftExtendMetadata(Stream stream, DraftExtendVariant variant,
                             const FillDraftExtendMetadataArguments& args) {
  const int64_t blocks = std::max<int64_t>(1, CeilDiv(args.rows.count, kExpandThreads));
  const auto launch = [&](auto kernel, int64_t grid) {
    Launch("fill_draft_extend_metadata", stream, kernel, grid, kExpandThreads, args);
  };
  if (variant == DraftExtendVariant::kOptimized) {
    launch(FillDraftExtendMetadataKernel, blocks);
    return;
  }
  launch(OffsetsKernel, 1);
  const bool adaptive = variant == DraftExtendVariant::kAdaptive;
  launch(adaptive ? ExpandKernel<true> : ExpandKernel<false>, blocks);
}

void LoadFillDraftExtendMetadata() {
  LoadKernels("fill_draft_extend_metadata", FillDraftExtendMetadataKernel, OffsetsKernel,
              ExpandKernel<false>, ExpandKernel<true>);
}

}  // namespace jaxnsa
