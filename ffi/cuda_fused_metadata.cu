// The whole job in one launch, of blocks that do not wait for each other: the first ones write a
// backend's lengths and prefix sums of 128 requests each, the others a share of one request's tables.
#include <algorithm>
#include <cstddef>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda.h"
#include "cuda_launch.h"

namespace jaxnsa {
namespace {

constexpr const char* kName = "fused_metadata";
constexpr int kThreads = 128;
// Bounds the registers: copies want many blocks in flight.
constexpr int kBlocksPerMultiprocessor = 10;
// So many backends or fewer have a kernel of their own.
constexpr int kFewBackends = 8;
// Columns of a page table that a block moves in one turn.
constexpr int kColumns = 4 * kThreads;
// Blocks that share the tables: half as many as there are turns, within these bounds. Each costs
// 0.6 nanoseconds of a Hopper GPU, whether its columns are live or not.
constexpr int64_t kFewestBlocks = 1024, kMostBlocks = 8192;

// Division without a division: T. Granlund and P. Montgomery, "Division by invariant integers using
// multiplication" (1994), for dividends below 2^31.
struct Divisor {
  int32_t value;
  int32_t shift;
  uint32_t multiplier;

  static Divisor Of(int32_t value) {
    int32_t bits = 0;
    while ((int64_t{1} << bits) < value) ++bits;
    const uint64_t multiplier = (uint64_t{1} << (31 + bits)) / value + 1;
    return {value, 31 + bits, static_cast<uint32_t>(multiplier)};
  }

  // Rounds towards minus infinity.
  __device__ int32_t Divide(int32_t x) const {
    const uint32_t sign = x < 0 ? 0xffffffffu : 0u;
    const uint64_t magnitude = static_cast<uint32_t>(x) ^ sign;
    return static_cast<int32_t>(static_cast<uint32_t>((magnitude * multiplier) >> shift) ^ sign);
  }
};

// The tables of a backend; null where they are not wanted.
struct Tables {
  int32_t* page_indices;
  int32_t* real_page_table;
};

struct Lengths {
  int32_t* cache_seqlens;
  int32_t* cu_seqlens_k;
  int32_t* seqlens_expanded;
  int32_t* nsa_cache_seqlens;
  int32_t* nsa_cu_seqlens_k;
};

// What a row of a table gets: columns below `live` from the pool, then 0 below `end`; in tokens.
struct Extent {
  int32_t live;
  int32_t end;
};

// The parameters of the kernel, in the order in which tables need them. A multiprocessor fetches
// parameters 64 bytes at once and waits for each fetch; 16 of the first 64 are not ours.
template <int kCapacity>
struct Parameters {
  Vector seq_lens;
  Vector req_pool_indices;
  int32_t length_rows;
  int32_t requests;  // at least one where rows past the total are to be cleared
  int32_t tokens_per_request;
  int32_t added_tokens;

  Pool pool;
  int64_t page_indices_stride;
  int64_t real_page_table_stride;
  Extent least;  // of any row
  int32_t max_len;
  Divisor page_size;

  int32_t num_backends;
  Tables tables[kCapacity];

