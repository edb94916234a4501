"""The lengths of a draft-extend step in one launch: prefix sum, row of each token, clamp.

Grid: a program for each request, which waits for no other.
Inputs: extend_seq_lens and seq_lens. Outputs: the arrays of `DraftExtendSeqlens`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import by_name, grouped
from jaxnsa.implementations.triton_kernels.launch import launch
from jaxnsa.implementations.triton_kernels.rows import (
    Lengths,
    LengthSums,
    RowConstants,
    RowSizes,
    RowSums,
    RowValues,
    load_request,
    write_rows,
)
from jaxnsa.metadata import DraftExtendSeqlens, ForwardMode
from jaxnsa.spec import Rows


class Results(NamedTuple):
    """The arrays that the kernel writes: those of [rows], and [1]."""

    rows: RowValues
    total_tokens: Any


def fill_draft_extend_metadata(
    extend_seq_lens: jax.Array,
    seq_lens: jax.Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int,
) -> DraftExtendSeqlens:
    """Expands the lengths of requests to those of their extend tokens.

    Args:
      extend_seq_lens: int32 [requests], at least one; negative counts as 0.
      seq_lens: int32 [requests], extend tokens counted.
      nsa_index_topk: the indexer's top-k, in tokens.
      max_total_tokens: capacity, at least 1.

    Returns:
      DraftExtendSeqlens; padding rows hold 0.
    """
    (requests,) = seq_lens.shape
    rows = Rows.of(ForwardMode.DRAFT_EXTEND, requests, max_total_tokens=max_total_tokens)
    vector = jax.ShapeDtypeStruct((max_total_tokens,), jnp.int32)
    shapes = {"seqlens_expanded": vector, "nsa_cache_seqlens": vector}
    results = launch(
        _fill_draft_extend_metadata,
        Lengths(seq_lens, extend_seq_lens),
        None,
        Results(grouped(RowValues, shapes, [shapes]), jax.ShapeDtypeStruct((), jnp.int32)),
        programs=requests,
        warps=4,
        sizes=RowSizes.of(rows, nsa_index_topk),
        constants={"ROWS": RowConstants.of(rows)},
    )
    (arrays,) = by_name([results.rows])
    return DraftExtendSeqlens(**arrays, total_tokens=results.total_tokens)


@triton.jit
def _fill_draft_extend_metadata(lengths, results, sizes, ROWS: tl.constexpr):
    request = load_request(lengths, tl.program_id(0), ROWS)
    # No array of sums is written here.
    write_rows(results.rows, RowSums(()), lengths, request, LengthSums(0, 0, 0), 0, 1, sizes, ROWS)
    if request.i == 0:
        AT_ONCE: tl.constexpr = ROWS.requests_at_once
        total = tl.zeros([AT_ONCE], tl.int32)
        for first in range(0, sizes.requests, AT_ONCE):
            k = first + tl.arange(0, AT_ONCE)
            q = tl.load(lengths.extend_seq_lens + k, k < sizes.requests, 0)
            total += tl.maximum(q, 0)
        tl.store(results.total_tokens, tl.sum(total))
