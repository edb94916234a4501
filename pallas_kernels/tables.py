"""Writing a page table: cut into blocks, each element loaded once and stored everywhere it goes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lanes import LANES, Lanes
from pallas_kernels.rows import Location, Request, for_rows
from pallas_kernels.tuning import BlockConfig

Destination = tuple[Any, tuple[int, ...]]
"""A ref [..., rows, columns] and the index of its leading axes."""


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
      columns: columns of the table.
      tokens: tokens that a column stands for; it is live where the first of them is.
      tail: what lies past the live columns: "copy", "zero" or "keep".
      width: elements of one access; 0 where the table has to be copied one by one, because it is
        narrower than a window or its source has no vectors.
      blocks: blocks that share a request's rows.
      config: block sizes.
    """

    columns: int
    tokens: int
    tail: str
    width: int
    blocks: int
    config: BlockConfig

    @classmethod
    def of(
        cls, requests: int, columns: int, tokens: int, tail: str, width: int, config: BlockConfig
    ) -> "Table":
        """A table whose accesses are as wide as pitches (`width`) and columns allow."""
        while width and LANES * width > columns:
            width //= 2
        if not width:
            return cls(columns, tokens, tail, 0, -(-columns // config.scalars), config)
        chunks = -(-(columns // (LANES * width)) // config.windows)
        blocks = min(chunks, max(1, config.blocks // requests))
        return cls(columns, tokens, tail, width, blocks, config)

    @property
    def window(self) -> int:
        """Columns of one vector."""
        return LANES * self.width

    def yields_pages(self, page: int) -> bool:
        """Whether a page table can be written out of this table's columns while they are moved."""
        return self.tokens == 1 and self.width > 0 and page % self.width == 0

    def write(
        self,
        lanes: Lanes,
        block: jax.Array,
        read: Callable,
        request: Request,
        locate: Callable[[], Location],
        for_spare_rows: Callable[[Location, Callable], None],
        targets: Targets,
    ) -> None:
        """Writes the share of one block in all rows of a request.

        Args:
          lanes: vector operations.
          block: which of the request's blocks.
          read: gives the columns at an index, a scalar or a `pl.ds`, of the source row.
          request: whose rows.
          locate: tells which they are. That may take its time: where a block has one turn, its
            loads are under way by then.
          for_spare_rows: calls a function for each of the rows past the total to fill with 0.
          targets: where to.
        """
        if not self.width:
            first = block * self.config.scalars
            columns = [first + k for k in range(self.config.scalars)]
            self._write_scalars(columns, read, request, locate(), for_spare_rows, targets.tables)
            return
        chunk_columns = self.config.windows * self.window
        windows = self.columns // self.window
        chunks = -(-windows // self.config.windows)
        in_last = windows - (chunks - 1) * self.config.windows
        # The columns that fill no window are covered by one that overlaps its neighbour.
        rest = [self.columns - self.window] if self.columns % self.window else []

        def write_chunk(chunk, locate):
            def write(count, more=()):
                starts = [chunk * chunk_columns + k * self.window for k in range(count)]
                self._write_windows(
                    lanes, starts + list(more), read, request, locate, for_spare_rows, targets
                )

            if in_last == self.config.windows and not rest:
                write(in_last)
                return
            pl.when(chunk == chunks - 1)(lambda: write(in_last, rest))
            if chunks > 1:
                pl.when(chunk < chunks - 1)(lambda: write(self.config.windows))

        if self.blocks == chunks:
            write_chunk(block, locate)
            return
        location = locate()
        end = jnp.int32(chunks)
        if self.tail == "keep":
            live = self._longest(request)
            end = jnp.minimum(end, lax.div(live + (chunk_columns - 1), jnp.int32(chunk_columns)))
        turns = lax.div(end - block + (self.blocks - 1), jnp.int32(self.blocks))
        lax.fori_loop(
            0, turns, lambda k, _: write_chunk(block + k * self.blocks, lambda: location), None
        )

    def _live(self, request: Request, j: jax.Array | int) -> jax.Array:
        kv_len = jnp.minimum(request.kv_len(j), self.columns * self.tokens)
        return lax.div(kv_len + (self.tokens - 1), jnp.int32(self.tokens))

    def _longest(self, request: Request) -> jax.Array:
        """Live columns of all rows together: the last one's, unless its KV length has wrapped."""
        if isinstance(request.tokens, int) and request.tokens == 1:
            return self._live(request, 0)
        return jnp.maximum(self._live(request, 0), self._live(request, request.tokens - 1))

    def _write_windows(self, lanes, starts, read, request, locate, for_spare_rows, targets):
        keep = self.tail == "keep"
        longest = self._longest(request) if keep else self.columns

        def load(start):
            def window():
                return lanes.laid_out(read(pl.ds(start, self.window)), self.width)

            if not keep:
                return window()
            nothing = lanes.zeros(self.window, self.width)
            return lax.cond(start < longest, window, lambda: nothing)

        def write_window(row, start, window, end):
            columns = pl.ds(start, self.window)

            def whole():
                for ref, lead in targets.tables:
                    lanes.store(ref, (*lead, row, columns), window, self.width)

            def part():
                for ref, lead in targets.tables:
                    index = (*lead, row, columns)
                    lanes.store_some(ref, index, window, end - start, self.width)

            if keep:
                lax.cond(start + self.window <= end, whole, part)
            else:
                whole()
            for ref, lead in targets.pages:
                index = (*lead, row)
                lanes.store_pages(ref, index, window, start, end, targets.page_size, self.width)

        def write():
            iota = lanes.iota(self.window, self.width)
            windows = [load(start) for start in starts]
            location = locate()

            def write_row(j, row):
                live = self.columns if self.tail == "copy" else self._live(request, j)
                for start, window in zip(starts, windows, strict=True):
                    if self.tail == "zero":
                        window = jnp.where(start + iota < live, window, 0)
                    write_window(row, start, window, live if keep else self.columns)

            for_rows(location, write_row)
            if keep:
                return
            zeros = lanes.zeros(self.window, self.width)

            def clear_row(row):
                for start in starts:
                    write_window(row, start, zeros, self.columns)

            for_spare_rows(location, clear_row)

        if keep:
            pl.when(starts[0] < longest)(write)
        else:
            write()

    def _write_scalars(self, columns, read, request, location, for_spare_rows, destinations):
        values = [read(jnp.minimum(column, self.columns - 1)) for column in columns]

        def write_row(j, row):
            live = self.columns if self.tail == "copy" else self._live(request, j)
            for column, value in zip(columns, values, strict=True):
                if self.tail == "zero":
                    value = jnp.where(column < live, value, 0)

                @pl.when(column < (live if self.tail == "keep" else self.columns))
                def _(column=column, value=value):
                    for ref, lead in destinations:
                        ref[(*lead, row, column)] = value

        for_rows(location, write_row)
        if self.tail == "keep":
            return

        def clear_row(row):
            for column in columns:

                @pl.when(column < self.columns)
                def _(column=column):
                    for ref, lead in destinations:
                        ref[(*lead, row, column)] = jnp.int32(0)

        for_spare_rows(location, clear_row)
