"""A tile of a page table: each element loaded once and stored in every row and destination.

Lengths are in tokens. A column stands for the tokens from `column * tokens_per_column` on; it is
live, and exists, where the first of them is.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import store


class Pages(NamedTuple):
    """The pages that start in a tile.

    Attributes:
      column: of the page table.
      token: the first one of each page.
      in_tile: whether the page starts in the tile and is wanted; the last of the vector may not.
      physical: their numbers in the cache; unspecified where they are not live.
    """

    column: Any
    token: Any
    in_tile: Any
    physical: Any


@triton.jit
def load_columns(
    source, start, first, live, TILE: tl.constexpr, TOKENS_PER_COLUMN: tl.constexpr = 1
):
    """Columns [start, start + TILE) of a table row; 0 before `first` and past `live`."""
    columns = start + tl.arange(0, TILE)
    # Without a mask, an access is as wide as the alignment allows.
    if (start >= first) & ((start + TILE - 1) * TOKENS_PER_COLUMN < live):
        values = tl.load(source + columns)
    else:
        is_read = (columns >= first) & (columns * TOKENS_PER_COLUMN < live)
        values = tl.load(source + columns, is_read, 0)
    return values


@triton.jit
def store_columns(
    pointers,
    base,
    start,
    first,
    values,
    live,
    end,
    TILE: tl.constexpr,
    TOKENS_PER_COLUMN: tl.constexpr = 1,
):
    """Stores columns [start, start + TILE) of a table row: live ones, then 0 up to `end`.

    Args:
      pointers: to the table in all destinations.
      base: the element at which the row begins.
      start: the first column.
      first: the first one that is stored.
      values: of the columns.
      live: tokens of the row that are live.
      end: tokens whose columns are stored.
      TILE: columns of the tile.
      TOKENS_PER_COLUMN: tokens that a column stands for.
    """
    columns = start + tl.arange(0, TILE)
    tokens = columns * TOKENS_PER_COLUMN
    if (start >= first) & ((start + TILE - 1) * TOKENS_PER_COLUMN < live):
        store(pointers, base + columns, values)
    elif start * TOKENS_PER_COLUMN < end:
        is_stored = (columns >= first) & (tokens < end)
        store(pointers, base + columns, tl.where(tokens < live, values, 0), is_stored)


@triton.jit
def load_pages(
    source,
    start,
    first,
    live,
    TILE: tl.constexpr,
    PAGES: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """The pages that start in tokens [start, start + TILE) of a pool row, from token `first` on.

    They are PAGES at most, one for each TOKENS; PAGE_SIZE is what slots are divided by.
    """
    # A page may be as long as int32 reaches: its tokens are counted in 64 bits.
    start = tl.cast(start, tl.int64)
    column = tl.cdiv(start, TOKENS) + tl.arange(0, PAGES)
    token = column * TOKENS
    in_tile = (token >= first) & (token < start + TILE)
    slots = tl.load(source + token, in_tile & (token < live), 0)
    return Pages(column, token, in_tile, _floor_div(slots, PAGE_SIZE))


@triton.jit
def store_pages(pointers, base, pages, live, end):
    """Stores the pages of a tile in a row of a page table: live ones, then 0 up to `end`."""
    values = tl.where(pages.token < live, pages.physical, 0)
    store(pointers, base + pages.column, values, pages.in_tile & (pages.token < end))


@triton.jit
def _floor_div(x, DIVISOR: tl.constexpr):
    """x // DIVISOR, rounded towards minus infinity."""
    quotient = x // DIVISOR
    return quotient - tl.where(x - quotient * DIVISOR < 0, 1, 0)
