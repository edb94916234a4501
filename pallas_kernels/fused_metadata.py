"""The whole computation in one launch: lengths, prefix sums and page tables, for every destination.

Purpose: `NSAMetadata` of all backends of a step.
Grid: for each schedule and each offset of backends the blocks that share its rows; then for each
request the blocks that share its lengths, for each offset; in prefill those that share its keys;
then those that share its tables.
Block: a warpgroup. It waits for no other: sums over earlier requests it takes by itself.
Inputs: seq_lens, req_pool_indices, extend_seq_lens where rows are ragged, written_lens if that is
given, FlashMLA's arrays where they are constant, req_to_token.
Outputs: the arrays of `Spec.shapes` of every destination.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxnsa.metadata import NSAMetadata
from jaxnsa.spec import Inputs, Spec
from pallas_kernels.destinations import Destinations
from pallas_kernels.lanes import LANES, Lanes, access_width
from pallas_kernels.launch import launch
from pallas_kernels.rows import (
    IndexTopk,
    Lengths,
    Request,
    Share,
    padding_row_values,
    row_values,
)
from pallas_kernels.schedules import ScheduleWriters
from pallas_kernels.tables import Source, Table, Targets
from pallas_kernels.tuning import BlockConfig, place

_KEY_VECTORS = 4  # of a tile of keys


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the blocks of a request share its work: first lengths, then keys, then tables.

    Attributes:
      offsets: those of backends, each once and in ascending order.
      length_blocks: blocks that write its lengths, for each offset.
      key_blocks: blocks that write its keys, if they are wanted.
      wide: the tiles of `page_indices`, if it is wanted.
      real: the tiles of `real_page_table`, if it is wanted and not written with the wide table.
      pages_with_wide: whether the blocks of the wide table write both.
      pooled: the tiles of `pooled_page_table`, if it is wanted.
    """

    offsets: tuple[int, ...]
    length_blocks: int
    key_blocks: int
    wide: Table | None
    real: Table | None
    pages_with_wide: bool
    pooled: Table | None

    @classmethod
    def of(cls, spec: Spec, pool_cols: int, config: BlockConfig) -> "_Plan":
        """The plan for a pool [pool_rows, pool_cols]."""
        requests, max_len, page_size = spec.rows.requests, spec.max_len, spec.real_page_size
        wide = real = pooled = None

        def table(tokens_per_column: int, width: int) -> Table:
            return Table.of(
                requests, max_len, tokens_per_column, spec.tail, width, config, spec.max_new_tokens
            )

        if spec.wide_table:
            wide = table(1, access_width(pool_cols, max_len))
        together = spec.real_table and wide is not None and wide.yields_pages(page_size)
        if spec.real_table and not together:
            real = table(page_size, 1)
        if spec.pooled_table:
            pooled = table(spec.pooled_page_tokens, 1)

        ragged = spec.rows.rows_per_request is None
        return cls(
            tuple(sorted(set(spec.offsets))),
            Share.blocks_of(requests, spec.rows.count) if ragged else 1,
            Share.blocks_of(requests, spec.max_total_keys or 0, _KEY_VECTORS),
            wide,
            real,
            together,
            pooled,
        )

    @property
    def first_key_block(self) -> int:
        """The first block that writes keys."""
        return len(self.offsets) * self.length_blocks

    @property
    def first_wide_block(self) -> int:
        """The first block that writes tables."""
        return self.first_key_block + self.key_blocks

    @property
    def first_real_block(self) -> int:
        """The first block that writes `real_page_table` alone."""
        return self.first_wide_block + (self.wide.blocks if self.wide else 0)

    @property
    def first_pooled_block(self) -> int:
        """The first block that writes `pooled_page_table`."""
        return self.first_real_block + (self.real.blocks if self.real else 0)

    @property
    def blocks(self) -> int:
        """Blocks of a request."""
        return self.first_pooled_block + (self.pooled.blocks if self.pooled else 0)


