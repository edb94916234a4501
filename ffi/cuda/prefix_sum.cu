// Prefix sums: the variants that the source documents compare.
//
// Input of all kernels: x, int32 [n]. Output: out, int32 [n + 1], 0 and the inclusive prefix sum.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "computations.h"
#include "launch.cuh"

namespace jaxnsa {
namespace {

// Grid: a block for each tile of kBlockThreads * kItems elements. Block: kBlockThreads threads,
// which add up what comes before their tile, out of the L2 cache, and scan the tile.
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
    if (IsAligned(x)) {
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

// Grid: one block, of one thread.
__global__ void SequentialKernel(const int32_t* x, int64_t n, int32_t* out) {
  int32_t sum = 0;
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) out[i + 1] = sum = Add(sum, x[i]);
}

// G. E. Blelloch, "Prefix sums and their applications" (1990), in tiles whose totals are carried
// on, so that any length is right.
// Grid: one block, of 512 threads: half a tile.
constexpr int kBlellochTile = 1024;

__global__ void __launch_bounds__(kBlellochTile / 2)
    BlellochKernel(const int32_t* x, int64_t n, int32_t* out) {
  const int thread = threadIdx.x;
  __shared__ uint32_t tile[kBlellochTile];
  __shared__ uint32_t carry, total;
  if (thread == 0) carry = 0, out[0] = 0;
  for (int64_t first = 0; first < n; first += kBlellochTile) {
    for (int k = thread; k < kBlellochTile; k += blockDim.x) {
      tile[k] = first + k < n ? x[first + k] : 0;
    }
    int stride = 1;
    for (int active = kBlellochTile / 2; active > 0; active /= 2, stride *= 2) {  // reduce
      __syncthreads();
      if (thread < active) {
        const int right = (2 * thread + 2) * stride - 1;
        tile[right] += tile[right - stride];
      }
    }
    __syncthreads();
    if (thread == 0) {
      total = tile[kBlellochTile - 1];
      tile[kBlellochTile - 1] = 0;
    }
    for (int active = 1; active < kBlellochTile; active *= 2) {  // distribute
      stride /= 2;
      __syncthreads();
      if (thread < active) {
        const int right = (2 * thread + 2) * stride - 1;
        const uint32_t left = tile[right - stride];
        tile[right - stride] = tile[right];
        tile[right] += left;
      }
    }
    __syncthreads();
    for (int k = thread; k < kBlellochTile && first + k < n; k += blockDim.x) {
      out[first + k + 1] = carry + tile[k] + static_cast<uint32_t>(x[first + k]);
    }
    __syncthreads();
    if (thread == 0) carry += total;
  }
}

}  // namespace

void PrefixSum(Stream stream, PrefixSumVariant variant, const int32_t* x, int64_t n, int32_t* out) {
  const auto launch = [&](auto kernel, int64_t grid, int threads) {
    Launch("prefix_sum", stream, kernel, grid, threads, x, n, out);
  };
  if (variant == PrefixSumVariant::kSequential) {
    launch(SequentialKernel, 1, 1);
  } else if (variant == PrefixSumVariant::kBlelloch) {
    launch(BlellochKernel, 1, kBlellochTile / 2);
  } else if (n <= 512) {
    launch(BlockScanKernel<128, 4>, 1, 128);
  } else {
    launch(BlockScanKernel<512, 4>, CeilDiv(n, 512 * 4), 512);
  }
}

}  // namespace jaxnsa