  Rows rows;
  bool clears;  // rows past the total
  int32_t length_blocks;  // of a backend
  Lengths lengths[kCapacity];
};

static_assert(offsetof(Parameters<kFewBackends>, pool) == 64 - 16);
static_assert(offsetof(Parameters<kFewBackends>, num_backends) == 128 - 16);

// Calls `body` with every backend's part. A few are taken one by one rather than in a loop: then
// their pointers are operands of the instructions, and no indexed load comes first.
template <int kCapacity, typename Part, typename Body>
__device__ __forceinline__ void ForEach(const Part (&backends)[kCapacity], int count, Body body) {
  if constexpr (kCapacity == kFewBackends) {
#pragma unroll
    for (int b = 0; b < kCapacity; ++b) {
      if (b >= count) return;
      body(backends[b]);
    }
  } else {
#pragma unroll 2
    for (int b = 0; b < count; ++b) body(backends[b]);
  }
}

// min(1, topk) + min(2, topk) + ... + min(n, topk), modulo 2^32.
__device__ uint32_t ClampedSeries(int32_t n, int32_t topk) {
  const uint32_t low = Min(n, topk);
  const uint32_t triangle = low % 2 == 0 ? low / 2 * (low + 1) : low * (low / 2 + 1);
  return triangle + (static_cast<uint32_t>(n) - low) * static_cast<uint32_t>(topk);
}

// The sum of nsa_cache_seqlens over rows 0 to j of a request, modulo 2^32.
__device__ uint32_t NsaSum(const Rows& rows, int32_t cache_seqlen, int32_t q, int32_t j) {
  const int32_t kv_len = Rows::kv_len(cache_seqlen, q, j);
  // A KV length past int32 has wrapped; the rows before that count.
  const int32_t last = cache_seqlen < 0 && kv_len == 0 ? kInt32Max : kv_len;
  return ClampedSeries(last, rows.nsa_index_topk) -
         ClampedSeries(Max(Add(cache_seqlen, -q), 0), rows.nsa_index_topk);
}

// The sum of `value(i)` over [begin, end), taken and received by all threads of a block.
template <typename T, typename Value>
__device__ T BlockSum(int64_t begin, int64_t end, Value value) {
  using Reduce = cub::BlockReduce<T, kThreads>;
  __shared__ typename Reduce::TempStorage temp;
  __shared__ T result;
  T sum{};
  if (begin >= end) return sum;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum = sum + value(i);
  sum = Reduce(temp).Sum(sum);
  if (threadIdx.x == 0) result = sum;
  __syncthreads();
  sum = result;
  __syncthreads();
  return sum;
}

// What the threads before this one hold.
template <typename T>
__device__ T SumBeforeThread(T value) {
  using Scan = cub::BlockScan<T, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage temp;
  T before;
  Scan(temp).ExclusiveSum(value, before);
  __syncthreads();
  return before;
}

// Modulo 2^32.
struct LengthSums {
  uint32_t cache_seqlens;
  uint32_t nsa_cache_seqlens;

  friend __device__ LengthSums operator+(LengthSums a, LengthSums b) {
    return {a.cache_seqlens + b.cache_seqlens, a.nsa_cache_seqlens + b.nsa_cache_seqlens};
  }
};

// A backend's lengths and prefix sums of 128 requests, one for each thread, and of their rows.
template <bool kRagged>
__device__ void WriteLengths(const Rows& rows, int32_t blocks, int32_t block, const Lengths& to) {
  struct Request {
    int32_t cache_seqlen;
    int32_t q;
    int32_t first_row;  // at most the number of rows
    uint32_t nsa_before;
  };
  __shared__ Request requests[kThreads];
  const auto q = [&](int64_t i) -> int64_t { return rows.q(i); };
  const auto sums_of = [&](int32_t cache_seqlen, int32_t tokens) -> LengthSums {
    return {static_cast<uint32_t>(cache_seqlen), NsaSum(rows, cache_seqlen, tokens, tokens - 1)};
  };
  const auto sums = [&](int64_t i) { return sums_of(rows.cache_seqlen(i), rows.q(i)); };
  const int64_t first = int64_t{block} * kThreads, i = first + threadIdx.x;
  const int64_t end = first + kThreads < rows.requests ? first + kThreads : rows.requests;
  const bool exists = i < end;

  const int32_t cache_seqlen = exists ? rows.cache_seqlen(i) : 0, tokens = exists ? rows.q(i) : 0;
  const LengthSums before =
      BlockSum<LengthSums>(0, first, sums) + SumBeforeThread(sums_of(cache_seqlen, tokens));
  int64_t first_row = i * rows.tokens_per_request, end_row = end * rows.tokens_per_request;
  if (kRagged) {
    const int64_t rows_before = BlockSum<int64_t>(0, first, q);
    first_row = rows_before + SumBeforeThread<int64_t>(tokens);
    end_row = rows_before + BlockSum<int64_t>(first, end, q);
  }
  const auto at_most_all = [&](int64_t row) {
    return row < rows.count ? static_cast<int32_t>(row) : rows.count;
  };
  requests[threadIdx.x] = {cache_seqlen, tokens, at_most_all(first_row), before.nsa_cache_seqlens};
  if (i == 0) {
    to.cu_seqlens_k[0] = 0;
    to.nsa_cu_seqlens_k[0] = 0;
  }
  if (exists) {
    to.cache_seqlens[i] = cache_seqlen;
    to.cu_seqlens_k[i + 1] = static_cast<int32_t>(before.cache_seqlens + cache_seqlen);
  }
  __syncthreads();

  const int32_t last_row = at_most_all(end_row);
  for (int64_t row = requests[0].first_row + threadIdx.x; row < last_row; row += kThreads) {
    int low = 0;
    if (kRagged) {
      int high = kThreads - 1;  // the last request that begins at this row or before it
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (requests[middle].first_row <= row) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
    } else {
      low = static_cast<int>(static_cast<uint32_t>(row) / rows.tokens_per_request - first);
    }
    const Request request = requests[low];
    const auto j = static_cast<int32_t>(row - request.first_row);
    const int32_t kv_len = Rows::kv_len(request.cache_seqlen, request.q, j);
    to.seqlens_expanded[row] = kv_len;
    to.nsa_cache_seqlens[row] = rows.nsa_len(kv_len);
    to.nsa_cu_seqlens_k[row + 1] = static_cast<int32_t>(
        request.nsa_before + NsaSum(rows, request.cache_seqlen, request.q, j));
  }
  if (!kRagged) return;

  // The rows past the total.
  const int64_t total = BlockSum<int64_t>(0, rows.requests, q);
  if (total >= rows.count) return;
  const auto nsa_total =
      static_cast<int32_t>(BlockSum<LengthSums>(0, rows.requests, sums).nsa_cache_seqlens);
  for (int64_t row = total + i; row < rows.count; row += int64_t{blocks} * kThreads) {
    to.seqlens_expanded[row] = 0;
    to.nsa_cache_seqlens[row] = 0;
    to.nsa_cu_seqlens_k[row + 1] = nsa_total;
  }
}

// kWidth neighbouring elements, moved by one access.
template <int kWidth>
struct Access;

template <>
struct Access<4> {
  static __device__ void Load(const int32_t* source, int32_t (&value)[4]) {
    const int4 v = __ldg(reinterpret_cast<const int4*>(source));
    value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
  }
  // A launch reads nothing that it wrote: those lines are the first that the cache can do without.
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
struct Request {
  int32_t cache_seqlen;
  int32_t q;
  int32_t max_len;
  Extent least;

