// How threads of the fused kernel write their share of one request's rows in both page tables.
#ifndef JAXNSA_CUDA_TABLES_CUH_
#define JAXNSA_CUDA_TABLES_CUH_

#include <cstdint>

#include "batch_tracker.cuh"
#include "block_sums.cuh"
#include "parameters.cuh"

namespace jaxnsa {

// A number of rows that stops at INT32_MAX: no array has more.
struct RowCount {
  uint32_t value;

  friend __device__ RowCount operator+(RowCount a, RowCount b) {
    const uint32_t sum = a.value + b.value;
    return {sum < INT32_MAX ? sum : INT32_MAX};
  }
};

// kWidth neighbouring elements, moved by one access.
template <int kWidth>
struct Access;

template <>
struct Access<4> {
  static __device__ void Load(const int32_t* source, int32_t (&value)[4]) {
    const int4 v = __ldg(reinterpret_cast<const int4*>(source));
    value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
  }
  // A launch reads nothing of tables: their lines are the first that the cache can do without.
  static __device__ void Store(int32_t* destination, const int32_t (&value)[4]) {
    __stcs(reinterpret_cast<int4*>(destination), make_int4(value[0], value[1], value[2], value[3]));
  }
};

template <>
struct Access<1> {
  static __device__ void Load(const int32_t* source, int32_t (&value)[1]) {
    value[0] = __ldg(source);
  }
  static __device__ void Store(int32_t* destination, const int32_t (&value)[1]) {
    __stcs(destination, value[0]);
  }
};

// One request's rows in a table.
struct RequestContent {
  int32_t seq_len;
  int32_t added_tokens;
  int32_t q;
  int32_t max_len;
  RowContent least;
  bool requests_are_items;

  __device__ RowContent of_kv_len(int32_t kv_len) const {
    const int32_t live = Max(Min(kv_len, max_len), least.live);
    return {live, Max(live, least.end)};
  }

  // Row j of a backend that is computed for `offset` tokens more.
  __device__ RowContent row(int32_t j, int32_t offset) const {
    const int32_t cache_seqlen = Rows::cache_seqlen_of(seq_len, offset, added_tokens);
    return of_kv_len(requests_are_items ? cache_seqlen : Rows::kv_len(cache_seqlen, q, j));
  }

  // Of its last row, which sees the most tokens.
  __device__ RowContent longest(int32_t offset) const {
    return of_kv_len(Rows::cache_seqlen_of(seq_len, offset, added_tokens));
  }
};

// One row in the tables of all backends, columns from `first` on.
template <typename OfBackend>
struct RowContents {
  int32_t first;
  RowContent shortest;  // of any backend
  RowContent longest;
  OfBackend of_backend;  // called with a backend's index
};

// Stores the number of a page, whose first token is `token`, in a row of `real_page_table`, and in
// `pooled_page_table` where a page of pooled keys begins with it.
template <int kCapacity, bool kSchedules, typename OfBackend>
__device__ __forceinline__ void StorePage(const Parameters<kCapacity, kSchedules>& args,
                                          int64_t row, int32_t page, int64_t token, int32_t number,
                                          const RowContents<OfBackend>& contents) {
  const auto store = [&](const auto& tables, auto table_of, int64_t offset) {
    ForEach(tables, args.num_backends, [&](const auto& to, int b) {
      const RowContent content = contents.of_backend(b);
      if (token >= content.end) return;
      table_of(to)[offset] = token < content.live ? number : 0;
    });
  };
  store(args.tables, [](const PageTables& to) { return to.real_page_table; },
        row * args.real_page_table_stride + page);
  if constexpr (kSchedules) {
    const auto& schedules = args.schedules;
    if (!args.is_pooled) return;
    const Divisor& pages = schedules.pages_per_pooled_page;
    const int32_t pooled = pages.Divide(page);
    if (pooled * pages.value != page) return;
    store(schedules.pooled_page_tables, [](int32_t* to) { return to; },
          row * schedules.pooled_page_table_stride + pooled);
  }
}

// Whether a column is not before another. As unsigned: where `first` is a constant 0, nothing is
// compared, and a column past 2^31 is not before any.
__device__ inline bool IsFrom(int32_t first, int32_t column) {
  return static_cast<uint32_t>(column) >= static_cast<uint32_t>(first);
}

// What a thread moves of a tile: kWidth columns from `column` on.
template <int kWidth>
struct Columns {
  int32_t column;
  int32_t value[kWidth];

