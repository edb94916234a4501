"""How rows map to requests, inside a kernel: written once for all forward modes.

`jaxnsa.spec.Rows` says how. Sums over earlier requests are taken by every program for itself, out
of the L2 cache: no program waits for another.
"""

import dataclasses
from typing import Any, NamedTuple

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import store_values
from jaxnsa.spec import Rows


class Lengths(NamedTuple):
    """What a kernel reads of all requests: pointers to int32 [requests].

    Attributes:
      seq_lens: KV lengths.
      extend_seq_lens: rows of each request; None where they all have the same number.
    """

    seq_lens: Any
    extend_seq_lens: Any


class RowSizes(NamedTuple):
    """The numbers that may change without compiling a kernel again.

    Attributes:
      requests: number of requests.
      rows: number of rows, padding rows included.
      topk: the indexer's top-k, in tokens.
    """

    requests: Any
    rows: Any
    topk: Any

    @classmethod
    def of(cls, rows: Rows, topk: int) -> "RowSizes":
        """The numbers of a computation."""
        return cls(rows.requests, rows.count, topk)


@dataclasses.dataclass(frozen=True)
class RowConstants:
    """What a kernel is compiled for.

    Attributes:
      rows_per_request: q where it is one number for all, None where extend_seq_lens says.
      offset: tokens by which `seq_lens` are longer.
      added_tokens: tokens that the step itself appends to every request.
      least_seq_len, greatest_seq_len: where `seq_lens` saturate.
      rows_at_once: rows of a request whose lengths are one vector.
      requests_at_once: requests that are added up as one vector.
      index_kpool: tokens that are one key of the indexer.
    """

    rows_per_request: int | None
    offset: int
    added_tokens: int
    least_seq_len: int
    greatest_seq_len: int
    rows_at_once: int
    requests_at_once: int
    index_kpool: int

    @classmethod
    def of(cls, rows: Rows, index_kpool: int = 1) -> "RowConstants":
        """What a kernel for these rows is compiled for."""
        q = rows.rows_per_request
        return cls(
            q,
            rows.offset,
            rows.added_tokens,
            *rows.seq_len_range,
            128 if rows.prefill else min(32, triton.next_power_of_2(q or 32)),
            min(1024, triton.next_power_of_2(rows.requests)),
            index_kpool,
        )


class Request(NamedTuple):
    """One request and its rows; scalars, or vectors of several requests.

    Attributes:
      i: which request.
      cache_seqlen: its KV length; its last row sees so many tokens, and no other more.
      q: rows that it has with unlimited capacity.
    """

    i: Any
    cache_seqlen: Any
    q: Any


class Location(NamedTuple):
    """Which rows a request has; scalars. Of its keys, the same.

    Attributes:
      first_row: the first of them.
      rows: how many.
      total: rows of all requests, at most the capacity.
    """

    first_row: Any
    rows: Any
    total: Any


class LengthSums(NamedTuple):
    """Sums of lengths; scalars that wrap as int32 does.

    Attributes:
      cache_seqlens: of `cache_seqlens` over the requests before one.
      nsa_cache_seqlens: of `nsa_cache_seqlens` over the rows of the requests before one.
      nsa_total: of `nsa_cache_seqlens` over the rows of all requests.
    """

    cache_seqlens: Any
    nsa_cache_seqlens: Any
    nsa_total: Any


class RowValues(NamedTuple):
    """The arrays of [rows]."""

    seqlens_expanded: Any
    nsa_cache_seqlens: Any
    token_to_request: Any
    indexer_ks: Any
    indexer_ke: Any
    topk_indices_offset: Any
    pooled_cache_seqlens: Any


@triton.jit
def row_values(kv_len, request, first_key, sizes, ROWS: tl.constexpr):
    """What the arrays of [rows] hold for rows of a request that see `kv_len` tokens.

    The first of these tokens is the key `first_key`.
    """
    return RowValues(
        seqlens_expanded=kv_len,
        nsa_cache_seqlens=selected(kv_len, sizes.topk, ROWS),
        token_to_request=request,
        indexer_ks=first_key,
        indexer_ke=first_key + kv_len,
        topk_indices_offset=first_key,
        pooled_cache_seqlens=kv_len // ROWS.index_kpool,
    )


@triton.jit
def selected(kv_len, topk, ROWS: tl.constexpr):
    """Tokens that the indexer selects of a row that sees `kv_len`.

    Those of its full keys are limited, and the rest is selected.
    """
    rest = kv_len % ROWS.index_kpool
    return tl.minimum(kv_len - rest, topk) + rest


class RowSums(NamedTuple):
    """The arrays of [rows + 1]."""

    nsa_cu_seqlens_k: Any


@triton.jit
def load_request(lengths, i, ROWS: tl.constexpr, exists=True):
    """Request i; of several, those that exist, and lengths of 0 in place of the others."""
    cache_seqlen = tl.maximum(tl.load(lengths.seq_lens + i, exists, 0), ROWS.least_seq_len)
    cache_seqlen = tl.minimum(cache_seqlen, ROWS.greatest_seq_len) + ROWS.offset
    cache_seqlen += ROWS.added_tokens
    if ROWS.rows_per_request is None:
        q = tl.maximum(tl.load(lengths.extend_seq_lens + i, exists, 0), 0)
    else:
        q = ROWS.rows_per_request
    return Request(i, cache_seqlen, q)


@triton.jit
def kv_len(request, j):
    """Tokens that row j of a request sees."""
    return tl.maximum(request.cache_seqlen - request.q + 1 + j, 0)


