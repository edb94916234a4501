#include <algorithm>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda.h"

namespace jaxnsa {
namespace {

// ---------------------------------------------------------------------------------------------
// The whole job. Blocks of one launch that do not wait for each other: the first ones write the
// lengths and prefix sums of 128 requests each, the others a share of one request's tables.

constexpr int kThreads = 128;
// Bounds the registers: copies want many blocks in flight.
constexpr int kBlocksPerMultiprocessor = 10;
// Table blocks of a launch; each takes as many turns as its request's live columns need. One wave of
// them, all of which start at once, serves a small table best. More keep a large one's writes close
// together, and cost little where their columns are dead.
constexpr int64_t kOneWave = 1024;
constexpr int64_t kManyWaves = 8192;

// min(1, topk) + min(2, topk) + ... + min(n, topk), modulo 2^32.
__device__ uint32_t ClampedSeries(int32_t n, int32_t topk) {
  const uint32_t low = Min(n, topk);
  const uint32_t triangle = low % 2 == 0 ? low / 2 * (low + 1) : low * (low / 2 + 1);
  return triangle + (static_cast<uint32_t>(n) - low) * static_cast<uint32_t>(topk);
}

// The sum of nsa_cache_seqlens over the rows of a request, modulo 2^32.
__device__ uint32_t NsaSum(const Rows& rows, int32_t cache_seqlen, int32_t q) {
  if (q == 1) return rows.nsa_len(Max(cache_seqlen, 0));
  // A KV length past int32 has wrapped; the rows before that count.
  const int32_t last = cache_seqlen < 0 ? kInt32Max : cache_seqlen;
  return ClampedSeries(last, rows.nsa_index_topk) -
         ClampedSeries(Max(Add(cache_seqlen, -q), 0), rows.nsa_index_topk);
}

// The sum of `value(i)` over [begin, end), taken and received by all threads of a block.
template <typename T, typename Value>
__device__ T BlockSum(int64_t begin, int64_t end, Value value) {
  using Reduce = cub::BlockReduce<T, kThreads>;
  __shared__ typename Reduce::TempStorage temp;
  __shared__ T result;
  if (begin >= end) return 0;
  T sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += value(i);
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

__device__ void WriteLengths(const Fused& args, int64_t block, int64_t blocks) {
  const Rows& rows = args.rows;
  const auto cache_seqlen = [&](int64_t i) -> uint32_t { return rows.cache_seqlen(i); };
  const auto nsa_sum = [&](int64_t i) { return NsaSum(rows, rows.cache_seqlen(i), rows.q(i)); };
  const auto q = [&](int64_t i) -> int64_t { return rows.q(i); };
  const int64_t first = block * kThreads, i = first + threadIdx.x;
  const bool exists = i < rows.requests;

  const uint32_t cache_before = BlockSum<uint32_t>(0, first, cache_seqlen) +
                                SumBeforeThread(exists ? cache_seqlen(i) : 0);
  const uint32_t nsa_before =
      BlockSum<uint32_t>(0, first, nsa_sum) + SumBeforeThread(exists ? nsa_sum(i) : 0);
  int64_t row = i * rows.tokens_per_request;
  if (rows.ragged()) {
    row = BlockSum<int64_t>(0, first, q) + SumBeforeThread(exists ? q(i) : 0);
  }

  if (i == 0) {
#pragma unroll 1
    for (int b = 0; b < args.num_backends; ++b) {
      args.backends[b].cu_seqlens_k[0] = 0;
      args.backends[b].nsa_cu_seqlens_k[0] = 0;
    }
  }
  if (exists) {
    const int32_t cache = rows.cache_seqlen(i), tokens = rows.q(i);
#pragma unroll 1
    for (int b = 0; b < args.num_backends; ++b) {
      args.backends[b].cache_seqlens[i] = cache;
      args.backends[b].cu_seqlens_k[i + 1] = cache_before + static_cast<uint32_t>(cache);
    }
    uint32_t sum = nsa_before;
#pragma unroll 1
    for (int32_t j = 0; j < tokens && row < rows.count; ++j, ++row) {
      const int32_t kv_len = Rows::kv_len(cache, tokens, j), nsa_len = rows.nsa_len(kv_len);
      sum += nsa_len;
#pragma unroll 1
      for (int b = 0; b < args.num_backends; ++b) {
        args.backends[b].seqlens_expanded[row] = kv_len;
        args.backends[b].nsa_cache_seqlens[row] = nsa_len;
        args.backends[b].nsa_cu_seqlens_k[row + 1] = sum;
      }
    }
  }
  if (!rows.ragged()) return;

  // The rows past the total.
  const int64_t total = BlockSum<int64_t>(0, rows.requests, q);
  if (total >= rows.count) return;
  const uint32_t nsa_total = BlockSum<uint32_t>(0, rows.requests, nsa_sum);
#pragma unroll 1
  for (row = total + i; row < rows.count; row += blocks * kThreads) {
#pragma unroll 1
    for (int b = 0; b < args.num_backends; ++b) {
      args.backends[b].seqlens_expanded[row] = 0;
      args.backends[b].nsa_cache_seqlens[row] = 0;
      args.backends[b].nsa_cu_seqlens_k[row + 1] = nsa_total;
    }
  }
}

// kWidth neighbouring columns of a row, moved by one access where they are aligned and complete.
template <int kWidth>
struct Columns;

template <>
struct Columns<4> {
  int32_t value[4];

  __device__ void Load(const int32_t* source) {
    const int4 v = __ldg(reinterpret_cast<const int4*>(source));
    value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
  }
  // A launch reads nothing that it wrote: those lines are the first that the cache can do without.
  __device__ void Store(int32_t* destination) const {
    __stcs(reinterpret_cast<int4*>(destination), make_int4(value[0], value[1], value[2], value[3]));
  }
};

template <>
struct Columns<1> {
  int32_t value[1];

  __device__ void Load(const int32_t* source) { value[0] = __ldg(source); }
  __device__ void Store(int32_t* destination) const { __stcs(destination, value[0]); }
};

// What a row of a table gets: columns below `live` from the pool, then 0 below `end`; in tokens.
struct Extent {
  int32_t live;
  int32_t end;
};

// One request's rows in a table: `count` of them from `first` on.
struct Request {
  int64_t first;
  int32_t count;
  int32_t cache_seqlen;
  int32_t q;
  int32_t max_len;
  Tail tail;

  __device__ Extent extent(int32_t j) const {
    const int32_t live = Min(Rows::kv_len(cache_seqlen, q, j), max_len);
    if (tail == Tail::kCopy) return {max_len, max_len};
    return {live, tail == Tail::kZero ? max_len : live};
  }

  // What its rows take together: the last one the most, unless its KV length has wrapped.
  __device__ Extent longest() const {
    const Extent a = extent(0), b = extent(q - 1);
    return {Max(a.live, b.live), Max(a.end, b.end)};
  }
};

// Division by the page size without a division: T. Granlund and P. Montgomery, "Division by invariant
// integers using multiplication" (1994), for dividends below 2^31.
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

__device__ void StorePage(const Fused& args, int64_t row, int32_t index, int32_t page) {
  const int64_t offset = row * args.real_page_table_stride + index;
#pragma unroll 1
  for (int b = 0; b < args.num_backends; ++b) args.backends[b].real_page_table[offset] = page;
}

// The columns of one block's turn, loaded before any is stored: kAccesses of each thread.
template <int kWidth, int kAccesses>
struct Chunk {
  static constexpr int kColumns = kThreads * kWidth * kAccesses;

  Columns<kWidth> columns[kAccesses];
  int32_t page_index[kAccesses];  // of the page that starts in an access, or -1
  int32_t page[kAccesses];

  // The first column of this thread's u-th access.
  static __device__ int32_t ColumnOf(int32_t chunk, int u) {
    return chunk * kColumns + (u * kThreads + static_cast<int32_t>(threadIdx.x)) * kWidth;
  }

  __device__ void Load(const int32_t* source, int32_t chunk, int32_t live) {
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const int32_t column = ColumnOf(chunk, u);
      if (column + kWidth <= live) {
        columns[u].Load(source + column);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          columns[u].value[e] = column + e < live ? source[column + e] : 0;
        }
      }
    }
  }

