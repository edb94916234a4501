// The lengths of a draft-extend step on the CPU: all variants are the same loop.
#include "computations.h"

namespace jaxnsa {

void FillDraftExtendMetadata(Stream, DraftExtendVariant,
                             const FillDraftExtendMetadataArguments& args) {
  const Rows& rows = args.rows;
  const RowRules rules{args.nsa_index_topk, 1, false};
  int64_t row = 0;
  int32_t total = 0;
  for (int64_t i = 0; i < rows.requests; ++i) {
    const int32_t cache_seqlen = rows.cache_seqlen(i), q = rows.q(i);
    total = Add(total, q);
    for (int32_t j = 0; j < q && row < rows.count; ++j, ++row) {
      const int32_t kv_len = Rows::kv_len(cache_seqlen, q, j);
      Store(args.lengths, row, RowValuesOf(kv_len, {}, rules));
    }
  }
  *args.total_tokens = total;
  if (!args.clears_padding) return;
  for (; row < rows.count; ++row) Store(args.lengths, row, PaddingRowValues());
}

void LoadFillDraftExtendMetadata() {}

}  // namespace jaxnsa
