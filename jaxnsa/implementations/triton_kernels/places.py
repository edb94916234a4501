"""Prefix sums of what items cost, and the search for the item that holds a unit of cost."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.rows import kv_len, load_request


class Places(NamedTuple):
    """Where units lie.

    Attributes:
      item: the first with whose end the sum of costs is above the unit; behind them all, any index
        past the last.
      start: the sum before that item, int64.
    """

    item: Any
    start: Any


@triton.jit
def count_up_to(ascending, values, SIZE: tl.constexpr):
    """How many of SIZE ascending numbers are at most each of some values; SIZE a power of two."""
    count = tl.zeros(values.shape, tl.int32)
    step = SIZE
    while step > 0:
        probe = count + step - 1
        found = tl.gather(ascending, tl.minimum(probe, SIZE - 1), 0)
        count += tl.where((probe < SIZE) & (found <= values), step, 0)
        step //= 2
    return count


@triton.jit
def advanced(places, ends, units, SIZE: tl.constexpr):
    """Places after SIZE more items, with whose ends the sums are `ends`."""
    count = count_up_to(ends, units, SIZE)
    before = tl.gather(ends, tl.maximum(count - 1, 0), 0)
    return Places(places.item + count, tl.where(count > 0, before, places.start))


@triton.jit
def first_places(units):
    """Places before any item."""
    return Places(tl.zeros(units.shape, tl.int32), tl.zeros(units.shape, tl.int64))


@triton.jit
def kv_lens_of_rows(lengths, row, sizes, ROWS: tl.constexpr):
    """`seqlens_expanded` of any rows; 0 past the last."""
    if ROWS.rows_per_request is None:
        AT_ONCE: tl.constexpr = ROWS.requests_at_once
        units = row.to(tl.int64)
        places = first_places(units)
        total = tl.zeros([1], tl.int64)
        for first in range(0, sizes.requests, AT_ONCE):
            k = first + tl.arange(0, AT_ONCE)
            extend = tl.load(lengths.extend_seq_lens + k, k < sizes.requests, 0)
            q = tl.minimum(tl.maximum(extend, 0), sizes.rows).to(tl.int64)
            places = advanced(places, total + tl.cumsum(q, 0), units, AT_ONCE)
            total += tl.sum(q)
        i = places.item
        j = (units - places.start).to(tl.int32)
    else:
        i = row // ROWS.rows_per_request
        j = row % ROWS.rows_per_request
    exists = (i < sizes.requests) & (row < sizes.rows)
    request = load_request(lengths, i, ROWS, exists)
    return tl.where(exists, kv_len(request, j), 0)


@triton.jit
def kv_lens_of_requests(lengths, i, sizes, ROWS: tl.constexpr):
    """`cache_seqlens` of any requests; 0 past the last."""
    exists = i < sizes.requests
    return tl.where(exists, load_request(lengths, i, ROWS, exists).cache_seqlen, 0)


@triton.jit
def kv_lens_of_items(lengths, item, sizes, OF_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """Those of rows or of requests."""
    if OF_ROWS:
        result = kv_lens_of_rows(lengths, item, sizes, ROWS)
    else:
        result = kv_lens_of_requests(lengths, item, sizes, ROWS)
    return result
