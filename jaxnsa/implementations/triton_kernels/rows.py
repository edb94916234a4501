"""How table rows map to requests, inside a kernel: written once for all forward modes.

`nsa_kernel_types.RowMap` says how; TOKENS is its tokens_per_request, 0 where rows are ragged. Sums
over earlier requests are taken by every program for itself, out of the L2 cache: no program waits
for another.
"""

import triton
import triton.language as tl

from jaxnsa.triton_kernels.columns import store
from nsa_kernel_types import RowMap

_INT32_MAX = tl.constexpr(2**31 - 1)


def scalars(rows: RowMap) -> dict[str, int]:
    """The parameters of a kernel that may change without compiling it again."""
    return {
        "requests": rows.requests,
        "rows": rows.rows,
        "added_tokens": rows.added_tokens,
        "topk": rows.nsa_index_topk,
    }


def constants(rows: RowMap) -> dict[str, int]:
    """The parameters that a kernel is compiled for."""
    tokens = rows.tokens_per_request or 0
    return {
        "TOKENS": tokens,
        "ROW_LANES": min(32, triton.next_power_of_2(tokens or 32)),
        "SCAN": min(1024, triton.next_power_of_2(rows.requests)),
    }


@triton.jit
def load_request(seq_lens, extend_seq_lens, i, added_tokens, TOKENS: tl.constexpr, mask=True):
    """cache_seqlens and q of request i, or of several, where `mask` holds."""
    cache_seqlen = tl.maximum(tl.load(seq_lens + i, mask, 0), 0) + added_tokens
    q = tl.maximum(tl.load(extend_seq_lens + i, mask, 0), 0) if TOKENS == 0 else TOKENS
    return cache_seqlen, q


@triton.jit
def locate(extend_seq_lens, i, q, requests, rows, TOKENS: tl.constexpr, SCAN: tl.constexpr):
    """The first row of request i, how many it has, and how many all requests have."""
    if TOKENS > 0:
        first_row = i * TOKENS
        count = q
        total = rows
    else:
        before = tl.zeros([SCAN], tl.int64)
        everywhere = tl.zeros([SCAN], tl.int64)
        for first in range(0, requests, SCAN):
            k = first + tl.arange(0, SCAN)
            extend = tl.load(extend_seq_lens + k, k < requests, 0)
            tokens = tl.minimum(tl.maximum(extend, 0), rows).to(tl.int64)
            before += tl.where(k < i, tokens, 0)
            everywhere += tokens
        first_row = tl.minimum(tl.sum(before), rows).to(tl.int32)
        count = tl.minimum(q, rows - first_row)
        total = tl.minimum(tl.sum(everywhere), rows).to(tl.int32)
    return first_row, count, total


@triton.jit
def prefix_sums(
    seq_lens,
    extend_seq_lens,
    i,
    requests,
    added_tokens,
    topk,
    TOKENS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Sums over the requests before i, of cache_seqlens and of nsa_cache_seqlens over their rows,
    and the latter over all requests. They wrap as int32 does.
    """
    cache_before = tl.zeros([SCAN], tl.int32)
    nsa_before = tl.zeros([SCAN], tl.int32)
    nsa_total = tl.zeros([SCAN], tl.int32)
    for first in range(0, requests, SCAN):
        k = first + tl.arange(0, SCAN)
        exists = k < requests
        cache_seqlen, q = load_request(seq_lens, extend_seq_lens, k, added_tokens, TOKENS, exists)
        nsa = _nsa_sum(cache_seqlen, q, topk, TOKENS)
        cache_before += tl.where(k < i, cache_seqlen, 0)
        nsa_before += tl.where(k < i, nsa, 0)
        nsa_total += tl.where(exists, nsa, 0)
    return tl.sum(cache_before), tl.sum(nsa_before), tl.sum(nsa_total)


@triton.jit
def write_row_lengths(
    seqlens_expanded,
    nsa_cache_seqlens,
    nsa_cu_seqlens_k,
    extend_seq_lens,
    i,
    cache_seqlen,
    q,
    nsa_before,
    nsa_total,
    requests,
    rows,
    topk,
    TOKENS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    SCAN: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Writes the lengths of request i's rows, and its share of the rows past the total."""
    first_row, count, total = locate(extend_seq_lens, i, q, requests, rows, TOKENS, SCAN)
    if i == 0:
        store(nsa_cu_seqlens_k, 0, 0, None, rows + 1, COPIES)
    for first in range(0, count, ROW_LANES):
        j = first + tl.arange(0, ROW_LANES)
        exists = j < count
        kv_len = tl.where(exists, tl.maximum(cache_seqlen - q + 1 + j, 0), 0)
        nsa_len = tl.minimum(kv_len, topk)
        store(seqlens_expanded, first_row + j, kv_len, exists, rows, COPIES)
        store(nsa_cache_seqlens, first_row + j, nsa_len, exists, rows, COPIES)
        sums = nsa_before + tl.cumsum(nsa_len, 0)
        store(nsa_cu_seqlens_k, first_row + j + 1, sums, exists, rows + 1, COPIES)
        nsa_before += tl.sum(nsa_len)
    if TOKENS == 0:
        for row in range(total + i, rows, requests):
            store(seqlens_expanded, row, 0, None, rows, COPIES)
            store(nsa_cache_seqlens, row, 0, None, rows, COPIES)
            store(nsa_cu_seqlens_k, row + 1, nsa_total, None, rows + 1, COPIES)


@triton.jit
def _nsa_sum(cache_seqlen, q, topk, TOKENS: tl.constexpr):
    """The sum of nsa_cache_seqlens over the q rows of a request."""
    if TOKENS == 1:
        return tl.minimum(tl.maximum(cache_seqlen, 0), topk)
    # A KV length past int32 has wrapped; the rows before that are counted.
    last = tl.where(cache_seqlen < 0, _INT32_MAX, cache_seqlen)
    return _clamped_series(last, topk) - _clamped_series(tl.maximum(cache_seqlen - q, 0), topk)


@triton.jit
def _clamped_series(n, topk):
    """min(1, topk) + min(2, topk) + ... + min(n, topk), for n >= 0."""
    low = tl.minimum(n, topk)
    half = low >> 1
    triangle = tl.where((low & 1) == 0, half * (low + 1), low * (half + 1))
    return triangle + (n - low) * topk