  __device__ Extent extent(int32_t j) const {
    const int32_t live = Max(Min(Rows::kv_len(cache_seqlen, q, j), max_len), least.live);
    return {live, Max(live, least.end)};
  }

  // What its rows take together: as much as the last one, unless its KV length has wrapped.
  __device__ Extent longest() const {
    return cache_seqlen < 0 ? Extent{max_len, max_len} : extent(q - 1);
  }
};

// A piece of a row of the page table: what a thread moves of it, in registers.
template <int kWidth>
struct Piece {
  static constexpr int kAccesses = kColumns / kThreads / kWidth;

  int32_t value[kAccesses][kWidth];

  // The first column of this thread's u-th access in the piece that starts at `start`.
  static __device__ int32_t Column(int32_t start, int u) {
    return start + (u * kThreads + static_cast<int32_t>(threadIdx.x)) * kWidth;
  }

  __device__ void Load(const int32_t* source, int32_t start, int32_t live) {
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const int32_t column = Column(start, u);
      if (column + kWidth <= live) {
        Access<kWidth>::Load(source + column, value[u]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) value[u][e] = column + e < live ? source[column + e] : 0;
    }
  }

  // Writes a row, and the pages that start in it to the other table if there is one. A page starts
  // with an access, or in none.
  template <int kCapacity>
  __device__ void Store(const Parameters<kCapacity>& args, int32_t start, int64_t row,
                        Extent extent) const {
    const int32_t backends = args.num_backends;
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const int32_t column = Column(start, u);
      const int64_t offset = row * args.page_indices_stride + column;
      int32_t live[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) live[e] = column + e < extent.live ? value[u][e] : 0;
      if (column + kWidth <= extent.end) {
        ForEach(args.tables, backends, [&](const Tables& to) {
          Access<kWidth>::Store(to.page_indices + offset, live);
        });
      } else {
        ForEach(args.tables, backends, [&](const Tables& to) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            if (column + e < extent.end) to.page_indices[offset + e] = live[e];
          }
        });
      }
      const int32_t page = args.page_size.Divide(column);
      if (args.tables[0].real_page_table == nullptr || page * args.page_size.value != column ||
          column >= extent.end) {
        continue;
      }
      const int64_t page_offset = row * args.real_page_table_stride + page;
      const int32_t number = args.page_size.Divide(live[0]);
      ForEach(args.tables, backends,
              [&](const Tables& to) { to.real_page_table[page_offset] = number; });
    }
  }
};

