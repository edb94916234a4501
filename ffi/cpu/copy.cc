// Copies of one source to all destinations on the CPU, row by row.
#include <algorithm>
#include <cstring>

#include "computations.h"

namespace jaxnsa {

void Copy(Stream, const CopyArguments& args) {
  for (int a = 0; a < args.num_arrays; ++a) {
    const CopiedArray& array = args.arrays[a];
    for (int64_t row = 0; row < array.rows; ++row) {
      int64_t columns = array.columns;
      if (array.tokens_per_column > 0) {
        columns = std::min(columns, LiveColumns(array.tokens_per_column, args.kv_lens[row]));
      }
      if (columns == 0) continue;
      for (int b = 0; b < args.num_backends; ++b) {
        std::memcpy(args.destinations[b][a] + row * array.destination_stride,
                    array.source + row * array.columns, columns * sizeof(int32_t));
      }
    }
  }
}

void LoadCopy() {}

}  // namespace jaxnsa
