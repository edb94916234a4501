"""The lengths of a draft-extend step in one launch: prefix sum, row of each token, clamp."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nsa_kernel_types import ExpandedSeqlens, RowMap
from pallas_kernels.lanes import Lanes, sum_over_requests
from pallas_kernels.launch import launch
from pallas_kernels.rows import load_request, locate, prefix_sums, write_row_lengths


def seqlen_expansion(
    extend_seq_lens: jax.Array,
    seq_lens: jax.Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int,
    interpret: Any = False,
) -> ExpandedSeqlens:
    """Expands the lengths of requests to those of their extend tokens.

    Args:
      extend_seq_lens: int32 [requests], at least one; negative counts as 0.
      seq_lens: int32 [requests], extend tokens counted.
      nsa_index_topk: the indexer's top-k.
      max_total_tokens: capacity.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      ExpandedSeqlens; rows past the total hold 0, and the last prefix sum.
    """
    (requests,) = seq_lens.shape
    rows = RowMap(requests, max_total_tokens, None, 0, nsa_index_topk)
    lanes = Lanes(bool(interpret))

    def kernel(i, inputs, result, scratch):
        extend, lens = inputs
        request = load_request(rows, lens, extend, i)
        location = locate(lanes, rows, request, extend, scratch, i)
        sums = prefix_sums(lanes, rows, lens, extend, scratch, i)

        def store(name, index, value):
            getattr(result, name)[index] = value

        write_row_lengths(rows, request, location, sums, i, store)

        @pl.when(i == 0)
        def _():
            (total,) = sum_over_requests(
                lanes,
                requests,
                (extend,),
                scratch,
                lambda index, exists, q: (jnp.where(exists, jnp.maximum(q, 0), 0),),
            )
            result.total_tokens[0] = total

    return launch(
        kernel,
        (extend_seq_lens, seq_lens),
        None,
        ExpandedSeqlens.shapes(max_total_tokens),
        blocks=requests,
        name="seqlen_expansion",
        interpret=interpret,
    )