// A block's share of request i's rows in both tables, and of the rows past the total: every
// gridDim.x-th piece.
template <int kWidth, bool kRagged, int kCapacity>
__device__ void WriteTables(const Parameters<kCapacity>& args, int32_t i) {
  // Without requests, one that does not exist clears the rows.
  const bool exists = !kRagged || i < args.rows.requests;
  // Both loads are under way before either is needed.
  const int32_t index = exists ? args.req_pool_indices[i] : 0;
  const int32_t seq_len = exists ? args.seq_lens[i] : 0;
  const int32_t q = !kRagged ? args.tokens_per_request : exists ? args.rows.q(i) : 0;
  const Request request{Rows::cache_seqlen_of(seq_len, args.added_tokens), q, args.max_len,
                        args.least};
  const int32_t* const source = args.pool.row(index);

  // Rows from `total` on are cleared.
  int64_t first_row = static_cast<int64_t>(i) * q, total = args.rows.count;
  int32_t count = q;
  if (kRagged) {
    const auto tokens = [&](int64_t k) -> int64_t { return args.rows.q(k); };
    first_row = BlockSum<int64_t>(0, i, tokens);
    if (args.clears) total = first_row + q + BlockSum<int64_t>(i + 1, args.rows.requests, tokens);
    const int64_t room = first_row < args.rows.count ? args.rows.count - first_row : 0;
    count = room < q ? static_cast<int32_t>(room) : q;
  }
  const Extent none{0, kRagged && args.clears ? args.max_len : 0};
  const Extent longest = !kRagged || count > 0 ? request.longest() : none;
  // Calls `write` with every row and what it gets.
  const auto for_rows = [&](auto write) {
#pragma unroll 1
    for (int32_t j = 0; j < count; ++j) write(first_row + j, request.extent(j));
    if constexpr (kRagged) {
#pragma unroll 1
      for (int64_t row = total + i; row < args.rows.count; row += args.requests) write(row, none);
    }
  };

  const auto block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  if (args.tables[0].page_indices != nullptr) {
#pragma unroll 1
    for (int32_t start = block * kColumns; start < longest.end;
         start += blocks * kColumns) {
      Piece<kWidth> piece;
      piece.Load(source, start, longest.live);
      for_rows([&](int64_t row, Extent extent) { piece.Store(args, start, row, extent); });
    }
    return;
  }
  // Only the first token of each page is read.
#pragma unroll 1
  for (int32_t page = block * kThreads + static_cast<int32_t>(threadIdx.x);;
       page += blocks * kThreads) {
    const int64_t token = int64_t{page} * args.page_size.value;
    if (token >= longest.end) return;
    const int32_t number =
        token < longest.live ? args.page_size.Divide(__ldg(source + token)) : 0;
    for_rows([&](int64_t row, Extent extent) {
      if (token >= extent.end) return;
      const int64_t offset = row * args.real_page_table_stride + page;
      const int32_t live = token < extent.live ? number : 0;
      ForEach(args.tables, args.num_backends,
              [&](const Tables& to) { to.real_page_table[offset] = live; });
    });
  }
}

// The grid has a row of blocks for each request after those for the lengths, so that neighbouring
// blocks write neighbouring memory; more than kGridRows lie in layers.
constexpr int kGridRows = 32768;

template <int kWidth, bool kRagged, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    FusedMetadataKernel(const __grid_constant__ Parameters<kCapacity> args) {
  const auto row = static_cast<int32_t>(blockIdx.z * kGridRows + blockIdx.y);
  const int32_t i = row - args.length_rows;
  if (i >= args.requests) return;
  if (__builtin_expect(i < 0, 0)) {
    const uint32_t block = row * gridDim.x + blockIdx.x, blocks = args.length_blocks;
    const uint32_t b = blocks == 1 ? block : block / blocks;
    if (b < static_cast<uint32_t>(args.num_backends)) {
      WriteLengths<kRagged>(args.rows, blocks, block - b * blocks, args.lengths[b]);
    }
    return;
  }
  WriteTables<kWidth, kRagged>(args, i);
}

