// How a block of the fused kernel writes the lengths and prefix sums of 128 requests and its share
// of those of their rows.
#ifndef JAXNSA_CUDA_LENGTHS_CUH_
#define JAXNSA_CUDA_LENGTHS_CUH_

#include <cstdint>

#include "block_sums.cuh"
#include "parameters.cuh"

namespace jaxnsa {

// min(1, topk) + min(2, topk) + ... + min(n, topk), modulo 2^32.
__device__ inline uint32_t ClampedSeries(int32_t n, int32_t topk) {
  const uint32_t low = Min(n, topk);
  const uint32_t triangle = low % 2 == 0 ? low / 2 * (low + 1) : low * (low / 2 + 1);
  return triangle + (static_cast<uint32_t>(n) - low) * static_cast<uint32_t>(topk);
}

// 1 + 2 + ... + n, modulo 2^64, for n below 2^32.
__device__ inline uint64_t Triangle(uint64_t n) { return n * (n + 1) / 2; }

// The sum of nsa_cache_seqlens of rows that see 1, 2, ..., n tokens, modulo 2^32.
__device__ inline uint32_t NsaSeries(int32_t n, const RowRules& rules) {
  const int32_t topk = rules.nsa_index_topk, pool = rules.index_kpool;
  if (pool == 1) return ClampedSeries(n, topk);
  // Groups of `pool` rows whose full pools are the same, 0 for the first, and what they lack of
  // another; the last group has but `rest` + 1 of them.
  const int32_t groups = n / pool, rest = n % pool;
  if (groups == 0) return static_cast<uint32_t>(Triangle(rest));
  const int32_t unclamped = Min(groups - 1, topk / pool);
  const uint64_t full = pool * Triangle(unclamped) +
                        uint64_t{static_cast<uint32_t>(groups - 1 - unclamped)} * topk;
  const uint64_t last = Min(groups * pool, topk);
  return static_cast<uint32_t>(pool * full + (rest + 1) * last + groups * Triangle(pool - 1) +
                               Triangle(rest));
}

// The sum of nsa_cache_seqlens over rows 0 to j of a request of q rows, modulo 2^32.
__device__ inline uint32_t NsaSum(const RowRules& rules, int32_t cache_seqlen, int32_t q,
                                  int32_t j) {
  return NsaSeries(Rows::kv_len(cache_seqlen, q, j), rules) -
         NsaSeries(Max(cache_seqlen - q, 0), rules);
}

// Modulo 2^32.
struct LengthSums {
  uint32_t cache_seqlens;
  uint32_t nsa_cache_seqlens;

  friend __device__ LengthSums operator+(LengthSums a, LengthSums b) {
    return {a.cache_seqlens + b.cache_seqlens, a.nsa_cache_seqlens + b.nsa_cache_seqlens};
  }
};

// One of the blocks of a backend: group `group` of 128 requests, of `groups`; share `share` of
// their rows, of `shares`.
struct LengthBlock {
  uint32_t groups;
  uint32_t group;
  uint32_t shares;
  uint32_t share;
};

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
  __shared__ int64_t rows_end;  // of the group, where rows are ragged
  const auto q_of = [&](int64_t i) -> int64_t { return rows.q(i); };
  const auto sums_of = [&](int32_t cache_seqlen, int32_t q) -> LengthSums {
    return {static_cast<uint32_t>(cache_seqlen), NsaSum(rules, cache_seqlen, q, q - 1)};
  };
  const auto sums = [&](int64_t i) { return sums_of(rows.cache_seqlen(i, offset), rows.q(i)); };
  const int64_t first = int64_t{block.group} * kThreads, i = first + threadIdx.x;
  const int64_t end = first + kThreads < rows.requests ? first + kThreads : rows.requests;
  const bool exists = i < end;

  const int32_t cache_seqlen = exists ? rows.cache_seqlen(i, offset) : 0;
  const int32_t q = exists ? rows.q(i) : 0;
  // What a request of one row adds takes little to compute.
  const bool is_row = !kRagged && rows.rows_per_request == 1;
  const auto sums_of_row = [&](int32_t cache_seqlen) -> LengthSums {
    const int32_t nsa_cache_seqlen = rules.nsa_cache_seqlen(cache_seqlen);
    return {static_cast<uint32_t>(cache_seqlen), static_cast<uint32_t>(nsa_cache_seqlen)};
  };
  const LengthSums own = is_row ? sums_of_row(cache_seqlen) : sums_of(cache_seqlen, q);
  LengthSums before = SumBeforeThread(own);
  if (first > 0) {
    const auto row_sums = [&](int64_t i) { return sums_of_row(rows.cache_seqlen(i, offset)); };
    before = before + SumOfThreads(is_row ? ThreadSum<LengthSums>(0, first, row_sums)
                                          : ThreadSum<LengthSums>(0, first, sums));
  }
  int64_t first_row = i * rows.rows_per_request, end_row = end * rows.rows_per_request;
  if (kRagged) {
    const int64_t rows_before = BlockSum<int64_t>(0, first, q_of);
    first_row = rows_before + SumBeforeThread<int64_t>(q);
    if (threadIdx.x == kThreads - 1) rows_end = first_row + q;
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
    Store(to, i + 1, RequestSums(static_cast<int32_t>(before.cache_seqlens + cache_seqlen)));
  }
  if (is_row) {
    if (!exists) return;
    const RowOwner owner{static_cast<int32_t>(i), cache_seqlen, first_key};
    Store(to, i, RowValuesOf(cache_seqlen, owner, rules));
    const LengthSums after = before + own;
    Store(to, i + 1, RowSums(static_cast<int32_t>(after.nsa_cache_seqlens)));
    return;
  }
  requests[threadIdx.x] = {cache_seqlen, q, at_most_all(first_row), before.nsa_cache_seqlens,
                           first_key};
  __syncthreads();
  if (kRagged) end_row = rows_end;

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
  if (!kRagged) return;

  // The padding rows.
  const int64_t total = end_row + BlockSum<int64_t>(end, rows.requests, q_of);
  if (total >= rows.count) return;
  const RowSums nsa_total(
      static_cast<int32_t>(BlockSum<LengthSums>(0, rows.requests, sums).nsa_cache_seqlens));
  const int64_t first_lane = int64_t{block.group} * lanes + lane;
  for (int64_t row = total + first_lane; row < rows.count; row += int64_t{block.groups} * lanes) {
    Store(to, row, PaddingRowValues());
    Store(to, row + 1, nsa_total);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_LENGTHS_CUH_
