// What a platform computes: the arguments of each computation and its function. cpu/ and cuda/ each
// define all of these functions; the build chooses which of them a library consists of.
//
// Functions that take a stream queue their work on it, and on a CPU are done when they return. They
// throw std::runtime_error where a kernel cannot be launched or loaded. They check no arguments.
#ifndef JAXNSA_COMPUTATIONS_H_
#define JAXNSA_COMPUTATIONS_H_

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "batch_tracker.h"
#include "fields.h"
#include "integers.h"
#include "rows.h"
#include "schedules.h"

namespace jaxnsa {

// A cudaStream_t; on a CPU it says nothing.
using Stream = void*;

// Backends that fit the parameters of one launch.
constexpr int kMaxBackends = 64;

// The widest page table, in tokens: kernels count the columns of a row in 32 bits.
constexpr int64_t kMaxLen = int64_t{1} << 30;

// What a table holds past a row's live columns: the pool's content, 0, or what was there.
enum class Tail : int32_t { kCopy, kZero, kKeep };
constexpr std::string_view kTailNames[] = {"copy", "zero", "keep"};

// KV slots of each request's tokens, a row for each request.
struct Pool {
  int32_t last_row;
  int64_t stride;  // elements from row to row
  const int32_t* req_to_token;

  static Pool Of(const int32_t* req_to_token, int64_t rows, int64_t stride) {
    return {static_cast<int32_t>(rows <= kInt32Max ? rows - 1 : kInt32Max), stride, req_to_token};
  }

  // The row of an index, which is clamped into the pool.
  JAXNSA_HOST_DEVICE const int32_t* row(int32_t index) const {
    return req_to_token + Min(Max(index, 0), last_row) * stride;
  }
};

// How a table lies in memory and what its columns stand for.
struct TableLayout {
  int64_t stride;  // elements from row to row
  int32_t tokens_per_column;
  int32_t slots_per_page;  // of the pages whose numbers it holds
};

struct FusedMetadataArguments {
  Rows rows;
  Vector req_pool_indices;
  Pool pool;
  int32_t nsa_index_topk;
  int32_t index_kpool;
  Schedules schedules;
  // FlashMLA's arrays one behind the other, where its schedule is constant and they are known;
  // null: they are computed.
  const int32_t* flash_mla;
  bool is_fresh;  // whether arrays hold nothing yet: what follows a top-k plan gets 0
  int32_t max_len;
  int32_t max_total_keys;  // of flat_page_indices
  Tail tail;
  // Leading tokens of each request that the tables of its rows hold, whose columns are left alone;
  // data is null: none, and where the tail is not kept.
  Vector written_lens;
  // The same for the rows of requests that are known by their ids; not with written_lens.
  BatchTracker tracker;
  // By which a row's live tokens exceed those, for the size of a launch: more take longer.
  int32_t max_new_tokens;
  // Whether consumers read a request's rows as one: all have the live columns, and the length as
  // context, of the last.
  bool requests_are_items;
  TableLayout tables[kFields];  // by Field, of those that are tables and wanted
  int32_t num_backends;
  Backend backends[kMaxBackends];         // all want the same arrays
  int32_t backend_offsets[kMaxBackends];  // tokens by which each one's seq_lens are longer
  // The least of those of all backends that are filled from the same tracker, by one launch or
  // several.
  int32_t least_offset;

  // Whether columns may be left alone because they are written.
  bool may_hold_columns() const {
    return written_lens.data != nullptr || tracker.request_ids.data != nullptr;
  }

  // Takes those of all backends.
  template <typename Int>
  void TakeOffsets(const Int* offsets) {
    std::copy_n(offsets, num_backends, backend_offsets);
    least_offset = *std::min_element(backend_offsets, backend_offsets + num_backends);
  }

  RowRules row_rules() const {
    const bool items_have_rows =
        schedules.paged_mqa.num_sms > 0 && schedules.paged_mqa.next_n(rows) > 1;
    return {nsa_index_topk, index_kpool, requests_are_items || items_have_rows};
  }

  int64_t columns(Field table) const { return CeilDiv(max_len, tables[table].tokens_per_column); }
};

// One array of a copy, contiguous in the source.
struct CopiedArray {
  const int32_t* source;
  int64_t rows;
  int64_t columns;
  int64_t destination_stride;  // elements from row to row
  int64_t tokens_per_column;   // of a table that is copied as far as it is live; otherwise 0
};

struct CopyArguments {
  int32_t num_arrays;
  CopiedArray arrays[kFields];
  const int32_t* kv_lens;  // [rows] of the tables that are copied as far as they are live
  int32_t num_backends;
  int32_t* destinations[kMaxBackends][kFields];
};

// The lengths of a draft-extend step, whose rows are ragged.
struct FillDraftExtendMetadataArguments {
  Rows rows;
  int32_t nsa_index_topk;
  Lengths lengths;        // the arrays of [rows]; the others are null
  int32_t* total_tokens;  // [1]
  int32_t* offsets;       // [requests + 1] of scratch, for the variants that launch twice
  bool clears_padding;    // whether padding rows get 0
};

enum class PrefixSumVariant : int32_t { kBlockScan, kSequential, kBlelloch };
constexpr std::string_view kPrefixSumVariantNames[] = {"block_scan", "sequential", "blelloch"};

enum class DraftExtendVariant : int32_t { kOptimized, kAdaptive, kBasic };
constexpr std::string_view kDraftExtendVariantNames[] = {"optimized", "adaptive", "basic"};

// The value of an enum by its name; std::invalid_argument where there is none.
template <typename Enum, size_t kCount>
Enum FromName(const char* argument, std::string_view name,
              const std::string_view (&names)[kCount]) {
  std::string known;
  for (size_t k = 0; k < kCount; ++k) {
    if (name == names[k]) return static_cast<Enum>(k);
    known += (k > 0 ? ", " : "") + std::string(names[k]);
  }
  throw std::invalid_argument(std::string(argument) + ": got " + std::string(name) +
                              ", expected one of " + known);
}

void PrefixSum(Stream stream, PrefixSumVariant variant, const int32_t* x, int64_t n, int32_t* out);
void FillDraftExtendMetadata(Stream stream, DraftExtendVariant variant,
                             const FillDraftExtendMetadataArguments& args);
void FusedMetadata(Stream stream, const FusedMetadataArguments& args);
void Copy(Stream stream, const CopyArguments& args);

// Load kernels on the current device, which the first launch of each would do otherwise.
void LoadFillDraftExtendMetadata();
void LoadFusedMetadata();
void LoadCopy();

// Whether a device is the one that launches go to.
bool IsCurrentDevice(int device);

// Whether what is launched on a stream becomes part of a graph.
bool IsCapturing(Stream stream);

}  // namespace jaxnsa

#endif  // JAXNSA_COMPUTATIONS_H_
