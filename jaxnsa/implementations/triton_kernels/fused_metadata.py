"""The whole computation in one launch: lengths, prefix sums and page tables, for every destination.

Purpose: `NSAMetadata` of all backends of a step.
Grid: for each offset of backends a program for each schedule; then for each request the programs
that share its lengths, for each offset; in prefill those that share its keys; then those that share
its tables.
Program: independent of all others; sums over earlier requests it takes by itself. Those of the
tables take tiles of the request's pool row with a grid stride, as far as columns are written.
Inputs: seq_lens, req_pool_indices, req_to_token, extend_seq_lens where rows are ragged,
written_lens if that is given, and FlashMLA's arrays where they are constant.
Outputs: the arrays of `Spec.shapes` of every destination.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import (
    Group,
    by_name,
    grouped,
    of_backends,
    store_values,
)
from jaxnsa.implementations.triton_kernels.launch import launch
from jaxnsa.implementations.triton_kernels.rows import (
    Lengths,
    RowConstants,
    RowSizes,
    RowSums,
    RowValues,
    kv_len,
    load_request,
    locate,
    locate_among,
    sums_before,
    write_rows,
)
from jaxnsa.implementations.triton_kernels.schedules import (
    ScheduleArrays,
    ScheduleConstants,
    write_schedules,
)
from jaxnsa.implementations.triton_kernels.tables import (
    load_columns,
    load_pages,
    store_columns,
    store_pages,
)
from jaxnsa.implementations.triton_kernels.tuning import BlockConfig
from jaxnsa.metadata import Extent, NSAMetadata
from jaxnsa.spec import MAX_LEN, Inputs, Spec, Tail

_KEY_TILE = tl.constexpr(512)
_MOST_SHARES = 1024  # programs of all requests together that share ragged rows, and keys


class RequestValues(NamedTuple):
    """The arrays of [requests]."""

    cache_seqlens: Any


class RequestSums(NamedTuple):
    """The arrays of [requests + 1]."""

    cu_seqlens_k: Any


class Tables(NamedTuple):
    """The arrays of [rows, columns]."""

    page_indices: Any
    real_page_table: Any
    pooled_page_table: Any


class Keys(NamedTuple):
    """The arrays of [max_total_keys]."""

    flat_page_indices: Any


class Results(NamedTuple):
    """All arrays that the kernel writes, by extent."""

    requests: RequestValues
    requests_plus_1: RequestSums
    rows: RowValues
    rows_plus_1: RowSums
    tables: Tables
    keys: Keys
    schedules: ScheduleArrays

    @classmethod
    def of(cls, spec: Spec, destinations: Sequence[Mapping[str, Any]]) -> "Results":
        """The arrays of all destinations."""

        def of_extent(group: type[Group], *extents: Extent) -> Group:
            return grouped(group, [field.name for field in spec.fields(*extents)], destinations)

        return cls(
            of_extent(RequestValues, Extent.REQUESTS),
            of_extent(RequestSums, Extent.REQUESTS_PLUS_1),
            of_extent(RowValues, Extent.ROWS),
            of_extent(RowSums, Extent.ROWS_PLUS_1),
            of_extent(Tables, Extent.TABLE),
            of_extent(Keys, Extent.KEYS),
            of_extent(
                ScheduleArrays,
                Extent.PAGED_MQA_ITEMS,
                Extent.MULTIPROCESSORS_PLUS_1,
                Extent.PLANNED_ROWS,
                Extent.PARTS,
                Extent.FLASH_MLA_ITEMS_PLUS_1,
            ),
        )


class Sizes(NamedTuple):
    """The numbers that may change without compiling the kernel again.

    Attributes:
      rows: those of the rows.
      table_rows: those of the table rows.
      max_total_keys: keys of all requests, padding keys included.
      max_len: tokens that a table row has columns for.
      pages: columns of the real page table.
      pooled_pages: columns of the pooled page table.
      pool_rows: rows of req_to_token.
      pool_stride: of req_to_token, in units of `TableConstants.pool_unit` elements.
      wide_stride: of page_indices, in units of `TableConstants.wide_unit` elements.
      programs: of a request.
      length_programs: the first of them, which share its lengths.
      key_programs: those after them, which share its keys.
    """

    rows: RowSizes
    table_rows: RowSizes
    max_total_keys: Any
    max_len: Any
    pages: Any
    pooled_pages: Any
    pool_rows: Any
    pool_stride: Any
    wide_stride: Any
    programs: Any
    length_programs: Any
    key_programs: Any


@dataclasses.dataclass(frozen=True)
class OffsetConstants:
    """The backends of one offset.

    Attributes:
      rows: their rows.
      table_rows: the rows of their tables.
      backends: of each, its destination and its place in there.
      count: of backends.
    """

    rows: RowConstants
    table_rows: RowConstants
    backends: tuple[tuple[int, int], ...]
    count: int

    @classmethod
    def of(cls, spec: Spec) -> tuple["OffsetConstants", ...]:
        """All of them; the backends that see the most tokens come last."""
        places = [(0, k) if spec.stacked else (k, 0) for k in range(spec.num_backends)]

        def of_offset(offset: int) -> "OffsetConstants":
            rows = spec.rows_of(offset)
            backends = tuple(
                place for place, other in zip(places, spec.offsets, strict=True) if other == offset
            )
            return cls(
                RowConstants.of(rows, spec.index_kpool),
                RowConstants.of(rows.tables),
                backends,
                len(backends),
            )

        return tuple(map(of_offset, sorted(set(spec.offsets))))


@dataclasses.dataclass(frozen=True)
class TableConstants:
    """What the kernel is compiled for.

    Attributes:
      page_size: tokens in a physical page.
      tail: what tables hold past a row's live columns.
      offsets: how many different ones backends have.
      pool_unit: elements that the stride of req_to_token is a multiple of: 4, 2 or 1.
      wide_unit: the same of page_indices.
      tile: tokens of a tile.
      pages: pages that start in a tile, at most, as a power of two.
      pooled_tokens: tokens in a page of pooled keys.
      pooled_pages: such pages that start in a tile, likewise.
    """

    page_size: int
    tail: Tail
    offsets: int
    pool_unit: int
    wide_unit: int
    tile: int
    pages: int
    pooled_tokens: int
    pooled_pages: int

    @classmethod
    def of(cls, spec: Spec, pool_cols: int, config: BlockConfig) -> "TableConstants":
        """What the kernel for a computation is compiled for."""
        page_size = spec.real_page_size
        if spec.wide_table:
            tile = config.tile
            pages = triton.next_power_of_2(tile // page_size + 1)
            if tile % page_size == 0:
                pages = tile // page_size
        else:
            pages = min(config.pages, triton.next_power_of_2(-(-spec.max_len // page_size)))
            tile = min(pages * page_size, MAX_LEN)
        return cls(
            page_size,
            spec.tail,
            len(set(spec.offsets)),
            math.gcd(4, pool_cols),
            math.gcd(4, spec.max_len),
            tile,
            pages,
            spec.pooled_page_tokens,
            triton.next_power_of_2(tile // spec.pooled_page_tokens + 1),
        )


def fused_metadata(
    inputs: Inputs,
    out: tuple[NSAMetadata, ...] | None,
    spec: Spec,
    *,
    config: BlockConfig | None = None,
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of a step for all backends in one kernel launch.

    Args:
      inputs: int32 arrays, of at least one request.
      out: destinations to fill in place, or None for fresh ones.
      spec: what to compute, at least one row. Tail "keep" without `out` leaves the columns
        unspecified.
      config: block sizes; None: what `BlockConfig` advises.

    Returns:
      As many NSAMetadata as `spec` has destinations.
    """
    rows, max_len = spec.rows, spec.max_len
    pool_rows, pool_cols = inputs.req_to_token.shape
    pages = -(-max_len // spec.real_page_size)
    if config is None:
        config = (
            BlockConfig.heuristic(rows.tables.count, max_len)
            if spec.wide_table
            else BlockConfig.of_pages(rows.requests, pages)
        )
    constants = TableConstants.of(spec, pool_cols, config)
    # The first access may begin three columns before the first new one.
    tiles = -(-min(max_len, spec.max_new_tokens + 3) // constants.tile)
    offsets = OffsetConstants.of(spec)

    def shares(places: int, tile: int) -> int:
        return min(triton.cdiv(places, tile), max(1, _MOST_SHARES // rows.requests))

    ragged = rows.rows_per_request is None
    rows_at_once = offsets[0].rows.rows_at_once
    length_programs = shares(rows.count, 2 * rows_at_once) if ragged else 1
    key_programs = shares(spec.max_total_keys or 0, _KEY_TILE.value)
    table_programs = min(tiles, max(1, config.programs // rows.requests))
    programs = len(offsets) * length_programs + key_programs + table_programs
    schedules = ScheduleConstants.of(spec, fresh=out is None)
    results = launch(
        _fused_metadata,
        inputs,
        None if out is None else Results.of(spec, [o.arrays() for o in out]),
        Results.of(spec, [spec.shapes()] * spec.destinations),
        programs=len(offsets) * schedules.programs + rows.requests * programs,
        warps=config.warps,
        sizes=Sizes(
            RowSizes.of(rows, spec.nsa_index_topk),
            RowSizes.of(rows.tables, spec.nsa_index_topk),
            spec.max_total_keys or 0,
            max_len,
            pages,
            -(-max_len // spec.pooled_page_tokens),
            pool_rows,
            pool_cols // constants.pool_unit,
            max_len // constants.wide_unit,
            programs,
            length_programs,
            key_programs,
        ),
        constants={"OFFSETS": offsets, "TABLES": constants, "SCHEDULES": schedules},
    )
    return tuple(spec.metadata(arrays) for arrays in by_name(results))


@triton.jit
def _fused_metadata(
    inputs,
    results,
    sizes,
    OFFSETS: tl.constexpr,
    TABLES: tl.constexpr,
    SCHEDULES: tl.constexpr,
):
    lengths = Lengths(inputs.seq_lens, inputs.extend_seq_lens)
    index = tl.program_id(0)
    NUM_OFFSETS: tl.constexpr = TABLES.offsets
    for k in tl.static_range(NUM_OFFSETS):
        if (index >= 0) & (index < SCHEDULES.programs):
            write_schedules(
                results.schedules,
                index,
                lengths,
                inputs.flash_mla,
                sizes.rows,
                OFFSETS,
                k,
                SCHEDULES,
            )
        index -= SCHEDULES.programs
    if index >= 0:
        _write_of_request(inputs, results, index, lengths, sizes, OFFSETS, TABLES)


@triton.jit
def _write_of_request(
    inputs, results, index, lengths, sizes, OFFSETS: tl.constexpr, TABLES: tl.constexpr
):
    """What one of a request's programs writes."""
    # Neighbouring programs write neighbouring memory.
    i = index // sizes.programs
    program = index % sizes.programs
    NUM_OFFSETS: tl.constexpr = TABLES.offsets
    for k in tl.static_range(NUM_OFFSETS):
        share = program - k * sizes.length_programs
        if (share >= 0) & (share < sizes.length_programs):
            _write_lengths(results, share, lengths, i, sizes, OFFSETS, k)
    share = program - NUM_OFFSETS * sizes.length_programs
    if share >= 0:
        index = tl.load(inputs.req_pool_indices + i)
        pool_row = tl.minimum(tl.maximum(index, 0), sizes.pool_rows - 1).to(tl.int64)
        source = inputs.req_to_token + pool_row * sizes.pool_stride * TABLES.pool_unit
        if share < sizes.key_programs:
            _write_keys(results.keys, source, share, lengths, i, sizes, OFFSETS, TABLES)
        else:
            share -= sizes.key_programs
            _write_tables(inputs, results, source, share, lengths, i, sizes, OFFSETS, TABLES)


@triton.jit
def _write_lengths(results, share, lengths, i, sizes, OFFSETS: tl.constexpr, K: tl.constexpr):
    """One program's share of all arrays but the tables, as far as a request goes."""
    ROWS: tl.constexpr = OFFSETS[K].rows
    BACKENDS: tl.constexpr = OFFSETS[K].backends
    COUNT: tl.constexpr = OFFSETS[K].count
    requests, rows = sizes.rows.requests, sizes.rows.rows
    of_requests = of_backends(results.requests, requests, BACKENDS, COUNT)
    of_requests_plus_1 = of_backends(results.requests_plus_1, requests + 1, BACKENDS, COUNT)
    of_rows = of_backends(results.rows, rows, BACKENDS, COUNT)
    of_rows_plus_1 = of_backends(results.rows_plus_1, rows + 1, BACKENDS, COUNT)
    request = load_request(lengths, i, ROWS)
    sums = sums_before(lengths, i, sizes.rows, ROWS)
    if share == 0:
        store_values(of_requests, i, RequestValues(request.cache_seqlen))
        if i == 0:
            store_values(of_requests_plus_1, 0, RequestSums(0))
        cache_sum = sums.cache_seqlens + request.cache_seqlen
        store_values(of_requests_plus_1, i + 1, RequestSums(cache_sum))
    shares = sizes.length_programs
    write_rows(of_rows, of_rows_plus_1, lengths, request, sums, share, shares, sizes.rows, ROWS)


@triton.jit
def _write_keys(
    keys, source, share, lengths, i, sizes, OFFSETS: tl.constexpr, TABLES: tl.constexpr
):
    """One program's share of a request's keys, and of the padding keys."""
    ROWS: tl.constexpr = OFFSETS[0].rows
    BACKENDS: tl.constexpr = OFFSETS[0].backends
    COUNT: tl.constexpr = OFFSETS[0].count
    capacity = sizes.max_total_keys
    request = load_request(lengths, i, ROWS)
    location = locate_among(lengths.seq_lens, i, request.cache_seqlen, capacity, sizes.rows, ROWS)
    arrays = of_backends(keys, capacity, BACKENDS, COUNT)
    TILE: tl.constexpr = _KEY_TILE
    for first in range(share * TILE, location.rows, sizes.key_programs * TILE):
        column = first + tl.arange(0, TILE)
        exists = column < location.rows
        slots = tl.load(source + column, exists & (column < sizes.max_len), 0)
        store_values(arrays, location.first_row + column, Keys(slots), exists)
    if TABLES.tail != "keep":
        programs = sizes.rows.requests * sizes.key_programs
        program = i * sizes.key_programs + share
        for index in range(program, tl.cdiv(capacity - location.total, TILE), programs):
            key = location.total + index * TILE + tl.arange(0, TILE)
            store_values(arrays, key, Keys(0), key < capacity)


@triton.jit
def _write_tables(
    inputs,
    results,
    source,
    program,
    lengths,
    i,
    sizes,
    OFFSETS: tl.constexpr,
    TABLES: tl.constexpr,
):
    """One program's share of a request's rows in the tables.

    Args:
      inputs: Inputs.
      results: Results.
      source: the request's row of req_to_token.
      program: which of the programs that share the request's tables.
      lengths: of all requests.
      i: which request.
      sizes: Sizes.
      OFFSETS: OffsetConstants of all offsets.
      TABLES: TableConstants.
    """
    # As the backends see it that see the most tokens.
    NUM_OFFSETS: tl.constexpr = TABLES.offsets
    ROWS: tl.constexpr = OFFSETS[NUM_OFFSETS - 1].table_rows
    request = load_request(lengths, i, ROWS)
    first = 0
    begin = 0
    if inputs.written_lens is not None:
        first = tl.minimum(tl.maximum(tl.load(inputs.written_lens + i), 0), sizes.max_len)
        begin = first // 4 * 4  # so that accesses are as wide as the alignment allows
    longest = sizes.max_len
    if TABLES.tail == "keep":
        longest = tl.minimum(request.cache_seqlen, sizes.max_len)
    location = locate(lengths, request, sizes.table_rows, ROWS)
    programs = sizes.programs - NUM_OFFSETS * sizes.length_programs - sizes.key_programs
    for index in range(program, tl.cdiv(longest - begin, TABLES.tile), programs):
        start = begin + index * TABLES.tile
        tile = _load_tile(results.tables, source, start, first, longest, TABLES)
        for k in tl.static_range(NUM_OFFSETS):
            _store_rows(results.tables, tile, lengths, i, location, sizes, OFFSETS, k, TABLES)


@triton.jit
def _store_rows(
    tables,
    tile,
    lengths,
    i,
    location,
    sizes,
    OFFSETS: tl.constexpr,
    K: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Stores a tile in a request's rows, and its share of the padding rows, for an offset."""
    ROWS: tl.constexpr = OFFSETS[K].table_rows
    request = load_request(lengths, i, ROWS)
    for j in range(0, location.rows):
        live = sizes.max_len
        if TABLES.tail != "copy":
            live = tl.minimum(kv_len(request, j), sizes.max_len)
        end = live if TABLES.tail == "keep" else sizes.max_len
        _store_tile(tables, location.first_row + j, tile, live, end, sizes, OFFSETS, K, TABLES)
    if ROWS.rows_per_request is None and TABLES.tail != "keep":
        rows = sizes.table_rows
        for row in range(location.total + i, rows.rows, rows.requests):
            _store_tile(tables, row, tile, 0, sizes.max_len, sizes, OFFSETS, K, TABLES)


class Tile(NamedTuple):
    """A tile of a pool row.

    Attributes:
      start: its first token.
      first: the first one of them that tables are written for.
      slots: the KV slots of its tokens; () where there is no table of them.
      pages: `tables.Pages` that start in it; () where there is no table of them.
      pooled_pages: likewise, of pooled keys.
    """

    start: Any
    first: Any
    slots: Any
    pages: Any
    pooled_pages: Any


@triton.jit
def _load_tile(tables, source, start, first, longest, TABLES: tl.constexpr):
    """What the tables hold for tokens [start, start + TABLES.tile), as far as any row is live."""
    slots = ()
    pages = ()
    pooled_pages = ()
    if len(tables.page_indices) > 0:
        slots = load_columns(source, start, first, longest, TABLES.tile)
    if len(tables.real_page_table) > 0:
        SIZE: tl.constexpr = TABLES.page_size
        COUNT: tl.constexpr = TABLES.pages
        pages = load_pages(source, start, first, longest, TABLES.tile, COUNT, SIZE, SIZE)
    if len(tables.pooled_page_table) > 0:
        pooled_pages = load_pages(
            source,
            start,
            first,
            longest,
            TABLES.tile,
            TABLES.pooled_pages,
            TABLES.pooled_tokens,
            TABLES.page_size,
        )
    return Tile(start, first, slots, pages, pooled_pages)


@triton.jit
def _store_tile(
    tables,
    row,
    tile,
    live,
    end,
    sizes,
    OFFSETS: tl.constexpr,
    K: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Stores a tile in a row of the tables: live columns, then 0 up to token `end`."""
    BACKENDS: tl.constexpr = OFFSETS[K].backends
    COUNT: tl.constexpr = OFFSETS[K].count
    row = tl.cast(row, tl.int64)
    rows = tl.cast(sizes.table_rows.rows, tl.int64)
    if len(tables.page_indices) > 0:
        stride = sizes.wide_stride * TABLES.wide_unit
        (wide,) = of_backends((tables.page_indices,), rows * stride, BACKENDS, COUNT)
        base = row * stride
        store_columns(wide, base, tile.start, tile.first, tile.slots, live, end, TABLES.tile)
    if len(tables.real_page_table) > 0:
        (real,) = of_backends((tables.real_page_table,), rows * sizes.pages, BACKENDS, COUNT)
        store_pages(real, row * sizes.pages, tile.pages, live, end)
    if len(tables.pooled_page_table) > 0:
        size = rows * sizes.pooled_pages
        (pooled,) = of_backends((tables.pooled_page_table,), size, BACKENDS, COUNT)
        store_pages(pooled, row * sizes.pooled_pages, tile.pooled_pages, live, end)
