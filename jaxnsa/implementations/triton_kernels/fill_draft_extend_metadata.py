"""The lengths of a draft-extend step in one launch: prefix sum, rows of each request, clamp."""

import jax
import triton
import triton.language as tl

from jaxnsa.triton_kernels.launch import launch
from jaxnsa.triton_kernels.rows import (
    constants,
    load_request,
    prefix_sums,
    scalars,
    write_row_lengths,
)
from nsa_kernel_types import ExpandedSeqlens, RowMap


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
    results = launch(
        _seqlen_expansion,
        (extend_seq_lens, seq_lens),
        None,
        [[shape] for shape in ExpandedSeqlens.shapes(max_total_tokens)],
        programs=requests,
        warps=4,
        scalars=scalars(rows),
        constants=constants(rows),
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
