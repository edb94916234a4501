"""The KV lengths of a schedule's items, which are rows or requests, by vectors of indices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnsa.spec import Rows
from pallas_kernels.lanes import Lanes
from pallas_kernels.rows import Lengths, Request, cache_seqlen_of
from pallas_kernels.shared_sums import SharedSums
from pallas_kernels.wide import Wide, quotient_and_rest


class ItemLengths:
    """Called inside a kernel with indices of items that exist.

    Args:
      lanes: vector operations.
      lengths: of all requests.
      rows: for each offset of backends how rows map to requests.
      which: a scalar, which of these.
      are_rows: whether items are rows; a request is the last of its rows.
      shared: int32 in shared memory, as `SharedSums` takes it.
      start: where `words(rows)` of them are free.
    """

    def __init__(
        self,
        lanes: Lanes,
        lengths: Lengths,
        rows: Sequence[Rows],
        which: jax.Array,
        are_rows: bool,
        shared: Any,
        start: int,
    ):
        self._lanes, self._lengths, self._rows, self._which = lanes, lengths, rows, which
        self._rows_of_each = rows[0].rows_per_request if are_rows else 1
        if self._rows_of_each is None:
            requests, count = rows[0].requests, rows[0].count

            def rows_of(request: jax.Array) -> Wide:
                return Wide.of(jnp.clip(self._q(request), 0, count))

            self._first_rows = SharedSums(lanes, requests, rows_of, shared, start)

    @staticmethod
    def words(rows: Rows) -> int:
        """How many int32 of shared memory it takes."""
        return SharedSums.words(rows.requests) if rows.rows_per_request is None else 0

    def __call__(self, item: jax.Array) -> jax.Array:
        """Their KV lengths."""
        each = self._rows_of_each
        if each == 1:
            return self._of_requests(item)
        if each is not None:
            return self._of_row(*quotient_and_rest(item, each), each)
        requests = self._rows[0].requests
        found = self._first_rows.find(Wide.of(item))
        i = jnp.minimum(found.place, requests - 1)
        kv_len = self._of_row(i, Wide.of(item).minus(found.sum), jnp.maximum(self._q(i), 0))
        # A padding row belongs to no request.
        return jnp.where(found.place < requests, kv_len, 0)

    def _of_requests(self, i: jax.Array) -> jax.Array:
        (seq_len,) = self._lanes.gather(self._lengths.seq_lens, i)
        length = cache_seqlen_of(self._rows[0], seq_len)
        for k, rows in enumerate(self._rows[1:], start=1):
            of_rows = cache_seqlen_of(rows, seq_len)
            length = self._lanes.select(self._which == k, of_rows, length)
        return length

    def _of_row(self, i: jax.Array, j: jax.Array, q: Any) -> jax.Array:
        length = self._of_requests(i)
        return Request(self._lanes, self._rows[0], self._lengths, None, i, length, q).kv_len(j)

    def _q(self, request: jax.Array) -> jax.Array:
        (q,) = self._lanes.gather(self._lengths.extend_seq_lens, request)
        return q
