"""How table rows map to requests, inside a kernel: written once for all forward modes.

`nsa_kernel_types.RowMap` says how. Sums over earlier requests are taken by every block for itself,
out of the L2 cache: no block waits for another.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from nsa_kernel_types import RowMap
from pallas_kernels.lanes import Lanes, sum_over_requests

_INT32_MAX = 2**31 - 1


class Request(NamedTuple):
    """One request; scalars.

    Attributes:
      cache_seqlen: KV length.
      tokens: rows that it has with unlimited capacity, q.
    """

    cache_seqlen: jax.Array
    tokens: jax.Array | int

    def kv_len(self, j: jax.Array | int) -> jax.Array:
        """Tokens that its row j sees."""
        return jnp.maximum(self.cache_seqlen - self.tokens + 1 + j, 0)


class Location(NamedTuple):
    """Which rows a request has; scalars.

    Attributes:
      first_row: the first of them.
      rows: how many.
      total: rows of all requests, at most the capacity.
    """

    first_row: jax.Array
    rows: jax.Array | int
    total: jax.Array | int


class PrefixSums(NamedTuple):
    """Sums over the requests before one; scalars that wrap as int32 does.

    Attributes:
      cache_seqlens: of `cache_seqlens`.
      nsa_cache_seqlens: of `nsa_cache_seqlens` over their rows.
      nsa_total: of `nsa_cache_seqlens` over the rows of all requests.
    """

    cache_seqlens: jax.Array
    nsa_cache_seqlens: jax.Array
    nsa_total: jax.Array


def load_request(rows: RowMap, seq_lens, extend_seq_lens, i: jax.Array) -> Request:
    """Request i."""
    cache_seqlen = jnp.maximum(seq_lens[i], 0) + rows.added_tokens
    if rows.tokens_per_request is not None:
        return Request(cache_seqlen, rows.tokens_per_request)
    return Request(cache_seqlen, jnp.maximum(extend_seq_lens[i], 0))


def locate(
    lanes: Lanes, rows: RowMap, request: Request, extend_seq_lens, scratch, i: jax.Array
) -> Location:
    """Which rows request i has."""
    if rows.tokens_per_request is not None:
        each = rows.tokens_per_request
        return Location(i * each, each, rows.rows)

    def terms(index, exists, extend):
        q = jnp.clip(extend, 0, rows.rows)
        return jnp.where(index < i, q, 0), jnp.where(exists, q, 0)

    first, total = sum_over_requests(
        lanes, rows.requests, (extend_seq_lens,), scratch, terms, limit=rows.rows
    )
    return Location(first, jnp.minimum(request.tokens, rows.rows - first), total)


def prefix_sums(
    lanes: Lanes, rows: RowMap, seq_lens, extend_seq_lens, scratch, i: jax.Array
) -> PrefixSums:
    """Sums of lengths over the requests before request i."""
    ragged = rows.tokens_per_request is None

    def terms(index, exists, lengths, *extend):
        cache = jnp.maximum(lengths, 0) + rows.added_tokens
        q = jnp.maximum(extend[0], 0) if ragged else rows.tokens_per_request
        nsa = _nsa_sum(cache, q, rows.nsa_index_topk)
        before = index < i
        return (
            jnp.where(before, cache, 0),
            jnp.where(before, nsa, 0),
            *([jnp.where(exists, nsa, 0)] if ragged else []),
        )

    refs = (seq_lens, extend_seq_lens) if ragged else (seq_lens,)
    cache, nsa, *nsa_total = sum_over_requests(lanes, rows.requests, refs, scratch, terms)
    return PrefixSums(cache, nsa, nsa_total[0] if ragged else nsa)


def for_rows(location: Location, body: Callable) -> None:
    """Calls `body(j, row)` for each row j of a request."""
    if isinstance(location.rows, int) and location.rows == 1:
        body(jnp.int32(0), location.first_row)
    else:
        lax.fori_loop(0, location.rows, lambda j, _: body(j, location.first_row + j), None)


def for_spare_rows(rows: RowMap, location: Location, i: jax.Array, body: Callable) -> None:
    """Calls `body(row)` for request i's share of the rows past the total."""
    if rows.tokens_per_request is not None:
        return
    first = location.total + i
    left = jnp.maximum(rows.rows - first, 0)
    count = lax.div(left + (rows.requests - 1), jnp.int32(rows.requests))
    lax.fori_loop(0, count, lambda m, _: body(first + m * rows.requests), None)


def write_row_lengths(
    rows: RowMap,
    request: Request,
    location: Location,
    sums: PrefixSums,
    i: jax.Array,
    store: Callable,
) -> None:
    """Writes the lengths of request i's rows, and its share of the rows past the total.

    Args:
      rows: how rows map to requests.
      request: request i.
      location: its rows.
      sums: over the requests before it.
      i: which request.
      store: called with the name of an array, an index and a value.
    """
    pl.when(i == 0)(lambda: store("nsa_cu_seqlens_k", 0, jnp.int32(0)))

    def write_row(j, nsa_sum):
        row = location.first_row + j
        kv_len = request.kv_len(j)
        nsa_len = jnp.minimum(kv_len, rows.nsa_index_topk)
        store("seqlens_expanded", row, kv_len)
        store("nsa_cache_seqlens", row, nsa_len)
        store("nsa_cu_seqlens_k", row + 1, nsa_sum + nsa_len)
        return nsa_sum + nsa_len

    lax.fori_loop(0, location.rows, write_row, sums.nsa_cache_seqlens)

    def clear_row(row):
        store("seqlens_expanded", row, jnp.int32(0))
        store("nsa_cache_seqlens", row, jnp.int32(0))
        store("nsa_cu_seqlens_k", row + 1, sums.nsa_total)

    for_spare_rows(rows, location, i, clear_row)


def _nsa_sum(cache_seqlen: jax.Array, q, topk: int) -> jax.Array:
    """The sum of `nsa_cache_seqlens` over the q rows of a request; wraps as int32 does."""
    if isinstance(q, int) and q == 1:
        return jnp.minimum(jnp.maximum(cache_seqlen, 0), topk)
    # A KV length past int32 has wrapped; the rows before that are counted.
    last = jnp.where(cache_seqlen < 0, _INT32_MAX, cache_seqlen)
    return _clamped_series(last, topk) - _clamped_series(jnp.maximum(cache_seqlen - q, 0), topk)


def _clamped_series(n: jax.Array, topk: int) -> jax.Array:
    """min(1, topk) + min(2, topk) + ... + min(n, topk), for n >= 0; wraps as int32 does."""
    low = jnp.minimum(n, topk)
    half = low >> 1
    triangle = jnp.where((low & 1) == 0, half * (low + 1), low * (half + 1))
    return triangle + (n - low) * topk
