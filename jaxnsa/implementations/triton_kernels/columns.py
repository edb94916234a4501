"""A piece of a table row: loaded once, stored in every backend.

A column stands for the token at which it starts: column c of the page table for token c, of the
real page table for token c * PAGE. Both are live, and exist, as far as their token is.
"""

import triton
import triton.language as tl


@triton.jit
def store(targets, offset, value, mask, size, COPIES: tl.constexpr):
    """Stores a value at an offset of every array.

    Args:
      targets: tuple of pointers.
      offset: in elements.
      value: what to store, a scalar or a vector.
      mask: where to store it, or None.
      size: elements from one copy to the next in an array that holds several.
      COPIES: how many it holds.
    """
    for k in tl.static_range(len(targets)):
        for copy in tl.static_range(COPIES):
            # Nothing that a launch writes is read by it: those lines can leave the caches first.
            pointer = targets[k] + (offset + copy * size)
            tl.store(pointer, value, mask, cache_modifier=".cs")


@triton.jit
def load_tokens(source, start, live, LANES: tl.constexpr):
    """Tokens [start, start + LANES) of a pool row; 0 from `live` on."""
    tokens = start + tl.arange(0, LANES)
    # Without a mask, an access is as wide as the alignment allows.
    if start + LANES <= live:
        values = tl.load(source + tokens)
    else:
        values = tl.load(source + tokens, tokens < live, 0)
    return values


@triton.jit
def store_tokens(targets, base, start, values, live, end, size, COPIES, LANES: tl.constexpr):
    """Writes columns [start, start + LANES) of a row: values below `live`, then 0 below `end`."""
    columns = start + tl.arange(0, LANES)
    if start + LANES <= live:
        store(targets, base + columns, values, None, size, COPIES)
    elif start < end:
        values = tl.where(columns < live, values, 0)
        store(targets, base + columns, values, columns < end, size, COPIES)


@triton.jit
def floor_div(x, DIVISOR: tl.constexpr):
    """x // DIVISOR, rounded towards minus infinity."""
    quotient = x // DIVISOR
    return quotient - tl.where(x - quotient * DIVISOR < 0, 1, 0)
