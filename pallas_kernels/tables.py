"""Writing a page table: cut into tiles, each element loaded once and stored everywhere it goes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxnsa.spec import MAX_LEN, Tail
from pallas_kernels.lanes import LANES, Lanes, ceil_div, floor_div
from pallas_kernels.rows import Location, Request
from pallas_kernels.tuning import BlockConfig

Destination = tuple[Any, tuple[int, ...]]
"""A ref [..., rows, columns] and the index of its leading axes."""


class Source(NamedTuple):
    """The row that the rows of a request are copied from.

    Attributes:
      ref: [rows, columns], or [rows, columns, page_size] where columns are pages.
      row: which row, a scalar.
      page_size: what slots are divided by; 1: columns are as they are.
      stride: otherwise, tokens from one column to the next.
    """

    ref: Any
    row: jax.Array
    page_size: int = 1
    stride: int = 1

    def columns(self, lanes: Lanes, index: Any) -> jax.Array:
        """The columns at an index, a scalar or a `pl.ds`."""
        if self.page_size == 1:
            return self.ref[self.row, index]
        if len(self.ref.shape) == 3:
            starts = self.ref[self.row, index, 0]
            return floor_div(lanes.laid_out(starts) if starts.ndim else starts, self.page_size)
        return floor_div(self.ref[self.row, index * self.stride], self.page_size)


class Targets(NamedTuple):
    """Where the columns of a table go, in all backends that see the same tokens.

    Attributes:
      request: whose rows, as these backends see it.
      tables: as they are.
      pages: where the pages that start in them go, if the table yields any.
      page_size: tokens in a page.
    """

    request: Request
    tables: Sequence[Destination]
    pages: Sequence[Destination] = ()
    page_size: int = 1


class Vector(NamedTuple):
    """Columns that are moved at once.

    Attributes:
      start: the first of them.
      first: the first of them that is stored.
    """

    start: Any
    first: Any


@dataclasses.dataclass(frozen=True)
class Table:
    """The static part of a table.

    Attributes:
      max_len: tokens that a row has columns for.
      tokens_per_column: tokens that a column stands for; it is live where the first of them is.
      tail: what lies past the live columns: "copy", "zero" or "keep".
      width: elements of one access; 0 where the table has to be copied one by one, because it is
        narrower than a vector or its source has no vectors.
      blocks: blocks that share a request's rows.
      config: block sizes.
    """

    max_len: int
    tokens_per_column: int
    tail: Tail
    width: int
    blocks: int
    config: BlockConfig

    @classmethod
    def of(
        cls,
        requests: int,
        max_len: int,
        tokens_per_column: int,
        tail: Tail,
        width: int,
        config: BlockConfig,
        max_new_tokens: int = MAX_LEN,
    ) -> "Table":
        """A table whose accesses are as wide as strides (`width`) and columns allow.

        Its blocks are as many as a row of `max_new_tokens` wants.
        """
        columns = -(-max_len // tokens_per_column)
        while width and LANES * width > columns:
            width //= 2
        table = cls(max_len, tokens_per_column, tail, width, 0, config)
        # The first access may begin before the first new column.
        new_columns = -(-max_new_tokens // tokens_per_column) + max(width - 1, 0)
        blocks = min(table.tiles, max(1, -(-new_columns // table.tile)))
        if width:
            blocks = min(blocks, max(1, config.blocks // requests))
        return dataclasses.replace(table, blocks=blocks)

    @property
    def columns(self) -> int:
        """Columns of a row."""
        return -(-self.max_len // self.tokens_per_column)

    @property
    def vector(self) -> int:
        """Columns of a vector."""
        return LANES * self.width

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return self.config.vectors * self.vector if self.width else self.config.scalars

    @property
    def tiles(self) -> int:
        """Tiles of a row. Columns that fill no vector belong to the last one."""
        if not self.width:
            return -(-self.columns // self.tile)
        return -(-(self.columns // self.vector) // self.config.vectors)

    def yields_pages(self, page_size: int) -> bool:
        """Whether a page table can be written out of this table's columns while they are moved."""
        return self.tokens_per_column == 1 and self.width > 0 and page_size % self.width == 0

    def write(
        self,
        lanes: Lanes,
        block: jax.Array,
        source: Source,
        targets: Sequence[Targets],
        written: jax.Array | None = None,
    ) -> None:
        """Writes the share of one block in all rows of a request.

        Args:
          lanes: vector operations.
          block: which of the request's blocks.
          source: where the columns come from.
          targets: where they go; the backends that see the most tokens come last.
          written: leading tokens whose columns are left alone; None: none. Needs tail "keep".
        """
        writer = _Writer(self, lanes, source, targets)
        if written is not None:
            self._write_new(writer, block, self.columns_of(jnp.maximum(written, 0)))
        elif not self.width:
            writer.write_scalars(block * self.tile, writer.request.locate())
        elif self.blocks == self.tiles:
            self._write_tile(writer, block, None)
        else:
            location = writer.request.locate()
            tiles = jnp.int32(self.tiles)
            if self.tail == "keep":
                tiles = jnp.minimum(tiles, ceil_div(writer.live_columns(), self.tile))
            self._for_tiles(block, tiles, lambda index: self._write_tile(writer, index, location))

    def columns_of(self, tokens: jax.Array) -> jax.Array:
        """Columns that stand for the first `tokens` of a row: those whose first token is one."""
        return ceil_div(jnp.minimum(tokens, self.max_len), self.tokens_per_column)

    def _for_tiles(self, block: jax.Array, tiles: jax.Array, write: Callable) -> None:
        """Calls `write` with the index of each of a block's tiles, of so many."""
        strides = lax.div(tiles - block + (self.blocks - 1), jnp.int32(self.blocks))
        lax.fori_loop(0, strides, lambda k, _: write(block + k * self.blocks), None)

    def _write_new(self, writer: "_Writer", block: jax.Array, first: jax.Array) -> None:
        """Writes the live columns from `first` on, where the tiles begin."""
        location, live = writer.request.locate(), writer.live_columns()
        begin = first - lax.rem(first, jnp.int32(max(self.width, 1)))
        tiles = jnp.where(first < live, ceil_div(live - begin, self.tile), 0)

        def write(index: jax.Array) -> None:
            start = begin + index * self.tile
            if not self.width:
                writer.write_scalars(start, location)
                return
            starts = [start + k * self.vector for k in range(self.config.vectors)]
            # What would go past the end of the row begins before, and stores no column twice.
            last = self.columns - self.vector
            writer.write_vectors(
                [Vector(jnp.minimum(s, last), jnp.maximum(s, first)) for s in starts], location
            )

        self._for_tiles(block, tiles, write)

    def _write_tile(self, writer: "_Writer", index: jax.Array, location: Location | None) -> None:
        in_last = self.columns // self.vector - (self.tiles - 1) * self.config.vectors
        # The columns that fill no vector are covered by one that overlaps its neighbour.
        rest = [self.columns - self.vector] if self.columns % self.vector else []

        def write(vectors: int, more: Sequence[int] = ()) -> None:
            starts = [index * self.tile + k * self.vector for k in range(vectors)]
            writer.write_vectors([Vector(s, None) for s in (*starts, *more)], location)

        if in_last == self.config.vectors and not rest:
            write(in_last)
            return
        pl.when(index == self.tiles - 1)(lambda: write(in_last, rest))
        if self.tiles > 1:
            pl.when(index < self.tiles - 1)(lambda: write(self.config.vectors))


