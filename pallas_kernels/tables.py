"""Writing a page table: cut into tiles, each element loaded once and stored everywhere it goes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxnsa.spec import MAX_LEN, Tail
from pallas_kernels.lanes import LANES, Lanes, Scalar, ceil_div, floor_div
from pallas_kernels.rows import Location, Request
from pallas_kernels.tuning import BlockConfig

Destination = tuple[Any, tuple[int, ...]]
"""A ref [..., rows, columns] and the index of its leading axes."""


class Source(NamedTuple):
    """The row that the rows of a request are copied from.

    Attributes:
      ref: [rows, columns].
      row: which row, a scalar.
      page_size: what slots are divided by.
      stride: elements of the row from one column to the next.
    """

    ref: Any
    row: jax.Array
    page_size: int = 1
    stride: int = 1

    def column(self, index: jax.Array) -> jax.Array:
        """One column, a scalar."""
        return self._pages(self.ref[self.row, index * self.stride])

    def columns(self, lanes: Lanes, start: Scalar, width: int, count: Scalar) -> jax.Array:
        """A vector of columns, `width` in each access; those behind the first `count` may be 0.

        With a stride the width is 1: each column is then an access of its own.
        """
        if self.stride > 1:
            slots = lanes.load_first(self.ref.at[self.row], start, count, self.stride)
            return self._pages(slots)

        def load() -> jax.Array:
            index = (self.row, pl.ds(start, LANES * width))
            return self._pages(lanes.load(self.ref, index, width))

        if isinstance(count, int):
            return load()
        return lax.cond(count > 0, load, lambda: lanes.zeros(LANES * width, width))

    def _pages(self, slots: jax.Array) -> jax.Array:
        return slots if self.page_size == 1 else floor_div(slots, self.page_size)


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
      first: the first of them that is stored; None: `start`.
    """

    start: Any
    first: Any


class Tile(NamedTuple):
    """What is loaded before any of it is stored.

    Attributes:
      vectors: in ascending order.
      begin: the first of its columns that is stored.
      end: the column behind its last one.
    """

    vectors: Sequence[Vector]
    begin: Any
    end: Any


