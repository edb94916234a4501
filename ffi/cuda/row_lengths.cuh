// The tokens that each row sees, for blocks that look at all rows.
#ifndef JAXNSA_CUDA_ROW_LENGTHS_CUH_
#define JAXNSA_CUDA_ROW_LENGTHS_CUH_

#include <cstdint>

#include "parameters.cuh"
#include "shared_sums.cuh"

namespace jaxnsa {

struct RowsOfRequest {
  const Rows* rows;
  __device__ int64_t operator()(int32_t i) const { return rows->q(i); }
};

// Of ragged rows, which are looked up; otherwise of rows that are counted. Requests are `offset` tokens
// longer than `rows` says.
template <bool kRagged>
class RowLengths {
 public:
  __device__ RowLengths(SumsMemory& memory, const Rows& rows, int32_t offset)
      : rows_(rows), offset_(offset), first_rows_(memory, rows.requests, {&rows}) {}

  __device__ int32_t operator()(int32_t row) const {
    Found found[1];
    first_rows_.Find({int64_t{row}}, found);
    const int32_t i = found[0].index;
    if (i >= rows_.requests) return 0;
    const auto j = static_cast<int32_t>(row - found[0].sum);
    return Rows::kv_len(rows_.cache_seqlen(i, offset_), rows_.q(i), j);
  }

 private:
  const Rows& rows_;
  int32_t offset_;
  SharedSums<RowsOfRequest> first_rows_;
};

template <>
class RowLengths<false> {
 public:
  __device__ RowLengths(SumsMemory&, const Rows& rows, int32_t offset)
      : rows_(rows), offset_(offset) {}

  __device__ int32_t operator()(int32_t row) const {
    const uint32_t q = rows_.rows_per_request, i = static_cast<uint32_t>(row) / q;
    const auto j = static_cast<int32_t>(row - i * q);
    return Rows::kv_len(rows_.cache_seqlen(i, offset_), rows_.rows_per_request, j);
  }

 private:
  const Rows& rows_;
  int32_t offset_;
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_ROW_LENGTHS_CUH_