  __device__ void FindPages(const Pages& pages, int32_t chunk) {
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const int32_t column = ColumnOf(chunk, u);
      const int32_t index = pages.Index(column + kWidth - 1);  // the last page in this access
      page_index[u] = -1;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (column + e == index * pages.size) {
          page_index[u] = index;
          page[u] = pages.Index(columns[u].value[e]);
        }
      }
    }
  }

  // Writes a row of both tables of every backend, all columns of this chunk being live. At most one
  // page starts in an access.
  __device__ void StoreLive(const Fused& args, int32_t chunk, int64_t row) const {
    const int64_t offset = row * args.page_indices_stride + ColumnOf(chunk, 0);
    const int64_t page_offset = row * args.real_page_table_stride;
#pragma unroll 2
    for (int b = 0; b < args.num_backends; ++b) {
      int32_t* const wide = args.backends[b].page_indices + offset;
      int32_t* const real = args.backends[b].real_page_table;
#pragma unroll
      for (int u = 0; u < kAccesses; ++u) columns[u].Store(wide + u * kThreads * kWidth);
      if (real == nullptr) continue;
#pragma unroll
      for (int u = 0; u < kAccesses; ++u) {
        if (page_index[u] >= 0) real[page_offset + page_index[u]] = page[u];
      }
    }
  }

  // The same with any extent and page size.
  __device__ void StorePart(const Fused& args, const Pages& pages, int32_t chunk, int64_t row,
                            Extent extent) const {
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const int32_t column = ColumnOf(chunk, u);
      const int64_t offset = row * args.page_indices_stride + column;
      const bool vector = column + kWidth <= extent.live;
      if (vector) {
#pragma unroll 1
        for (int b = 0; b < args.num_backends; ++b) {
          columns[u].Store(args.backends[b].page_indices + offset);
        }
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const int32_t token = column + e;
        if (token >= extent.end) break;
        const int32_t value = token < extent.live ? columns[u].value[e] : 0;
        if (!vector) {
#pragma unroll 1
          for (int b = 0; b < args.num_backends; ++b) {
            args.backends[b].page_indices[offset + e] = value;
          }
        }
        const int32_t index = pages.Index(token);
        if (args.backends[0].real_page_table != nullptr && token == index * pages.size) {
          StorePage(args, row, index, pages.Index(value));
        }
      }
    }
  }
};

