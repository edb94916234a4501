// The KV lengths of a schedule's items, which are rows or requests.
#ifndef JAXNSA_CUDA_ITEM_LENGTHS_CUH_
#define JAXNSA_CUDA_ITEM_LENGTHS_CUH_

#include <cstdint>

#include "parameters.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

struct RowsOfRequest {
  const Rows* rows;

  __device__ int64_t operator()(int32_t i) const { return rows->q(i); }

  __device__ void Load(int32_t first, int32_t end, int64_t (&values)[kItems]) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) values[k] = first + k < end ? rows->q(first + k) : 0;
  }
};

// The request of each row, and which of its rows that is.
template <bool kRagged>
class RowOwners {
 public:
  __device__ RowOwners(SumsMemory& memory, const Rows& rows)
      : first_rows_(memory, rows.requests, {&rows}) {}

  // Of neighbouring rows.
  template <int kCount>
  __device__ void Find(int32_t first, int32_t (&request)[kCount], int32_t (&j)[kCount]) const {
    int64_t rows[kCount];
    Found found[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) rows[k] = int64_t{first} + k;
    first_rows_.Find(rows, found);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      request[k] = found[k].index;
      j[k] = static_cast<int32_t>(rows[k] - found[k].sum);
    }
  }

 private:
  SharedSums<RowsOfRequest> first_rows_;
};

template <>
class RowOwners<false> {
 public:
  __device__ RowOwners(SumsMemory&, const Rows& rows) : q_(rows.rows_per_request) {}

  template <int kCount>
  __device__ void Find(int32_t first, int32_t (&request)[kCount], int32_t (&j)[kCount]) const {
    request[0] = first / q_;
    j[0] = first % q_;
#pragma unroll
    for (int k = 1; k < kCount; ++k) {
      const bool next = j[k - 1] + 1 == q_;
      request[k] = request[k - 1] + next;
      j[k] = next ? 0 : j[k - 1] + 1;
    }
  }

 private:
  int32_t q_;
};

// Requests are `offset` tokens longer than `rows` says. Schedules ask for lengths in many places:
// nothing is inlined.
template <bool kRagged>
class ItemLengths {
 public:
  __device__ ItemLengths(SumsMemory& memory, const Rows& rows, bool are_rows, int32_t offset)
      : rows_(rows), are_rows_(are_rows), offset_(offset), owners_(memory, rows) {}

  __device__ __attribute__((noinline)) int32_t operator()(int32_t item) const {
    int32_t request[1], j[1];
    Locate(item, request, j);
    return Length(request[0], j[0]);
  }

  // Of neighbouring items; 0 from `end` on.
  __device__ __attribute__((noinline)) void Load(int32_t first, int32_t end,
                                                 int32_t (&lengths)[kItems]) const {
    int32_t request[kItems], j[kItems];
    Locate(first, request, j);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      lengths[k] = first + k < end ? Length(request[k], j[k]) : 0;
    }
  }

 private:
  template <int kCount>
  __device__ void Locate(int32_t first, int32_t (&request)[kCount], int32_t (&j)[kCount]) const {
    if (are_rows_) {
      owners_.Find(first, request, j);
      return;
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      request[k] = first + k;
      j[k] = 0;
    }
  }

  // Past the last request's rows are padding rows.
  __device__ int32_t Length(int32_t request, int32_t j) const {
    if (request >= rows_.requests) return 0;
    const int32_t cache_seqlen = rows_.cache_seqlen(request, offset_);
    return are_rows_ ? Rows::kv_len(cache_seqlen, rows_.q(request), j) : cache_seqlen;
  }

  const Rows& rows_;
  bool are_rows_;
  int32_t offset_;
  RowOwners<kRagged> owners_;
};

// What `of` makes of the KV length of each item.
template <typename Lengths, typename Of>
struct ItemValues {
  const Lengths& lengths;
  Of of;

  __device__ int64_t operator()(int32_t item) const { return of(lengths(item)); }

  __device__ void Load(int32_t first, int32_t end, int64_t (&values)[kItems]) const {
    int32_t loaded[kItems];
    lengths.Load(first, end, loaded);
#pragma unroll
    for (int k = 0; k < kItems; ++k) values[k] = first + k < end ? of(loaded[k]) : 0;
  }
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_ITEM_LENGTHS_CUH_
