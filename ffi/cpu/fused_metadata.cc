// The whole computation on the CPU: request by request, each tile of a table stored everywhere it
// goes while it is in the first-level cache.
#include <algorithm>
#include <cstring>
#include <vector>

#include "computations.h"
#include "write_schedules.h"

namespace jaxnsa {
namespace {

// Columns of a tile.
constexpr int64_t kTileColumns = 4096;

// What a row of a table gets: columns below `live` from the pool, then 0 below `end`.
struct RowContent {
  int64_t live;
  int64_t end;
};

// One table of every backend.
class Table {
 public:
  Table(const FusedMetadataArguments& args, Field field)
      : layout_(args.tables[field]), columns_(args.columns(field)), tail_(args.tail) {
    arrays_.reserve(args.num_backends);
    contents_.reserve(args.num_backends);
    for (int b = 0; b < args.num_backends; ++b) {
      Backend backend = args.backends[b];
      arrays_.push_back(ArrayOf(backend, field));
    }
  }

  // Writes `count` rows from `first_row` on, of which row j of backend b sees kv_len(b, j) tokens
  // of a pool row, but for the columns of the first `written` tokens.
  template <typename KvLen>
  void Write(const int32_t* pool_row, int64_t first_row, int64_t count, int32_t written,
             KvLen kv_len) {
    const int64_t first = LiveColumns(layout_.tokens_per_column, written);
    RowContent longest{0, 0};
    contents_.clear();
    for (int64_t j = 0; j < count; ++j) {
      for (int b = 0; b < backends(); ++b) {
        const RowContent content = ContentOf(kv_len(b, j));
        longest = {std::max(longest.live, content.live), std::max(longest.end, content.end)};
        contents_.push_back(content);
      }
    }
    const int32_t* const source = Columns(pool_row, first, longest.live);
    for (int64_t begin = first; begin < longest.end; begin += kTileColumns) {
      const int64_t end = std::min(begin + kTileColumns, longest.end);
      for (int64_t j = 0; j < count; ++j) {
        for (int b = 0; b < backends(); ++b) {
          int32_t* const row = arrays_[b] + (first_row + j) * layout_.stride;
          WriteColumns(row, source, contents_[j * backends() + b], begin, end);
        }
      }
    }
  }

  // Writes 0 to all columns of `count` rows from `first_row` on.
  void Clear(int64_t first_row, int64_t count) {
    for (int32_t* const array : arrays_) {
      for (int64_t row = first_row; row < first_row + count; ++row) {
        std::fill_n(array + row * layout_.stride, columns_, 0);
      }
    }
  }

 private:
  int backends() const { return static_cast<int>(arrays_.size()); }

  RowContent ContentOf(int32_t kv_len) const {
    const int64_t live = std::min(LiveColumns(layout_.tokens_per_column, kv_len), columns_);
    return {tail_ == Tail::kCopy ? columns_ : live, tail_ == Tail::kKeep ? live : columns_};
  }

  // A row of the table, of the pool's row, from column `begin` to before `end`.
  const int32_t* Columns(const int32_t* pool_row, int64_t begin, int64_t end) {
    const int64_t tokens = layout_.tokens_per_column;
    if (tokens == 1) return pool_row;
    if (static_cast<int64_t>(scratch_.size()) < end) scratch_.resize(end);
    for (int64_t c = begin; c < end; ++c) {
      scratch_[c] = FloorDiv(pool_row[c * tokens], layout_.slots_per_page);
    }
    return scratch_.data();
  }

  static void WriteColumns(int32_t* row, const int32_t* source, RowContent content, int64_t begin,
                           int64_t end) {
    const int64_t copied = std::clamp(content.live, begin, end);
    const int64_t written = std::clamp(content.end, copied, end);
    if (copied > begin) {
      std::memcpy(row + begin, source + begin, (copied - begin) * sizeof(int32_t));
    }
    if (written > copied) std::memset(row + copied, 0, (written - copied) * sizeof(int32_t));
  }

  TableLayout layout_;
  int64_t columns_;
  Tail tail_;
  std::vector<int32_t*> arrays_;
  std::vector<RowContent> contents_;
  std::vector<int32_t> scratch_;
};

// The keys of all requests in every backend, if they are wanted, request by request.
class Keys {
 public:
  explicit Keys(const FusedMetadataArguments& args)
      : room_(args.max_total_keys), max_len_(args.max_len) {
    for (int b = 0; b < args.num_backends; ++b) {
      int32_t* const array = args.backends[b].lengths.flat_page_indices;
      if (array != nullptr) ends_.push_back(array);
    }
  }

  // The keys of a request: the slots of its tokens, 0 past the table's last column.
  void Append(const int32_t* pool_row, int32_t cache_seqlen) {
    const int64_t count = std::min<int64_t>(cache_seqlen, room_);
    const int64_t copied = std::min<int64_t>(count, max_len_);
    for (int32_t*& end : ends_) {
      std::fill_n(std::copy_n(pool_row, copied, end), count - copied, 0);
      end += count;
    }
    room_ -= count;
  }

  // The padding keys.
  void Clear() {
    for (int32_t* const end : ends_) std::fill_n(end, room_, 0);
  }

