// Copies of one source to all destinations on the CPU: row by row, each tile of a row stored
// everywhere it goes while it is in the second-level cache.
#include <algorithm>
#include <cstring>

#include "computations.h"

namespace jaxnsa {
namespace {

// Columns of a tile. A memcpy of megabytes would store past the caches.
constexpr int64_t kTileColumns = 32768;

}  // namespace

void Copy(Stream, const CopyArguments& args) {
  for (int a = 0; a < args.num_arrays; ++a) {
    const CopiedArray& array = args.arrays[a];
    for (int64_t row = 0; row < array.rows; ++row) {
      int64_t columns = array.columns;
      if (array.tokens_per_column > 0) {
        columns = std::min(columns, LiveColumns(array.tokens_per_column, args.kv_lens[row]));
      }
      const int32_t* const source = array.source + row * array.columns;
      for (int64_t begin = 0; begin < columns; begin += kTileColumns) {
        const int64_t end = std::min(begin + kTileColumns, columns);
        for (int b = 0; b < args.num_backends; ++b) {
          int32_t* const destination = args.destinations[b][a] + row * array.destination_stride;
          std::memcpy(destination + begin, source + begin, (end - begin) * sizeof(int32_t));
        }
      }
    }
  }
}

void LoadCopy() {}

}  // namespace jaxnsa