class Loaded(NamedTuple):
    """A tile in registers.

    Attributes:
      vectors: its columns.
      page_starts: those of them that a page starts with, and 0 behind them; None: not wanted.
    """

    vectors: Sequence[jax.Array]
    page_starts: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Table:
    """The static part of a table.

    Attributes:
      max_len: tokens that a row has columns for.
      tokens_per_column: tokens that a column stands for; it is live where the first of them is.
      tail: what lies past the live columns: "copy", "zero" or "keep".
      width: elements of one access; 0 where the table has to be copied one by one, because it is
        narrower than a vector.
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
        """Whether a page table can be written while this table's columns are moved.

        Each of 128 threads writes at most one page of a tile, whose last vector may be a part.
        """
        if self.tokens_per_column > 1 or not self.width:
            return False
        vectors = self.config.vectors + (self.columns % self.vector > 0)
        return page_size >= vectors * self.width

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

        def tile_of(k: jax.Array) -> Tile:
            start = start_of(k)
            starts = [start + n * self.vector for n in range(self.config.vectors)]
            # What would go past the end of the row begins before, and stores no column twice.
            last = self.columns - self.vector
            vectors = [Vector(jnp.minimum(s, last), jnp.maximum(s, first)) for s in starts]
            return Tile(vectors, jnp.maximum(start, first), start + self.tile)

        locate = writer.request.start_locating()

        def load(k: jax.Array) -> Loaded:
            return writer.load_live(tile_of(k), live, k < steps)

        def step(k: jax.Array, loaded: Loaded) -> Loaded:
            following = load(k + 1)  # under way while this one is stored
            writer.store_live(tile_of(k), loaded, location)
            return following

        loaded = load(jnp.int32(0))
        location = locate()
        lax.fori_loop(0, steps, step, loaded)

    def _write_tile(self, writer: "_Writer", index: jax.Array, location: Location | None) -> None:
        in_last = self.columns // self.vector - (self.tiles - 1) * self.config.vectors
        # The columns that fill no vector are covered by one that overlaps its neighbour.
        rest = [self.columns - self.vector] if self.columns % self.vector else []

        def write(vectors: int, more: Sequence[int] = ()) -> None:
            begin = index * self.tile
            starts = [begin + k * self.vector for k in range(vectors)]
            end = self.columns if more else begin + vectors * self.vector
            tile = Tile([Vector(s, None) for s in (*starts, *more)], begin, end)
            writer.write_tile(tile, location)

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

    def write_tile(self, tile: Tile, location: Location | None) -> None:
        """Loads a tile and stores it in all rows.

        Location None: they are found once the loads are under way.
        """
        if self.table.tail != "keep":
            self._overwrite(tile, location)
            return
        live = self.live_columns()
        locate = self.request.start_locating()

        @pl.when(tile.begin < live)
        def _():
            loaded = self.load_live(tile, live)
            self.store_live(tile, loaded, locate())

    def load_live(self, tile: Tile, live: jax.Array, exists: Any = True) -> Loaded:
        """The columns of a tile before `live`, if the tile exists; what else there is, may be 0."""
        page_starts = self._load_page_starts(tile, live)

        def load(start):
            count = jnp.where(exists, live - start, 0)
            return self.source.columns(self.lanes, start, self.table.width, count)

        return Loaded([load(start) for start, _ in tile.vectors], page_starts)

    def store_live(self, tile: Tile, loaded: Loaded, location: Location) -> None:
        """Stores the live columns of a tile in all rows and touches nothing else."""
        pages = self._pages(loaded.page_starts)

        def write_row(j, row):
            for targets in self.targets:
                live = self.table.columns_of(targets.request.kv_len(j))
                for vector, values in zip(tile.vectors, loaded.vectors, strict=True):
                    self._store_part(targets, row, vector, live, values)
                self._store_pages(targets, row, tile, live, pages)

        self.request.for_rows(location, write_row)

    def _store_part(self, targets: Targets, row, vector: Vector, live, values) -> None:
        """Stores the columns of a vector from its first one to before `live`."""
        table, lanes = self.table, self.lanes
        start, first = vector
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

    def _overwrite(self, tile: Tile, location: Location | None) -> None:
        """Stores every column, 0 past the live ones with tail "zero" and in padding rows."""
        table, lanes = self.table, self.lanes
        iota = lanes.iota(table.vector, table.width)
        starts = [start for start, _ in tile.vectors]
        page_starts = self._load_page_starts(tile, table.max_len)
        loaded = [self.source.columns(lanes, s, table.width, table.vector) for s in starts]
        location = location or self.request.locate()
        pages = self._pages(page_starts)
        nothing = lanes.zeros(table.vector, table.width)
        no_pages = None if pages is None else lanes.zeros(LANES)

        def store(targets, row, vectors, pages):
            for start, values in zip(starts, vectors, strict=True):
                for ref, lead in targets.tables:
                    index = (*lead, row, pl.ds(start, table.vector))
                    lanes.store(ref, index, values, table.width)
            self._store_pages(targets, row, tile, table.max_len, pages)

        def write_row(j, row):
            for targets in self.targets:
                vectors, live_pages = loaded, pages
                if table.tail == "zero":
                    live = table.columns_of(targets.request.kv_len(j))
                    vectors = [
                        jnp.where(start + iota < live, values, 0)
                        for start, values in zip(starts, vectors, strict=True)
                    ]
                    if pages is not None:
                        _, count = self._page_range(tile, live)
                        live_pages = jnp.where(lanes.iota(LANES) < count, pages, 0)
                store(targets, row, vectors, live_pages)

        def clear_row(row):
            for targets in self.targets:
                store(targets, row, [nothing] * len(starts), no_pages)

        self.request.for_rows(location, write_row)
        self.request.for_padding_rows(location, clear_row)

    def write_scalars(self, start: jax.Array, location: Location) -> None:
        """The same, column by column."""
        table = self.table
        last = table.columns - 1
        columns = [start + k for k in range(table.tile)]
        loaded = [self.source.column(jnp.minimum(c, last)) for c in columns]

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

    @property
    def _page_size(self) -> int:
        """Tokens of a page, where pages are written with these columns; otherwise 0."""
        return self.targets[0].page_size if self.targets[0].pages else 0

    def _page_range(self, tile: Tile, end: Any) -> tuple[jax.Array, jax.Array]:
        """The first page that starts in a tile, and how many do before column `end`, if any."""
        first = ceil_div(jnp.asarray(tile.begin, jnp.int32), self._page_size)
        return first, ceil_div(jnp.minimum(tile.end, end), self._page_size) - first

    def _load_page_starts(self, tile: Tile, end: Any) -> jax.Array | None:
        if not self._page_size:
            return None
        row = self.source.ref.at[self.source.row]
        return self.lanes.load_first(row, *self._page_range(tile, end), self._page_size)

    def _pages(self, page_starts: jax.Array | None) -> jax.Array | None:
        return None if page_starts is None else floor_div(page_starts, self._page_size)

    def _store_pages(
        self, targets: Targets, row, tile: Tile, end: Any, pages: jax.Array | None
    ) -> None:
        """Stores the numbers of those pages of a tile that start before column `end`."""
        if pages is None:
            return
        first, count = self._page_range(tile, end)
        for ref, lead in targets.pages:
            self.lanes.store_first(ref.at[(*lead, row)], first, pages, count)