// One block's share of the tables of a request's rows. `locate` completes the request, and may take
// its time: the first chunk is on its way by then.
template <int kWidth, int kAccesses, typename Locate>
__device__ void CopyRows(const Fused& args, const Pages& pages, Request request,
                         const int32_t* source, int32_t block, int32_t blocks, Locate locate) {
  using ChunkType = Chunk<kWidth, kAccesses>;
  const Extent longest = request.longest();
  const int32_t chunks = (longest.end + ChunkType::kColumns - 1) / ChunkType::kColumns;
  if (block >= chunks) return;
  const bool one_page = pages.size >= kWidth || args.backends[0].real_page_table == nullptr;
  ChunkType chunk;
  chunk.Load(source, block, longest.live);
  locate(request);
  while (true) {
    chunk.FindPages(pages, block);
#pragma unroll 1
    for (int32_t j = 0; j < request.count; ++j) {
      const Extent extent = request.extent(j);
      if ((block + 1) * ChunkType::kColumns <= extent.live && one_page) {
        chunk.StoreLive(args, block, request.first + j);
      } else {
        chunk.StorePart(args, pages, block, request.first + j, extent);
      }
    }
    block += blocks;
    if (block >= chunks) return;
    chunk.Load(source, block, longest.live);
  }
}

// The same where there is no wide table: only the first token of each page is read.
template <typename Locate>
__device__ void CopyPages(const Fused& args, const Pages& pages, Request request,
                          const int32_t* source, int32_t block, int32_t blocks, Locate locate) {
  const int32_t end = request.longest().end;
  locate(request);
#pragma unroll 1
  for (int64_t index = block * kThreads + threadIdx.x; index * pages.size < end;
       index += blocks * kThreads) {
    const auto token = static_cast<int32_t>(index * pages.size);
#pragma unroll 1
    for (int32_t j = 0; j < request.count; ++j) {
      const Extent extent = request.extent(j);
      if (token >= extent.end) continue;
      const int32_t value = token < extent.live ? source[token] : 0;
      StorePage(args, request.first + j, static_cast<int32_t>(index), pages.Index(value));
    }
  }
}

