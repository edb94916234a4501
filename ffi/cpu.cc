#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace jaxnsa {
namespace {

// Tokens that are copied to every destination while they are in the first-level cache.
constexpr int64_t kChunk = 4096;

// One row of a table: the first `live` columns come from the source, and the rest up to `end` is 0.
struct Extent {
  int64_t live;
  int64_t end;
};

Extent ExtentOf(Tail tail, int64_t live, int64_t columns) {
  live = std::min(live, columns);
  switch (tail) {
    case Tail::kCopy:
      return {columns, columns};
    case Tail::kZero:
      return {live, columns};
    case Tail::kKeep:
      break;
  }
  return {live, live};
}

// Writes columns [begin, end) of a row.
void WriteColumns(int32_t* row, const int32_t* source, Extent extent, int64_t begin, int64_t end) {
  const int64_t copied = std::clamp(extent.live, begin, end);
  const int64_t written = std::clamp(extent.end, copied, end);
  if (copied > begin) {
    std::memcpy(row + begin, source + begin, (copied - begin) * sizeof(int32_t));
  }
  if (written > copied) {
    std::memset(row + copied, 0, (written - copied) * sizeof(int32_t));
  }
}

// The rows of one request in one table of every destination.
void WriteRows(const Fused& args, int32_t* Destination::* table, int64_t stride,
               const int32_t* source, int64_t first_row, const std::vector<Extent>& extents) {
  int64_t end = 0;
  for (const Extent& extent : extents) end = std::max(end, extent.end);
  for (int64_t begin = 0; begin < end; begin += kChunk) {
    for (size_t j = 0; j < extents.size(); ++j) {
      for (int b = 0; b < args.num_backends; ++b) {
        WriteColumns(args.backends[b].*table + (first_row + j) * stride, source, extents[j], begin,
                     std::min(begin + kChunk, end));
      }
    }
  }
}

template <typename Value>
void ForEachBackend(const Fused& args, int32_t* Destination::* array, int64_t index, Value value) {
  for (int b = 0; b < args.num_backends; ++b) (args.backends[b].*array)[index] = value;
}

// The tables of `count` consecutive rows that see kv_len(j) tokens of the pool row `source`.
template <typename KvLen>
void WriteTables(const Fused& args, const int32_t* source, int64_t first_row, int64_t count,
                 KvLen kv_len, Tail tail,
                 std::vector<int32_t>& pages) {
  std::vector<Extent> extents(count);
  if (args.backends[0].page_indices != nullptr) {
    for (int64_t j = 0; j < count; ++j) extents[j] = ExtentOf(tail, kv_len(j), args.max_len);
    WriteRows(args, &Destination::page_indices, args.page_indices_stride, source, first_row,
              extents);
  }
  if (args.backends[0].real_page_table != nullptr) {
    const int64_t page = args.real_page_size;
    int64_t live = 0;
    for (int64_t j = 0; j < count; ++j) {
      extents[j] = ExtentOf(tail, (kv_len(j) + page - 1) / page, args.pages());
      live = std::max(live, extents[j].live);
    }
    for (int64_t p = 0; p < live; ++p) pages[p] = FloorDiv(source[p * page], args.real_page_size);
    WriteRows(args, &Destination::real_page_table, args.real_page_table_stride, pages.data(),
              first_row, extents);
  }
}

}  // namespace

std::string Cpu::PrefixSum(Stream, PrefixSumVariant, const int32_t* x, int64_t n, int32_t* out) {
  int32_t sum = 0;
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum = Add(sum, x[i]);
    out[i + 1] = sum;
  }
  return "";
}

std::string Cpu::FillDraftExtend(Stream, DraftExtendVariant, const DraftExtend& args) {
  const Rows& rows = args.rows;
  int64_t row = 0;
  int32_t total = 0;
  for (int64_t i = 0; i < rows.requests; ++i) {
    const int32_t cache = rows.cache_seqlen(i), q = rows.q(i);
    total = Add(total, q);
    for (int32_t j = 0; j < q && row < rows.count; ++j, ++row) {
      const int32_t kv_len = Rows::kv_len(cache, q, j);
      args.seqlens_expanded[row] = kv_len;
      args.nsa_cache_seqlens[row] = rows.nsa_len(kv_len);
    }
  }
  *args.total_tokens = total;
  if (args.tail == Tail::kKeep) return "";
  std::fill(args.seqlens_expanded + row, args.seqlens_expanded + rows.count, 0);
  std::fill(args.nsa_cache_seqlens + row, args.nsa_cache_seqlens + rows.count, 0);
  return "";
}

std::string Cpu::CopyMetadata(Stream, const Copy& args) {
  for (int a = 0; a < kCopiedArrays; ++a) {
    const CopiedArray& array = args.arrays[a];
    for (int64_t row = 0; row < array.rows; ++row) {
      const int64_t size = args.live(array, row) * sizeof(int32_t);
      if (size == 0) continue;
      for (int b = 0; b < args.num_backends; ++b) {
        std::memcpy(args.destinations[b][a] + row * array.destination_stride,
                    array.source + row * array.columns, size);
      }
    }
  }
  return "";
}

std::string Cpu::FusedMetadata(Stream, const Fused& args) {
  const Rows& rows = args.rows;
  std::vector<int32_t> pages(args.pages());
  int64_t row = 0;
  int32_t cache_sum = 0, nsa_sum = 0;
  ForEachBackend(args, &Destination::cu_seqlens_k, 0, 0);
  ForEachBackend(args, &Destination::nsa_cu_seqlens_k, 0, 0);
  for (int64_t i = 0; i < rows.requests; ++i) {
    const int32_t cache = rows.cache_seqlen(i), q = rows.q(i);
    cache_sum = Add(cache_sum, cache);
    ForEachBackend(args, &Destination::cache_seqlens, i, cache);
    ForEachBackend(args, &Destination::cu_seqlens_k, i + 1, cache_sum);
    const int64_t count = std::min<int64_t>(q, rows.count - row);
    for (int64_t j = 0; j < count; ++j) {
      const int32_t kv_len = Rows::kv_len(cache, q, static_cast<int32_t>(j));
      nsa_sum = Add(nsa_sum, rows.nsa_len(kv_len));
      ForEachBackend(args, &Destination::seqlens_expanded, row + j, kv_len);
      ForEachBackend(args, &Destination::nsa_cache_seqlens, row + j, rows.nsa_len(kv_len));
      ForEachBackend(args, &Destination::nsa_cu_seqlens_k, row + j + 1, nsa_sum);
    }
    WriteTables(
        args, args.pool().row(args.req_pool_indices[i]), row, count,
        [&](int64_t j) -> int64_t { return Rows::kv_len(cache, q, static_cast<int32_t>(j)); },
        args.tail, pages);
    row += count;
  }
  const int64_t spare = rows.count - row;
  for (int64_t r = row; r < rows.count; ++r) {
    ForEachBackend(args, &Destination::seqlens_expanded, r, 0);
    ForEachBackend(args, &Destination::nsa_cache_seqlens, r, 0);
    ForEachBackend(args, &Destination::nsa_cu_seqlens_k, r + 1, nsa_sum);
  }
  if (spare > 0 && args.tail != Tail::kKeep) {
    const auto nothing = [](int64_t) -> int64_t { return 0; };
    WriteTables(args, nullptr, row, spare, nothing, Tail::kZero, pages);
  }
  return "";
}

}  // namespace jaxnsa
