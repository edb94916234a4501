"""The lengths of a draft-extend step in one launch: prefix sum, row of each token, clamp.

Grid: a block for each request, a warpgroup, which waits for no other.
Inputs: extend_seq_lens and seq_lens. Outputs: the arrays of `DraftExtendSeqlens`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxnsa.metadata import DraftExtendSeqlens, ForwardMode
from jaxnsa.spec import Rows
from pallas_kernels.lanes import Lanes, start_sums
from pallas_kernels.launch import launch
from pallas_kernels.rows import IndexTopk, Lengths, Request, row_values


def fill_draft_extend_metadata(
    extend_seq_lens: jax.Array,
    seq_lens: jax.Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int,
    interpret: Any = False,
) -> DraftExtendSeqlens:
    """Expands the lengths of requests to those of their extend tokens.

    Args:
      extend_seq_lens: int32 [requests], at least one; negative counts as 0.
      seq_lens: int32 [requests], extend tokens counted.
      nsa_index_topk: the indexer's top-k, in tokens.
      max_total_tokens: capacity, at least 1.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      DraftExtendSeqlens; padding rows hold 0.
    """
    (requests,) = seq_lens.shape
    rows = Rows.of(ForwardMode.DRAFT_EXTEND, requests, max_total_tokens=max_total_tokens)
    lanes = Lanes(bool(interpret))

    def kernel(i, lengths, results, scratch):
        request = Request.load(lanes, rows, lengths, scratch, i)
        location = request.locate()

        def store(row, kv_len):
            values = row_values(kv_len, IndexTopk(nsa_index_topk), 0, 0)
            for name in ("seqlens_expanded", "nsa_cache_seqlens"):
                results[name][row] = values[name]

        request.for_rows(location, lambda j, row: store(row, request.kv_len(j)))
        request.for_padding_rows(location, lambda row: store(row, jnp.int32(0)))

        @pl.when(i == 0)
        def _():
            sums = start_sums(
                lanes,
                requests,
                (lengths.extend_seq_lens,),
                scratch,
                lambda index, exists, q: (jnp.where(exists, jnp.maximum(q, 0), 0),),
            )
            (results["total_tokens"][0],) = sums()

    vector = jax.ShapeDtypeStruct((max_total_tokens,), jnp.int32)
    results = launch(
        kernel,
        Lengths(seq_lens, extend_seq_lens),
        None,
        {
            "seqlens_expanded": vector,
            "nsa_cache_seqlens": vector,
            "total_tokens": jax.ShapeDtypeStruct((1,), jnp.int32),
        },
        blocks=requests,
        name="fill_draft_extend_metadata",
        interpret=interpret,
    )
    return DraftExtendSeqlens(**results | {"total_tokens": results["total_tokens"].reshape(())})
