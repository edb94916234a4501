// How table rows map to requests and what each row sees: jaxnsa/spec.py and jaxnsa/metadata.py in
// C++. Shared by the CPU and the CUDA code; plain data, so that it can be a kernel parameter.
#ifndef JAXNSA_ROWS_H_
#define JAXNSA_ROWS_H_

#include <cstdint>

#include "fields.h"
#include "integers.h"

namespace jaxnsa {

// int32 or int64 values, low word first; int64 values are brought into int32's range.
struct Vector {
  const void* data;
  int32_t itemsize;  // bytes

  // An element as it lies in memory; `high` only where elements are of 8 bytes.
  struct Words {
    int32_t low;
    int32_t high;
  };

  JAXNSA_HOST_DEVICE Words words(int64_t i) const {
    const auto* const words =
        reinterpret_cast<const int32_t*>(static_cast<const char*>(data) + i * itemsize);
    return {words[0], itemsize == 4 ? 0 : words[1]};
  }

  JAXNSA_HOST_DEVICE int32_t value(Words words) const {
    if (itemsize == 4) return words.low;
    return words.high == words.low >> 31 ? words.low : words.high >> 31 ^ kInt32Max;
  }

  JAXNSA_HOST_DEVICE int32_t operator[](int64_t i) const { return value(words(i)); }

  // A value that is no number of tokens, as it is.
  JAXNSA_HOST_DEVICE int64_t id(Words words) const {
    if (itemsize == 4) return words.low;
    return FromWords(words.low, words.high);
  }
};

// Request i owns q(i) consecutive rows, its KV length is cache_seqlen(i), and its row j sees
// kv_len(cache_seqlen(i), q(i), j) tokens. No KV length leaves [0, 2^31 - 1]. The four forward
// modes are four values of this. Rows past the last request's are padding rows.
struct Rows {
  int32_t requests;
  int32_t count;             // rows; where they are ragged, the capacity
  int32_t rows_per_request;  // 0: ragged, as many as extend_seq_lens says
  int32_t added_tokens;      // tokens that the step appends to each request
  bool prefill;              // a request has one table row, whatever rows it has, and keys
  Vector seq_lens;
  Vector extend_seq_lens;

  JAXNSA_HOST_DEVICE bool ragged() const { return rows_per_request == 0; }

  // Whether table rows are: without prefill they are the rows.
  JAXNSA_HOST_DEVICE bool tables_ragged() const { return ragged() && !prefill; }

  JAXNSA_HOST_DEVICE int32_t q(int64_t i) const {
    return ragged() ? q_of(extend_seq_lens[i]) : rows_per_request;
  }

  static JAXNSA_HOST_DEVICE int32_t q_of(int32_t extend_seq_len) { return Max(extend_seq_len, 0); }

  // In a backend that is computed for `offset` tokens more.
  JAXNSA_HOST_DEVICE int32_t cache_seqlen(int64_t i, int32_t offset = 0) const {
    return cache_seqlen_of(seq_lens[i], offset, added_tokens);
  }

  static JAXNSA_HOST_DEVICE int32_t cache_seqlen_of(int32_t seq_len, int32_t offset,
                                                    int32_t added_tokens) {
    return Min(Max(SaturatingAdd(seq_len, offset), 0), kInt32Max - added_tokens) + added_tokens;
  }

  // For 0 <= j < q.
  static JAXNSA_HOST_DEVICE int32_t kv_len(int32_t cache_seqlen, int32_t q, int32_t j) {
    return Max(cache_seqlen - q + (j + 1), 0);
  }
};

// What a row's values depend on beside the tokens that it sees.
struct RowRules {
  int32_t nsa_index_topk;
  int32_t index_kpool;
  bool context_of_request;  // whether paged_mqa_ctx_lens is a row's request's cache_seqlen

  JAXNSA_HOST_DEVICE int32_t pooled(int32_t kv_len) const {
    return index_kpool == 1 ? kv_len : RareQuotient(kv_len, index_kpool);
  }

  JAXNSA_HOST_DEVICE int32_t nsa_cache_seqlen(int32_t kv_len) const {
    const int32_t full = pooled(kv_len) * index_kpool;
    return Min(full, nsa_index_topk) + (kv_len - full);
  }
};

// The request of a row.
struct RowOwner {
  int32_t request;
  int32_t cache_seqlen;
  int32_t first_key;  // where its keys begin among those of all requests
};

// What the arrays of [rows] hold for a row that sees `kv_len` tokens.
JAXNSA_HOST_DEVICE RowValues RowValuesOf(int32_t kv_len, const RowOwner& owner,
                                         const RowRules& rules) {
  return RowValues(kv_len, rules.nsa_cache_seqlen(kv_len), owner.request, owner.first_key,
                   Add(owner.first_key, kv_len), owner.first_key, rules.pooled(kv_len),
                   rules.context_of_request ? owner.cache_seqlen : kv_len);
}

// What they hold for a padding row.
JAXNSA_HOST_DEVICE RowValues PaddingRowValues() { return RowValues(0, 0, 0, 0, 0, 0, 0, 0); }

// Column c of a table stands for the tokens from c * tokens_per_column on. It is live where a row
// sees the first of them.
JAXNSA_HOST_DEVICE bool IsLive(int64_t column, int64_t tokens_per_column, int32_t kv_len) {
  return column * tokens_per_column < kv_len;
}

// How many columns are live in an unlimited table: all from the first one to the last.
JAXNSA_HOST_DEVICE int64_t LiveColumns(int64_t tokens_per_column, int32_t kv_len) {
  return CeilDiv(Max(kv_len, 0), tokens_per_column);
}

}  // namespace jaxnsa

#endif  // JAXNSA_ROWS_H_
