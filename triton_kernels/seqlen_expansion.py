"""The lengths of a draft-extend step in one launch: prefix sum, rows of each request, clamp."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.launch import launch
from triton_kernels.rows import RowMap, load_request, prefix_sums, write_row_lengths


class ExpandedSeqlens(NamedTuple):
    """The lengths of a draft-extend step, all int32.

    Attributes:
      seqlens_expanded: [max_total_tokens].
      nsa_cache_seqlens: [max_total_tokens].
      nsa_cu_seqlens_k: [max_total_tokens + 1].
      total_tokens: [1], also where it exceeds the capacity.
    """

    seqlens_expanded: Any
    nsa_cache_seqlens: Any
    nsa_cu_seqlens_k: Any
    total_tokens: Any


def seqlen_expansion(
    extend_seq_lens: jax.Array,
    seq_lens: jax.Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int,
) -> ExpandedSeqlens:
    """Expands the lengths of requests to those of their extend tokens.

    Args:
      extend_seq_lens: int32 [requests], at least one; negative counts as 0.
      seq_lens: int32 [requests], extend tokens counted.
      nsa_index_topk: the indexer's top-k.
      max_total_tokens: capacity.

    Returns:
      ExpandedSeqlens; rows past the total hold 0, and the last prefix sum.
    """
    (requests,) = seq_lens.shape
    rows = RowMap(requests, max_total_tokens, None, 0, nsa_index_topk)
    sizes = (max_total_tokens, max_total_tokens, max_total_tokens + 1, 1)
    results = launch(
        _seqlen_expansion,
        (extend_seq_lens, seq_lens),
        None,
        [[jax.ShapeDtypeStruct((size,), jnp.int32)] for size in sizes],
        programs=requests,
        warps=4,
        scalars=rows.scalars(),
        constants=rows.constants(),
    )
    return ExpandedSeqlens(*(array for (array,) in results))


@triton.jit
def _seqlen_expansion(
    inputs,
    results,
    requests,
    rows,
    added_tokens,
    topk,
    TOKENS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    SCAN: tl.constexpr,
):
    extend_seq_lens, seq_lens = inputs[0], inputs[1]
    i = tl.program_id(0)
    cache_seqlen, q = load_request(seq_lens, extend_seq_lens, i, added_tokens, TOKENS)
    _, nsa_before, nsa_total = prefix_sums(
        seq_lens, extend_seq_lens, i, requests, added_tokens, topk, TOKENS, SCAN
    )
    write_row_lengths(
        results[0],
        results[1],
        results[2],
        extend_seq_lens,
        i,
        cache_seqlen,
        q,
        nsa_before,
        nsa_total,
        requests,
        rows,
        topk,
        TOKENS,
        ROW_LANES,
        SCAN,
        1,
    )
    if i == 0:
        tokens = tl.zeros([SCAN], tl.int32)
        for first in range(0, requests, SCAN):
            k = first + tl.arange(0, SCAN)
            tokens += tl.maximum(tl.load(extend_seq_lens + k, k < requests, 0), 0)
        tl.store(results[3][0], tl.sum(tokens))
