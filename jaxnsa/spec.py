"""What a computation is: its inputs, and the static description of rows and results."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxnsa.metadata import FIELDS, Array, Extent, Field, ForwardMode, NSAMetadata
from jaxnsa.scalar_checks import INT32_MAX, INT32_MIN
from jaxnsa.schedules import NO_SCHEDULES, Schedules

Tail = Literal["copy", "zero", "keep"]

MAX_LEN = 2**30
"""The widest page table, and the longest flat one, in tokens: kernels count columns in 32 bits."""
MAX_ROWS = 2**30 - 1
"""The most requests and the most rows, and the longest prefix sum: kernels count them likewise, and
both numbers of each line of a top-k plan, which has one more than there are rows."""
MAX_BACKENDS = 1024
"""The most backends: compiling a function takes some milliseconds for each of its results."""


class Inputs(NamedTuple):
    """The arrays that a computation reads.

    Attributes:
      seq_lens: int32 or int64 [bs].
      req_pool_indices: int32 or int64 [bs].
      req_to_token: int32 [pool_rows, pool_cols].
      extend_seq_lens: int32 or int64 [bs] in draft extend and prefill, otherwise None.
      written_lens: int32 or int64 [bs], leading tokens of each request that the tables of its rows
        hold, whose columns are left alone; None: none.
      flash_mla: int32 [num_sm_parts * 8 + items + 1], FlashMLA's arrays one behind the other where
        its schedule is constant, which a launch copies; otherwise None.
    """

    seq_lens: Array
    req_pool_indices: Array
    req_to_token: Array
    extend_seq_lens: Array | None
    written_lens: Array | None = None
    flash_mla: Array | None = None


def saturated(x: Array) -> jax.Array:
    """A wider vector as int32, its values brought into int32's range; int32 itself untouched.

    An int64 array may be older than the setting that there are none, which would cut it off first.
    """
    if x.dtype == jnp.int32:
        return jnp.asarray(x)
    with jax.enable_x64(True):
        return jnp.clip(x, INT32_MIN, INT32_MAX).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows map to requests. The four forward modes are four values of this.

    Request i owns q[i] consecutive rows and has KV length
    `cache_seqlens[i] = clip(seq_lens[i] + offset, 0, 2^31 - 1 - added_tokens) + added_tokens`. Its
    row j, 0 <= j < q[i], sees `seqlens_expanded = max(cache_seqlens[i] - q[i] + 1 + j, 0)` tokens.
    No KV length leaves int32, so that nothing computed from one has to expect a negative one.

    | mode          | q[i]                       | added_tokens     | table rows of request i |
    | ---           | ---                        | ---              | ---                     |
    | decode        | 1                          | 0                | its row                 |
    | target verify | num_draft_tokens           | num_draft_tokens | its rows                |
    | draft extend  | max(extend_seq_lens[i], 0) | 0                | its rows                |
    | extend        | max(extend_seq_lens[i], 0) | 0                | one, of cache_seqlens   |

    Extend is prefill: its rows are a prompt's tokens, too many for a table row each. Chunks of a
    prompt, and decoding requests (q = 1) among prefilling ones, are values of extend_seq_lens.

    Rows past the last request's, where q is extend_seq_lens, are padding rows: they see 0 tokens,
    and all that they hold is 0 but for prefix sums, which repeat the total. Rows past `count` are
    left out, in the order of requests.

    In prefill there are also keys, the tokens of all requests one behind the other: request i has
    keys S[i] to before S[i] + cache_seqlens[i], where S is the sum over the requests before it,
    which does not wrap. Key S[i] + c is its token c, in column c of its table row; it holds 0 where
    the table has no such column. Keys past `max_total_keys` are left out, and those past the last
    request's are padding keys, which hold what a table does past its live columns, 0 in place of
    the pool's content.

    Attributes:
      requests: number of requests, bs.
      count: number of rows; where extend_seq_lens says them, the capacity, max_total_tokens.
      rows_per_request: q where it is one number for all, None where extend_seq_lens says.
      added_tokens: tokens that the step itself appends to every request.
      prefill: whether a request has one table row, whatever rows it has, and keys.
      offset: what counts in place of `seq_lens` is `seq_lens + offset`: see
        `Spec.backend_offsets`.
    """

    requests: int
    count: int
    rows_per_request: int | None
    added_tokens: int
    prefill: bool = False
    offset: int = 0

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
        return cls(requests, max_total_tokens, None, 0, prefill=mode is ForwardMode.EXTEND)

    @property
    def tables(self) -> "Rows":
        """How table rows map to requests: as rows do, but in prefill as in decode."""
        if not self.prefill:
            return self
        rows = Rows.of(ForwardMode.DECODE, self.requests)
        return dataclasses.replace(rows, offset=self.offset)

    @property
    def seq_len_range(self) -> tuple[int, int]:
        """The least and greatest of `seq_lens` that count as they are: KV lengths fit int32."""
        longest = INT32_MAX - self.added_tokens
        return max(-self.offset, INT32_MIN), min(longest - self.offset, INT32_MAX)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything about a computation but its arrays; hashable, so it is a static argument of jit.

    Attributes:
      rows: how rows map to requests.
      max_len: columns of the page table, in tokens.
      nsa_index_topk: the indexer's top-k, in tokens.
      real_page_size: tokens in a physical page; 1 means no second table.
      wide_table: whether `page_indices` is wanted.
      index_kpool: tokens that the indexer pools into one key; 1: it pools none.
      schedules: what the consumers want beside the metadata.
      tail: what tables hold past a row's live columns. "keep" without destinations leaves them
        unspecified.
      max_total_keys: length of `flat_page_indices`; None where it is not wanted.
      num_backends: how many copies of the metadata.
      stacked: one NSAMetadata whose arrays lead with [num_backends] instead of a tuple of them.
      backend_offsets: of each backend, the tokens by which its `seq_lens` are longer; None: all 0.
      max_new_tokens: tokens by which a row's live ones exceed `Inputs.written_lens`, which a launch
        is sized for: where they are more, it takes longer.
    """

    rows: Rows
    max_len: int
    nsa_index_topk: int
    real_page_size: int
    wide_table: bool
    tail: Tail
    num_backends: int = 1
    stacked: bool = False
    max_total_keys: int | None = None
    index_kpool: int = 1
    schedules: Schedules = NO_SCHEDULES
    backend_offsets: tuple[int, ...] | None = None
    max_new_tokens: int = MAX_LEN

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of each backend, the tokens by which its `seq_lens` are longer."""
        return self.backend_offsets or (0,) * self.num_backends

    def rows_of(self, offset: int) -> Rows:
        """The rows of the backends of an offset."""
        return dataclasses.replace(self.rows, offset=offset)

    def of_backend(self, k: int) -> "Spec":
        """What backend k alone is."""
        offsets = self.backend_offsets and self.backend_offsets[k : k + 1]
        return dataclasses.replace(self, num_backends=1, stacked=False, backend_offsets=offsets)

    def destination(self, out: tuple[NSAMetadata, ...] | None, k: int) -> tuple[NSAMetadata] | None:
        """Where backend k alone goes."""
        if out is None:
            return None
        return (jax.tree.map(lambda array: array[k], out[0]) if self.stacked else out[k],)

    def joined(self, backends: Sequence[NSAMetadata]) -> tuple[NSAMetadata, ...]:
        """Backends that were computed alone, as destinations."""
        if self.stacked:
            return (jax.tree.map(lambda *arrays: jnp.stack(arrays), *backends),)
        return tuple(backends)

    @property
    def real_table(self) -> bool:
        """Whether `real_page_table` is wanted."""
        return self.real_page_size > 1

    @property
    def prefill(self) -> bool:
        """Whether the arrays of prefill are wanted."""
        return self.rows.prefill

    @property
    def flat_table(self) -> bool:
        """Whether `flat_page_indices` is wanted."""
        return self.max_total_keys is not None

    @property
    def pooled(self) -> bool:
        """Whether the indexer's keys are pooled, and `pooled_cache_seqlens` is wanted."""
        return self.index_kpool > 1

    @property
    def pooled_table(self) -> bool:
        """Whether `pooled_page_table` is wanted."""
        return self.pooled and self.real_table

    @property
    def pooled_page_tokens(self) -> int:
        """Tokens in a page of pooled keys."""
        return self.real_page_size * self.index_kpool

    @property
    def paged_mqa_items(self) -> tuple[int, int]:
        """Items of the paged MQA logits and the rows of each, next_n."""
        paged_mqa, q = self.schedules.paged_mqa, self.rows.rows_per_request
        if q is None or (paged_mqa is not None and paged_mqa.per_row):
            return self.rows.count, 1
        return self.rows.requests, q

    @property
    def flash_mla_items(self) -> int:
        """Items of FlashMLA's schedule."""
        flash_mla = self.schedules.flash_mla
        dense = flash_mla is not None and flash_mla.lengths == "cache_seqlens"
        return self.rows.requests if dense else self.rows.count

    @property
    def destinations(self) -> int:
        """How many NSAMetadata the computation returns."""
        return 1 if self.stacked else self.num_backends

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of every array of a destination."""
        return (self.num_backends,) if self.stacked else ()

    @property
    def is_empty(self) -> bool:
        """Whether an array has no element: nothing that a kernel could be launched for."""
        return not self.rows.requests or not self.rows.count or self.max_total_keys == 0

    def fields(self, *extents: Extent) -> list[Field]:
        """The arrays that are wanted, of the given extents if there are any, in their order."""
        return [
            field
            for field in FIELDS.values()
            if (field.wanted is None or operator.attrgetter(field.wanted)(self))
            and (not extents or field.extent in extents)
        ]

    def tokens_per_column(self, field: Field) -> int:
        """Tokens that a column of a table stands for."""
        tokens = field.tokens_per_column
        assert tokens is not None
        return tokens if isinstance(tokens, int) else getattr(self, tokens)

    def slots_per_page(self, field: Field) -> int:
        """KV slots of the pages whose numbers a table holds."""
        return 1 if field.tokens_per_column == 1 else self.real_page_size

    def columns(self, field: Field) -> int:
        """Columns of a table: those that stand for the first max_len tokens."""
        return -(-self.max_len // self.tokens_per_column(field))

    # A Spec is small, and each eager call asks.
    @functools.lru_cache(maxsize=256)  # noqa: B019
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of one destination, by name, of those that are wanted."""
        rows, schedules = self.rows, self.schedules
        sms = schedules.paged_mqa.num_sms if schedules.paged_mqa else 0
        parts = schedules.flash_mla.num_sm_parts if schedules.flash_mla else 0

        def shape(field: Field) -> tuple[int, ...]:
            if field.extent is Extent.TABLE:
                return (rows.tables.count, self.columns(field))
            return {
                Extent.REQUESTS: (rows.requests,),
                Extent.REQUESTS_PLUS_1: (rows.requests + 1,),
                Extent.ROWS: (rows.count,),
                Extent.ROWS_PLUS_1: (rows.count + 1,),
                Extent.KEYS: (self.max_total_keys or 0,),
                Extent.PAGED_MQA_ITEMS: self.paged_mqa_items,
                Extent.MULTIPROCESSORS_PLUS_1: (sms + 1, 2),
                Extent.PLANNED_ROWS: (rows.count + 1, 2),
                Extent.PARTS: (parts, 8),
                Extent.FLASH_MLA_ITEMS_PLUS_1: (self.flash_mla_items + 1,),
            }[field.extent]

        return {
            field.name: jax.ShapeDtypeStruct((*self.lead, *shape(field)), jnp.int32)
            for field in self.fields()
        }

    def table_kv_lens(self, metadata: NSAMetadata) -> Array:
        """int32 [table rows], the tokens that each table row of a result sees."""
        return metadata.cache_seqlens if self.prefill else metadata.seqlens_expanded

    def metadata(self, arrays: Mapping[str, Any]) -> NSAMetadata:
        """The arrays of one destination, or what stands for them, as NSAMetadata.

        Every implementation returns its results through this, so that an array that it forgot is
        an error while it is traced: KeyError where one is missing or too many.
        """
        wanted = self.shapes().keys()
        if arrays.keys() != wanted:
            raise KeyError(
                f"an implementation computed {sorted(arrays)}, expected {sorted(wanted)}"
            )
        return NSAMetadata(**arrays)
