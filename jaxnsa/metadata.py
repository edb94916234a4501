"""What a computation returns. Every array of `NSAMetadata` is described here, and only here."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax import export

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


class Extent(enum.Enum):
    """What an array has an element for, and a table a row."""

    REQUESTS = "requests"
    REQUESTS_PLUS_1 = "requests + 1"
    ROWS = "rows"
    ROWS_PLUS_1 = "rows + 1"
    TABLE = "table"


@dataclasses.dataclass(frozen=True)
class Field:
    """The description of one array of `NSAMetadata`.

    Shapes, checks, operands and structs derive from it, in Python and, through the header that
    `ffi/generate_fields.py` writes when the library is built, in C++ and CUDA.

    Attributes:
      name: of the array.
      extent: REQUESTS [requests]; REQUESTS_PLUS_1 [requests + 1], 0 and the inclusive prefix sum of
        `sum_of`; ROWS [rows]; ROWS_PLUS_1 [rows + 1], likewise; TABLE [rows, columns].
      sum_of: the array whose prefix sum this is.
      tokens_per_column: of a table, the tokens that a column stands for: a number, or the attribute
        of `Spec` that holds it. Column c stands for the tokens from c * tokens_per_column on and is
        live where the first of them is.
      wanted: the attribute of `Spec` that tells whether the array is asked for; None: always.
    """

    name: str
    extent: Extent
    sum_of: str | None
    tokens_per_column: Literal[1, "real_page_size"] | None
    wanted: str | None


def _described(extent: Extent, **description: Any) -> Any:
    described = {"extent": extent, "sum_of": None, "tokens_per_column": None, "wanted": None}
    described |= description
    default = dataclasses.MISSING if described["wanted"] is None else None
    return dataclasses.field(default=default, metadata=described)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NSAMetadata:
    """What the attention kernels of one step read, for one backend: int32 arrays.

    `rows` is bs in decode, bs * num_draft_tokens in target verify and max_total_tokens in draft
    extend. With `stacked=True` every array has one more leading axis, [num_backends]. An array that
    was not asked for is None.

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

    cache_seqlens: Array = _described(Extent.REQUESTS)
    cu_seqlens_k: Array = _described(Extent.REQUESTS_PLUS_1, sum_of="cache_seqlens")
    seqlens_expanded: Array = _described(Extent.ROWS)
    nsa_cache_seqlens: Array = _described(Extent.ROWS)
    nsa_cu_seqlens_k: Array = _described(Extent.ROWS_PLUS_1, sum_of="nsa_cache_seqlens")
    page_indices: Array | None = _described(Extent.TABLE, tokens_per_column=1, wanted="wide_table")
    real_page_table: Array | None = _described(
        Extent.TABLE, tokens_per_column="real_page_size", wanted="real_table"
    )

    def arrays(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


FIELDS: Mapping[str, Field] = {
    field.name: Field(field.name, **field.metadata) for field in dataclasses.fields(NSAMetadata)
}
"""The description of every array of `NSAMetadata`, in its order."""


@jax.tree_util.register_dataclass
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


# What `jax.export` serialises holds them as results.
for _type in (NSAMetadata, DraftExtendSeqlens):
    export.register_pytree_node_serialization(
        _type,
        serialized_name=f"jaxnsa.{_type.__name__}",
        serialize_auxdata=lambda nothing: b"",
        deserialize_auxdata=lambda nothing: (),
    )
