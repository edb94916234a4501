"""The static description of one computation: how rows map to requests, and what to write."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxnsa.metadata import ForwardMode, NSAMetadata

Tail = Literal["copy", "zero", "keep"]

MAX_LEN = 2**30
"""The widest page table, in tokens: kernels count the columns of a row in 32 bits."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How table rows map to requests. The three forward modes are three values of this.

    Request i owns q[i] consecutive rows and has KV length
    `cache_seqlens[i] = max(seq_lens[i], 0) + added_tokens`. Its row j, 0 <= j < q[i], sees
    `seqlens_expanded = max(cache_seqlens[i] - q[i] + 1 + j, 0)` tokens.

    | mode          | q[i]               | added_tokens     |
    | ---           | ---                | ---              |
    | decode        | 1                  | 0                |
    | target verify | num_draft_tokens   | num_draft_tokens |
    | draft extend  | extend_seq_lens[i] | 0                |

    Attributes:
      requests: number of requests, bs.
      count: number of rows; in draft extend the capacity, max_total_tokens.
      tokens_per_request: q where it is one number for all, None where extend_seq_lens says.
      added_tokens: tokens that the step itself appends to every request.
    """

    requests: int
    count: int
    tokens_per_request: int | None
    added_tokens: int

    @classmethod
    def of(
        cls,
        mode: ForwardMode,
        requests: int,
        num_draft_tokens: int | None = None,
        max_total_tokens: int | None = None,
    ) -> "Rows":
        """The rows of a forward mode; the arguments that the mode does not take are None."""
        if mode is ForwardMode.DECODE:
            return cls(requests, requests, 1, 0)
        if mode is ForwardMode.TARGET_VERIFY:
            assert num_draft_tokens is not None
            return cls(requests, requests * num_draft_tokens, num_draft_tokens, num_draft_tokens)
        assert max_total_tokens is not None
        return cls(requests, max_total_tokens, None, 0)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything about a computation but its arrays; hashable, so it is a static argument of jit.

    Attributes:
      rows: how rows map to requests.
      max_len: columns of the page table, in tokens.
      nsa_index_topk: the indexer's top-k, in tokens.
      real_page_size: tokens in a physical page; 1 means no second table.
      wide_table: whether `page_indices` is wanted.
      tail: what tables hold past a row's live columns. "keep" without destinations leaves them
        unspecified.
      num_backends: how many copies of the metadata.
      stacked: one NSAMetadata whose arrays lead with [num_backends] instead of a tuple of them.
    """

    rows: Rows
    max_len: int
    nsa_index_topk: int
    real_page_size: int
    wide_table: bool
    tail: Tail
    num_backends: int = 1
    stacked: bool = False

    @property
    def pages(self) -> int:
        """Columns of the real page table."""
        return -(-self.max_len // self.real_page_size)

    @property
    def destinations(self) -> int:
        """How many NSAMetadata the computation returns."""
        return 1 if self.stacked else self.num_backends

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of every array of a destination."""
        return (self.num_backends,) if self.stacked else ()

    def column_tokens(self, metadata: NSAMetadata) -> list[int]:
        """For each array of `metadata`, tokens that a column stands for; 0 if it is no table."""
        tables = {"page_indices": 1, "real_page_table": self.real_page_size}
        return [
            tables.get(field, 0) for field, array in vars(metadata).items() if array is not None
        ]

    # A Spec is small, and each eager call asks.
    @functools.lru_cache(maxsize=256)  # noqa: B019
    def shapes(self) -> NSAMetadata:
        """Shape and dtype of every array of one destination."""
        rows = self.rows.count

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*self.lead, *shape), jnp.int32)

        return NSAMetadata(
            cache_seqlens=array(self.rows.requests),
            cu_seqlens_k=array(self.rows.requests + 1),
            seqlens_expanded=array(rows),
            nsa_cache_seqlens=array(rows),
            nsa_cu_seqlens_k=array(rows + 1),
            page_indices=array(rows, self.max_len) if self.wide_table else None,
            real_page_table=array(rows, self.pages) if self.real_page_size > 1 else None,
        )