template <int kWidth, int kAccesses, bool kRagged>
__device__ void WriteTables(const Fused& args, const Pages& pages, uint32_t i, uint32_t requests,
                            int32_t block, int32_t blocks) {
  const Rows& rows = args.rows;
  const auto q = [&](int64_t k) -> int64_t { return rows.q(k); };
  const auto copy = [&](const Request& request, const int32_t* source, auto locate) {
    if (args.backends[0].page_indices != nullptr) {
      CopyRows<kWidth, kAccesses>(args, pages, request, source, block, blocks, locate);
    } else {
      CopyPages(args, pages, request, source, block, blocks, locate);
    }
  };

  if (i < rows.requests) {
    // Both loads are under way before either is needed.
    const int64_t index = args.req_pool_indices[i], seq_len = rows.seq_lens[i];
    const int32_t tokens = kRagged ? rows.q(i) : rows.tokens_per_request;
    const Request own{0, 0, rows.cache_seqlen_of(seq_len), tokens, args.max_len, args.tail};
    if (own.q > 0) {
      copy(own, args.pool_row(index), [&](Request& request) {
        request.first =
            kRagged ? BlockSum<int64_t>(0, i, q) : static_cast<int64_t>(i) * request.q;
        const int64_t room = rows.count - request.first;
        request.count = room < request.q ? static_cast<int32_t>(room < 0 ? 0 : room) : request.q;
      });
    }
  }
  if (kRagged && args.tail != Tail::kKeep) {
    // This request's share of the rows past the total: nothing is live in them.
    const int64_t total = BlockSum<int64_t>(0, rows.requests, q);
#pragma unroll 1
    for (int64_t row = total + i; row < rows.count; row += requests) {
      copy(Request{row, 1, 0, 1, args.max_len, Tail::kZero}, nullptr, [](Request&) {});
    }
  }
}

