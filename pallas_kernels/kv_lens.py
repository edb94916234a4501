"""The KV lengths of any requests or rows, by vectors of indices: what schedules follow from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxnsa.spec import Rows
from pallas_kernels.cumulative import Cumulative, Vectors, Wide
from pallas_kernels.lanes import Lanes, Scalar
from pallas_kernels.rows import Lengths, Request, cache_seqlen_of


@dataclasses.dataclass(frozen=True)
class KvLens:
    """Inside a kernel, of all requests and rows.

    Attributes:
      lanes: vector operations.
      rows: how rows map to requests.
      lengths: of all requests.
      owners: the rows of the requests, added up; None where each has the same number.
    """

    lanes: Lanes
    rows: Rows
    lengths: Lengths
    owners: Cumulative | None

    @staticmethod
    def words(rows: Rows) -> int:
        """How many int32 of shared memory `load` takes."""
        return Cumulative.words(rows.requests) if rows.rows_per_request is None else 0

    @classmethod
    def load(cls, lanes: Lanes, rows: Rows, lengths: Lengths, shared: Any, start: int) -> "KvLens":
        """Finds which rows the requests have; see `Cumulative.of`."""
        owners = None
        if rows.rows_per_request is None:

            def rows_of(requests: Vectors) -> Vectors:
                extend = lanes.gather(lengths.extend_seq_lens, *requests)
                return [jnp.clip(q, 0, rows.count) for q in extend]

            owners = Cumulative.of(lanes, rows.requests, rows_of, shared, start)
        return cls(lanes, rows, lengths, owners)

    def of_requests(self, requests: Vectors) -> Vectors:
        """`cache_seqlens` at indices below the number of requests."""
        seq_lens = self.lanes.gather(self.lengths.seq_lens, *requests)
        return [cache_seqlen_of(self.rows, seq_len) for seq_len in seq_lens]

    def of_rows(self, indices: Vectors) -> Vectors:
        """`seqlens_expanded` at indices below the number of rows."""
        rows, each = self.rows, self.rows.rows_per_request
        if each == 1:
            return self.of_requests(indices)
        if each is not None:
            places = [_quotient_and_rest(index, each) for index in indices]
        else:
            assert self.owners is not None
            places = self.owners.locate([Wide.of(jnp.zeros_like(i), i) for i in indices])
        # A padding row belongs to no request.
        owners = [jnp.where(i < rows.requests, i, -1) for i, _ in places]
        seq_lens = self.lanes.gather(self.lengths.seq_lens, *owners)
        qs: list[Scalar] = []
        if each is None:
            extend = self.lanes.gather(self.lengths.extend_seq_lens, *owners)
            qs += [jnp.maximum(q, 0) for q in extend]
        else:
            qs += [each] * len(owners)
        result = []
        for (i, j), seq_len, q in zip(places, seq_lens, qs, strict=True):
            length = cache_seqlen_of(rows, seq_len)
            request = Request(self.lanes, rows, self.lengths, None, i, length, q)
            result.append(jnp.where(i < rows.requests, request.kv_len(j), 0))
        return result


def _quotient_and_rest(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    quotient = jax.lax.div(x, jnp.full_like(x, divisor))
    return quotient, x - quotient * divisor
