"""The types that cross the public API: all of them pytrees, every array int32."""

import dataclasses
import enum
from typing import Any

import jax

Array = Any  # a jax.Array, a tracer, a numpy.ndarray or a jax.ShapeDtypeStruct


@jax.tree_util.register_static
class ForwardMode(enum.Enum):
    """What the engine runs in this step; it decides how table rows map to requests.

    A pytree without leaves, so a jitted function takes it as an ordinary argument.
    """

    DECODE = "decode"
    TARGET_VERIFY = "target_verify"
    DRAFT_EXTEND = "draft_extend"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NSAMetadata:
    """What the attention kernels of one step read, for one backend.

    `rows` is bs in decode, bs * num_draft_tokens in target verify and max_total_tokens in draft
    extend. With `stacked=True` every array has one more leading axis, [num_backends].

    Attributes:
      cache_seqlens: int32 [bs], KV length of each request after the step.
      cu_seqlens_k: int32 [bs + 1], 0 and the inclusive prefix sum of `cache_seqlens`.
      seqlens_expanded: int32 [rows], KV length that each row's query token sees.
      nsa_cache_seqlens: int32 [rows], `seqlens_expanded` clamped to the indexer's top-k.
      nsa_cu_seqlens_k: int32 [rows + 1], 0 and the inclusive prefix sum of `nsa_cache_seqlens`.
      page_indices: int32 [rows, max_len], KV slot of each token; None without the wide table.
      real_page_table: int32 [rows, ceil(max_len / real_page_size)], physical page of each page of
        tokens; None when real_page_size is 1.
    """

    cache_seqlens: Array
    cu_seqlens_k: Array
    seqlens_expanded: Array
    nsa_cache_seqlens: Array
    nsa_cu_seqlens_k: Array
    page_indices: Array | None
    real_page_table: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftExtendSeqlens:
    """The lengths of a draft-extend step, one row per extend token.

    Attributes:
      seqlens_expanded: int32 [max_total_tokens], KV length that each token sees; 0 past the total.
      nsa_cache_seqlens: int32 [max_total_tokens], the same, clamped to the indexer's top-k.
      total_tokens: int32 [], the sum of the extend lengths, also where it exceeds the capacity.
    """

    seqlens_expanded: Array
    nsa_cache_seqlens: Array
    total_tokens: Array