def fused_metadata(
    inputs: Inputs,
    out: tuple[NSAMetadata, ...] | None,
    spec: Spec,
    *,
    config: BlockConfig | None = None,
    interpret: Any = False,
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of a step for all backends in one kernel launch.

    Args:
      inputs: int32 arrays, of at least one request.
      out: destinations to fill in place, or None for fresh ones.
      spec: what to compute, at least one row. Tail "keep" without `out` leaves the columns
        unspecified.
      config: block sizes; None: what `BlockConfig` advises.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      As many NSAMetadata as `spec` has destinations.
    """
    requests = spec.rows.requests
    if config is None:
        tokens = min(spec.max_len, spec.max_new_tokens)
        config = (
            BlockConfig.heuristic(requests, spec.rows.tables.count, tokens, spec.num_backends)
            if spec.wide_table
            else BlockConfig.of_pages(requests, -(-tokens // spec.real_page_size))
        )
    pool_rows, pool_cols = inputs.req_to_token.shape
    plan = _Plan.of(spec, pool_cols, config)
    lanes = Lanes(bool(interpret))
    schedules = ScheduleWriters(spec, fresh=out is None)

    def kernel(index, inputs, results, shared):
        lengths = Lengths(inputs.seq_lens, inputs.extend_seq_lens)
        destinations = Destinations(spec, results)
        schedules.write(index, lanes, inputs, shared, destinations)
        scratch = shared.at[pl.ds(0, LANES)]
        index = index - schedules.blocks
        i, block = place(jnp.maximum(index, 0), requests, plan.blocks)
        block = jnp.where(index < 0, plan.blocks, block)

        for n, offset in enumerate(plan.offsets):
            share = Share(block - n * plan.length_blocks, plan.length_blocks)

            @pl.when(share.exists)
            def _(offset=offset, share=share):
                request = Request.load(lanes, spec.rows_of(offset), lengths, scratch, i)
                _write_lengths(lanes, request, share, IndexTopk.of(spec), destinations)

        if plan.key_blocks:

            @pl.when((block >= plan.first_key_block) & (block < plan.first_wide_block))
            def _():
                pool_row = jnp.clip(inputs.req_pool_indices[i], 0, pool_rows - 1)
                lanes.start_load(pool_row)
                request = Request.load(lanes, spec.rows, lengths, scratch, i)
                share = Share(block - plan.first_key_block, plan.key_blocks)
                source = inputs.req_to_token.at[pool_row]
                _write_keys(lanes, request, share, source, spec, destinations)

        def write(table: Table, first_block: int, page_size: int, targets: Callable):
            @pl.when((block >= first_block) & (block < first_block + table.blocks))
            def _():
                pool_row = jnp.clip(inputs.req_pool_indices[i], 0, pool_rows - 1)
                lanes.start_load(pool_row)
                written = None
                if inputs.written_lens is not None:
                    written = inputs.written_lens[i]
                    lanes.start_load(written)
                source = Source(inputs.req_to_token, pool_row, page_size, table.tokens_per_column)
                each = []
                for offset in plan.offsets:
                    rows = spec.rows_of(offset).tables
                    request = Request.load(lanes, rows, lengths, scratch, i)
                    each.append(targets(request, offset))
                table.write(lanes, block - first_block, source, each, written)

        def both_tables(request: Request, offset: int) -> Targets:
            pages = destinations.of("real_page_table", offset) if plan.pages_with_wide else []
            tables = destinations.of("page_indices", offset)
            return Targets(request, tables, pages, spec.real_page_size)

        def pages_of(name: str) -> Callable:
            return lambda request, offset: Targets(request, destinations.of(name, offset))

        if plan.wide:
            write(plan.wide, plan.first_wide_block, 1, both_tables)
        if plan.real:
            write(
                plan.real, plan.first_real_block, spec.real_page_size, pages_of("real_page_table")
            )
        if plan.pooled:
            table, first = plan.pooled, plan.first_pooled_block
            write(table, first, spec.real_page_size, pages_of("pooled_page_table"))
        destinations.check_all_written()

    results = launch(
        kernel,
        inputs,
        None if out is None else [o.arrays() for o in out],
        [dict(spec.shapes())] * spec.destinations,
        blocks=schedules.blocks + requests * plan.blocks,
        shared=(max(LANES, schedules.words),),
        name="fused_metadata",
        interpret=interpret,
    )
    return tuple(spec.metadata(arrays) for arrays in results)


def _write_lengths(
    lanes: Lanes, request: Request, share: Share, topk: IndexTopk, destinations: Destinations
) -> None:
    """A share of all arrays but the tables, as far as a request goes, of an offset's backends."""
    store, i = functools.partial(destinations.store, request.rows.offset), request.i
    store_first = functools.partial(destinations.store_first, request.rows.offset, lanes)
    locate = request.start_locating()
    sums = request.sums_before(topk)
    location = locate()

    @pl.when(share.block == 0)
    def _():
        store(i, cache_seqlens=request.cache_seqlen)
        store(i + 1, cu_seqlens_k=sums.cache_seqlens + request.cache_seqlen)
        pl.when(i == 0)(lambda: store(0, cu_seqlens_k=jnp.int32(0), nsa_cu_seqlens_k=jnp.int32(0)))

    if isinstance(request.q, int) and request.q == 1:
        # Vectors of one element would cost the blocks of the tables registers, and so occupancy.
        store(i, **row_values(request.cache_seqlen, topk, i, sums.cache_seqlens))
        nsa_sum = sums.nsa_cache_seqlens + request.nsa_sum(jnp.int32(0), topk)
        store(i + 1, nsa_cu_seqlens_k=nsa_sum)
        return

    def write_rows(first):
        j, count = first + lanes.iota(LANES), location.rows - first
        row = location.first_row + first
        values = row_values(request.kv_len(j), topk, i, sums.cache_seqlens)
        store_first(row, count, **values)
        nsa_sums = sums.nsa_cache_seqlens + request.nsa_sum(j, topk)
        store_first(row + 1, count, nsa_cu_seqlens_k=nsa_sums)

    def write_padding_rows(first):
        row, count = location.total + first, request.rows.count - location.total - first
        store_first(row, count, **padding_row_values())
        store_first(row + 1, count, nsa_cu_seqlens_k=sums.nsa_total)

    share.for_tiles(location.rows, write_rows)
    if request.rows.rows_per_request is None:
        padding = request.rows.count - location.total
        share.of_all(request).for_tiles(padding, write_padding_rows)


def _write_keys(
    lanes: Lanes,
    request: Request,
    share: Share,
    source: Any,
    spec: Spec,
    destinations: Destinations,
) -> None:
    """A share of a request's keys, whose slots are in `source`, and of the padding keys."""
    capacity = spec.max_total_keys
    assert capacity is not None
    location = request.locate_keys(capacity)

    def write(first):
        # All loads are under way before anything is stored.
        columns = [first + k * LANES for k in range(_KEY_VECTORS)]
        slots = [lanes.load_first(source, column, spec.max_len - column) for column in columns]
        for column, vector in zip(columns, slots, strict=True):
            key, count = location.first_row + column, location.rows - column
            destinations.store_first(
                request.rows.offset, lanes, key, count, flat_page_indices=vector
            )

    def clear(first):
        key, count = location.total + first, capacity - location.total - first
        destinations.store_first(request.rows.offset, lanes, key, count, flat_page_indices=0)

    share.for_tiles(location.rows, write, _KEY_VECTORS)
    if spec.tail != "keep":
        share.of_all(request).for_tiles(capacity - location.total, clear)
