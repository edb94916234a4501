"""Writing a page table: cut into tiles, each element loaded once and stored everywhere it goes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxnsa.spec import MAX_LEN, Tail
from pallas_kernels.lanes import LANES, Lanes, floor_div
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
    """Where the columns of a table go.

    Attributes:
      tables: as they are.
      pages: where the pages that start in them go, if the table yields any.
      page_size: tokens in a page.
    """

    tables: Sequence[Destination]
    pages: Sequence[Destination] = ()
    page_size: int = 1


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
    ) -> "Table":
        """A table whose accesses are as wide as strides (`width`) and columns allow."""
        columns = -(-max_len // tokens_per_column)
        while width and LANES * width > columns:
            width //= 2
        table = cls(max_len, tokens_per_column, tail, width, 0, config)
        blocks = min(table.tiles, max(1, config.blocks // requests)) if width else table.tiles
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
        self, lanes: Lanes, block: jax.Array, source: Source, request: Request, targets: Targets
    ) -> None:
        """Writes the share of one block in all rows of a request.

        Args:
          lanes: vector operations.
          block: which of the request's blocks.
          source: where the columns come from.
          request: whose rows.
          targets: where they go.
        """
        writer = _Writer(self, lanes, source, request, targets)
        if not self.width:
            writer.write_scalars(block, request.locate())
        elif self.blocks == self.tiles:
            self._write_tile(writer, block, None)
        else:
            location = request.locate()
            tiles = jnp.int32(self.tiles)
            if self.tail == "keep":
                tile_tokens = min(self.tile * self.tokens_per_column, MAX_LEN)
                live = self.live_tokens(request.cache_seqlen)
                tiles = jnp.minimum(
                    tiles, lax.div(live + (tile_tokens - 1), jnp.int32(tile_tokens))
                )
            strides = lax.div(tiles - block + (self.blocks - 1), jnp.int32(self.blocks))
            lax.fori_loop(
                0,
                strides,
                lambda k, _: self._write_tile(writer, block + k * self.blocks, location),
                None,
            )

    def live_tokens(self, kv_len: jax.Array) -> jax.Array:
        """Tokens of a row that columns stand for: column c is live if c * tokens_per_column is."""
        return jnp.minimum(kv_len, self.max_len)

    def _write_tile(self, writer: "_Writer", index: jax.Array, location: Location | None) -> None:
        in_last = self.columns // self.vector - (self.tiles - 1) * self.config.vectors
        # The columns that fill no vector are covered by one that overlaps its neighbour.
        rest = [self.columns - self.vector] if self.columns % self.vector else []

        def write(vectors: int, more: Sequence[int] = ()) -> None:
            starts = [index * self.tile + k * self.vector for k in range(vectors)]
            writer.write_vectors([*starts, *more], location)

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
    request: Request
    targets: Targets

    def write_vectors(self, starts: Sequence[Any], location: Location | None) -> None:
        """Loads the vectors of a tile and stores them in all rows.

        Args:
          starts: the first column of each vector.
          location: the rows; None: to be found once the loads are under way.
        """
        if self.table.tail == "keep":
            live = self.table.live_tokens(self.request.cache_seqlen)
            first_token = starts[0] * self.table.tokens_per_column
            pl.when(first_token < live)(lambda: self._keep(starts, live, location))
        else:
            self._overwrite(starts, location)

    def _keep(self, starts: Sequence[Any], longest: jax.Array, location: Location | None) -> None:
        """Stores the live columns and touches nothing else."""
        table, lanes = self.table, self.lanes
        tokens = table.tokens_per_column

        def load(start):
            nothing = lanes.zeros(table.vector, table.width)
            return lax.cond(start * tokens < longest, lambda: self._load(start), lambda: nothing)

        vectors = [load(start) for start in starts]
        location = location or self.request.locate()

        def write_row(j, row):
            live = table.live_tokens(self.request.kv_len(j))
            for start, vector in zip(starts, vectors, strict=True):
                columns = pl.ds(start, table.vector)

                def whole(vector=vector, columns=columns):
                    for ref, lead in self.targets.tables:
                        lanes.store(ref, (*lead, row, columns), vector, table.width)

                def part(vector=vector, columns=columns, start=start):
                    for ref, lead in self.targets.tables:
                        index = (*lead, row, columns)
                        lanes.store_live(ref, index, vector, start, live, tokens, table.width)

                last_token = (start + (table.vector - 1)) * tokens
                lax.cond(last_token < live, whole, part)
                self._store_pages(row, start, vector, live)

        self.request.for_rows(location, write_row)

    def _overwrite(self, starts: Sequence[Any], location: Location | None) -> None:
        """Stores every column, 0 past the live ones with tail "zero" and in padding rows."""
        table, lanes = self.table, self.lanes
        tokens = lanes.iota(table.vector, table.width) * table.tokens_per_column
        vectors = [self._load(start) for start in starts]
        location = location or self.request.locate()

        def store(row, start, vector):
            for ref, lead in self.targets.tables:
                index = (*lead, row, pl.ds(start, table.vector))
                lanes.store(ref, index, vector, table.width)
            self._store_pages(row, start, vector, table.max_len)

        def write_row(j, row):
            live = table.live_tokens(self.request.kv_len(j)) if table.tail == "zero" else None
            for start, vector in zip(starts, vectors, strict=True):
                if live is not None:
                    is_live = start * table.tokens_per_column + tokens < live
                    vector = jnp.where(is_live, vector, 0)
                store(row, start, vector)

        def clear_row(row):
            for start in starts:
                store(row, start, lanes.zeros(table.vector, table.width))

        self.request.for_rows(location, write_row)
        self.request.for_padding_rows(location, clear_row)

    def write_scalars(self, tile: jax.Array, location: Location) -> None:
        """The same, column by column."""
        table = self.table
        last = table.columns - 1
        columns = [tile * table.tile + k for k in range(table.tile)]
        tokens = [jnp.minimum(column, last) * table.tokens_per_column for column in columns]
        values = [self.source.columns(self.lanes, jnp.minimum(c, last)) for c in columns]

        def store(row, column, value, is_stored):
            @pl.when(is_stored & (column <= last))
            def _():
                for ref, lead in self.targets.tables:
                    ref[(*lead, row, column)] = value

        def write_row(j, row):
            live = table.live_tokens(self.request.kv_len(j))
            for column, token, value in zip(columns, tokens, values, strict=True):
                if table.tail == "zero":
                    value = jnp.where(token < live, value, 0)
                store(row, column, value, token < live if table.tail == "keep" else True)

        def clear_row(row):
            for column in columns:
                store(row, column, jnp.int32(0), True)

        self.request.for_rows(location, write_row)
        if table.tail != "keep":
            self.request.for_padding_rows(location, clear_row)

    def _load(self, start: jax.Array) -> jax.Array:
        columns = self.source.columns(self.lanes, pl.ds(start, self.table.vector))
        return self.lanes.laid_out(columns, self.table.width)

    def _store_pages(self, row, start, vector, end) -> None:
        for ref, lead in self.targets.pages:
            page_size = self.targets.page_size
            self.lanes.store_pages(
                ref, (*lead, row), vector, start, end, page_size, self.table.width
            )