@dataclasses.dataclass(frozen=True)
class _Writer:
    """One block's work on one request's rows of a table."""

    table: Table
    lanes: Lanes
    source: Source
    targets: Sequence[Targets]

    @property
    def request(self) -> Request:
        """As the backends see it that see the most tokens."""
        return self.targets[-1].request

    def live_columns(self) -> jax.Array:
        """Of the longest row."""
        return self.table.columns_of(self.request.cache_seqlen)

    def write_vectors(self, vectors: Sequence[Vector], location: Location | None) -> None:
        """Loads the vectors of a tile and stores them in all rows.

        Args:
          vectors: in ascending order.
          location: the rows; None: to be found once the loads are under way.
        """
        if self.table.tail == "keep":
            live = self.live_columns()
            pl.when(vectors[0].start < live)(lambda: self._keep(vectors, live, location))
        else:
            self._overwrite(vectors, location)

    def _keep(
        self, vectors: Sequence[Vector], longest: jax.Array, location: Location | None
    ) -> None:
        """Stores the live columns and touches nothing else."""
        table, lanes = self.table, self.lanes

        def load(start):
            nothing = lanes.zeros(table.vector, table.width)
            return lax.cond(start < longest, lambda: self._load(start), lambda: nothing)

        loaded = [load(vector.start) for vector in vectors]
        location = location or self.request.locate()

        def write_row(j, row):
            for targets in self.targets:
                live = table.columns_of(targets.request.kv_len(j))
                for (start, first), values in zip(vectors, loaded, strict=True):
                    self._store_live(targets, row, start, first, live, values)

        self.request.for_rows(location, write_row)

    def _store_live(self, targets: Targets, row, start, first, live, values) -> None:
        """Stores the columns of a vector from `first`, if that is not None, to before `live`."""
        table, lanes = self.table, self.lanes
        columns = pl.ds(start, table.vector)

        def whole():
            for ref, lead in targets.tables:
                lanes.store(ref, (*lead, row, columns), values, table.width)

        def part():
            for ref, lead in targets.tables:
                index = (*lead, row, columns)
                lanes.store_part(ref, index, values, start, first, live, table.width)

        is_whole = start + (table.vector - 1) < live
        if first is not None:
            is_whole &= first <= start
        lax.cond(is_whole, whole, part)
        self._store_pages(targets, row, start, first, live, values)

    def _overwrite(self, vectors: Sequence[Vector], location: Location | None) -> None:
        """Stores every column, 0 past the live ones with tail "zero" and in padding rows."""
        table, lanes = self.table, self.lanes
        iota = lanes.iota(table.vector, table.width)
        starts = [vector.start for vector in vectors]
        loaded = [self._load(start) for start in starts]
        location = location or self.request.locate()

        def store(targets, row, start, values):
            for ref, lead in targets.tables:
                index = (*lead, row, pl.ds(start, table.vector))
                lanes.store(ref, index, values, table.width)
            self._store_pages(targets, row, start, None, table.max_len, values)

        def write_row(j, row):
            for targets in self.targets:
                live = None
                if table.tail == "zero":
                    live = table.columns_of(targets.request.kv_len(j))
                for start, values in zip(starts, loaded, strict=True):
                    if live is not None:
                        values = jnp.where(start + iota < live, values, 0)
                    store(targets, row, start, values)

        def clear_row(row):
            for targets in self.targets:
                for start in starts:
                    store(targets, row, start, lanes.zeros(table.vector, table.width))

        self.request.for_rows(location, write_row)
        self.request.for_padding_rows(location, clear_row)

    def write_scalars(self, start: jax.Array, location: Location) -> None:
        """The same, column by column."""
        table = self.table
        last = table.columns - 1
        columns = [start + k for k in range(table.tile)]
        loaded = [self.source.columns(self.lanes, jnp.minimum(c, last)) for c in columns]

        def store(targets, row, column, value, is_stored):
            @pl.when(is_stored & (column <= last))
            def _():
                for ref, lead in targets.tables:
                    ref[(*lead, row, column)] = value

        def write_row(j, row):
            for targets in self.targets:
                live = table.columns_of(targets.request.kv_len(j))
                for column, value in zip(columns, loaded, strict=True):
                    if table.tail == "zero":
                        value = jnp.where(column < live, value, 0)
                    is_stored = column < live if table.tail == "keep" else True
                    store(targets, row, column, value, is_stored)

        def clear_row(row):
            for targets in self.targets:
                for column in columns:
                    store(targets, row, column, jnp.int32(0), True)

        self.request.for_rows(location, write_row)
        if table.tail != "keep":
            self.request.for_padding_rows(location, clear_row)

    def _load(self, start: jax.Array) -> jax.Array:
        columns = self.source.columns(self.lanes, pl.ds(start, self.table.vector))
        return self.lanes.laid_out(columns, self.table.width)

    def _store_pages(self, targets: Targets, row, start, first, end, values) -> None:
        for ref, lead in targets.pages:
            page_size = targets.page_size
            self.lanes.store_pages(
                ref, (*lead, row), values, start, first, end, page_size, self.table.width
            )
