"""Writing a page table: cut into tiles, each element loaded once and stored everywhere it goes."""

import dataclasses
from collections.abc import Sequence
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
            self._write_live(writer, block, self.columns_of(jnp.maximum(written, 0)))
        elif not self.width:
            writer.write_scalars(block * self.tile, writer.request.locate())
        elif self.blocks == self.tiles:
            self._write_tile(writer, block, None)
        elif self.tail == "keep":
            self._write_live(writer, block, jnp.int32(0))
        else:
            location = writer.request.locate()

            def write_tile(k, _):
                self._write_tile(writer, self._index(block, k), location)

            lax.fori_loop(0, self._steps(block, jnp.int32(self.tiles)), write_tile, None)

    def columns_of(self, tokens: jax.Array) -> jax.Array:
        """Columns that stand for the first `tokens` of a row: those whose first token is one."""
        return ceil_div(jnp.minimum(tokens, self.max_len), self.tokens_per_column)

    def _index(self, block: jax.Array, k: jax.Array) -> jax.Array:
        """Which tile of a row is the k-th of a block."""
        return block + k * self.blocks

    def _steps(self, block: jax.Array, tiles: jax.Array) -> jax.Array:
        """How many of a row's tiles a block has."""
        return lax.div(tiles - block + (self.blocks - 1), jnp.int32(self.blocks))

    def _write_live(self, writer: "_Writer", block: jax.Array, first: jax.Array) -> None:
        """Writes the live columns from `first` on, where the tiles begin."""
        live = writer.live_columns()
        begin = first - lax.rem(first, jnp.int32(max(self.width, 1)))
        tiles = jnp.where(first < live, ceil_div(live - begin, self.tile), 0)
        steps = self._steps(block, tiles)

        def start_of(k: jax.Array) -> jax.Array:
            return begin + self._index(block, k) * self.tile

        if not self.width:
            location = writer.request.locate()
            lax.fori_loop(0, steps, lambda k, _: writer.write_scalars(start_of(k), location), None)
            return

        def vectors_of(k: jax.Array) -> list[Vector]:
            starts = [start_of(k) + n * self.vector for n in range(self.config.vectors)]
            # What would go past the end of the row begins before, and stores no column twice.
            last = self.columns - self.vector
            return [Vector(jnp.minimum(s, last), jnp.maximum(s, first)) for s in starts]

        locate = writer.request.start_locating()

        def load(k: jax.Array) -> list[jax.Array]:
            return [writer.load_live(v.start, live, k < steps) for v in vectors_of(k)]

        def step(k: jax.Array, loaded: list[jax.Array]) -> list[jax.Array]:
            following = load(k + 1)  # under way while these are stored
            writer.store_live(vectors_of(k), loaded, location)
            return following

        loaded = load(jnp.int32(0))
        location = locate()
        lax.fori_loop(0, steps, step, loaded)

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
        if self.table.tail != "keep":
            self._overwrite(vectors, location)
            return
        live = self.live_columns()
        locate = self.request.start_locating()

        @pl.when(vectors[0].start < live)
        def _():
            loaded = [self.load_live(vector.start, live) for vector in vectors]
            self.store_live(vectors, loaded, locate())

    def load_live(self, start: jax.Array, live: jax.Array, exists: Any = True) -> jax.Array:
        """The vector from column `start` on, if it exists and begins before `live`; else zeros."""
        nothing = self.lanes.zeros(self.table.vector, self.table.width)
        return lax.cond(exists & (start < live), lambda: self._load(start), lambda: nothing)

    def store_live(
        self, vectors: Sequence[Vector], loaded: Sequence[jax.Array], location: Location
    ) -> None:
        """Stores the live columns of vectors in all rows and touches nothing else."""

        def write_row(j, row):
            for targets in self.targets:
                live = self.table.columns_of(targets.request.kv_len(j))
                for (start, first), values in zip(vectors, loaded, strict=True):
                    self._store_part(targets, row, start, first, live, values)

        self.request.for_rows(location, write_row)

    def _store_part(self, targets: Targets, row, start, first, live, values) -> None:
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
