// The KV lengths of a schedule's items, which are rows or requests.
#ifndef JAXNSA_CUDA_ITEM_LENGTHS_CUH_
#define JAXNSA_CUDA_ITEM_LENGTHS_CUH_

#include <cstdint>

#include "parameters.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

// The rows that each request has.
struct RowsOfRequests {
  const Rows& rows;

  template <typename Body>
  __device__ void ForEach(int32_t first, int32_t end, Body body) const {
#pragma unroll 1
    for (int32_t i = first; i < end && body(i, rows.q(i)); ++i) {
    }
  }
};

// An item: one of a request's.
struct Item {
  int32_t request;
  int32_t j;
};

// The items of each request. Past the last one's are padding rows.
template <bool kRagged>
class ItemOwners {
 public:
  __device__ ItemOwners(SumsMemory& memory, const Rows& rows, bool are_rows)
      : rows_(rows),
        are_rows_(are_rows),
        first_rows_(memory, are_rows ? rows.requests : 0, {rows}) {}

  __device__ Item operator[](int32_t item) const {
    if (!are_rows_) return {item, 0};
    Found<int64_t> found[1];
    first_rows_.Find({int64_t{item}}, found);
    return {found[0].index, static_cast<int32_t>(item - found[0].sum)};
  }

  __device__ Item Next(Item item) const {
    if (!are_rows_) return {item.request + 1, 0};
    ++item.j;
    while (!IsPadding(item) && item.j >= rows_.q(item.request)) item = {item.request + 1, 0};
    return item;
  }

  __device__ bool IsPadding(Item item) const { return item.request >= rows_.requests; }

  __device__ int32_t length(Item item, int32_t cache_seqlen) const {
    return are_rows_ ? Rows::kv_len(cache_seqlen, rows_.q(item.request), item.j) : cache_seqlen;
  }

 private:
  const Rows& rows_;
  bool are_rows_;
  SharedSums<int64_t, RowsOfRequests> first_rows_;
};

template <>
class ItemOwners<false> {
 public:
  __device__ ItemOwners(SumsMemory&, const Rows& rows, bool are_rows)
      : q_(are_rows ? rows.rows_per_request : 1) {}

  __device__ Item operator[](int32_t item) const {
    return q_ == 1 ? Item{item, 0} : Item{item / q_, item % q_};
  }

  __device__ Item Next(Item item) const {
    return item.j + 1 < q_ ? Item{item.request, item.j + 1} : Item{item.request + 1, 0};
  }

  __device__ bool IsPadding(Item) const { return false; }

  // A request is the last of its rows.
  __device__ int32_t length(Item item, int32_t cache_seqlen) const {
    return Rows::kv_len(cache_seqlen, q_, item.j);
  }

 private:
  int32_t q_;
};

struct ItemLengthsMemory {
  static constexpr int kRequests = 2048;

  int32_t cache_seqlens[kRequests];  // of all requests, if there are no more
  bool are_long;                     // some, more than kShort; false before
};

// Requests are `offset` tokens longer than `rows` says.
template <bool kRagged>
class ItemLengths {
 public:
  // Called by all threads of the block.
  __device__ ItemLengths(ItemLengthsMemory& memory, SumsMemory& sums, const Rows& rows,
                         bool are_rows, int32_t offset)
      : memory_(memory),
        rows_(rows),
        offset_(offset),
        is_kept_(rows.requests <= ItemLengthsMemory::kRequests),
        owners_(sums, rows, are_rows) {
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < (is_kept_ ? rows.requests : 0); i += kThreads) {
      const int32_t cache_seqlen = rows.cache_seqlen(i, offset);
      memory.cache_seqlens[i] = cache_seqlen;
      if (cache_seqlen > kShort) memory.are_long = true;
    }
    __syncthreads();
  }

  static constexpr int32_t kShort = 1 << 20;

  // Whether so many numbers add up to one of 32 bits; `most` is the greatest of an item that is no
  // longer than kShort.
  __device__ bool HaveShortSum(int64_t numbers, int64_t most) const {
    return is_kept_ && !memory_.are_long && numbers * most <= kInt32Max;
  }

  __device__ __attribute__((noinline)) int32_t operator()(int32_t item) const {
    return Of(owners_[item]);
  }

  // Calls `body` with neighbouring items and their lengths until it returns false.
  template <typename Body>
  __device__ void ForEach(int32_t first, int32_t end, Body body) const {
    if (first >= end) return;
    Item at = owners_[first];
#pragma unroll 1
    for (int32_t item = first; item < end && body(item, Of(at)); ++item) at = owners_.Next(at);
  }

 private:
  __device__ int32_t Of(Item item) const {
    if (owners_.IsPadding(item)) return 0;
    const int32_t cache_seqlen = is_kept_ ? memory_.cache_seqlens[item.request]
                                          : rows_.cache_seqlen(item.request, offset_);
    return owners_.length(item, cache_seqlen);
  }

  const ItemLengthsMemory& memory_;
  const Rows& rows_;
  int32_t offset_;
  bool is_kept_;
  ItemOwners<kRagged> owners_;
};

// What `of` makes of the KV length of each item.
template <typename Lengths, typename Of>
struct ItemValues {
  const Lengths& lengths;
  Of of;

  template <typename Body>
  __device__ void ForEach(int32_t first, int32_t end, Body body) const {
    lengths.ForEach(first, end, [&](int32_t item, int32_t kv_len) { return body(item, of(kv_len)); });
  }
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_ITEM_LENGTHS_CUH_
