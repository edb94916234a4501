"""What a package of kernels is asked for and what it returns, the same for each of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nsa_kernel_types.in_place import in_place

__all__ = ["ExpandedSeqlens", "FusedJob", "Metadata", "RowMap", "in_place"]


class RowMap(NamedTuple):
    """How table rows map to requests: the static part.

    Request i owns q[i] consecutive rows: `tokens_per_request` of them, or extend_seq_lens[i]. Its
    KV length is `cache_seqlens[i] = max(seq_lens[i], 0) + added_tokens`, and its row j sees
    `max(cache_seqlens[i] - q[i] + 1 + j, 0)` tokens.

    Attributes:
      requests: number of requests.
      rows: number of rows; with ragged rows, the capacity.
      tokens_per_request: rows of each request; None: as many as extend_seq_lens says.
      added_tokens: tokens that the step appends to each request.
      nsa_index_topk: the indexer's top-k.
    """

    requests: int
    rows: int
    tokens_per_request: int | None
    added_tokens: int
    nsa_index_topk: int


class Metadata(NamedTuple):
    """The arrays of one destination, all int32; stacked ones have one more leading axis.

    Attributes:
      cache_seqlens: [requests].
      cu_seqlens_k: [requests + 1].
      seqlens_expanded: [rows].
      nsa_cache_seqlens: [rows].
      nsa_cu_seqlens_k: [rows + 1].
      page_indices: [rows, max_len] or None.
      real_page_table: [rows, ceil(max_len / page)] or None.
    """

    cache_seqlens: Any
    cu_seqlens_k: Any
    seqlens_expanded: Any
    nsa_cache_seqlens: Any
    nsa_cu_seqlens_k: Any
    page_indices: Any
    real_page_table: Any


class FusedJob(NamedTuple):
    """The metadata of a step for all backends: everything but the arrays.

    Attributes:
      rows: how rows map to requests; at least one request.
      max_len: columns of the page table, in tokens, at most 2**30.
      real_page_size: tokens in a physical page; 1: no `real_page_table`.
      wide_table: whether `page_indices` is wanted.
      tail: what tables hold past the live columns: "copy" the pool's content, "zero", or "keep"
        what was there.
      num_backends: number of copies.
      stacked: one Metadata whose arrays lead with [num_backends] instead of several.
    """

    rows: RowMap
    max_len: int
    real_page_size: int
    wide_table: bool
    tail: str
    num_backends: int
    stacked: bool = False

    @property
    def pages(self) -> int:
        """Columns of the real page table."""
        return -(-self.max_len // self.real_page_size)

    @property
    def destinations(self) -> int:
        """How many Metadata there are."""
        return 1 if self.stacked else self.num_backends

    def shapes(self) -> Metadata:
        """Shape and dtype of every array of one destination."""
        requests, rows = self.rows.requests, self.rows.rows
        lead = (self.num_backends,) if self.stacked else ()

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*lead, *shape), jnp.int32)

        return Metadata(
            cache_seqlens=array(requests),
            cu_seqlens_k=array(requests + 1),
            seqlens_expanded=array(rows),
            nsa_cache_seqlens=array(rows),
            nsa_cu_seqlens_k=array(rows + 1),
            page_indices=array(rows, self.max_len) if self.wide_table else None,
            real_page_table=array(rows, self.pages) if self.real_page_size > 1 else None,
        )


class ExpandedSeqlens(NamedTuple):
    """The lengths of a draft-extend step, all int32.

    Attributes:
      seqlens_expanded: [max_total_tokens].
      nsa_cache_seqlens: [max_total_tokens].
      nsa_cu_seqlens_k: [max_total_tokens + 1].
      total_tokens: [1], also where it exceeds the capacity.
    """

    seqlens_expanded: Any
    nsa_cache_seqlens: Any
    nsa_cu_seqlens_k: Any
    total_tokens: Any

    @classmethod
    def shapes(cls, max_total_tokens: int) -> "ExpandedSeqlens":
        """Shape and dtype of every array."""
        sizes = (max_total_tokens, max_total_tokens, max_total_tokens + 1, 1)
        return cls(*(jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes))
