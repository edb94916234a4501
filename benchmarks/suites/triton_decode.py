"""What an engine has without this library: one Triton launch for each backend."""

from typing import Any

import triton
import triton.language as tl

_TOKENS = 1024  # that one program copies


def decode_metadata(
    seq_lens: Any,
    req_pool_indices: Any,
    req_to_token: Any,
    backend: dict[str, Any],
    topk: int,
    page_size: int,
) -> None:
    """Fills the tensors of one backend, tables as far as they are live; page_size divides 1,024."""
    bs, max_len = backend["page_indices"].shape
    _decode_metadata[(bs, triton.cdiv(max_len, _TOKENS))](
        seq_lens,
        req_pool_indices,
        req_to_token,
        *backend.values(),
        req_to_token.stride(0),
        max_len,
        backend["real_page_table"].shape[1],
        topk,
        BS=triton.next_power_of_2(bs),
        PAGE=page_size,
        TOKENS=_TOKENS,
    )


@triton.jit
def _decode_metadata(
    seq_lens,
    indices,
    pool,
    cache_seqlens,
    cu_seqlens_k,
    seqlens_expanded,
    nsa_cache_seqlens,
    nsa_cu_seqlens_k,
    page_indices,
    real_page_table,
    pool_stride,
    max_len,
    pages,
    topk,
    BS: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    i = tl.program_id(0)
    piece = tl.program_id(1)
    length = tl.load(seq_lens + i)
    if piece == 0:
        k = tl.arange(0, BS)
        lengths = tl.load(seq_lens + k, k <= i, 0)
        if i == 0:
            tl.store(cu_seqlens_k, 0)
            tl.store(nsa_cu_seqlens_k, 0)
        tl.store(cache_seqlens + i, length)
        tl.store(seqlens_expanded + i, length)
        tl.store(nsa_cache_seqlens + i, tl.minimum(length, topk))
        tl.store(cu_seqlens_k + i + 1, tl.sum(lengths))
        tl.store(nsa_cu_seqlens_k + i + 1, tl.sum(tl.minimum(lengths, topk)))
    start = piece * TOKENS
    live = tl.minimum(length, max_len)
    if start < live:
        row = pool + tl.load(indices + i).to(tl.int64) * pool_stride
        column = start + tl.arange(0, TOKENS)
        values = tl.load(row + column, column < live)
        tl.store(page_indices + i.to(tl.int64) * max_len + column, values, column < live)
        page = piece * (TOKENS // PAGE) + tl.arange(0, TOKENS // PAGE)
        starts = tl.load(row + page * PAGE, page * PAGE < live)
        numbers = starts // PAGE
        tl.store(real_page_table + i.to(tl.int64) * pages + page, numbers, page * PAGE < live)
