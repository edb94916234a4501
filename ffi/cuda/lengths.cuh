// How a block of the fused kernel writes the lengths and prefix sums of 128 requests and its share
// of those of their rows.
#ifndef JAXNSA_CUDA_LENGTHS_CUH_
#define JAXNSA_CUDA_LENGTHS_CUH_

#include <cstdint>

#include "length_sums.cuh"
#include "parameters.cuh"

namespace jaxnsa {

// A backend's arrays of lengths, null at compile time where a kernel is never asked for them.
template <bool kPrefill, bool kPooled>
__device__ Lengths Wanted(Lengths to) {
  if constexpr (!kPrefill) to = WithoutPrefill(to);
  if constexpr (!kPooled) to = WithoutPooled(to);
  return to;
}

// Writes the lengths and prefix sums of one backend, computed for `offset` tokens more, for a group
// of requests, one for each thread, and a share of their rows; sums over earlier requests it takes
// by itself. Together the blocks of a backend also write the padding rows.
template <bool kRagged, bool kPrefill, bool kPooled>
__device__ void WriteLengths(const Rows& rows, const RowRules& rules, LengthBlock block,
                             int32_t offset, const Lengths& lengths) {
  struct Request {
    int32_t cache_seqlen;
    int32_t q;
    int32_t first_row;  // at most the number of rows
    uint32_t nsa_before;
    int32_t first_key;
  };
  __shared__ Request requests[kThreads];
  __shared__ LengthSums<kRagged> group_end;  // of the group and all before it
  const int64_t first = block.first_request(), end = block.end_request(rows);
  const int64_t i = first + threadIdx.x;
  const bool exists = i < end;

  const auto own = FindInGroup<kRagged>(rows, rules, block, offset);
  const int32_t cache_seqlen = own.cache_seqlen;
  const LengthSums<kRagged> before = own.sums_before, after = before + own.sums;
  int64_t first_row = i * rows.rows_per_request, end_row = end * rows.rows_per_request;
  if constexpr (kRagged) {
    first_row = before.rows;
    if (threadIdx.x == kThreads - 1) group_end = after;
  }
  const auto at_most_all = [&](int64_t row) {
    return row < rows.count ? static_cast<int32_t>(row) : rows.count;
  };
  // From here on: pointers that are fetched earlier hold up the lengths.
  const Lengths to = Wanted<kPrefill, kPooled>(lengths);
  const auto first_key = static_cast<int32_t>(before.cache_seqlens);
  if (i == 0 && block.share == 0) {
    Store(to, 0, RequestSums(0));
    Store(to, 0, RowSums(0));
  }
  if (exists && block.share == 0) {
    Store(to, i, RequestValues(cache_seqlen));
    Store(to, i + 1, RequestSums(static_cast<int32_t>(after.cache_seqlens)));
  }
  if (!kRagged && rows.rows_per_request == 1) {
    if (!exists) return;
    const RowOwner owner{static_cast<int32_t>(i), cache_seqlen, first_key};
    Store(to, i, RowValuesOf(cache_seqlen, owner, rules));
    Store(to, i + 1, RowSums(static_cast<int32_t>(after.nsa_cache_seqlens)));
    return;
  }
  requests[threadIdx.x] = {cache_seqlen, own.q, at_most_all(first_row), before.nsa_cache_seqlens,
                           first_key};
  __syncthreads();
  if constexpr (kRagged) end_row = group_end.rows;

  // Unsigned: a row and the next one of the thread fit 32 bits, which saves registers.
  const uint32_t last_row = at_most_all(end_row);
  const uint32_t lane = block.share * kThreads + threadIdx.x, lanes = block.shares * kThreads;
  for (uint32_t row = requests[0].first_row + lane; row < last_row; row += lanes) {
    int low = 0;
    if (kRagged) {
      int high = static_cast<int>(end - first) - 1;  // the last that begins at this row or before
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (static_cast<uint32_t>(requests[middle].first_row) <= row) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
    } else {
      low = static_cast<int>(row / rows.rows_per_request - static_cast<uint32_t>(first));
    }
    const Request request = requests[low];
    const auto j = static_cast<int32_t>(row - request.first_row);
    const int32_t kv_len = Rows::kv_len(request.cache_seqlen, request.q, j);
    const RowOwner owner{static_cast<int32_t>(first) + low, request.cache_seqlen,
                         request.first_key};
    Store(to, row, RowValuesOf(kv_len, owner, rules));
    const uint32_t nsa_sum = request.nsa_before + NsaSum(rules, request.cache_seqlen, request.q, j);
    Store(to, int64_t{row} + 1, RowSums(static_cast<int32_t>(nsa_sum)));
  }
  if constexpr (kRagged) {  // the padding rows
    const LengthSums<kRagged> total = group_end + own.sums_behind_group;
    const RowSums nsa_total(static_cast<int32_t>(total.nsa_cache_seqlens));
    const int64_t step = int64_t{block.groups} * lanes;
    int64_t row = total.rows + int64_t{block.group} * lanes + lane;
    for (; row < rows.count; row += step) {
      Store(to, row, PaddingRowValues());
      Store(to, row + 1, nsa_total);
    }
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_LENGTHS_CUH_