template <int kWidth, int kAccesses, bool kRagged>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    FusedMetadataKernel(const __grid_constant__ Fused args, const Pages pages,
                        uint32_t length_blocks, uint32_t requests, uint32_t blocks_per_request) {
  if (blockIdx.x < length_blocks) {
    WriteLengths(args, blockIdx.x, length_blocks);
    return;
  }
  // Neighbouring blocks write neighbouring memory.
  const uint32_t block = blockIdx.x - length_blocks, i = block / blocks_per_request;
  WriteTables<kWidth, kAccesses, kRagged>(args, pages, i, requests,
                                          block - i * blocks_per_request, blocks_per_request);
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

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kWidth, int kAccesses>
void LaunchFusedMetadata(cudaStream_t stream, const Fused& args) {
  const int64_t chunk = args.backends[0].page_indices != nullptr
                            ? Chunk<kWidth, kAccesses>::kColumns
                            : static_cast<int64_t>(kThreads) * args.real_page_size;
  // Without requests, one block in their place clears the rows.
  const int64_t requests = std::max<int64_t>(args.rows.requests, 1);
  const int64_t length_blocks = CeilDiv(requests, kThreads);
  const int64_t chunks = CeilDiv(args.max_len, chunk);
  const int64_t most = requests * chunks <= kManyWaves ? kOneWave : kManyWaves;
  const int64_t blocks_per_request = std::min(chunks, std::max<int64_t>(1, most / requests));
  const auto blocks = static_cast<unsigned>(length_blocks + requests * blocks_per_request);
  const auto kernel = args.rows.ragged() ? FusedMetadataKernel<kWidth, kAccesses, true>
                                         : FusedMetadataKernel<kWidth, kAccesses, false>;
  kernel<<<blocks, kThreads, 0, stream>>>(
      args, Pages::Of(args.real_page_size), static_cast<uint32_t>(length_blocks),
      static_cast<uint32_t>(requests), static_cast<uint32_t>(blocks_per_request));
}

// ---------------------------------------------------------------------------------------------
// Copies.

constexpr int kCopyPerThread = 4;
constexpr int64_t kCopyChunk = 4 * kThreads * kCopyPerThread;

struct CopyGrid {
  int64_t first_block[kCopiedArrays + 1];
};

__global__ void __launch_bounds__(kThreads)
    CopyMetadataKernel(const __grid_constant__ Copy args, const __grid_constant__ CopyGrid grid) {
  int a = 0;
  while (blockIdx.x >= grid.first_block[a + 1]) ++a;
  const CopiedArray& array = args.arrays[a];
  const int64_t chunks = (array.columns + kCopyChunk - 1) / kCopyChunk;
  const int64_t block = blockIdx.x - grid.first_block[a];
  const int64_t row = block / chunks, begin = block % chunks * kCopyChunk;
  const int64_t live = args.live(array, row);
  const int64_t from = row * array.columns, to = row * array.destination_stride;
  bool vectors =
      from % 4 == 0 && to % 4 == 0 && reinterpret_cast<uintptr_t>(array.source) % 16 == 0;
  for (int b = 0; b < args.num_backends; ++b) {
    vectors = vectors && reinterpret_cast<uintptr_t>(args.destinations[b][a]) % 16 == 0;
  }
#pragma unroll
  for (int u = 0; u < kCopyPerThread; ++u) {
    const int64_t column = begin + (u * kThreads + threadIdx.x) * 4;
    if (vectors && column + 4 <= live) {
      const int4 value = __ldg(reinterpret_cast<const int4*>(array.source + from + column));
      for (int b = 0; b < args.num_backends; ++b) {
        __stcs(reinterpret_cast<int4*>(args.destinations[b][a] + to + column), value);
      }
      continue;
    }
    for (int64_t c = column; c < column + 4 && c < live; ++c) {
      const int32_t value = array.source[from + c];
      for (int b = 0; b < args.num_backends; ++b) args.destinations[b][a][to + c] = value;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Prefix sums.

// Each block adds up what comes before its tile, out of the L2 cache, and scans the tile.
template <int kBlockThreads, int kItems>
__global__ void __launch_bounds__(kBlockThreads)
    BlockScanKernel(const int32_t* x, int64_t n, int32_t* out) {
  using Reduce = cub::BlockReduce<uint32_t, kBlockThreads>;
  using Scan = cub::BlockScan<uint32_t, kBlockThreads>;
  __shared__ union {
    typename Reduce::TempStorage reduce;
    typename Scan::TempStorage scan;
  } temp;
  __shared__ uint32_t before;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockThreads * kItems;

  uint32_t items[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = first + threadIdx.x * kItems + k;
    items[k] = i < n ? x[i] : 0;
  }
  if (blockIdx.x > 0) {
    uint32_t sum = 0;
    if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
#pragma unroll 8
      for (int64_t i = threadIdx.x; i < first / 4; i += kBlockThreads) {
        const int4 v = __ldg(reinterpret_cast<const int4*>(x) + i);
        sum += static_cast<uint32_t>(v.x) + v.y + v.z + v.w;
      }
    } else {
#pragma unroll 8
      for (int64_t i = threadIdx.x; i < first; i += kBlockThreads) sum += x[i];
    }
    sum = Reduce(temp.reduce).Sum(sum);
    if (threadIdx.x == 0) before = sum;
    __syncthreads();
  }
  Scan(temp.scan).InclusiveSum(items, items);
  const uint32_t base = blockIdx.x > 0 ? before : 0;
  if (first == 0 && threadIdx.x == 0) out[0] = 0;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = first + threadIdx.x * kItems + k;
    if (i < n) out[i + 1] = base + items[k];
  }
}

__global__ void SequentialKernel(const int32_t* x, int64_t n, int32_t* out) {
  int32_t sum = 0;
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) out[i + 1] = sum = Add(sum, x[i]);
}

// G. E. Blelloch, "Prefix sums and their applications" (1990), in tiles whose totals are carried on,
// so that any length is right.
constexpr int kBlellochTile = 1024;

__global__ void __launch_bounds__(kBlellochTile / 2)
    BlellochKernel(const int32_t* x, int64_t n, int32_t* out) {
  __shared__ uint32_t tile[kBlellochTile];
  __shared__ uint32_t carry, total;
  if (threadIdx.x == 0) carry = 0, out[0] = 0;
  for (int64_t first = 0; first < n; first += kBlellochTile) {
    for (int k = threadIdx.x; k < kBlellochTile; k += blockDim.x) {
      tile[k] = first + k < n ? x[first + k] : 0;
    }
    int stride = 1;
    for (int active = kBlellochTile / 2; active > 0; active /= 2, stride *= 2) {  // reduce
      __syncthreads();
      if (threadIdx.x < active) {
        const int right = (2 * threadIdx.x + 2) * stride - 1;
        tile[right] += tile[right - stride];
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      total = tile[kBlellochTile - 1];
      tile[kBlellochTile - 1] = 0;
    }
    for (int active = 1; active < kBlellochTile; active *= 2) {  // distribute
      stride /= 2;
      __syncthreads();
      if (threadIdx.x < active) {
        const int right = (2 * threadIdx.x + 2) * stride - 1;
        const uint32_t left = tile[right - stride];
        tile[right - stride] = tile[right];
        tile[right] += left;
      }
    }
    __syncthreads();
    for (int k = threadIdx.x; k < kBlellochTile && first + k < n; k += blockDim.x) {
      out[first + k + 1] = carry + tile[k] + static_cast<uint32_t>(x[first + k]);
    }
    __syncthreads();
    if (threadIdx.x == 0) carry += total;
  }
}

// ---------------------------------------------------------------------------------------------
// Draft extend.

__device__ void WriteRow(const DraftExtend& args, int64_t row, int64_t i, int64_t j) {
  const Rows& rows = args.rows;
  if (i >= rows.requests && args.tail == Tail::kKeep) return;
  const int32_t kv_len =
      i < rows.requests ? Rows::kv_len(rows.cache_seqlen(i), rows.q(i), static_cast<int32_t>(j)) : 0;
  args.seqlens_expanded[row] = kv_len;
  args.nsa_cache_seqlens[row] = rows.nsa_len(kv_len);
}

constexpr int kExpandThreads = 256;

// Each block expands 256 rows: it scans the requests tile by tile until they reach its last row, and
// each thread looks its row up in the tile that holds it.
__global__ void __launch_bounds__(kExpandThreads)
    FillDraftExtendKernel(const __grid_constant__ DraftExtend args) {
  using Scan = cub::BlockScan<int64_t, kExpandThreads>;
  __shared__ typename Scan::TempStorage temp;
  __shared__ int64_t ends[kExpandThreads];
  const Rows& rows = args.rows;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kExpandThreads;
  const int64_t row = first_row + threadIdx.x;
  const bool sums_all = blockIdx.x == 0;  // this block also writes the total

  int64_t before = 0, request = rows.requests, token = 0;
  for (int64_t first = 0; first < rows.requests; first += kExpandThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t end, total;
    Scan(temp).InclusiveSum(i < rows.requests ? rows.q(i) : 0, end, total);
    ends[threadIdx.x] = before + end;
    __syncthreads();
    if (row >= before && row < before + total) {
      int low = 0, high = kExpandThreads - 1;  // the first request that ends after this row
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > row) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      request = first + low;
      token = row - (low > 0 ? ends[low - 1] : before);
    }
    before += total;
    __syncthreads();
    if (!sums_all && before > first_row + kExpandThreads) break;
  }
  if (row < rows.count) WriteRow(args, row, request, token);
  if (sums_all && threadIdx.x == 0) *args.total_tokens = static_cast<int32_t>(before);
}

// The same in two launches, from offsets in global memory; they stop at the capacity.
__global__ void OffsetsKernel(const __grid_constant__ DraftExtend args) {
  using Scan = cub::BlockScan<int64_t, kExpandThreads>;
  __shared__ typename Scan::TempStorage temp;
  const Rows& rows = args.rows;
  int64_t before = 0;
  if (threadIdx.x == 0) args.offsets[0] = 0;
  for (int64_t first = 0; first < rows.requests; first += kExpandThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t end, total;
    Scan(temp).InclusiveSum(i < rows.requests ? rows.q(i) : 0, end, total);
    if (i < rows.requests) {
      args.offsets[i + 1] =
          static_cast<int32_t>(before + end < rows.count ? before + end : rows.count);
    }
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) *args.total_tokens = static_cast<int32_t>(before);
}

constexpr int kLinearSearchLimit = 16;  // requests up to which "adaptive" searches linearly

template <bool kAdaptive>
__global__ void ExpandKernel(const __grid_constant__ DraftExtend args) {
  const Rows& rows = args.rows;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows.count) return;
  int64_t i = 0;
  if (kAdaptive && rows.requests <= kLinearSearchLimit) {
    while (i < rows.requests && args.offsets[i + 1] <= row) ++i;
  } else {
    int64_t high = rows.requests;
    while (i < high) {
      const int64_t middle = (i + high) / 2;
      if (args.offsets[middle + 1] > row) {
        high = middle;
      } else {
        i = middle + 1;
      }
    }
  }
  WriteRow(args, row, i, row - args.offsets[i]);
}

