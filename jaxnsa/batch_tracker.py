"""Which columns of a batch's tables are written, from one step to the next."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa import argument_checks as checks
from jaxnsa.metadata import Array, ForwardMode, pytree
from jaxnsa.row_owners import row_owners
from jaxnsa.spec import INT32_MAX, MAX_ROWS, Rows, saturated


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class BatchTracker:
    """What the table rows of one set of destinations hold: a value, which a step makes anew.

    Each step's destinations must be those of the step before, filled from the same pool with tail
    "keep", and every step that writes them must go through the tracker:

        written_lens, tracker = tracker.step(request_ids, seq_lens)
        out = fused_metadata_precompute_and_broadcast(..., out=out, written_lens=written_lens)

    A row that belongs to the same request as in the step before keeps what it has; all others are
    written anew. Tokens that a step appends for a while, drafts that may be rejected, do not count
    as written, and neither does what lies past a length that has become shorter. Where the pool's
    entries for tokens that are written change, `invalidate` says so. What a tracker is not told
    leaves old columns in place and touches nothing else.

    Attributes:
      request_ids: int32 [rows, 2], the request of each row in the last step, its low word first.
      held: int32 [rows], leading tokens that each row holds of it.
    """

    request_ids: Array
    held: Array

    @classmethod
    def empty(cls, rows: int) -> "BatchTracker":
        """The tracker of destinations of so many table rows, which hold nothing yet."""
        rows = checks.integer("rows", rows, 0, MAX_ROWS)
        return cls(jnp.zeros((rows, 2), jnp.int32), jnp.zeros(rows, jnp.int32))

    def step(
        self,
        request_ids: Array,
        seq_lens: Array,
        *,
        forward_mode: ForwardMode = ForwardMode.DECODE,
        num_draft_tokens: int | None = None,
        extend_seq_lens: Array | None = None,
        max_total_tokens: int | None = None,
        backend_offsets: Sequence[int] | None = None,
    ) -> tuple[jax.Array, "BatchTracker"]:
        """What is written before a step, and the tracker after it.

        Args:
          request_ids: [bs] of any integer dtype, a number for each request that no other has, of
            those that live and those of the step before.
          seq_lens, forward_mode, num_draft_tokens, extend_seq_lens, max_total_tokens,
            backend_offsets: as the step gets them.

        Returns:
          int32 [bs], the step's `written_lens`; and the tracker for the next step.

        Raises:
          ValueError, TypeError: an argument has the wrong shape, dtype or value, or the step has
            more table rows than the tracker.
        """
        seq_lens = saturated(checks.held(checks.vector("seq_lens", seq_lens)))
        bs = len(seq_lens)
        rows = checks.rows(forward_mode, bs, num_draft_tokens, max_total_tokens)
        extend = checks.extend_seq_lens(extend_seq_lens, forward_mode, bs)
        extend = None if extend is None else saturated(checks.held(extend))
        count = rows.tables.count
        if count > len(self.held):
            raise ValueError(
                f"seq_lens: got a step of {count} table rows, expected at most {len(self.held)}, "
                f"those of the tracker"
            )
        offsets = checks.backend_offsets(backend_offsets, None) or (0,)
        rows = dataclasses.replace(rows, offset=min(offsets))
        return self.advanced(_words(request_ids, bs), seq_lens, extend, rows)

    def advanced(
        self, words: Array, seq_lens: Array, extend_seq_lens: Array | None, rows: Rows
    ) -> tuple[jax.Array, "BatchTracker"]:
        """`step` of checked arrays.

        Args:
          words: int32 [bs, 2], each request's id.
          seq_lens, extend_seq_lens: int32 [bs].
          rows: the step's, in the backend with the shortest.
        """
        nothing = BatchTracker.empty(len(self.held))
        tables, bs = rows.tables, len(seq_lens)
        if not bs or not tables.count:
            return jnp.zeros(bs, jnp.int32), nothing
        owners = row_owners(tables, seq_lens, extend_seq_lens)
        row = jnp.arange(tables.count)
        is_row = row < (tables.count if owners.total is None else owners.total)
        ids = words[owners.request]
        same = jnp.all(self.request_ids[: tables.count] == ids, axis=1)
        # What lies past a request's own tokens, such as drafts, is new in every step.
        own = jnp.maximum(seq_lens, 0)[owners.request]
        before = jnp.where(same, jnp.minimum(self.held[: tables.count], own), 0)
        if tables.rows_per_request is not None:
            written = before.reshape(bs, tables.rows_per_request).min(axis=1)
        else:  # a request without rows has nothing to write
            request = jnp.where(is_row, owners.request, bs)
            written = jnp.full(bs, INT32_MAX, jnp.int32).at[request].min(before, mode="drop")
        held = jnp.minimum(owners.kv_len, own)
        rest = len(self.held) - tables.count
        return written, BatchTracker(
            jnp.pad(ids, ((0, rest), (0, 0))), jnp.pad(jnp.where(is_row, held, 0), (0, rest))
        )

    def invalidate(self, request_ids: Array | None = None) -> "BatchTracker":
        """The tracker after the pool's entries for some requests have changed.

        Args:
          request_ids: [n] of any integer dtype, those requests, living or not; None: all.
        """
        if request_ids is None:
            return BatchTracker.empty(len(self.held))
        words = _words(request_ids)
        named = jnp.any(jnp.all(self.request_ids[:, None] == words, axis=2), axis=1)
        return BatchTracker(self.request_ids, jnp.where(named, 0, self.held))


def _words(request_ids: Any, length: int | None = None) -> Array:
    """int32 [n, 2], integers of any width as their low and high words."""
    value = checks.vector("request_ids", request_ids, length, checks.INTEGERS)
    if isinstance(value, np.ndarray):
        wide = value.astype(np.uint64 if value.dtype == np.uint64 else np.int64)
        return wide.view(np.int32).reshape(-1, 2).copy()
    if value.dtype.itemsize == 8:  # made under x64, which need not be set any more
        with jax.enable_x64(True):
            shifts = jnp.array([0, 32], value.dtype)
            return jax.lax.convert_element_type(value[:, None] >> shifts, jnp.int32)
    low = jax.lax.convert_element_type(value, jnp.int32)
    high = jnp.zeros_like(low) if jnp.issubdtype(value.dtype, jnp.unsignedinteger) else low >> 31
    return jnp.stack([low, high], axis=1)
