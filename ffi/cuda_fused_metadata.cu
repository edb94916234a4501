// The whole job in one launch, of blocks that do not wait for each other: the first ones write the
// lengths and prefix sums of 128 requests each, the others a share of one request's tables.
#include <algorithm>
#include <cstring>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <utility>

#include "cuda.h"
#include "cuda_launch.h"

namespace jaxnsa {
namespace {

constexpr const char* kName = "fused_metadata";
constexpr int kThreads = 128;
// Bounds the registers: copies want many blocks in flight.
constexpr int kBlocksPerMultiprocessor = 10;
// So many backends or fewer have a kernel of their own, with fewer parameters.
constexpr int kFewBackends = 8;
// Tables of fewer elements are cut into small pieces, so that every multiprocessor of a Hopper GPU
// has work.
constexpr int64_t kSmallTable = 132 * 2048 * 4;
// Blocks that share the tables. Where there would be more, a block takes several turns, as many as
// its request's live columns need.
constexpr int64_t kTableBlocks = 8192;

// How the work is cut: blocks for the lengths, then `blocks_per_request` for the tables of each
// request, which take turns of one piece of its rows.
struct FusedGrid {
  uint32_t length_blocks;
  int32_t requests;  // at least one where rows past the total are to be cleared
  int32_t blocks_per_request;
  int32_t pieces;
  int32_t piece;  // tokens
};

// Calls `body` with every backend. A few are taken one by one rather than in a loop: then their
// pointers are operands of the instructions, and no indexed load comes first.
template <typename Body, int... kFirst>
__device__ __forceinline__ void ForFewBackends(const Destination* backends, int count, Body body,
                                               std::integer_sequence<int, kFirst...>) {
  ((kFirst < count && (body(backends[kFirst]), true)) && ...);
}

template <int kCapacity, typename Body>
__device__ __forceinline__ void ForBackends(const FusedOf<kCapacity>& args, Body body) {
  if constexpr (kCapacity == kFewBackends) {
    ForFewBackends(args.backends, args.num_backends, body,
                   std::make_integer_sequence<int, kCapacity>());
  } else {
#pragma unroll 2
    for (int b = 0; b < args.num_backends; ++b) body(args.backends[b]);
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

// The lengths and prefix sums of 128 requests, one for each thread, and of their rows.
template <bool kRagged, typename Args>
__device__ void WriteLengths(const Args& args, int64_t block, int64_t blocks) {
  struct Request {
    int32_t cache_seqlen;
    int32_t q;
    int32_t first_row;  // at most the number of rows
    uint32_t nsa_before;
  };
  __shared__ Request requests[kThreads];
  const Rows& rows = args.rows;
  const auto q = [&](int64_t i) -> int64_t { return rows.q(i); };
  const auto sums_of = [&](int32_t cache_seqlen, int32_t tokens) -> LengthSums {
    return {static_cast<uint32_t>(cache_seqlen), NsaSum(rows, cache_seqlen, tokens, tokens - 1)};
  };
  const auto sums = [&](int64_t i) { return sums_of(rows.cache_seqlen(i), rows.q(i)); };
  const int64_t first = block * kThreads, i = first + threadIdx.x;
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
    ForBackends(args, [&](const Destination& to) {
      to.cu_seqlens_k[0] = 0;
      to.nsa_cu_seqlens_k[0] = 0;
    });
  }
  if (exists) {
    const auto sum = static_cast<int32_t>(before.cache_seqlens + cache_seqlen);
    ForBackends(args, [&](const Destination& to) {
      to.cache_seqlens[i] = cache_seqlen;
      to.cu_seqlens_k[i + 1] = sum;
    });
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
    const int32_t nsa_len = rows.nsa_len(kv_len);
    const auto sum = static_cast<int32_t>(request.nsa_before +
                                          NsaSum(rows, request.cache_seqlen, request.q, j));
    ForBackends(args, [&](const Destination& to) {
      to.seqlens_expanded[row] = kv_len;
      to.nsa_cache_seqlens[row] = nsa_len;
      to.nsa_cu_seqlens_k[row + 1] = sum;
    });
  }
  if (!kRagged) return;

  // The rows past the total.
  const int64_t total = BlockSum<int64_t>(0, rows.requests, q);
  if (total >= rows.count) return;
  const auto nsa_total =
      static_cast<int32_t>(BlockSum<LengthSums>(0, rows.requests, sums).nsa_cache_seqlens);
  for (int64_t row = total + i; row < rows.count; row += blocks * kThreads) {
    ForBackends(args, [&](const Destination& to) {
      to.seqlens_expanded[row] = 0;
      to.nsa_cache_seqlens[row] = 0;
      to.nsa_cu_seqlens_k[row + 1] = nsa_total;
    });
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

// What a row of a table gets: columns below `live` from the pool, then 0 below `end`; in tokens.
struct Extent {
  int32_t live;
  int32_t end;
};

// One request's rows in a table.
struct Request {
  int32_t cache_seqlen;
  int32_t q;
  int32_t max_len;
  Tail tail;

  __device__ Extent extent(int32_t j) const {
    if (tail == Tail::kCopy) return {max_len, max_len};
    const int32_t live = Min(Rows::kv_len(cache_seqlen, q, j), max_len);
    return {live, tail == Tail::kZero ? max_len : live};
  }

  // What its rows take together: as much as the last one, unless its KV length has wrapped.
  __device__ Extent longest() const {
    return cache_seqlen < 0 ? Extent{max_len, max_len} : extent(q - 1);
  }
};

// Division by the page size without a division: T. Granlund and P. Montgomery, "Division by
// invariant integers using multiplication" (1994), for dividends below 2^31.
struct Pages {
  int32_t size;
  int32_t shift;
  uint32_t multiplier;

  static Pages Of(int32_t size) {
    int32_t bits = 0;
    while ((int64_t{1} << bits) < size) ++bits;
    const uint64_t multiplier = (uint64_t{1} << (31 + bits)) / size + 1;
    return {size, 31 + bits, static_cast<uint32_t>(multiplier)};
  }

  // Rounds towards minus infinity.
  __device__ int32_t Index(int32_t value) const {
    const uint32_t sign = value < 0 ? 0xffffffffu : 0u;
    const uint64_t magnitude = static_cast<uint32_t>(value) ^ sign;
    return static_cast<int32_t>(static_cast<uint32_t>((magnitude * multiplier) >> shift) ^ sign);
  }
};

// A piece of a row of the page table: what a thread moves of it, in registers.
template <int kWidth, int kAccesses>
struct Piece {
  static constexpr int kColumns = kThreads * kWidth * kAccesses;

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

  template <typename Args>
  __device__ void Store(const Args& args, int32_t start, int64_t row, Extent extent) const {
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const int32_t column = Column(start, u);
      const int64_t offset = row * args.page_indices_stride + column;
      int32_t live[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) live[e] = column + e < extent.live ? value[u][e] : 0;
      if (column + kWidth <= extent.end) {
        ForBackends(args, [&](const Destination& to) {
          Access<kWidth>::Store(to.page_indices + offset, live);
        });
        continue;
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (column + e >= extent.end) break;
#pragma unroll 1
        for (int b = 0; b < args.num_backends; ++b) {
          args.backends[b].page_indices[offset + e] = live[e];
        }
      }
    }
  }
};

// One block's share of a request's rows in both tables, and of the rows past the total.
template <int kWidth, int kAccesses, bool kRagged, typename Args>
__device__ void WriteTables(const Args& args, const Pages& pages, const FusedGrid& grid, int64_t i,
                            int32_t block) {
  const Rows& rows = args.rows;
  const bool wide = args.backends[0].page_indices != nullptr;
  const bool real = args.backends[0].real_page_table != nullptr;
  const bool clears = kRagged && args.tail != Tail::kKeep;
  // Without requests, one that does not exist clears the rows.
  const bool exists = !kRagged || i < rows.requests;
  // Both loads are under way before either is needed.
  const int64_t index = exists ? args.req_pool_indices[i] : 0;
  const int64_t seq_len = exists ? rows.seq_lens[i] : 0;
  const int32_t q = exists ? rows.q(i) : 0;
  const Request request{rows.cache_seqlen_of(seq_len), q, args.max_len, args.tail};
  const int32_t* const source = args.pool_row(index);

  int64_t first_row = i * q, total = rows.count;  // the rows from there on are cleared
  int32_t count = q;
  if (kRagged) {
    const auto tokens = [&](int64_t k) -> int64_t { return rows.q(k); };
    first_row = BlockSum<int64_t>(0, i, tokens);
    if (clears) total = first_row + q + BlockSum<int64_t>(i + 1, rows.requests, tokens);
    const int64_t room = first_row < rows.count ? rows.count - first_row : 0;
    count = room < q ? static_cast<int32_t>(room) : q;
  }
  const Extent none{0, clears ? args.max_len : 0};
  const Extent longest = count > 0 ? request.longest() : none;
  // Calls `write` with every row and what it gets.
  const auto for_rows = [&](auto write) {
#pragma unroll 1
    for (int32_t j = 0; j < count; ++j) write(first_row + j, request.extent(j));
    if constexpr (kRagged) {
#pragma unroll 1
      for (int64_t row = total + i; row < rows.count; row += grid.requests) write(row, none);
    }
  };

#pragma unroll 1
  for (int32_t turn = block; turn < grid.pieces; turn += grid.blocks_per_request) {
    const int32_t start = turn * grid.piece;
    if (start >= longest.end) return;
    Piece<kWidth, kAccesses> piece;
    if (wide) piece.Load(source, start, longest.live);
    if (real) {
      const int64_t end = Min(args.max_len - start, grid.piece) + start;
#pragma unroll 1
      for (int32_t page = pages.Index(start - 1) + 1 + static_cast<int32_t>(threadIdx.x);;
           page += kThreads) {
        const int64_t token = int64_t{page} * pages.size;
        if (token >= end) break;
        const int32_t value = token < longest.live ? pages.Index(__ldg(source + token)) : 0;
        for_rows([&](int64_t row, Extent extent) {
          if (token >= extent.end) return;
          const int64_t offset = row * args.real_page_table_stride + page;
          const int32_t live = token < extent.live ? value : 0;
          ForBackends(args, [&](const Destination& to) { to.real_page_table[offset] = live; });
        });
      }
    }
    if (wide) {
      for_rows([&](int64_t row, Extent extent) { piece.Store(args, start, row, extent); });
    }
  }
}

template <int kWidth, int kAccesses, bool kRagged, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    FusedMetadataKernel(const __grid_constant__ FusedOf<kCapacity> args,
                        const __grid_constant__ Pages pages,
                        const __grid_constant__ FusedGrid grid) {
  if (blockIdx.x < grid.length_blocks) {
    WriteLengths<kRagged>(args, blockIdx.x, grid.length_blocks);
    return;
  }
  // Neighbouring blocks write neighbouring memory.
  const uint32_t block = blockIdx.x - grid.length_blocks, i = block / grid.blocks_per_request;
  WriteTables<kWidth, kAccesses, kRagged>(args, pages, grid, i,
                                          block - i * grid.blocks_per_request);
}

bool IsAligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool AllowsVectors(const Fused& args) {
  bool allows = args.pool_stride % 4 == 0 && args.page_indices_stride % 4 == 0 &&
                IsAligned(args.req_to_token);
  for (int b = 0; b < args.num_backends; ++b) {
    allows = allows && IsAligned(args.backends[b].page_indices);
  }
  return allows;
}

template <int kWidth, int kAccesses, int kCapacity>
std::string LaunchFusedMetadata(cudaStream_t stream, const FusedOf<kCapacity>& args) {
  const Rows& rows = args.rows;
  FusedGrid grid{};
  grid.length_blocks =
      static_cast<uint32_t>(std::max<int64_t>(1, CeilDiv(rows.requests, kThreads)));
  grid.requests = rows.ragged() ? std::max(rows.requests, 1) : rows.requests;
  const int64_t piece = args.backends[0].page_indices != nullptr
                            ? Piece<kWidth, kAccesses>::kColumns
                            : int64_t{kThreads} * args.real_page_size;
  grid.piece = static_cast<int32_t>(std::min(piece, kMaxLen));
  grid.pieces = static_cast<int32_t>(CeilDiv(args.max_len, grid.piece));
  grid.blocks_per_request = static_cast<int32_t>(std::clamp<int64_t>(
      kTableBlocks / std::max(grid.requests, 1), 1, grid.pieces));
  const int64_t blocks = grid.length_blocks + int64_t{grid.requests} * grid.blocks_per_request;
  const auto kernel = rows.ragged() ? FusedMetadataKernel<kWidth, kAccesses, true, kCapacity>
                                    : FusedMetadataKernel<kWidth, kAccesses, false, kCapacity>;
  const Pages pages = Pages::Of(args.real_page_size);
  return Launch(kName, stream, kernel, blocks, kThreads, args, pages, grid);
}

template <int kCapacity>
std::string LaunchForBackends(cudaStream_t stream, const Fused& all) {
  FusedOf<kCapacity> args;
  static_assert(sizeof args <= sizeof all);
  std::memcpy(&args, &all, sizeof args);
  if (!AllowsVectors(all)) return LaunchFusedMetadata<1, 4>(stream, args);
  if (int64_t{args.rows.count} * args.max_len < kSmallTable) {
    return LaunchFusedMetadata<4, 1>(stream, args);
  }
  return LaunchFusedMetadata<4, 2>(stream, args);
}

template <int kCapacity>
std::string LoadForBackends() {
  return LoadKernels(kName,  //
                     FusedMetadataKernel<4, 1, false, kCapacity>,
                     FusedMetadataKernel<4, 1, true, kCapacity>,
                     FusedMetadataKernel<4, 2, false, kCapacity>,
                     FusedMetadataKernel<4, 2, true, kCapacity>,
                     FusedMetadataKernel<1, 4, false, kCapacity>,
                     FusedMetadataKernel<1, 4, true, kCapacity>);
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
