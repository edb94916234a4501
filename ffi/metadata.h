// What a computation reads and writes, and how table rows map to requests: shared by the CPU and the
// CUDA code, and by everybody who calls either. Plain data, so that it can be a kernel parameter.
#ifndef JAXNSA_METADATA_H_
#define JAXNSA_METADATA_H_

#include <cstdint>

#ifdef __CUDACC__
#define JAXNSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAXNSA_HOST_DEVICE inline
#endif

namespace jaxnsa {

// Destinations that fit the parameters of one launch.
constexpr int kMaxBackends = 64;

constexpr int32_t kInt32Max = 0x7fffffff;

// The widest page table, in tokens: kernels count the columns of a row in 32 bits.
constexpr int64_t kMaxLen = int64_t{1} << 30;

// What a table holds past a row's live columns: the pool's content, 0, or what was there.
enum class Tail : int32_t { kCopy, kZero, kKeep };

// int32 or int64 values, low word first; what exceeds int32 is taken as its end.
struct Vector {
  const void* data;
  int32_t itemsize;  // bytes

  JAXNSA_HOST_DEVICE int32_t operator[](int64_t i) const {
    const auto* const words =
        reinterpret_cast<const int32_t*>(static_cast<const char*>(data) + i * itemsize);
    const int32_t low = words[0];
    if (itemsize == 4) return low;
    const int32_t high = words[1];
    return high == low >> 31 ? low : high >> 31 ^ kInt32Max;
  }
};

// int32 arithmetic that wraps.
JAXNSA_HOST_DEVICE int32_t Add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

JAXNSA_HOST_DEVICE int32_t Min(int32_t a, int32_t b) { return a < b ? a : b; }
JAXNSA_HOST_DEVICE int32_t Max(int32_t a, int32_t b) { return a > b ? a : b; }

JAXNSA_HOST_DEVICE int32_t FloorDiv(int32_t x, int32_t divisor) {
  const int32_t quotient = x / divisor;
  return quotient - (x % divisor < 0);
}

// How rows map to requests: request i owns q(i) consecutive rows, its KV length is cache_seqlen(i),
// and its row j sees kv_len(i, j) tokens. The three forward modes are three values of this.
struct Rows {
  int32_t requests;
  int32_t count;               // rows; where they are ragged, the capacity
  int32_t tokens_per_request;  // rows of each request; 0: as many as extend_seq_lens says
  int32_t added_tokens;        // tokens that the step appends to each request
  int32_t nsa_index_topk;
  Vector seq_lens;
  Vector extend_seq_lens;

  JAXNSA_HOST_DEVICE bool ragged() const { return tokens_per_request == 0; }

  JAXNSA_HOST_DEVICE int32_t q(int64_t i) const {
    return ragged() ? Max(extend_seq_lens[i], 0) : tokens_per_request;
  }

  JAXNSA_HOST_DEVICE int32_t cache_seqlen(int64_t i) const {
    return cache_seqlen_of(seq_lens[i], added_tokens);
  }

  static JAXNSA_HOST_DEVICE int32_t cache_seqlen_of(int32_t seq_len, int32_t added_tokens) {
    return Add(Max(seq_len, 0), added_tokens);
  }

  // A wrapped cache_seqlen wraps back here.
  static JAXNSA_HOST_DEVICE int32_t kv_len(int32_t cache_seqlen, int32_t q, int32_t j) {
    return Max(Add(Add(cache_seqlen, -q), j + 1), 0);
  }

  JAXNSA_HOST_DEVICE int32_t nsa_len(int32_t kv_len) const { return Min(kv_len, nsa_index_topk); }
};

// The arrays of one backend; the tables may be null.
struct Destination {
  int32_t* cache_seqlens;     // [requests]
  int32_t* cu_seqlens_k;      // [requests + 1]
  int32_t* seqlens_expanded;  // [rows]
  int32_t* nsa_cache_seqlens; // [rows]
  int32_t* nsa_cu_seqlens_k;  // [rows + 1]
  int32_t* page_indices;      // [rows, max_len]
  int32_t* real_page_table;   // [rows, pages]
};

// KV slots of each request's tokens, a row for each request.
struct Pool {
  const int32_t* req_to_token;
  int64_t stride;  // elements from row to row
  int32_t last_row;

  // The row that an index names, which is clamped into the pool.
  JAXNSA_HOST_DEVICE const int32_t* row(int32_t index) const {
    return req_to_token + Min(Max(index, 0), last_row) * stride;
  }
};

// The whole job. Strides are in elements.
struct Fused {
  Rows rows;
  Vector req_pool_indices;
  const int32_t* req_to_token;
  int64_t pool_rows;
  int64_t pool_stride;
  int64_t page_indices_stride;
  int64_t real_page_table_stride;
  int32_t max_len;
  int32_t real_page_size;
  Tail tail;
  int32_t num_backends;
  Destination backends[kMaxBackends];

  JAXNSA_HOST_DEVICE int32_t pages() const { return (max_len - 1) / real_page_size + 1; }

  Pool pool() const {
    const int64_t last = pool_rows > kInt32Max ? kInt32Max : pool_rows - 1;
    return {req_to_token, pool_stride, static_cast<int32_t>(last)};
  }
};

// One array of a copy: rows of `columns` elements, to every destination.
struct CopiedArray {
  const int32_t* source;
  int64_t rows;
  int64_t columns;
  int64_t destination_stride;  // elements from row to row
  int64_t tokens;  // that a column stands for, where only live columns are copied; otherwise 0
};

constexpr int kCopiedArrays = 7;

struct Copy {
  CopiedArray arrays[kCopiedArrays];
  const int32_t* kv_lens;  // [rows] of the arrays that are copied as far as they are live
  int32_t num_backends;
  int32_t* destinations[kMaxBackends][kCopiedArrays];

  JAXNSA_HOST_DEVICE int64_t live(const CopiedArray& array, int64_t row) const {
    if (array.tokens == 0) return array.columns;
    const int64_t live = (static_cast<int64_t>(Max(kv_lens[row], 0)) + array.tokens - 1) / array.tokens;
    return live < array.columns ? live : array.columns;
  }
};

// The lengths of a draft-extend step; tokens_per_request of `rows` is 0.
struct DraftExtend {
  Rows rows;
  int32_t* seqlens_expanded;   // [rows]
  int32_t* nsa_cache_seqlens;  // [rows]
  int32_t* total_tokens;       // [1]
  int32_t* offsets;            // [requests + 1] of scratch, for the variants that launch twice
  Tail tail;                   // what rows past the total get: 0, or with kKeep nothing
};

enum class PrefixSumVariant : int32_t { kBlockScan, kSequential, kBlelloch };
enum class DraftExtendVariant : int32_t { kOptimized, kAdaptive, kBasic };

}  // namespace jaxnsa

#endif  // JAXNSA_METADATA_H_
