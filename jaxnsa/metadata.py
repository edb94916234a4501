"""What a computation returns. Every array of `NSAMetadata` is described here, and only here."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax import export

Results = TypeVar("Results")

Array = jax.Array | np.ndarray
"""An array of the device, of the host, or a tracer of either."""


@jax.tree_util.register_static
class ForwardMode(enum.Enum):
    """What the engine runs in this step; it decides how table rows map to requests.

    A pytree without leaves, so a jitted function takes it as an ordinary argument.
    """

    DECODE = "decode"
    TARGET_VERIFY = "target_verify"
    DRAFT_EXTEND = "draft_extend"
    EXTEND = "extend"

    # Members are singletons; Enum hashes their names, in Python, whenever a call looks up a cache.
    __hash__ = object.__hash__

    @property
    def ragged(self) -> bool:
        """Whether extend_seq_lens says how many rows each request has: they may differ."""
        return self in (ForwardMode.DRAFT_EXTEND, ForwardMode.EXTEND)


export.register_pytree_node_serialization(
    ForwardMode,
    serialized_name="jaxnsa.ForwardMode",
    serialize_auxdata=lambda mode: mode.value.encode(),
    deserialize_auxdata=lambda value: ForwardMode(value.decode()),
)


class Extent(enum.Enum):
    """What an array has an element for, and one of two dimensions a row."""

    REQUESTS = "requests"
    REQUESTS_PLUS_1 = "requests + 1"
    ROWS = "rows"
    ROWS_PLUS_1 = "rows + 1"
    TABLE = "table"
    KEYS = "keys"
    PAGED_MQA_ITEMS = "paged MQA items"
    MULTIPROCESSORS_PLUS_1 = "multiprocessors + 1"
    PLANNED_ROWS = "planned rows"
    PARTS = "parts"
    FLASH_MLA_ITEMS_PLUS_1 = "FlashMLA items + 1"

    @property
    def dimensions(self) -> int:
        """Of an array, without those that backends or a batch lead with."""
        vectors = (
            Extent.REQUESTS,
            Extent.REQUESTS_PLUS_1,
            Extent.ROWS,
            Extent.ROWS_PLUS_1,
            Extent.KEYS,
            Extent.FLASH_MLA_ITEMS_PLUS_1,
        )
        return 1 if self in vectors else 2


@dataclasses.dataclass(frozen=True)
class Field:
    """The description of one array of `NSAMetadata`.

    Shapes, checks, operands and structs derive from it, in Python and, through the header that
    `ffi/generate_fields.py` writes when the library is built, in C++ and CUDA.

    Attributes:
      name: of the array.
      extent: REQUESTS [requests]; REQUESTS_PLUS_1 [requests + 1], 0 and the inclusive prefix sum of
        `sum_of`; ROWS [rows]; ROWS_PLUS_1 [rows + 1], likewise; TABLE [table rows, columns]; KEYS
        [max_total_keys]; PAGED_MQA_ITEMS [items, next_n], which are the rows in their order;
        MULTIPROCESSORS_PLUS_1 [num_sms + 1, 2]; PLANNED_ROWS [rows + 1, 2], of which rows past the
        plan's end are left alone in place; PARTS [num_sm_parts, 8]; FLASH_MLA_ITEMS_PLUS_1
        [items + 1].
      sum_of: the array whose prefix sum this is.
      tokens_per_column: of a table, the tokens that a column stands for: a number, or the attribute
        of `Spec` that holds it. Column c stands for the tokens from c * tokens_per_column on and is
        live where the first of them is.
      wanted: the attribute of `Spec`, dotted, that is true where the array is asked for; None:
        always.
    """

    name: str
    extent: Extent
    sum_of: str | None
    tokens_per_column: Literal[1, "real_page_size", "pooled_page_tokens"] | None
    wanted: str | None


def _described(extent: Extent, **description: Any) -> Any:
    described = {"extent": extent, "sum_of": None, "tokens_per_column": None, "wanted": None}
    described |= description
    default = dataclasses.MISSING if described["wanted"] is None else None
    return dataclasses.field(default=default, metadata=described)


def pytree(cls: type[Results]) -> type[Results]:
    """Registers a dataclass of arrays as a pytree, which `jax.export` serialises too."""
    jax.tree_util.register_dataclass(cls)
    return export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxnsa.{cls.__name__}",
        serialize_auxdata=lambda nothing: b"",
        deserialize_auxdata=lambda nothing: (),
    )


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class NSAMetadata:
    """What the attention kernels of one step read, for one backend: int32 arrays.

    `rows` is bs in decode, bs * num_draft_tokens in target verify and max_total_tokens in draft
    extend and prefill (extend). `table_rows` is bs in prefill, where a request's tokens share one
    table row, and `rows` elsewhere. With `stacked=True` every array has one more leading axis,
    [num_backends]. An array that was not asked for is None.

    In prefill the keys of all requests lie one request behind the other: those of request i at
    `cu_seqlens_k[i]` and after. A row's query token sees keys `indexer_ks` to before `indexer_ke`.

    Attributes:
      cache_seqlens: int32 [bs], KV length of each request after the step.
      cu_seqlens_k: int32 [bs + 1], 0 and the inclusive prefix sum of `cache_seqlens`.
      seqlens_expanded: int32 [rows], KV length that each row's query token sees.
      nsa_cache_seqlens: int32 [rows], `seqlens_expanded` clamped to the indexer's top-k. With
        index_kpool = k, all full groups of k tokens are clamped, and the tokens past them added.
      nsa_cu_seqlens_k: int32 [rows + 1], 0 and the inclusive prefix sum of `nsa_cache_seqlens`.
      page_indices: int32 [table_rows, max_len], KV slot of each token; None without the wide table.
      real_page_table: int32 [table_rows, ceil(max_len / real_page_size)], physical page of each
        page of tokens; None when real_page_size is 1.
      token_to_request: int32 [rows], the request of each row; this and the next four in prefill.
      indexer_ks: int32 [rows], where the keys of the row's request begin.
      indexer_ke: int32 [rows], `indexer_ks + seqlens_expanded`.
      topk_indices_offset: int32 [rows], what turns a request's top-k indices into indices of keys:
        `cu_seqlens_k` of the row's request.
      flat_page_indices: int32 [max_total_keys], KV slot of each key; None without max_total_keys.
      pooled_cache_seqlens: int32 [rows], `seqlens_expanded` // index_kpool; None when that is 1.
      pooled_page_table: int32 [table_rows, ceil(max_len / (real_page_size * index_kpool))],
        `real_page_table[:, ::index_kpool]`; None without either.
      paged_mqa_ctx_lens: int32 [items, next_n], KV length of each row of an item of DeepGEMM's
        paged MQA logits. Of target verify, unless its schedule is per row, items are requests and
        next_n is num_draft_tokens, each of which gets the request's `cache_seqlens`; otherwise
        items are rows, next_n is 1, and each gets its `seqlens_expanded`.
      paged_mqa_schedule: int32 [num_sms + 1, 2], DeepGEMM's schedule: multiprocessor s works from
        row s, (item, segment), to before row s + 1. With index_kpool, of the pooled lengths.
      topk_plan: int32 [rows + 1, 2], first (threshold, n), then n times (row, length), rows that
        are longer than the threshold, ascending. What follows is 0, or in place what was there.
      flash_mla_schedule: int32 [num_sm_parts, 8], FlashMLA's schedule, a part in each row.
      flash_mla_num_splits: int32 [items + 1], 0 and the inclusive prefix sum of the splits of each
        of FlashMLA's items.

    The last five are None unless `Schedules` asks for them.
    """

    cache_seqlens: Array = _described(Extent.REQUESTS)
    cu_seqlens_k: Array = _described(Extent.REQUESTS_PLUS_1, sum_of="cache_seqlens")
    seqlens_expanded: Array = _described(Extent.ROWS)
    nsa_cache_seqlens: Array = _described(Extent.ROWS)
    nsa_cu_seqlens_k: Array = _described(Extent.ROWS_PLUS_1, sum_of="nsa_cache_seqlens")
    page_indices: Array | None = _described(Extent.TABLE, tokens_per_column=1, wanted="wide_table")
    real_page_table: Array | None = _described(
        Extent.TABLE, tokens_per_column="real_page_size", wanted="real_table"
    )
    token_to_request: Array | None = _described(Extent.ROWS, wanted="prefill")
    indexer_ks: Array | None = _described(Extent.ROWS, wanted="prefill")
    indexer_ke: Array | None = _described(Extent.ROWS, wanted="prefill")
    topk_indices_offset: Array | None = _described(Extent.ROWS, wanted="prefill")
    flat_page_indices: Array | None = _described(Extent.KEYS, wanted="flat_table")
    pooled_cache_seqlens: Array | None = _described(Extent.ROWS, wanted="pooled")
    pooled_page_table: Array | None = _described(
        Extent.TABLE, tokens_per_column="pooled_page_tokens", wanted="pooled_table"
    )
    paged_mqa_ctx_lens: Array | None = _described(
        Extent.PAGED_MQA_ITEMS, wanted="schedules.paged_mqa"
    )
    paged_mqa_schedule: Array | None = _described(
        Extent.MULTIPROCESSORS_PLUS_1, wanted="schedules.paged_mqa"
    )
    topk_plan: Array | None = _described(Extent.PLANNED_ROWS, wanted="schedules.topk_plan")
    flash_mla_schedule: Array | None = _described(Extent.PARTS, wanted="schedules.flash_mla")
    flash_mla_num_splits: Array | None = _described(
        Extent.FLASH_MLA_ITEMS_PLUS_1, wanted="schedules.flash_mla"
    )

    def arrays(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


FIELDS: Mapping[str, Field] = {
    field.name: Field(field.name, **field.metadata) for field in dataclasses.fields(NSAMetadata)
}
"""The description of every array of `NSAMetadata`, in its order."""


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
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


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class RaggedPagedAttentionMetadata:
    """What ragged paged attention reads: int32 arrays of static sizes.

    `jax.experimental.pallas.ops.tpu.ragged_paged_attention` takes `kv_lens`, `page_indices`,
    `cu_q_lens` and `num_seqs`; kernels that take pages as one vector read either
    `page_indices.reshape(-1)`, or `flat_page_indices` where `cu_kv_lens` says.

    Attributes:
      kv_lens: int32 [max_num_seqs], KV length of each sequence, its new tokens counted.
      cu_q_lens: int32 [max_num_seqs + 1], 0 and the inclusive prefix sum of the new tokens.
      page_indices: int32 [max_num_seqs, ceil(max_len / page_size)], the physical page of each page
        of tokens, 0 past the live ones.
      flat_page_indices: int32 [max_total_pages], the live pages of all sequences one behind the
        other, then 0. Those of sequence i begin at `cu_kv_lens[i] // page_size`.
      cu_kv_lens: int32 [max_num_seqs + 1], 0 and the inclusive prefix sum of the KV lengths, each
        rounded up to whole pages.
      distribution: int32 [3], where sequences end that decode (one new token), those after them
        that prefill (more), and all of them: mixed ones are between the last two.
      num_seqs: int32 [1], how many sequences there are; the others are padding, of length 0.
    """

    kv_lens: Array
    cu_q_lens: Array
    page_indices: Array
    flat_page_indices: Array
    cu_kv_lens: Array
    distribution: Array
    num_seqs: Array
