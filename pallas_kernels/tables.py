"""Writing a page table: cut into blocks, each element loaded once and stored everywhere it goes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lanes import LANES, Lanes
from pallas_kernels.rows import Location, Request, for_rows
from pallas_kernels.tuning import BlockConfig

Destination = tuple[Any, tuple[int, ...]]
"""A ref [..., rows, columns] and the index of its leading axes."""


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

    def write(
        self,
        lanes: Lanes,
        block: jax.Array,
        read: Callable,
        request: Request,
        locate: Callable[[], Location],
        for_spare_rows: Callable[[Location, Callable], None],
        destinations: Sequence[Destination],
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
          destinations: where to.
        """
        if not self.width:
            first = block * self.config.scalars
            columns = [first + k for k in range(self.config.scalars)]
            self._write_scalars(columns, read, request, locate(), for_spare_rows, destinations)
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
                    lanes, starts + list(more), read, request, locate, for_spare_rows, destinations
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

    def _write_windows(self, lanes, starts, read, request, locate, for_spare_rows, destinations):
        keep = self.tail == "keep"
        longest = self._longest(request) if keep else self.columns

        def load(start):
            def window():
                return lanes.laid_out(read(pl.ds(start, self.window)), self.width)

            if not keep:
                return window()
            nothing = lanes.zeros(self.window, self.width)
            return lax.cond(start < longest, window, lambda: nothing)

        def write():
            iota = lanes.iota(self.window, self.width)
            windows = [load(start) for start in starts]
            location = locate()

            def write_row(j, row):
                live = self.columns if self.tail == "copy" else self._live(request, j)
                for start, window in zip(starts, windows, strict=True):
                    columns = pl.ds(start, self.window)
                    if keep:
                        self._keep(lanes, iota, row, start, window, live, destinations)
                        continue
                    if self.tail == "zero":
                        window = jnp.where(start + iota < live, window, 0)
                    for ref, lead in destinations:
                        lanes.store(ref, (*lead, row, columns), window, self.width)

            for_rows(location, write_row)
            if keep:
                return
            zeros = lanes.zeros(self.window, self.width)

            def clear_row(row):
                for start in starts:
                    for ref, lead in destinations:
                        lanes.store(ref, (*lead, row, pl.ds(start, self.window)), zeros, self.width)

            for_spare_rows(location, clear_row)

        if keep:
            pl.when(starts[0] < longest)(write)
        else:
            write()

    def _keep(self, lanes, iota, row, start, window, live, destinations):
        columns = pl.ds(start, self.window)

        @pl.when(start + self.window <= live)
        def _():
            for ref, lead in destinations:
                lanes.store(ref, (*lead, row, columns), window, self.width)

        @pl.when((start < live) & (live < start + self.window))
        def _():
            for ref, lead in destinations:
                index = (*lead, row, columns)
                held = lanes.load(ref, index, self.width)
                ref[index] = jnp.where(start + iota < live, window, held)

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
