"""What SGLang's functions of these names write, one request after the other."""

import torch


def fused_dsa_decode_metadata(
    seq_lens,
    req_pool_indices,
    req_to_token,
    cache_seqlens,
    cu_seqlens_k,
    page_table_1,
    dsa_cache_seqlens,
    dsa_cu_seqlens_k,
    real_page_table,
    bs,
    max_len,
    dsa_index_topk,
    physical_page_size,
):
    lengths = seq_lens[:bs].tolist()
    write_lengths(lengths, cache_seqlens, cu_seqlens_k)
    write_lengths([min(n, dsa_index_topk) for n in lengths], dsa_cache_seqlens, dsa_cu_seqlens_k)
    tables = Tables(page_table_1, real_page_table, max_len, physical_page_size)
    for i in range(bs):
        tables.write_row(i, req_to_token[req_pool_indices[i]], lengths[i])


def fused_dsa_target_verify_metadata(
    seq_lens,
    req_pool_indices,
    req_to_token,
    cache_seqlens,
    cu_seqlens_k,
    page_table_1,
    seqlens_expanded,
    dsa_cache_seqlens,
    dsa_cu_seqlens_k,
    real_page_table,
    bs,
    max_seqlen_k,
    dsa_index_topk,
    physical_page_size,
    next_n,
    paged_mqa_ctx_lens_2d=None,
):
    before = seq_lens[:bs].tolist()
    lengths = [n + next_n for n in before]
    expanded = [n + j + 1 for n in before for j in range(next_n)]
    write_lengths(lengths, cache_seqlens, cu_seqlens_k)
    write_lengths(expanded, seqlens_expanded)
    write_lengths([min(n, dsa_index_topk) for n in expanded], dsa_cache_seqlens, dsa_cu_seqlens_k)
    tables = Tables(page_table_1, real_page_table, max_seqlen_k, physical_page_size)
    for row in range(bs * next_n):
        i = row // next_n
        tables.write_row(row, req_to_token[req_pool_indices[i]], lengths[i])
        if paged_mqa_ctx_lens_2d is not None:
            paged_mqa_ctx_lens_2d[i] = lengths[i]


def fused_dsa_draft_extend_metadata(
    seq_lens,
    extend_seq_lens,
    req_pool_indices,
    req_to_token,
    cache_seqlens,
    cu_seqlens_k,
    page_table_1,
    seqlens_expanded,
    dsa_cache_seqlens,
    dsa_cu_seqlens_k,
    real_page_table,
    bs,
    total_len,
    max_seqlen_k,
    dsa_index_topk,
    physical_page_size,
    max_extend_len,
    max_total_len,
    static_extend_len=False,
):
    assert total_len <= min(max_total_len, bs * max_extend_len)
    lengths = seq_lens[:bs].tolist()
    extend = [int(extend_seq_lens[0])] * bs if static_extend_len else extend_seq_lens[:bs].tolist()
    owners = [(i, j) for i, q in enumerate(extend) for j in range(q)][:total_len]
    expanded = [max(lengths[i] - extend[i] + j + 1, 0) for i, j in owners]
    write_lengths(lengths, cache_seqlens, cu_seqlens_k)
    write_lengths(expanded, seqlens_expanded)
    write_lengths([min(n, dsa_index_topk) for n in expanded], dsa_cache_seqlens, dsa_cu_seqlens_k)
    tables = Tables(page_table_1, real_page_table, max_seqlen_k, physical_page_size)
    for row, (i, _) in enumerate(owners):
        tables.write_row(row, req_to_token[req_pool_indices[i]], lengths[i])


def write_lengths(lengths, out, sums=None):
    values = torch.tensor(lengths, dtype=torch.int32)
    out[: len(lengths)] = values
    if sums is not None:
        sums[0] = 0
        sums[1 : len(lengths) + 1] = values.cumsum(0, dtype=torch.int32)


class Tables:
    def __init__(self, wide, real, max_len, page):
        self.wide, self.real, self.max_len, self.page = wide, real, max_len, page

    def write_row(self, row, slots, kv_len):
        live = slots[: min(kv_len, self.max_len)]
        if self.wide is not None:
            self.wide[row, : len(live)] = live
        if self.page > 1:
            pages = live[:: self.page] // self.page
            self.real[row, : len(pages)] = pages
