"""The whole job in one launch: lengths, prefix sums and page tables, for every destination.

A grid of independent warpgroups. Block 0 of each request writes its lengths and prefix sums, which
it adds up by itself; every other block copies a few windows of the request's page tables to all of
its rows in all destinations. No block waits for another.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from nsa_kernel_types import FusedJob, Metadata, RowMap
from pallas_kernels.lanes import Lanes, access_width, floor_div
from pallas_kernels.launch import launch
from pallas_kernels.rows import (
    for_spare_rows,
    load_request,
    locate,
    prefix_sums,
    write_row_lengths,
)
from pallas_kernels.tables import Destination, Table, Targets
from pallas_kernels.tuning import BlockConfig


def fused_metadata(
    seq_lens: jax.Array,
    req_pool_indices: jax.Array,
    req_to_token: jax.Array,
    extend_seq_lens: jax.Array | None,
    out: tuple[Metadata, ...] | None,
    job: FusedJob,
    *,
    config: BlockConfig | None = None,
    interpret: Any = False,
) -> tuple[Metadata, ...]:
    """Computes the metadata of a step for all backends in one kernel launch.

    Args:
      seq_lens: int32 [requests].
      req_pool_indices: int32 [requests].
      req_to_token: int32 [pool_rows, pool_cols].
      extend_seq_lens: int32 [requests] where rows are ragged, otherwise None.
      out: destinations to fill in place, or None for fresh ones.
      job: what to compute. tail "keep" without `out` leaves the columns unspecified.
      config: block sizes; None: `BlockConfig.heuristic`.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      As many Metadata as `job` has destinations.
    """
    rows, max_len, real_page_size, tail = job.rows, job.max_len, job.real_page_size, job.tail
    pool_rows, pool_cols = req_to_token.shape
    ragged = rows.tokens_per_request is None
    lanes = Lanes(bool(interpret))
    config = config or BlockConfig.heuristic(rows.rows, max_len, job.num_backends)

    wide = Table.of(rows.requests, max_len, 1, tail, access_width(pool_cols, max_len), config)
    # Page starts form a vector where the pool's rows are whole pages.
    paged = pool_cols % real_page_size == 0
    real = Table.of(rows.requests, job.pages, real_page_size, tail, int(paged), config)
    together = job.wide_table and real_page_size > 1 and wide.yields_pages(real_page_size)
    wide_blocks = wide.blocks if job.wide_table else 0
    real_blocks = real.blocks if real_page_size > 1 and not together else 0
    blocks = 1 + wide_blocks + real_blocks

    inputs: dict[str, Any] = {
        "seq_lens": seq_lens,
        "indices": req_pool_indices,
        "pool": req_to_token,
    }
    if ragged:
        inputs["extend"] = extend_seq_lens
    if real_blocks and paged:
        inputs["pages"] = req_to_token.reshape(pool_rows, -1, real_page_size)

    def kernel(index, inputs, results, scratch):
        # Neighbouring blocks write neighbouring memory.
        i, block = lax.div(index, jnp.int32(blocks)), lax.rem(index, jnp.int32(blocks))
        seq_lens, extend = inputs["seq_lens"], inputs.get("extend")

        def destinations(field: str) -> list[Destination]:
            refs = [getattr(result, field) for result in results]
            return (
                [(refs[0], (k,)) for k in range(job.num_backends)]
                if job.stacked
                else [(ref, ()) for ref in refs]
            )

        @pl.when(block == 0)
        def _():
            _write_lengths(lanes, rows, seq_lens, extend, scratch, i, destinations)

        def write(table: Table, first_block: int, read, targets: Targets) -> None:
            @pl.when((block >= first_block) & (block < first_block + table.blocks))
            def _():
                slot = jnp.clip(inputs["indices"][i], 0, pool_rows - 1)
                lanes.issue(slot)
                request = load_request(rows, seq_lens, extend, i)
                table.write(
                    lanes,
                    block - first_block,
                    lambda columns: read(slot, columns),
                    request,
                    lambda: locate(lanes, rows, request, extend, scratch, i),
                    lambda location, body: for_spare_rows(rows, location, i, body),
                    targets,
                )

        if wide_blocks:
            targets = Targets(destinations("page_indices"))
            if together:
                targets = Targets(targets.tables, destinations("real_page_table"), real_page_size)
            write(wide, 1, lambda slot, columns: inputs["pool"][slot, columns], targets)
        if real_blocks:

            def read_pages(slot, columns):
                if real.width:
                    return floor_div(
                        lanes.laid_out(inputs["pages"][slot, columns, 0]), real_page_size
                    )
                return floor_div(inputs["pool"][slot, columns * real_page_size], real_page_size)

            write(real, 1 + wide_blocks, read_pages, Targets(destinations("real_page_table")))

    return launch(
        kernel,
        inputs,
        out,
        (job.shapes(),) * job.destinations,
        blocks=rows.requests * blocks,
        name="fused_metadata",
        interpret=interpret,
    )


def _write_lengths(lanes, rows: RowMap, seq_lens, extend, scratch, i, destinations) -> None:
    """All arrays but the tables, as far as request i goes."""
    request = load_request(rows, seq_lens, extend, i)
    location = locate(lanes, rows, request, extend, scratch, i)
    sums = prefix_sums(lanes, rows, seq_lens, extend, scratch, i)

    def store(field: str, index, value) -> None:
        for ref, lead in destinations(field):
            ref[(*lead, index)] = value

    store("cache_seqlens", i, request.cache_seqlen)
    store("cu_seqlens_k", i + 1, sums.cache_seqlens + request.cache_seqlen)

    pl.when(i == 0)(lambda: store("cu_seqlens_k", 0, jnp.int32(0)))
    write_row_lengths(rows, request, location, sums, i, store)
