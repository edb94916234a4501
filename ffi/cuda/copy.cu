// Copies of one source to all destinations in one launch.
//
// Grid: for each array the blocks of its tiles, row by row.
// Block: 128 threads, which move a tile of 2,048 columns, 16 a thread.
// Inputs: the arrays of the source, contiguous, and the KV lengths of the rows of tables that are
//   copied as far as they are live.
// Outputs: the same arrays of every destination.
#include <algorithm>

#include "computations.h"
#include "launch.cuh"
#include "parameters.cuh"

namespace jaxnsa {
namespace {

constexpr int kCopyThreads = 128;
constexpr int kAccesses = 4;
constexpr int64_t kCopyTileColumns = 4 * kCopyThreads * kAccesses;

// The parameters of the kernel for so many backends at most.
template <int kCapacity>
struct CopyParameters {
  int32_t num_backends;
  int64_t first_block[kFields + 1];  // of each array
  const int32_t* kv_lens;
  CopiedArray arrays[kFields];
  int32_t* destinations[kCapacity][kFields];
};

template <int kCapacity>
__global__ void __launch_bounds__(kCopyThreads)
    CopyKernel(const __grid_constant__ CopyParameters<kCapacity> args) {
  int a = 0;
  while (blockIdx.x >= args.first_block[a + 1]) ++a;
  const CopiedArray& array = args.arrays[a];
  const int64_t tiles = CeilDiv(array.columns, kCopyTileColumns);
  const int64_t block = blockIdx.x - args.first_block[a];
  const int64_t row = block / tiles, begin = block % tiles * kCopyTileColumns;
  // Where there is no limit a column stands for 0 tokens: with a length of 1 all are live.
  const int32_t kv_len = array.tokens_per_column > 0 ? args.kv_lens[row] : 1;
  const int64_t from = row * array.columns, to = row * array.destination_stride;
  bool vectors = from % 4 == 0 && to % 4 == 0 && IsAligned(array.source);
  for (int b = 0; b < args.num_backends; ++b) {
    vectors = vectors && IsAligned(args.destinations[b][a]);
  }
  const auto is_copied = [&](int64_t column) {
    return column < array.columns && IsLive(column, array.tokens_per_column, kv_len);
  };
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    const int64_t column = begin + (u * kCopyThreads + threadIdx.x) * 4;
    if (vectors && is_copied(column + 3)) {
      const int4 value = __ldg(reinterpret_cast<const int4*>(array.source + from + column));
      for (int b = 0; b < args.num_backends; ++b) {
        __stcs(reinterpret_cast<int4*>(args.destinations[b][a] + to + column), value);
      }
      continue;
    }
    for (int64_t c = column; c < column + 4 && is_copied(c); ++c) {
      const int32_t value = array.source[from + c];
      for (int b = 0; b < args.num_backends; ++b) args.destinations[b][a][to + c] = value;
    }
  }
}

template <int kCapacity>
void LaunchCopy(Stream stream, const CopyArguments& args) {
  CopyParameters<kCapacity> parameters{};
  parameters.num_backends = args.num_backends;
  parameters.kv_lens = args.kv_lens;
  for (int a = 0; a < args.num_arrays; ++a) {
    const CopiedArray& array = args.arrays[a];
    parameters.arrays[a] = array;
    parameters.first_block[a + 1] =
        parameters.first_block[a] + array.rows * CeilDiv(array.columns, kCopyTileColumns);
  }
  for (int b = 0; b < args.num_backends; ++b) {
    std::copy_n(args.destinations[b], args.num_arrays, parameters.destinations[b]);
  }
  const int64_t blocks = parameters.first_block[args.num_arrays];
  if (blocks > 0) Launch("copy", stream, CopyKernel<kCapacity>, blocks, kCopyThreads, parameters);
}

}  // namespace

void Copy(Stream stream, const CopyArguments& args) {
  if (args.num_backends <= kFewBackends) {
    LaunchCopy<kFewBackends>(stream, args);
  } else {
    LaunchCopy<kMaxBackends>(stream, args);
  }
}

void LoadCopy() { LoadKernels("copy", CopyKernel<kFewBackends>, CopyKernel<kMaxBackends>); }

}  // namespace jaxnsa