 private:
  std::vector<int32_t*> ends_;
  int64_t room_;
  int64_t max_len_;
};

std::vector<Table> TablesOf(const FusedMetadataArguments& args) {
  std::vector<Table> tables;
  Backend first = args.backends[0];
  for (int k = 0; k < kFields; ++k) {
    const auto field = static_cast<Field>(k);
    if (kFieldDescriptions[k].extent == Extent::kTable && ArrayOf(first, field) != nullptr) {
      tables.emplace_back(args, field);
    }
  }
  return tables;
}

// Leading tokens that all of request i's table rows hold, `count` of its q; takes down what they
// hold after the step.
int32_t AdvanceTracker(const FusedMetadataArguments& args, int64_t i, int64_t first_row,
                       int64_t count, int32_t q) {
  const BatchTracker& tracker = args.tracker;
  const int64_t id = tracker.request_ids.id(tracker.request_ids.words(i));
  const int32_t seq_len = args.rows.seq_lens[i];
  const int32_t shortest = args.rows.cache_seqlen(i, args.least_offset);
  int32_t held = std::max(seq_len, 0);
  for (int64_t j = 0; j < count; ++j) {
    HeldRow& row = tracker.rows[first_row + j];
    const int32_t tokens = BatchTracker::TokensAfter(
        Rows::kv_len(shortest, q, static_cast<int32_t>(j)), seq_len, args.max_len);
    held = std::min(held, row.last().of(id));
    row.steps[!row.last_is_second()] = {id, tokens, row.last().step + 1};
  }
  return held;
}

}  // namespace

void FusedMetadata(Stream, const FusedMetadataArguments& args) {
  const Rows& rows = args.rows;
  const RowRules rules = args.row_rules();
  std::vector<Table> tables = TablesOf(args);
  // By backend.
  std::vector<int32_t> cache_seqlens(args.num_backends), cache_sums(args.num_backends),
      nsa_sums(args.num_backends);
  int64_t row = 0;
  std::vector<StepLengths> lengths(args.schedules.any() ? args.num_backends : 0);
  Keys keys(args);
  const auto store_row = [&](int b, int64_t row, const RowValues& values) {
    if (!lengths.empty()) lengths[b].rows.push_back(values.seqlens_expanded);
    nsa_sums[b] = Add(nsa_sums[b], values.nsa_cache_seqlens);
    Store(args.backends[b].lengths, row, values);
    Store(args.backends[b].lengths, row + 1, RowSums(nsa_sums[b]));
  };
  for (int b = 0; b < args.num_backends; ++b) {
    Store(args.backends[b].lengths, 0, RequestSums(0));
    Store(args.backends[b].lengths, 0, RowSums(0));
  }
  for (int64_t i = 0; i < rows.requests; ++i) {
    const int32_t q = rows.q(i);
    const int64_t count = std::min<int64_t>(q, rows.count - row);
    const auto kv_len = [&](int b, int64_t j) {
      return Rows::kv_len(cache_seqlens[b], q, static_cast<int32_t>(j));
    };
    for (int b = 0; b < args.num_backends; ++b) {
      const Lengths& to = args.backends[b].lengths;
      cache_seqlens[b] = rows.cache_seqlen(i, args.backend_offsets[b]);
      if (!lengths.empty()) lengths[b].requests.push_back(cache_seqlens[b]);
      const RowOwner owner{static_cast<int32_t>(i), cache_seqlens[b], cache_sums[b]};
      cache_sums[b] = Add(cache_sums[b], cache_seqlens[b]);
      Store(to, i, RequestValues(cache_seqlens[b]));
      Store(to, i + 1, RequestSums(cache_sums[b]));
      for (int64_t j = 0; j < count; ++j) {
        store_row(b, row + j, RowValuesOf(kv_len(b, j), owner, rules));
      }
    }
    const auto table_kv_len = [&](int b, int64_t j) {
      return rows.prefill || args.requests_are_items ? cache_seqlens[b] : kv_len(b, j);
    };
    const int32_t* const pool_row = args.pool.row(args.req_pool_indices[i]);
    const int64_t table_row = rows.prefill ? i : row, table_rows = rows.prefill ? 1 : count;
    int32_t written = args.written_lens.data != nullptr ? args.written_lens[i] : 0;
    if (args.tracker.request_ids.data != nullptr) {
      written = AdvanceTracker(args, i, table_row, table_rows, rows.prefill ? 1 : q);
    }
    for (Table& table : tables) {
      table.Write(pool_row, table_row, table_rows, written, table_kv_len);
    }
    keys.Append(pool_row, cache_seqlens[0]);
    row += count;
  }
  for (int b = 0; b < args.num_backends; ++b) {
    for (int64_t padding = row; padding < rows.count; ++padding) {
      store_row(b, padding, PaddingRowValues());
    }
  }
  if (args.tracker.advances) {
    const int64_t known = args.tracker.request_ids.data == nullptr ? 0
                          : rows.prefill                           ? rows.requests
                                                                   : row;
    for (int64_t r = known; r < args.tracker.count; ++r) args.tracker.Forget(r);
  }
  for (size_t b = 0; b < lengths.size(); ++b) {
    WriteSchedules(args, lengths[b], args.backends[b].schedules);
  }
  if (args.tail == Tail::kKeep) return;
  keys.Clear();
  if (rows.prefill) return;
  for (Table& table : tables) table.Clear(row, rows.count - row);
}

void LoadFusedMetadata() {}

bool IsCurrentDevice(int) { return true; }

bool IsCapturing(Stream) { return false; }

}  // namespace jaxnsa
