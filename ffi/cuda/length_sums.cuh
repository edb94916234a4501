// What the lengths of requests add up to, for each thread of a block that writes lengths.
#ifndef JAXNSA_CUDA_LENGTH_SUMS_CUH_
#define JAXNSA_CUDA_LENGTH_SUMS_CUH_

#include <cstdint>
#include <type_traits>

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

// One of the blocks of a backend: group `group` of 128 requests, of `groups`; share `share` of
// their rows, of `shares`.
struct LengthBlock {
  uint32_t groups;
  uint32_t group;
  uint32_t shares;
  uint32_t share;

  __device__ int64_t first_request() const { return int64_t{group} * kThreads; }

  __device__ int64_t end_request(const Rows& rows) const {
    return first_request() + kThreads < rows.requests ? first_request() + kThreads : rows.requests;
  }
};

// What requests add up to: lengths modulo 2^32 and, where rows are ragged, rows.
template <bool kRagged>
struct LengthSums {
  uint32_t cache_seqlens;
  uint32_t nsa_cache_seqlens;

  friend __device__ LengthSums operator+(LengthSums a, LengthSums b) {
    return {a.cache_seqlens + b.cache_seqlens, a.nsa_cache_seqlens + b.nsa_cache_seqlens};
  }
};

template <>
struct LengthSums<true> {
  uint32_t cache_seqlens;
  uint32_t nsa_cache_seqlens;
  int64_t rows;

  friend __device__ LengthSums operator+(LengthSums a, LengthSums b) {
    return {a.cache_seqlens + b.cache_seqlens, a.nsa_cache_seqlens + b.nsa_cache_seqlens,
            a.rows + b.rows};
  }
};

// A thread's request of a group.
template <bool kRagged>
struct RequestInGroup {
  int32_t cache_seqlen;  // 0, as all of this, where there is none
  int32_t q;
  LengthSums<kRagged> sums;
  LengthSums<kRagged> sums_before;        // of the requests before it
  LengthSums<kRagged> sums_behind_group;  // where rows are ragged
};

// The requests of a group, one for each thread, where lengths are `offset` tokens more. All loads
// are issued before a value is used, also those of the requests outside the group.
template <bool kRagged>
__device__ RequestInGroup<kRagged> FindInGroup(const Rows& rows, const RowRules& rules,
                                               const LengthBlock& block, int32_t offset) {
  using Sums = LengthSums<kRagged>;
  // Of the requests outside the group: where rows are not ragged, of those before it.
  using Others = std::conditional_t<kRagged, Around<Sums>, Sums>;
  const int64_t first = block.first_request(), end = block.end_request(rows);
  const int64_t i = first + threadIdx.x;
  const bool exists = i < end, has_others = kRagged ? block.groups > 1 : first > 0;

  struct Words {
    Vector::Words seq_len;
    Vector::Words extend_seq_len;
  };
  const auto load = [&](int64_t k) -> Words {
    return {rows.seq_lens.words(k), kRagged ? rows.extend_seq_lens.words(k) : Vector::Words{}};
  };
  const auto cache_seqlen_of = [&](Words words) {
    const int32_t seq_len = rows.seq_lens.value(words.seq_len);
    return Rows::cache_seqlen_of(seq_len, offset, rows.added_tokens);
  };
  const auto q_of = [&](Words words) {
    return kRagged ? Rows::q_of(rows.extend_seq_lens.value(words.extend_seq_len))
                   : rows.rows_per_request;
  };
  // `is_row`, at compile time: whether requests have one row, whose sums take little to compute.
  const auto sums_of = [&](auto is_row, Words words) {
    constexpr bool kIsRow = decltype(is_row)::value;
    const int32_t cache_seqlen = cache_seqlen_of(words), q = q_of(words);
    Sums sums{};
    sums.cache_seqlens = cache_seqlen;
    sums.nsa_cache_seqlens = kIsRow ? rules.nsa_cache_seqlen(cache_seqlen)
                                    : NsaSum(rules, cache_seqlen, q, q - 1);
    if constexpr (kRagged) sums.rows = q;
    return sums;
  };
  const auto others_of = [&](auto is_row) {
    const auto summed = static_cast<int32_t>(kRagged ? rows.requests : first);
    constexpr int kLoads = decltype(is_row)::value ? 8 : 4;
    return ThreadSum<Others, kLoads>(summed, load, [&](int64_t k, Words words) -> Others {
      const Sums sums = sums_of(is_row, words);
      if constexpr (kRagged) {
        return {k < first ? sums : Sums{}, k >= end ? sums : Sums{}};
      } else {
        return sums;
      }
    });
  };
  constexpr std::true_type kRow;
  constexpr std::false_type kRows;
  const bool are_rows = !kRagged && rows.rows_per_request == 1;

  const Words words = exists ? load(i) : Words{};
  Others others{};
  if (has_others) others = are_rows ? others_of(kRow) : others_of(kRows);
  RequestInGroup<kRagged> request{};
  if (exists) {
    request.cache_seqlen = cache_seqlen_of(words);
    request.q = q_of(words);
    request.sums = are_rows ? sums_of(kRow, words) : sums_of(kRows, words);
  }
  if (!has_others) {
    request.sums_before = SumBeforeThread(request.sums);
    return request;
  }
  SumPair<Sums, Others> all;
  const Sums before = SumBeforeThread(SumPair<Sums, Others>{request.sums, others}, &all).first;
  if constexpr (kRagged) {
    request.sums_before = all.second.before + before;
    request.sums_behind_group = all.second.behind;
  } else {
    request.sums_before = all.second + before;
  }
  return request;
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_LENGTH_SUMS_CUH_
