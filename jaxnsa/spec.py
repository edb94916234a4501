"""What a computation is: its inputs, and the static description of rows and results."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxnsa.metadata import FIELDS, Array, Extent, Field, ForwardMode, NSAMetadata

Tail = Literal["copy", "zero", "keep"]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
MAX_LEN = 2**30
"""The widest page table, and the longest flat one, in tokens: kernels count columns in 32 bits."""


class Inputs(NamedTuple):
    """The arrays that a computation reads.

    Attributes:
      seq_lens: int32 or int64 [bs].
      req_pool_indices: int32 or int64 [bs].
      req_to_token: int32 [pool_rows, pool_cols].
      extend_seq_lens: int32 or int64 [bs] in draft extend and prefill, otherwise None.
    """

    seq_lens: Array
    req_pool_indices: Array
    req_to_token: Array
    extend_seq_lens: Array | None


def saturated(x: Array) -> jax.Array:
    """A wider vector as int32, its values brought into int32's range; int32 itself untouched."""
    if x.dtype == jnp.int32:
        return jnp.asarray(x)
    return jnp.clip(x, INT32_MIN, INT32_MAX).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows map to requests. The four forward modes are four values of this.

    Request i owns q[i] consecutive rows and has KV length
    `cache_seqlens[i] = clip(seq_lens[i], 0, 2^31 - 1 - added_tokens) + added_tokens`. Its row j,
    0 <= j < q[i], sees `seqlens_expanded = max(cache_seqlens[i] - q[i] + 1 + j, 0)` tokens. No KV
    length leaves int32, so that nothing computed from one has to expect a negative one.

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
    """

    requests: int
    count: int
    rows_per_request: int | None
    added_tokens: int
    prefill: bool = False

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
        return Rows.of(ForwardMode.DECODE, self.requests) if self.prefill else self

    @property
    def longest_seq_len(self) -> int:
        """Where `seq_lens` saturate, so that KV lengths fit int32."""
        return INT32_MAX - self.added_tokens


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
      max_total_keys: length of `flat_page_indices`; None where it is not wanted.
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
    max_total_keys: int | None = None

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
            if (field.wanted is None or getattr(self, field.wanted))
            and (not extents or field.extent in extents)
        ]

    def tokens_per_column(self, field: Field) -> int:
        """Tokens that a column of a table stands for."""
        tokens = field.tokens_per_column
        assert tokens is not None
        return tokens if isinstance(tokens, int) else getattr(self, tokens)

    def columns(self, field: Field) -> int:
        """Columns of a table: those that stand for the first max_len tokens."""
        return -(-self.max_len // self.tokens_per_column(field))

    # A Spec is small, and each eager call asks.
    @functools.lru_cache(maxsize=256)  # noqa: B019
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of one destination, by name, of those that are wanted."""
        rows = self.rows
        sizes = {
            Extent.REQUESTS: rows.requests,
            Extent.REQUESTS_PLUS_1: rows.requests + 1,
            Extent.ROWS: rows.count,
            Extent.ROWS_PLUS_1: rows.count + 1,
            Extent.TABLE: rows.tables.count,
            Extent.KEYS: self.max_total_keys,
        }
        return {
            field.name: jax.ShapeDtypeStruct(
                (
                    *self.lead,
                    sizes[field.extent],
                    *([self.columns(field)] if field.extent is Extent.TABLE else []),
                ),
                jnp.int32,
            )
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
