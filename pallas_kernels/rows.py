"""How rows map to requests, inside a kernel: written once for all forward modes.

`jaxnsa.spec.Rows` says how. Sums over earlier requests are taken by every block for itself, out of
the L2 cache: no block waits for another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.spec import INT32_MAX, Rows, Spec
from pallas_kernels.lanes import LANES, Lanes, Scalar, floor_div, start_sums

_MOST_SHARES = 1024  # blocks of all requests that share places, where that is one of each or more


class Location(NamedTuple):
    """Which rows a request has; scalars. Of its keys, the same.

    Attributes:
      first_row: the first of them.
      rows: how many.
      total: rows of all requests, at most the capacity.
    """

    first_row: jax.Array
    rows: jax.Array | int
    total: jax.Array | int


class LengthSums(NamedTuple):
    """Sums of lengths; scalars that wrap as int32 does.

    Attributes:
      cache_seqlens: of `cache_seqlens` over the requests before one.
      nsa_cache_seqlens: of `nsa_cache_seqlens` over the rows of the requests before one.
      nsa_total: of `nsa_cache_seqlens` over the rows of all requests.
    """

    cache_seqlens: jax.Array
    nsa_cache_seqlens: jax.Array
    nsa_total: jax.Array


class Lengths(NamedTuple):
    """What a kernel reads of all requests: refs, int32 [requests].

    Attributes:
      seq_lens: KV lengths.
      extend_seq_lens: rows of each request; None where they all have the same number.
    """

    seq_lens: Any
    extend_seq_lens: Any


class IndexTopk(NamedTuple):
    """How many of a row's tokens the indexer selects.

    Attributes:
      limit: its top-k, in tokens.
      pool: tokens that are one key of it; the full ones are limited, and the rest is selected.
    """

    limit: int
    pool: int = 1

    @classmethod
    def of(cls, spec: Spec) -> "IndexTopk":
        """Of a computation."""
        return cls(spec.nsa_index_topk, spec.index_kpool)

    def selected(self, kv_len: jax.Array) -> jax.Array:
        """Tokens selected of a row that sees `kv_len`."""
        if self.pool == 1:
            return jnp.minimum(kv_len, self.limit)
        whole = self.keys(kv_len) * self.pool
        return jnp.minimum(whole, self.limit) + (kv_len - whole)

    def keys(self, kv_len: jax.Array) -> jax.Array:
        """Full keys of a row that sees `kv_len`."""
        return floor_div(kv_len, self.pool)

    def series(self, n: jax.Array) -> jax.Array:
        """`selected(1)` + `selected(2)` + ... + `selected(n)`, for n >= 0; wraps as int32 does."""
        # Up to the first key past the limit all tokens are selected.
        last = min((self.limit // self.pool + 1) * self.pool - 1, INT32_MAX)
        low = jnp.minimum(n, last)
        result = _triangle(low) + (n - low) * self.limit
        if self.pool == 1:
            return result
        past = n - low
        keys = self.keys(past)
        rest = past - keys * self.pool
        return result + keys * _wrapped(self.pool * (self.pool - 1) // 2) + _triangle(rest - 1)


@dataclasses.dataclass(frozen=True)
class Request:
    """One request and its rows.

    Attributes:
      lanes: vector operations.
      rows: how rows map to requests.
      lengths: of all requests.
      scratch: int32 [128] in shared memory.
      i: which request, a scalar.
      cache_seqlen: its KV length, a scalar; its last row sees so many tokens, and no other more.
      q: rows that it has with unlimited capacity.
    """

    lanes: Lanes
    rows: Rows
    lengths: Lengths
    scratch: Any
    i: jax.Array
    cache_seqlen: jax.Array
    q: jax.Array | int

    @classmethod
    def load(
        cls, lanes: Lanes, rows: Rows, lengths: Lengths, scratch: Any, i: jax.Array
    ) -> "Request":
        """Request i, in backends that have these rows."""
        cache_seqlen = cache_seqlen_of(rows, lengths.seq_lens[i])
        each = rows.rows_per_request
        q = jnp.maximum(lengths.extend_seq_lens[i], 0) if each is None else each
        return cls(lanes, rows, lengths, scratch, i, cache_seqlen, q)

    def kv_len(self, j: jax.Array | int) -> jax.Array:
        """Tokens that its row j sees."""
        if isinstance(self.q, int) and self.q == 1:
            return self.cache_seqlen
        return jnp.maximum(self.cache_seqlen - self.q + 1 + j, 0)

    def locate(self) -> Location:
        """Which rows it has."""
        return self.start_locating()()

    def start_locating(self) -> Callable[[], Location]:
        """Starts the loads that tell which rows it has; the result, called, returns them."""
        rows = self.rows
        if isinstance(self.q, int):
            location = Location(self.i * self.q, self.q, rows.count)
            return lambda: location
        return self._locate(self.lengths.extend_seq_lens, self.q, rows.count)

    def locate_keys(self, max_total_keys: int) -> Location:
        """Which keys it has in prefill."""
        return self._locate(self.lengths.seq_lens, self.cache_seqlen, max_total_keys)()

    def _locate(self, counts: Any, count: jax.Array, capacity: int) -> Callable[[], Location]:
        """Which places it has, where request k has counts[k] and this one `count`."""

        def terms(index, exists, counts):
            counts = jnp.clip(counts, 0, capacity)
            return jnp.where(index < self.i, counts, 0), jnp.where(exists, counts, 0)

        sums = start_sums(
            self.lanes, self.rows.requests, (counts,), self.scratch, terms, limit=capacity
        )

        def wait() -> Location:
            first, total = sums()
            return Location(first, jnp.minimum(count, capacity - first), total)

        return wait

    def sums_before(self, topk: IndexTopk) -> LengthSums:
        """Sums over the requests before it."""
        rows, each = self.rows, self.rows.rows_per_request
        ragged = each is None

        def terms(index, exists, seq_lens, *extend):
            cache_seqlens = cache_seqlen_of(rows, seq_lens)
            q = jnp.maximum(extend[0], 0) if each is None else each
            nsa = _nsa_sum(cache_seqlens, cache_seqlens, q, topk)
            before = index < self.i
            return (
                jnp.where(before, cache_seqlens, 0),
                jnp.where(before, nsa, 0),
                *([jnp.where(exists, nsa, 0)] if ragged else []),
            )

        refs = self.lengths if ragged else (self.lengths.seq_lens,)
        sums = start_sums(self.lanes, rows.requests, tuple(refs), self.scratch, terms)
        cache, nsa, *total = sums()
        return LengthSums(cache, nsa, total[0] if ragged else nsa)

    def nsa_sum(self, j: jax.Array, topk: IndexTopk) -> jax.Array:
        """The sum of `nsa_cache_seqlens` over its rows 0 to j; wraps as int32 does."""
        return _nsa_sum(self.kv_len(j), self.cache_seqlen, self.q, topk)

    def for_rows(self, location: Location, body: Callable) -> None:
        """Calls `body(j, row)` for each of its rows j."""
        if isinstance(location.rows, int) and location.rows == 1:
            body(jnp.int32(0), location.first_row)
        else:
            lax.fori_loop(0, location.rows, lambda j, _: body(j, location.first_row + j), None)

    def for_padding_rows(self, location: Location, body: Callable) -> None:
        """Calls `body(row)` for its share of the padding rows."""
        rows = self.rows
        if rows.rows_per_request is not None:
            return
        first = location.total + self.i
        left = jnp.maximum(rows.count - first, 0)
        count = lax.div(left + (rows.requests - 1), jnp.int32(rows.requests))
        lax.fori_loop(0, count, lambda m, _: body(first + m * rows.requests), None)


class Share(NamedTuple):
    """One of the blocks that share the places of a request.

    Attributes:
      block: which of them, a scalar.
      blocks: how many there are.
    """

    block: jax.Array
    blocks: int

    @staticmethod
    def blocks_of(requests: int, places: int, vectors: int = 2) -> int:
        """For so many places of all requests, in tiles of `vectors` * 128, the blocks of each.

        As many as there are tiles, as any request may have all places, unless that makes too many.
        """
        return min(-(-places // (vectors * LANES)), max(1, _MOST_SHARES // requests))

    def of_all(self, request: Request) -> "Share":
        """The same block among those of all requests."""
        return Share(request.i * self.blocks + self.block, request.rows.requests * self.blocks)

    @property
    def exists(self) -> jax.Array:
        """Whether it is one of them."""
        return (self.block >= 0) & (self.block < self.blocks)

    def for_tiles(self, places: Scalar, body: Callable, vectors: int = 1) -> None:
        """Calls `body(first)` for its tiles of `vectors` * 128 of so many places."""
        if isinstance(places, int) and -(-places // (vectors * LANES)) == self.blocks:
            body(self.block * (vectors * LANES) if self.blocks > 1 else 0)
            return
        tile = jnp.int32(vectors * LANES)
        tiles = lax.div(jnp.int32(places) + (tile - 1), tile)
        steps = lax.div(tiles - self.block + (self.blocks - 1), jnp.int32(self.blocks))
        lax.fori_loop(0, steps, lambda k, _: body((self.block + k * self.blocks) * tile), None)


def row_values(
    kv_len: jax.Array, topk: IndexTopk, request: Scalar, first_key: Scalar
) -> dict[str, Scalar]:
    """What the arrays of [rows] hold for rows of a request that see `kv_len` tokens, by name.

    The first of these tokens is the key `first_key`.
    """
    return {
        "seqlens_expanded": kv_len,
        "nsa_cache_seqlens": topk.selected(kv_len),
        "pooled_cache_seqlens": topk.keys(kv_len),
        "token_to_request": request,
        "indexer_ks": first_key,
        "indexer_ke": first_key + kv_len,
        "topk_indices_offset": first_key,
    }


def padding_row_values() -> dict[str, Scalar]:
    """What they hold for padding rows."""
    return row_values(jnp.int32(0), IndexTopk(1), 0, 0)


def cache_seqlen_of(rows: Rows, seq_len: jax.Array) -> jax.Array:
    """The KV length of requests with these `seq_lens`."""
    least, greatest = rows.seq_len_range
    seq_len = jnp.maximum(seq_len, least)
    if greatest < INT32_MAX:
        seq_len = jnp.minimum(seq_len, greatest)
    return seq_len + rows.offset + rows.added_tokens


def _nsa_sum(kv_len: jax.Array, cache_seqlen: jax.Array, q: Scalar, topk: IndexTopk) -> jax.Array:
    """The sum of `nsa_cache_seqlens` over a request's rows up to the one that sees `kv_len`."""
    if isinstance(q, int) and q == 1:
        return topk.selected(kv_len)
    return topk.series(kv_len) - topk.series(jnp.maximum(cache_seqlen - q, 0))


def _triangle(n: jax.Array) -> jax.Array:
    """1 + 2 + ... + n, for n >= -1; wraps as int32 does."""
    half = n >> 1
    return jnp.where((n & 1) == 0, half * (n + 1), n * (half + 1))


def _wrapped(n: int) -> int:
    """As int32 holds it."""
    return (n + 2**31) % 2**32 - 2**31