@triton.jit
def locate(lengths, request, sizes, ROWS: tl.constexpr):
    """Which rows a request has."""
    if ROWS.rows_per_request is None:
        location = locate_among(
            lengths.extend_seq_lens, request.i, request.q, sizes.rows, sizes, ROWS
        )
    else:
        first_row = request.i * ROWS.rows_per_request
        location = Location(first_row, request.q, sizes.rows)
    return location


@triton.jit
def locate_among(counts, i, count, capacity, sizes, ROWS: tl.constexpr):
    """Which places request i has, where request k has counts[k] and this one `count`."""
    AT_ONCE: tl.constexpr = ROWS.requests_at_once
    before = tl.zeros([AT_ONCE], tl.int64)
    everywhere = tl.zeros([AT_ONCE], tl.int64)
    for first in range(0, sizes.requests, AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        places = tl.load(counts + k, k < sizes.requests, 0)
        places = tl.minimum(tl.maximum(places, 0), capacity).to(tl.int64)
        before += tl.where(k < i, places, 0)
        everywhere += places
    first_place = tl.minimum(tl.sum(before), capacity).to(tl.int32)
    total = tl.minimum(tl.sum(everywhere), capacity).to(tl.int32)
    return Location(first_place, tl.minimum(count, capacity - first_place), total)


@triton.jit
def sums_before(lengths, i, sizes, ROWS: tl.constexpr):
    """Sums over the requests before request i."""
    AT_ONCE: tl.constexpr = ROWS.requests_at_once
    cache_seqlens = tl.zeros([AT_ONCE], tl.int32)
    nsa_cache_seqlens = tl.zeros([AT_ONCE], tl.int32)
    nsa_total = tl.zeros([AT_ONCE], tl.int32)
    for first in range(0, sizes.requests, AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        exists = k < sizes.requests
        request = load_request(lengths, k, ROWS, exists)
        nsa = _nsa_sum(request, request.cache_seqlen, sizes.topk, ROWS)
        cache_seqlens += tl.where(k < i, request.cache_seqlen, 0)
        nsa_cache_seqlens += tl.where(k < i, nsa, 0)
        nsa_total += tl.where(exists, nsa, 0)
    return LengthSums(tl.sum(cache_seqlens), tl.sum(nsa_cache_seqlens), tl.sum(nsa_total))


@triton.jit
def write_rows(
    row_arrays, row_sums, lengths, request, sums, share, shares, sizes, ROWS: tl.constexpr
):
    """Writes a share of the lengths of a request's rows, and of the padding rows.

    Args:
      row_arrays: RowValues, the arrays of [rows].
      row_sums: RowSums, the arrays of [rows + 1].
      lengths: of all requests.
      request: whose rows.
      sums: LengthSums before it.
      share: which share, of `shares` of each request.
      shares: how many.
      sizes: RowSizes.
      ROWS: RowConstants.
    """
    location = locate(lengths, request, sizes, ROWS)
    AT_ONCE: tl.constexpr = ROWS.rows_at_once
    if (request.i == 0) & (share == 0):
        store_values(row_sums, 0, RowSums(0))
    for first in range(share * AT_ONCE, location.rows, shares * AT_ONCE):
        j = first + tl.arange(0, AT_ONCE)
        exists = j < location.rows
        row = location.first_row + j
        seen = kv_len(request, j)
        values = row_values(seen, request.i, sums.cache_seqlens, sizes, ROWS)
        store_values(row_arrays, row, values, exists)
        nsa_sums = sums.nsa_cache_seqlens + _nsa_sum(request, seen, sizes.topk, ROWS)
        store_values(row_sums, row + 1, RowSums(nsa_sums), exists)
    if ROWS.rows_per_request is None:
        programs = sizes.requests * shares
        tiles = tl.cdiv(sizes.rows - location.total, AT_ONCE)
        for index in range(request.i * shares + share, tiles, programs):
            row = location.total + index * AT_ONCE + tl.arange(0, AT_ONCE)
            exists = row < sizes.rows
            store_values(row_arrays, row, row_values(0, 0, 0, sizes, ROWS), exists)
            store_values(row_sums, row + 1, RowSums(sums.nsa_total), exists)


@triton.jit
def _nsa_sum(request, kv_len, topk, ROWS: tl.constexpr):
    """The sum of nsa_cache_seqlens over a request's rows up to the one that sees `kv_len`."""
    if ROWS.rows_per_request == 1:
        return selected(kv_len, topk, ROWS)
    before = tl.maximum(request.cache_seqlen - request.q, 0)
    return _selected_series(kv_len, topk, ROWS) - _selected_series(before, topk, ROWS)


@triton.jit
def _selected_series(n, topk, ROWS: tl.constexpr):
    """`selected` of 1, 2, ... and n, added up, for n >= 0; wraps as int32 does."""
    POOL: tl.constexpr = ROWS.index_kpool
    # Up to the first key past the limit all tokens are selected.
    last = (tl.cast(topk, tl.int64) // POOL + 1) * POOL - 1
    low = tl.minimum(n, last).to(tl.int32)
    past = n - low
    keys = past // POOL
    rests = keys * _wrapped(POOL * (POOL - 1) // 2) + _triangle(past % POOL - 1)
    return _triangle(low) + past * topk + rests


@triton.jit
def _triangle(n):
    """1 + 2 + ... + n, for n >= -1; wraps as int32 does."""
    half = n >> 1
    return tl.where((n & 1) == 0, half * (n + 1), n * (half + 1))


@triton.constexpr_function
def _wrapped(n):
    """As int32 holds it."""
    return (n + 2**31) % 2**32 - 2**31