bool AllowsVectors(const Fused& args) {
  bool allows = args.pool_stride % 4 == 0 && args.page_indices_stride % 4 == 0 &&
                IsAligned(args.req_to_token) &&
                (args.backends[0].real_page_table == nullptr || args.real_page_size % 4 == 0);
  for (int b = 0; b < args.num_backends; ++b) {
    allows = allows && IsAligned(args.backends[b].page_indices);
  }
  return allows;
}

template <int kWidth, int kCapacity>
std::string LaunchFusedMetadata(cudaStream_t stream, const Fused& all) {
  const Rows& rows = all.rows;
  Parameters<kCapacity> args{};
  args.seq_lens = rows.seq_lens;
  args.req_pool_indices = all.req_pool_indices;
  args.requests = rows.ragged() ? std::max(rows.requests, 1) : rows.requests;
  args.tokens_per_request = rows.tokens_per_request;
  args.added_tokens = rows.added_tokens;
  args.pool = all.pool();
  args.page_indices_stride = all.page_indices_stride;
  args.real_page_table_stride = all.real_page_table_stride;
  args.least.live = all.tail == Tail::kCopy ? all.max_len : 0;
  args.least.end = all.tail == Tail::kKeep ? 0 : all.max_len;
  args.max_len = all.max_len;
  args.page_size = Divisor::Of(all.real_page_size);
  args.num_backends = all.num_backends;
  args.rows = rows;
  args.clears = all.tail != Tail::kKeep;
  for (int b = 0; b < all.num_backends; ++b) {
    const Destination& to = all.backends[b];
    args.tables[b] = {to.page_indices, to.real_page_table};
    args.lengths[b] = {to.cache_seqlens, to.cu_seqlens_k, to.seqlens_expanded,
                       to.nsa_cache_seqlens, to.nsa_cu_seqlens_k};
  }
  const bool wide = all.backends[0].page_indices != nullptr;
  const int64_t turns = CeilDiv(wide ? all.max_len : all.pages(), wide ? kColumns : kThreads);
  const int64_t blocks = std::clamp(args.requests * turns / 2, kFewestBlocks, kMostBlocks);
  dim3 grid;
  grid.x = std::clamp<int64_t>(blocks / std::max(args.requests, 1), 1, turns);
  args.length_blocks = std::max<int64_t>(1, CeilDiv(rows.requests, kThreads));
  args.length_rows = CeilDiv(int64_t{args.length_blocks} * all.num_backends, grid.x);
  const int64_t grid_rows = int64_t{args.length_rows} + args.requests;
  grid.y = std::min<int64_t>(grid_rows, kGridRows);
  grid.z = CeilDiv(grid_rows, kGridRows);
  const auto kernel = rows.ragged() ? FusedMetadataKernel<kWidth, true, kCapacity>
                                    : FusedMetadataKernel<kWidth, false, kCapacity>;
  return Launch(kName, stream, kernel, grid, kThreads, args);
}

template <int kCapacity>
std::string LaunchForBackends(cudaStream_t stream, const Fused& args) {
  return AllowsVectors(args) ? LaunchFusedMetadata<4, kCapacity>(stream, args)
                             : LaunchFusedMetadata<1, kCapacity>(stream, args);
}

template <int kCapacity>
std::string LoadForBackends() {
  return LoadKernels(kName, FusedMetadataKernel<4, false, kCapacity>,
                     FusedMetadataKernel<4, true, kCapacity>,
                     FusedMetadataKernel<1, false, kCapacity>,
                     FusedMetadataKernel<1, true, kCapacity>);
}

}  // namespace

std::string Cuda::LoadFusedMetadata() {
  const std::string error = LoadForBackends<kFewBackends>();
  return error.empty() ? LoadForBackends<kMaxBackends>() : error;
}

std::string Cuda::FusedMetadata(Stream stream, const Fused& args) {
  return args.num_backends <= kFewBackends ? LaunchForBackends<kFewBackends>(stream, args)
                                           : LaunchForBackends<kMaxBackends>(stream, args);
}

}  // namespace jaxnsa