  // Loads columns from `first` to before `live`.
  __device__ Columns(const int32_t* source, int32_t column, int32_t first, int32_t live)
      : column(column) {
    if (IsFrom(first, column) && column + kWidth <= live) {
      Access<kWidth>::Load(source + column, value);
      return;
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      value[e] = IsFrom(first, column + e) && column + e < live ? source[column + e] : 0;
    }
  }

  // Stores them in a row of `page_indices`, and the page that begins with them in `real_page_table`
  // if that is wanted. A page begins with an access or in none.
  template <int kCapacity, bool kSchedules, typename OfBackend>
  __device__ void Store(const Parameters<kCapacity, kSchedules>& args, int64_t row,
                        const RowContents<OfBackend>& contents) const {
    const RowContent shortest = contents.shortest, longest = contents.longest;
    const int64_t offset = row * args.page_indices_stride + column;
    const bool equal = column + kWidth <= shortest.live || column >= longest.live;
    if (IsFrom(contents.first, column) && column + kWidth <= shortest.end && equal) {
      int32_t stored[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) stored[e] = column < shortest.live ? value[e] : 0;
      ForEach(args.tables, args.num_backends, [&](const PageTables& to, int) {
        Access<kWidth>::Store(to.page_indices + offset, stored);
      });
    } else if (column < longest.end) {
      ForEach(args.tables, args.num_backends, [&](const PageTables& to, int b) {
        const RowContent content = contents.of_backend(b);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          if (IsFrom(contents.first, column + e) && column + e < content.end) {
            to.page_indices[offset + e] = column + e < content.live ? value[e] : 0;
          }
        }
      });
    }
    const int32_t page = args.page_size.Divide(column);
    if (args.tables[0].real_page_table == nullptr || page * args.page_size.value != column ||
        !IsFrom(contents.first, column) || column >= longest.end) {
      return;
    }
    StorePage(args, row, page, column, args.page_size.Divide(value[0]), contents);
  }
};

