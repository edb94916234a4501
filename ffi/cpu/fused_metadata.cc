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
    for (int b = 0; b < args.num_backends; ++b) {
      Backend backend = args.backends[b];
      arrays_.push_back(ArrayOf(backend, field));
    }
  }

  // Writes `count` rows from `first_row` on, of which row j sees kv_len(j) tokens of a pool row.
  template <typename KvLen>
  void Write(const int32_t* pool_row, int64_t first_row, int64_t count, KvLen kv_len) {
    RowContent longest{0, 0};
    contents_.clear();
    for (int64_t j = 0; j < count; ++j) {
      const RowContent content = ContentOf(kv_len(j));
      longest = {std::max(longest.live, content.live), std::max(longest.end, content.end)};
      contents_.push_back(content);
    }
    const int32_t* const source = Columns(pool_row, longest.live);
    for (int64_t begin = 0; begin < longest.end; begin += kTileColumns) {
      const int64_t end = std::min(begin + kTileColumns, longest.end);
      for (int64_t j = 0; j < count; ++j) {
        for (int32_t* const array : arrays_) {
          int32_t* const row = array + (first_row + j) * layout_.stride;
          WriteColumns(row, source, contents_[j], begin, end);
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
  RowContent ContentOf(int32_t kv_len) const {
    const int64_t live = std::min(LiveColumns(layout_.tokens_per_column, kv_len), columns_);
    return {tail_ == Tail::kCopy ? columns_ : live, tail_ == Tail::kKeep ? live : columns_};
  }

  // The first columns of a row of the table, of the pool's row.
  const int32_t* Columns(const int32_t* pool_row, int64_t count) {
    const int64_t tokens = layout_.tokens_per_column;
    if (tokens == 1) return pool_row;
    if (static_cast<int64_t>(scratch_.size()) < count) scratch_.resize(count);
    for (int64_t c = 0; c < count; ++c) {
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

}  // namespace

void FusedMetadata(Stream, const FusedMetadataArguments& args) {
  const Rows& rows = args.rows;
  const RowRules rules = args.row_rules();
  std::vector<Table> tables = TablesOf(args);
  const auto store = [&](int64_t index, const auto& values) {
    for (int b = 0; b < args.num_backends; ++b) Store(args.backends[b].lengths, index, values);
  };
  int64_t row = 0;
  int32_t cache_sum = 0, nsa_sum = 0;
  StepLengths lengths;
  Keys keys(args);
  const auto store_row = [&](int64_t row, const RowValues& values) {
    lengths.rows.push_back(values.seqlens_expanded);
    nsa_sum = Add(nsa_sum, values.nsa_cache_seqlens);
    store(row, values);
    store(row + 1, RowSums(nsa_sum));
  };
  store(0, RequestSums(0));
  store(0, RowSums(0));
  for (int64_t i = 0; i < rows.requests; ++i) {
    const int32_t cache_seqlen = rows.cache_seqlen(i), q = rows.q(i);
    const auto kv_len = [&](int64_t j) {
      return Rows::kv_len(cache_seqlen, q, static_cast<int32_t>(j));
    };
    lengths.requests.push_back(cache_seqlen);
    const RowOwner owner{static_cast<int32_t>(i), cache_seqlen, cache_sum};
    cache_sum = Add(cache_sum, cache_seqlen);
    store(i, RequestValues(cache_seqlen));
    store(i + 1, RequestSums(cache_sum));
    const int64_t count = std::min<int64_t>(q, rows.count - row);
    for (int64_t j = 0; j < count; ++j) store_row(row + j, RowValuesOf(kv_len(j), owner, rules));
    const auto table_kv_len = [&](int64_t j) {
      return rows.prefill || args.request_columns ? cache_seqlen : kv_len(j);
    };
    const int32_t* const pool_row = args.pool.row(args.req_pool_indices[i]);
    for (Table& table : tables) {
      table.Write(pool_row, rows.prefill ? i : row, rows.prefill ? 1 : count, table_kv_len);
    }
    keys.Append(pool_row, cache_seqlen);
    row += count;
  }
  for (int64_t padding = row; padding < rows.count; ++padding) {
    store_row(padding, PaddingRowValues());
  }
  WriteSchedules(args, lengths);
  if (args.tail == Tail::kKeep) return;
  keys.Clear();
  if (rows.prefill) return;
  for (Table& table : tables) table.Clear(row, rows.count - row);
}

void LoadFusedMetadata() {}

bool IsCurrentDevice(int) { return true; }

}  // namespace jaxnsa
