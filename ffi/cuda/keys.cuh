// How a block of the fused kernel writes a tile of the keys of all requests.
#ifndef JAXNSA_CUDA_KEYS_CUH_
#define JAXNSA_CUDA_KEYS_CUH_

#include <cstdint>

#include "block_sums.cuh"
#include "parameters.cuh"

namespace jaxnsa {

constexpr int kKeysPerThread = 4;
constexpr int kTileKeys = kKeysPerThread * kThreads;

// Writes a tile of `flat_page_indices` in every backend. The block scans the KV lengths of 128
// requests after the other until they reach its last key, and each thread looks its keys up.
template <int kCapacity, bool kSchedules>
__device__ void WriteKeys(const Parameters<kCapacity, kSchedules>& args, int32_t tile) {
  __shared__ int64_t starts[kThreads];  // the first key of each of 128 requests
  __shared__ int64_t end;               // of the last one's keys
  __shared__ const int32_t* sources[kThreads];
  __shared__ int first_request, last_request;  // of the group, that may have keys of the tile
  const int64_t first = int64_t{tile} * kTileKeys;
  const int64_t last = first + kTileKeys < args.max_total_keys ? first + kTileKeys
                                                               : args.max_total_keys;
  if (first >= last) return;
  int32_t slots[kKeysPerThread] = {};
  const auto key = [&](int u) { return first + u * kThreads + static_cast<int>(threadIdx.x); };

  int64_t before = 0;
  for (int64_t group = 0; group < args.rows.requests && before < last; group += kThreads) {
    const int64_t i = group + threadIdx.x;
    const bool exists = i < args.rows.requests;
    if (threadIdx.x == 0) {
      first_request = 0;
      last_request = Min(args.rows.requests - static_cast<int32_t>(group), kThreads) - 1;
    }
    // Both loads are issued before either value is used.
    const int32_t index = exists ? args.req_pool_indices[i] : 0;
    const int32_t length = exists ? args.rows.cache_seqlen(i) : 0;
    const int64_t start = before + SumBeforeThread<int64_t>(length);
    starts[threadIdx.x] = start;
    sources[threadIdx.x] = args.pool.row(index);
    if (threadIdx.x == kThreads - 1) end = start + length;
    const auto has = [&](int64_t key) { return key >= start && key < start + length; };
    if (has(first)) first_request = static_cast<int>(threadIdx.x);
    if (has(last - 1)) last_request = static_cast<int>(threadIdx.x);
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kKeysPerThread; ++u) {
      if (key(u) < before || key(u) >= end) continue;
      int low = first_request, high = last_request;  // the last that begins at this key or before
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (starts[middle] <= key(u)) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      const int64_t column = key(u) - starts[low];
      if (column < args.max_len) slots[u] = __ldg(sources[low] + column);
    }
    before = end;
    __syncthreads();
  }
  // Keys from `before` on are padding keys, if the scan has come to an end there.
  const int64_t written = args.clears_padding || before > last ? last : before;
#pragma unroll
  for (int u = 0; u < kKeysPerThread; ++u) {
    if (key(u) >= written) continue;
    ForEach(args.lengths, args.num_backends,
            [&](const Lengths& to, int) { to.flat_page_indices[key(u)] = slots[u]; });
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_KEYS_CUH_
