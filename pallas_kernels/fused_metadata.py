"""The whole computation in one launch: lengths, prefix sums and page tables, for every destination.

Purpose: `NSAMetadata` of all backends of a step.
Grid: for each request blocks that write its lengths, one for each offset of backends, then those
that share its tables.
Block: a warpgroup. It waits for no other: sums over earlier requests it takes by itself.
Inputs: seq_lens, req_pool_indices, extend_seq_lens where rows are ragged, written_lens if that is
given, req_to_token, and a view of req_to_token as whole pages where its rows consist of such.
Outputs: the arrays of `Spec.shapes` of every destination.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxnsa.metadata import NSAMetadata
from jaxnsa.spec import Inputs, Spec
from pallas_kernels.destinations import Destinations
from pallas_kernels.lanes import Lanes, access_width
from pallas_kernels.launch import launch
from pallas_kernels.rows import Lengths, Request, row_values
from pallas_kernels.tables import Source, Table, Targets
from pallas_kernels.tuning import BlockConfig


@dataclasses.dataclass(frozen=True)
class _TablePlan:
    """How the blocks of a request share its work.

    Attributes:
      offsets: those of backends, each once, in ascending order; a block writes the lengths of one.
      wide: the tiles of `page_indices`, if it is wanted.
      real: the tiles of `real_page_table`, if it is wanted and not written with the wide table.
      pages_with_wide: whether the blocks of the wide table write both.
      reads_pages: whether the page starts of a pool row form a vector.
    """

    offsets: tuple[int, ...]
    wide: Table | None
    real: Table | None
    pages_with_wide: bool
    reads_pages: bool

    @classmethod
    def of(cls, spec: Spec, pool_shape: tuple[int, ...], config: BlockConfig) -> "_TablePlan":
        """The plan for a pool [pool_rows, pool_cols]."""
        requests, max_len, page_size = spec.rows.requests, spec.max_len, spec.real_page_size
        pool_cols, new = pool_shape[1], spec.max_new_tokens
        wide = real = None
        if spec.wide_table:
            width = access_width(pool_cols, max_len)
            wide = Table.of(requests, max_len, 1, spec.tail, width, config, new)
        together = spec.real_table and wide is not None and wide.yields_pages(page_size)
        whole_pages = pool_cols % page_size == 0
        if spec.real_table and not together:
            width = int(whole_pages)
            real = Table.of(requests, max_len, page_size, spec.tail, width, config, new)
        offsets = tuple(sorted(set(spec.offsets)))
        return cls(offsets, wide, real, together, real is not None and whole_pages)

    @property
    def first_wide_block(self) -> int:
        """The first block that writes `page_indices`."""
        return len(self.offsets)

    @property
    def first_real_block(self) -> int:
        """The first block that writes `real_page_table` alone."""
        return self.first_wide_block + (self.wide.blocks if self.wide else 0)

    @property
    def blocks(self) -> int:
        """Blocks of a request."""
        return self.first_real_block + (self.real.blocks if self.real else 0)


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
    if config is None:
        config = (
            BlockConfig.heuristic(spec.rows.count, spec.max_len, spec.num_backends)
            if spec.wide_table
            else BlockConfig.of_pages(spec.rows.requests, -(-spec.max_len // spec.real_page_size))
        )
    plan = _TablePlan.of(spec, inputs.req_to_token.shape, config)
    pool_rows = inputs.req_to_token.shape[0]
    lanes = Lanes(bool(interpret))
    read: dict[str, Any] = {"inputs": inputs}
    if plan.reads_pages:
        read["pages"] = inputs.req_to_token.reshape(pool_rows, -1, spec.real_page_size)

    def kernel(index, read, results, scratch):
        # Neighbouring blocks write neighbouring memory.
        i = lax.div(index, jnp.int32(plan.blocks))
        block = lax.rem(index, jnp.int32(plan.blocks))
        inputs = read["inputs"]
        lengths = Lengths(inputs.seq_lens, inputs.extend_seq_lens)
        destinations = Destinations(spec, results)

        def request_of(offset: int) -> Request:
            return Request.load(lanes, spec.rows_of(offset), lengths, scratch, i)

        for length_block, offset in enumerate(plan.offsets):

            @pl.when(block == length_block)
            def _(offset=offset):
                _write_lengths(request_of(offset), spec.nsa_index_topk, destinations)

        def write(table: Table, first_block: int, ref: Any, page_size: int, targets: Callable):
            @pl.when((block >= first_block) & (block < first_block + table.blocks))
            def _():
                pool_row = jnp.clip(inputs.req_pool_indices[i], 0, pool_rows - 1)
                lanes.start_load(pool_row)
                written = None
                if inputs.written_lens is not None:
                    written = inputs.written_lens[i]
                    lanes.start_load(written)
                source = Source(ref, pool_row, page_size)
                each = [targets(request_of(offset), offset) for offset in plan.offsets]
                table.write(lanes, block - first_block, source, each, written)

        def both_tables(request: Request, offset: int) -> Targets:
            pages = destinations.of("real_page_table", offset) if plan.pages_with_wide else []
            tables = destinations.of("page_indices", offset)
            return Targets(request, tables, pages, spec.real_page_size)

        def real_table(request: Request, offset: int) -> Targets:
            return Targets(request, destinations.of("real_page_table", offset))

        if plan.wide:
            write(plan.wide, plan.first_wide_block, inputs.req_to_token, 1, both_tables)
        if plan.real:
            ref = read["pages"] if plan.reads_pages else inputs.req_to_token
            write(plan.real, plan.first_real_block, ref, spec.real_page_size, real_table)
        destinations.check_all_written()

    results = launch(
        kernel,
        read,
        None if out is None else [o.arrays() for o in out],
        [dict(spec.shapes())] * spec.destinations,
        blocks=spec.rows.requests * plan.blocks,
        name="fused_metadata",
        interpret=interpret,
    )
    return tuple(spec.metadata(arrays) for arrays in results)


def _write_lengths(request: Request, topk: int, destinations: Destinations) -> None:
    """All arrays but the tables, as far as a request goes, in the backends that see it so."""
    store, i = functools.partial(destinations.store, request.rows.offset), request.i
    location = request.locate()
    sums = request.sums_before(topk)
    store(i, cache_seqlens=request.cache_seqlen)
    store(i + 1, cu_seqlens_k=sums.cache_seqlens + request.cache_seqlen)
    pl.when(i == 0)(lambda: store(0, cu_seqlens_k=jnp.int32(0), nsa_cu_seqlens_k=jnp.int32(0)))

    def write_row(j, nsa_sum):
        row, values = location.first_row + j, row_values(request.kv_len(j), topk)
        nsa_sum = nsa_sum + values["nsa_cache_seqlens"]
        store(row, **values)
        store(row + 1, nsa_cu_seqlens_k=nsa_sum)
        return nsa_sum

    def write_padding_row(row):
        store(row, **row_values(jnp.int32(0), topk))
        store(row + 1, nsa_cu_seqlens_k=sums.nsa_total)

    lax.fori_loop(0, location.rows, write_row, sums.nsa_cache_seqlens)
    request.for_padding_rows(location, write_padding_row)