// What went wrong with the launch before, or "".
std::string LaunchError(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string("kernel ") + kernel + ": " + cudaGetErrorString(error);
}

}  // namespace

std::string Cuda::Load() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {
           reinterpret_cast<const void*>(&FusedMetadataKernel<4, 1, false>),
           reinterpret_cast<const void*>(&FusedMetadataKernel<4, 1, true>),
           reinterpret_cast<const void*>(&FusedMetadataKernel<1, 4, false>),
           reinterpret_cast<const void*>(&FusedMetadataKernel<1, 4, true>),
           reinterpret_cast<const void*>(&CopyMetadataKernel),
           reinterpret_cast<const void*>(&FillDraftExtendKernel),
           reinterpret_cast<const void*>(&OffsetsKernel),
           reinterpret_cast<const void*>(&ExpandKernel<false>),
           reinterpret_cast<const void*>(&ExpandKernel<true>),
       }) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return std::string("loading kernels: ") + cudaGetErrorString(error);
  }
  return "";
}

std::string Cuda::PrefixSum(Stream stream, PrefixSumVariant variant, const int32_t* x, int64_t n,
                      int32_t* out) {
  switch (variant) {
    case PrefixSumVariant::kSequential:
      SequentialKernel<<<1, 1, 0, stream>>>(x, n, out);
      break;
    case PrefixSumVariant::kBlelloch:
      BlellochKernel<<<1, kBlellochTile / 2, 0, stream>>>(x, n, out);
      break;
    case PrefixSumVariant::kBlockScan:
      if (n <= 512) {
        BlockScanKernel<128, 4><<<1, 128, 0, stream>>>(x, n, out);
      } else {
        BlockScanKernel<512, 4>
            <<<static_cast<unsigned>(CeilDiv(n, 512 * 4)), 512, 0, stream>>>(x, n, out);
      }
      break;
  }
  return LaunchError("prefix_sum");
}

