"""The lengths of a draft-extend step in one launch: prefix sum, row of each token, clamp.

Grid: for each request the blocks that share its rows, each a warpgroup, which waits for no other.
Inputs: extend_seq_lens and seq_lens. Outputs: the arrays of `DraftExtendSeqlens`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxnsa.metadata import DraftExtendSeqlens, ForwardMode
from jaxnsa.spec import Rows
from pallas_kernels.lanes import LANES, Lanes, start_sums
from pallas_kernels.launch import launch
from pallas_kernels.rows import IndexTopk, Lengths, Request, Share, row_values


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

    blocks = Share.blocks_of(requests, max_total_tokens)

    def kernel(index, lengths, results, scratch):
        i = lax.div(index, jnp.int32(blocks))
        share = Share(index - i * blocks, blocks)
        request = Request.load(lanes, rows, lengths, scratch, i)
        location = request.locate()

        def store_first(row, count, kv_lens):
            values = row_values(kv_lens, IndexTopk(nsa_index_topk), 0, 0)
            for name in ("seqlens_expanded", "nsa_cache_seqlens"):
                lanes.store_first(results[name], row, lanes.zeros(LANES) + values[name], count)

        def write_rows(first):
            kv_lens = request.kv_len(first + lanes.iota(LANES))
            store_first(location.first_row + first, location.rows - first, kv_lens)

        def write_padding_rows(first):
            store_first(location.total + first, padding - first, lanes.zeros(LANES))

        padding = max_total_tokens - location.total
        share.for_tiles(location.rows, write_rows)
        share.of_all(request).for_tiles(padding, write_padding_rows)

        @pl.when(index == 0)
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
        blocks=requests * blocks,
        name="fill_draft_extend_metadata",
        interpret=interpret,
    )
    return DraftExtendSeqlens(**results | {"total_tokens": results["total_tokens"].reshape(())})
