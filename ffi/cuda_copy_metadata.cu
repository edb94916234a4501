// Copies of one source to all destinations in one launch.
#include "cuda.h"
#include "cuda_launch.h"

namespace jaxnsa {
namespace {

constexpr int kThreads = 128;
constexpr int kPerThread = 4;
constexpr int64_t kChunk = 4 * kThreads * kPerThread;

struct CopyGrid {
  int64_t first_block[kCopiedArrays + 1];
};

__global__ void __launch_bounds__(kThreads)
    CopyMetadataKernel(const __grid_constant__ Copy args, const __grid_constant__ CopyGrid grid) {
  int a = 0;
  while (blockIdx.x >= grid.first_block[a + 1]) ++a;
  const CopiedArray& array = args.arrays[a];
  const int64_t chunks = CeilDiv(array.columns, kChunk);
  const int64_t block = blockIdx.x - grid.first_block[a];
  const int64_t row = block / chunks, begin = block % chunks * kChunk;
  const int64_t live = args.live(array, row);
  const int64_t from = row * array.columns, to = row * array.destination_stride;
  bool vectors = from % 4 == 0 && to % 4 == 0 && IsAligned(array.source);
  for (int b = 0; b < args.num_backends; ++b) {
    vectors = vectors && IsAligned(args.destinations[b][a]);
  }
#pragma unroll
  for (int u = 0; u < kPerThread; ++u) {
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

}  // namespace

std::string Cuda::LoadCopyMetadata() {
  return LoadKernels("fused_metadata_copy", CopyMetadataKernel);
}

std::string Cuda::CopyMetadata(Stream stream, const Copy& args) {
  CopyGrid grid{};
  for (int a = 0; a < kCopiedArrays; ++a) {
    const CopiedArray& array = args.arrays[a];
    grid.first_block[a + 1] =
        grid.first_block[a] + array.rows * CeilDiv(array.columns, kChunk);
  }
  const int64_t blocks = grid.first_block[kCopiedArrays];
  if (blocks == 0) return "";
  return Launch("fused_metadata_copy", stream, CopyMetadataKernel, blocks, kThreads, args, grid);
}

}  // namespace jaxnsa