std::string Cuda::FillDraftExtend(Stream stream, DraftExtendVariant variant,
                            const DraftExtend& args) {
  const auto blocks =
      static_cast<unsigned>(std::max<int64_t>(1, CeilDiv(args.rows.count, kExpandThreads)));
  if (variant == DraftExtendVariant::kOptimized) {
    FillDraftExtendKernel<<<blocks, kExpandThreads, 0, stream>>>(args);
    return LaunchError("fill_draft_extend_metadata");
  }
  OffsetsKernel<<<1, kExpandThreads, 0, stream>>>(args);
  if (std::string error = LaunchError("draft_extend_offsets"); !error.empty()) return error;
  if (variant == DraftExtendVariant::kAdaptive) {
    ExpandKernel<true><<<blocks, kExpandThreads, 0, stream>>>(args);
  } else {
    ExpandKernel<false><<<blocks, kExpandThreads, 0, stream>>>(args);
  }
  return LaunchError("fill_draft_extend_metadata");
}

std::string Cuda::CopyMetadata(Stream stream, const Copy& args) {
  CopyGrid grid{};
  for (int a = 0; a < kCopiedArrays; ++a) {
    const CopiedArray& array = args.arrays[a];
    grid.first_block[a + 1] =
        grid.first_block[a] + array.rows * CeilDiv(array.columns, kCopyChunk);
  }
  const int64_t blocks = grid.first_block[kCopiedArrays];
  if (blocks == 0) return "";
  CopyMetadataKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, grid);
  return LaunchError("fused_metadata_copy");
}

std::string Cuda::FusedMetadata(Stream stream, const Fused& args) {
  if (AllowsVectors(args)) {
    LaunchFusedMetadata<4, 1>(stream, args);
  } else {
    LaunchFusedMetadata<1, 4>(stream, args);
  }
  return LaunchError("fused_metadata");
}

}  // namespace jaxnsa
