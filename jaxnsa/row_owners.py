"""Which request each row and key belongs to, and the tokens that a row sees, in `jax.numpy`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.metadata import Array
from jaxnsa.spec import Rows


class Owners(NamedTuple):
    """The owners of places, of which request i has as many as its count, one behind the other.

    Attributes:
      request: int32 [capacity], the request of each place; any valid one past the total.
      token: int32 [capacity], which of its request's places it is.
      total: int32 [], the places of all requests, at most the capacity.
    """

    request: jax.Array
    token: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, counts: jax.Array, capacity: int) -> "Owners":
        """The owners of `capacity` places, of int32 [bs] counts of at least 0."""
        place = jnp.arange(capacity, dtype=jnp.int32)
        if not len(counts):
            return cls(jnp.zeros_like(place), place, jnp.int32(0))
        # A sum of nonnegative int32 turns negative where it first leaves int32, and so past any
        # place.
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        past_int32 = lax.cummax((ends < 0).astype(jnp.int32)) > 0
        ends = jnp.where(past_int32, capacity, jnp.minimum(ends, capacity))
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        request = jnp.searchsorted(ends, place, side="right", method="scan_unrolled")
        request = jnp.minimum(request.astype(jnp.int32), len(counts) - 1)
        return cls(request, place - starts[request], ends[-1])


class RowOwners(NamedTuple):
    """The rows of a computation.

    Attributes:
      request: int32 [rows], the request of each row; any valid one for padding rows.
      kv_len: int32 [rows], tokens that the row sees; 0 for padding rows.
      total: int32 [], rows that are no padding rows; None where there are none of these.
    """

    request: jax.Array
    kv_len: jax.Array
    total: jax.Array | None


def cache_seqlens(rows: Rows, seq_lens: Array) -> jax.Array:
    """int32 [bs], the KV length of each request."""
    return jnp.clip(seq_lens, *rows.seq_len_range) + rows.offset + rows.added_tokens


def row_owners(rows: Rows, seq_lens: Array, extend_seq_lens: Array | None) -> RowOwners:
    """The owner of every row, of int32 [bs] lengths."""
    kv_lens = cache_seqlens(rows, seq_lens)
    row = jnp.arange(rows.count, dtype=jnp.int32)
    if rows.rows_per_request is not None:
        request, token = row // rows.rows_per_request, row % rows.rows_per_request
        return RowOwners(request, _kv_len(kv_lens[request], rows.rows_per_request, token), None)
    if rows.requests == 0:
        return RowOwners(jnp.zeros_like(row), jnp.zeros_like(row), jnp.int32(0))
    assert extend_seq_lens is not None
    q = jnp.maximum(extend_seq_lens, 0)
    request, token, total = Owners.of(q, rows.count)
    kv_len = _kv_len(kv_lens[request], q[request], token)
    return RowOwners(request, jnp.where(row < total, kv_len, 0), total)


def _kv_len(kv_len: jax.Array, q: jax.Array | int, token: jax.Array) -> jax.Array:
    """What row `token` of q rows sees, of a request of the given KV length."""
    return jnp.maximum(kv_len - q + 1 + token, 0)
