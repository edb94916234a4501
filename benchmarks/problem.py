"""One broadcast to measure: its inputs, its bytes, and its result checked."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnsa
from benchmarks.measure import Call, rotations
from jaxnsa import ForwardMode, Schedules, reference
from jaxnsa.schedules import NO_SCHEDULES

PAGE_SIZE = 64
TOPK = 2048
DRAFT_TOKENS = 4  # of each request in target verify; up to that many in draft extend
_ROW_ARRAYS = 7  # of [rows], in prefill


@dataclasses.dataclass(frozen=True)
class Problem:
    """A shape; lengths are uniform between `shortest`, or half of `live`, and `live`.

    Attributes:
      mode: forward mode.
      bs: requests.
      max_len: columns of the page table, in tokens.
      num_backends: copies, N.
      live: the longest length.
      new_tokens: in prefill, of all requests together; all have the length `live` then.
      wide_table: whether there is one; engines leave it out.
      schedules: what the consumers want beside the metadata.
      shortest: the shortest length; None: half of the longest.
      more_columns: of the pool, behind `max_len`.
    """

    mode: ForwardMode
    bs: int
    max_len: int
    num_backends: int
    live: int
    new_tokens: int = 1024
    wide_table: bool = True
    schedules: Schedules = NO_SCHEDULES
    shortest: int | None = None
    more_columns: int = 0

    @property
    def case(self) -> dict[str, Any]:
        """What identifies its row in a table."""
        return {
            "mode": self.mode.value,
            "bs": self.bs,
            "max_len": self.max_len,
            "N": self.num_backends,
            "live": self.live,
        }

    @functools.cached_property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """seq_lens, req_pool_indices, req_to_token."""
        rng = np.random.default_rng(0)
        low, high = self.shortest or self.live // 2, self.live
        seq_lens = rng.integers(low, high, self.bs, endpoint=True, dtype=np.int32)
        if self.mode is ForwardMode.EXTEND:
            seq_lens[:] = high
        if self.mode is ForwardMode.TARGET_VERIFY:  # the drafts are live too
            seq_lens = np.minimum(seq_lens, self.max_len - DRAFT_TOKENS)
        indices = rng.permutation(self.bs).astype(np.int32)
        columns = self.max_len + self.more_columns
        pool = rng.integers(0, 2**22, (self.bs, columns), dtype=np.int32)
        return seq_lens, indices, pool

    @functools.cached_property
    def rows_of_each(self) -> np.ndarray:
        """Rows of each request."""
        if self.mode is ForwardMode.TARGET_VERIFY:
            return np.full(self.bs, DRAFT_TOKENS)
        if self.mode is ForwardMode.DRAFT_EXTEND:
            rng = np.random.default_rng(1)
            return rng.integers(1, DRAFT_TOKENS, self.bs, endpoint=True)
        if self.mode is ForwardMode.EXTEND:
            return np.full(self.bs, self.new_tokens // self.bs)
        return np.ones(self.bs, np.int64)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that are no arrays."""
        options: dict[str, Any] = {
            "num_backends": self.num_backends,
            "forward_mode": self.mode,
            "max_len": self.max_len,
            "nsa_index_topk": TOPK,
            "real_page_size": PAGE_SIZE,
            "wide_table": self.wide_table,
            "schedules": self.schedules,
        }
        if self.mode is ForwardMode.TARGET_VERIFY:
            options["num_draft_tokens"] = DRAFT_TOKENS
        if self.mode is ForwardMode.DRAFT_EXTEND:
            options["max_total_tokens"] = self.bs * DRAFT_TOKENS
        if self.mode is ForwardMode.EXTEND:
            options["max_total_tokens"] = self.new_tokens
            options["max_total_keys"] = self.bs * self.live
        return options

    @property
    def extend_seq_lens(self) -> np.ndarray | None:
        """int32 [bs] in draft extend and prefill."""
        ragged = self.mode.ragged
        return self.rows_of_each.astype(np.int32) if ragged else None

    @property
    def bytes_moved(self) -> int:
        """Bytes that have to move: live elements read once, written to each row of each backend.

        In prefill to one table row and the flat table, and the arrays of [rows].
        """
        lengths = self.arguments[0].astype(np.int64)
        pages = -(-lengths // PAGE_SIZE)
        if self.mode is ForwardMode.EXTEND:
            each = ((1 + self.wide_table) * lengths + pages).sum() + _ROW_ARRAYS * self.new_tokens
            return int(lengths.sum() + each * self.num_backends) * 4
        read, columns = (lengths, lengths + pages) if self.wide_table else (pages, pages)
        written = (columns * self.rows_of_each).sum() * self.num_backends
        return int(read.sum() + written) * 4

    @functools.cached_property
    def expected(self) -> jaxnsa.NSAMetadata:
        """Every backend after a call in place on zeros, tail "keep"."""
        broadcast: Any = reference.fused_metadata_precompute_and_broadcast
        options = self.options | {"num_backends": 1, "tail": "zero"}
        return broadcast(*self.arguments, extend_seq_lens=self.extend_seq_lens, **options)[0]

    def check(self, backends: Any) -> None:
        """AssertionError where a backend is not what the reference says."""
        for k, backend in enumerate(backends):
            check(backend, self.expected, f"of backend {k} is wrong for {self.case}")

    def call(self, implementation: str, strategy: Any = "ultra_fast") -> Call:
        """A checked call in place, on memory of its own."""
        arrays = [jnp.asarray(array) for array in self.arguments]
        extend = None if self.extend_seq_lens is None else jnp.asarray(self.extend_seq_lens)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.expected)
        state: list[Any] = [tuple(jax.tree.map(jnp.copy, zeros) for _ in range(self.num_backends))]

        def call() -> Any:
            state[0] = jaxnsa.fused_metadata_precompute_and_broadcast(
                *arrays,
                extend_seq_lens=extend,
                out=state[0],
                strategy=strategy,
                implementation=implementation,
                **self.options,
            )
            return state[0]

        self.check(call())
        return call

    def calls(self, implementation: str, strategy: Any = "ultra_fast") -> list[Call]:
        """As many of them as keep any from finding its own inputs cached."""
        held = self.arguments[2].nbytes + self.num_backends * sum(
            array.nbytes for array in jax.tree.leaves(self.expected)
        )
        count = rotations(self.bytes_moved, held)
        return [self.call(implementation, strategy) for _ in range(count)]


def check(found: jaxnsa.NSAMetadata, expected: jaxnsa.NSAMetadata, problem: str) -> None:
    """AssertionError, with the problem behind the name of an array, where one is another."""
    for field, array in expected.arrays().items():
        if not np.array_equal(getattr(found, field), array):
            raise AssertionError(f"{field} {problem}")