// Writes these threads' share of request i's rows in both tables, and of the padding rows: in a
// stride of as many threads of gridDim.x blocks.
template <int kWidth, bool kRagged, Refresh kRefresh, int kCapacity, bool kSchedules>
__device__ void WriteTables(const Parameters<kCapacity, kSchedules>& args, int32_t i) {
  constexpr int kOwnThreads = kRequestThreads<kRefresh, kRagged>;
  constexpr bool kMayHold = kRefresh != Refresh::kWhole, kEqual = kRefresh != Refresh::kAny;
  // Where there are no requests, one that does not exist clears the padding rows.
  const bool exists = !kRagged || i < args.rows.requests;
  const bool is_tracked = kMayHold && exists && args.held == Held::kTracked;
  const bool is_told = kMayHold && exists && args.held == Held::kWrittenLens;
  // All loads are issued before a value is used, but what ragged rows hold: first they are found.
  const Vector& extend_seq_lens = args.rows.extend_seq_lens;
  Vector::Words written_words{}, index_words{}, seq_len_words{}, extend_words{};
  const auto load = [&] {
    if (is_told) written_words = args.written_lens.words(i);
    if (!exists) return;
    index_words = args.req_pool_indices.words(i);
    seq_len_words = args.seq_lens.words(i);
    if (kRagged) extend_words = extend_seq_lens.words(i);
  };

  // Rows from `total` on are padding rows.
  int32_t q = args.rows_per_request, count = q;
  int64_t first_row = static_cast<int64_t>(i) * q, total = args.rows.count;
  if constexpr (kRagged) {
    load();
    const auto q_of = [&](auto words) { return Rows::q_of(extend_seq_lens.value(words)); };
    q = q_of(extend_words);
    Around<RowCount> rows{};
    if (args.rows.requests > 1) {
      const int32_t summed = args.clears_padding ? args.rows.requests : i;
      const auto load_extend = [&](int64_t k) { return extend_seq_lens.words(k); };
      const auto rows_of = [&](int64_t k, auto words) {
        const auto q = static_cast<uint32_t>(q_of(words));
        return Around<RowCount>{{k < i ? q : 0}, {k > i ? q : 0}};
      };
      rows = SumOfThreads(ThreadSum<Around<RowCount>>(summed, load_extend, rows_of));
    }
    first_row = rows.before.value;
    if (args.clears_padding) total = first_row + q + rows.behind.value;
    count = Min(q, Max(args.rows.count - static_cast<int32_t>(rows.before.value), 0));
  }
  const TrackedRows tracked(args.tracker, is_tracked, i, first_row, count);
  if constexpr (!kRagged) load();

  const int32_t seq_len = args.seq_lens.value(seq_len_words);
  const RequestContent request{seq_len,      args.added_tokens, q,
                               args.max_len, args.least,        args.requests_are_items};
  const int32_t* const source = args.pool.row(args.req_pool_indices.value(index_words));
  const int32_t least_offset = kEqual ? 0 : args.least_offset;
  const int32_t greatest_offset = kEqual ? 0 : args.greatest_offset;
  const uint32_t own_thread = kOwnThreads < kThreads ? threadIdx.x % kOwnThreads : threadIdx.x;
  const auto thread = static_cast<int32_t>(blockIdx.x * kOwnThreads + own_thread);
  const auto threads = static_cast<int32_t>(gridDim.x * kOwnThreads);
  int32_t written = 0;
  if (is_tracked) {
    const int32_t shortest = Rows::cache_seqlen_of(seq_len, least_offset, args.added_tokens);
    const auto tokens_after = [&](int32_t j) {
      return BatchTracker::TokensAfter(Rows::kv_len(shortest, q, j), seq_len, args.max_len);
    };
    written = Min(tracked.held(tokens_after), seq_len);
    if (args.tracker.advances) tracked.Advance(thread, threads, tokens_after);
  } else if (is_told) {
    written = args.written_lens.value(written_words);
  }
  const int32_t first = kMayHold ? Min(Max(written, 0), args.max_len) : 0;
  const RowContent padding{0, kRagged && args.clears_padding ? args.max_len : 0};
  const RowContent longest =
      !kRagged || count > 0 ? request.longest(greatest_offset) : padding;
  // Calls `write` with every row and what it gets: those of the request, then padding rows.
  const auto for_rows = [&](auto write) {
#pragma unroll 1
    for (int32_t j = 0;; ++j) {
      const bool pads = j >= count;
      if (!kRagged && pads) return;
      const int64_t row =
          pads ? total + i + int64_t{j - count} * args.table_requests : first_row + j;
      if (kRagged && row >= args.rows.count) return;
      const auto content = [&](int32_t offset) {
        return kRagged && pads ? padding : request.row(j, offset);
      };
      const RowContent shortest = content(least_offset);
      const RowContent longest = kEqual ? shortest : content(greatest_offset);
      const auto of_backend = [&](int b) {
        return kEqual ? shortest : content(args.backend_offsets[b]);
      };
      const int32_t begin = pads ? 0 : first;
      write(row, RowContents<decltype(of_backend)>{begin, shortest, longest, of_backend});
    }
  };

  // Every column has a thread, whatever others found that rows hold: all begin at a multiple of
  // the stride, which is a power of two where `first` may be more than 0.
  if (args.is_wide) {
    const int32_t stride = threads * kWidth;
    int32_t column = (first & -stride) + thread * kWidth;
    if (kMayHold && column + kWidth <= first) column += stride;
    if (IsFrom(longest.end, column)) return;
    // The loop's pointers are fetched ahead of it, and would hold up the first load inside it.
    Columns<kWidth> columns(source, column, first, longest.live);
    while (true) {
      for_rows([&](int64_t row, const auto& contents) { columns.Store(args, row, contents); });
      column += stride;
      if (IsFrom(longest.end, column)) return;
      columns = Columns<kWidth>(source, column, first, longest.live);
    }
  }
  // Only the first token of each page is read.
  const int32_t first_page = kMayHold ? args.page_size.DivideUp(first) : 0;
  uint32_t page = (first_page & -threads) + thread;
  if (kMayHold && !IsFrom(first_page, page)) page += threads;
#pragma unroll 1
  for (;; page += threads) {
    const int64_t token = int64_t{page} * args.page_size.value;
    if (token >= longest.end) return;
    const int32_t number =
        token < longest.live ? args.page_size.Divide(__ldg(source + token)) : 0;
    for_rows([&](int64_t row, const auto& contents) {
      StorePage(args, row, page, token, number, contents);
    });
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_TABLES_CUH_
