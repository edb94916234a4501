// The KV lengths of a schedule's items, which are rows or requests.
#ifndef JAXNSA_CUDA_ITEM_LENGTHS_CUH_
#define JAXNSA_CUDA_ITEM_LENGTHS_CUH_

#include <cstdint>

#include "parameters.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

// Requests are `offset` tokens longer than `rows` says.
template <bool kRagged>
class ItemLengths {
 public:
  __device__ ItemLengths(const Rows& rows, bool are_rows, int32_t offset)
      : rows_(rows), offset_(offset), q_(are_rows ? rows.rows_per_request : 1) {}

  // A request is the last of its rows.
  __device__ int32_t operator()(int32_t item) const {
    const int32_t request = q_ == 1 ? item : RareQuotient(item, q_);
    return Rows::kv_len(rows_.cache_seqlen(request, offset_), q_, item - request * q_);
  }

 private:
  const Rows& rows_;
  int32_t offset_;
  int32_t q_;
};

struct RowsOfRequest {
  const Rows& rows;

  __device__ int64_t operator()(int32_t i) const { return rows.q(i); }
};

// Rows past the last request's are padding rows.
template <>
class ItemLengths<true> {
 public:
  // Called by all threads of the block.
  __device__ ItemLengths(const Rows& rows, bool are_rows, int32_t offset)
      : rows_(rows),
        offset_(offset),
        are_rows_(are_rows),
        first_rows_(Memory(), are_rows ? rows.requests : 0, {rows}) {}

  __device__ int32_t operator()(int32_t item) const {
    if (!are_rows_) return rows_.cache_seqlen(item, offset_);
    const Found found = first_rows_.Find(item);
    const int32_t request = found.index;
    if (request >= rows_.requests) return 0;
    return Rows::kv_len(rows_.cache_seqlen(request, offset_), rows_.q(request),
                        static_cast<int32_t>(item - found.sum));
  }

 private:
  // One for all threads of the block.
  static __device__ SumsMemory& Memory() {
    __shared__ SumsMemory memory;
    return memory;
  }

  const Rows& rows_;
  int32_t offset_;
  bool are_rows_;
  SharedSums<RowsOfRequest> first_rows_;
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_ITEM_LENGTHS_CUH_
