// The lengths of a draft-extend step: the variants that the source documents compare.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "cuda.h"
#include "cuda_launch.h"

namespace jaxnsa {
namespace {

constexpr int kThreads = 256;

__device__ void WriteRow(const DraftExtend& args, int64_t row, int64_t i, int64_t j) {
  const Rows& rows = args.rows;
  if (i >= rows.requests && args.tail == Tail::kKeep) return;
  const int32_t kv_len =
      i < rows.requests ? Rows::kv_len(rows.cache_seqlen(i), rows.q(i), static_cast<int32_t>(j)) : 0;
  args.seqlens_expanded[row] = kv_len;
  args.nsa_cache_seqlens[row] = rows.nsa_len(kv_len);
}

// Each block expands 256 rows: it scans the requests tile by tile until they reach its last row, and
// each thread looks its row up in the tile that holds it.
__global__ void __launch_bounds__(kThreads)
    FillDraftExtendKernel(const __grid_constant__ DraftExtend args) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage temp;
  __shared__ int64_t ends[kThreads];
  const Rows& rows = args.rows;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int64_t row = first_row + threadIdx.x;
  const bool sums_all = blockIdx.x == 0;  // this block also writes the total

  int64_t before = 0, request = rows.requests, token = 0;
  for (int64_t first = 0; first < rows.requests; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t end, total;
    Scan(temp).InclusiveSum(i < rows.requests ? rows.q(i) : 0, end, total);
    ends[threadIdx.x] = before + end;
    __syncthreads();
    if (row >= before && row < before + total) {
      int low = 0, high = kThreads - 1;  // the first request that ends after this row
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
    if (!sums_all && before > first_row + kThreads) break;
  }
  if (row < rows.count) WriteRow(args, row, request, token);
  if (sums_all && threadIdx.x == 0) *args.total_tokens = static_cast<int32_t>(before);
}

// The same in two launches, from offsets in global memory; they stop at the capacity.
__global__ void OffsetsKernel(const __grid_constant__ DraftExtend args) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage temp;
  const Rows& rows = args.rows;
  int64_t before = 0;
  if (threadIdx.x == 0) args.offsets[0] = 0;
  for (int64_t first = 0; first < rows.requests; first += kThreads) {
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

template <bool kAdaptive>
__global__ void ExpandKernel(const __grid_constant__ DraftExtend args) {
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

std::string Cuda::LoadFillDraftExtend() {
  return LoadKernels("fill_draft_extend_metadata", FillDraftExtendKernel, OffsetsKernel,
                     ExpandKernel<false>, ExpandKernel<true>);
}

std::string Cuda::FillDraftExtend(Stream stream, DraftExtendVariant variant,
                                  const DraftExtend& args) {
  const char* const name = "fill_draft_extend_metadata";
  const int64_t blocks = std::max<int64_t>(1, CeilDiv(args.rows.count, kThreads));
  if (variant == DraftExtendVariant::kOptimized) {
    return Launch(name, stream, FillDraftExtendKernel, blocks, kThreads, args);
  }
  std::string error = Launch("draft_extend_offsets", stream, OffsetsKernel, 1, kThreads, args);
  if (!error.empty()) return error;
  const bool adaptive = variant == DraftExtendVariant::kAdaptive;
  return Launch(name, stream, adaptive ? ExpandKernel<true> : ExpandKernel<false>, blocks,
                kThreads, args);
}

}  // namespace jaxnsa
