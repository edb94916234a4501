"""The metadata of JAX's ragged paged attention, from the same lengths and the same pool."""

import jax
import jax.numpy as jnp

from jaxnsa import argument_checks as checks
from jaxnsa.compilation import own_promotion
from jaxnsa.metadata import Array, RaggedPagedAttentionMetadata
from jaxnsa.operations import precompute_decode_metadata, prefix_sum
from jaxnsa.row_owners import Owners
from jaxnsa.spec import MAX_LEN, MAX_ROWS, saturated


@own_promotion()
def ragged_paged_attention_metadata(
    seq_lens: Array,
    extend_seq_lens: Array | None,
    req_pool_indices: Array,
    req_to_token: Array,
    *,
    page_size: int,
    num_seqs: Array | int | None = None,
    max_num_seqs: int | None = None,
    max_len: int | None = None,
    max_total_pages: int | None = None,
) -> RaggedPagedAttentionMetadata:
    """The metadata of JAX's ragged paged attention, on the device, for a step of any kind.

    A decode step has one new token in each sequence, target verify `num_draft_tokens`, and draft
    extend and prefill any number. Plain `jax.numpy`, for every platform that JAX runs on.

    Args:
      seq_lens: int32 or int64 [bs], KV length of each sequence, its new tokens counted; negative
        counts as 0.
      extend_seq_lens: int32 or int64 [bs], new tokens of each; negative counts as 0. None: one.
      req_pool_indices: int32 or int64 [bs], each sequence's row in the pool; clamped into it.
      req_to_token: int32 [pool_rows, pool_cols], KV slot of each token of each sequence.
      page_size: tokens in a physical page.
      num_seqs: how many of the bs sequences there are, an int or an int32 scalar; what follows is
        taken for padding. None: bs.
      max_num_seqs: sequences of the result, at least bs; None: bs.
      max_len: tokens that a sequence has pages for, at most pool_cols; None: pool_cols.
      max_total_pages: length of `flat_page_indices`, past which pages are left out; None: that of
        `page_indices` as a vector.

    Returns:
      RaggedPagedAttentionMetadata. KV lengths past max_len keep their value; pages that the table
      has no column for are 0. Prefix sums wrap as int32 does.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
    """
    seq_lens = checks.vector("seq_lens", seq_lens)
    bs = len(seq_lens)
    if extend_seq_lens is None:
        extend_seq_lens = jnp.ones(bs, jnp.int32)
    extend_seq_lens = checks.vector("extend_seq_lens", extend_seq_lens, bs)
    max_num_seqs = checks.integer(
        "max_num_seqs", bs if max_num_seqs is None else max_num_seqs, bs, MAX_ROWS
    )
    if num_seqs is None or isinstance(num_seqs, int):
        num_seqs = checks.integer("num_seqs", bs if num_seqs is None else num_seqs, 0, bs)
    else:
        num_seqs = saturated(checks.held(checks.array("num_seqs", num_seqs, 0)))
    page_size = checks.integer("page_size", page_size, 1)
    exists = jnp.arange(max_num_seqs) < jnp.minimum(num_seqs, bs)

    def padded(vector: Array) -> jax.Array:
        """int32 [max_num_seqs], 0 where there is no sequence."""
        narrow = saturated(checks.held(vector))
        return jnp.where(exists, jnp.pad(narrow, (0, max_num_seqs - bs)), 0)

    kv_lens, q_lens = padded(seq_lens), jnp.maximum(padded(extend_seq_lens), 0)
    # Its page table is that of decode: a row for each sequence.
    decode = precompute_decode_metadata(
        kv_lens,
        padded(checks.vector("req_pool_indices", req_pool_indices, bs)),
        req_to_token,
        max_len=max_len,
        real_page_size=page_size,
        wide_table=page_size == 1,
        tail="zero",
        implementation="xla",
    )
    page_indices = decode.page_indices if page_size == 1 else decode.real_page_table
    assert page_indices is not None
    kv_lens = jnp.asarray(decode.cache_seqlens)
    pages = kv_lens // page_size + (kv_lens % page_size > 0)
    max_total_pages = checks.integer(
        "max_total_pages",
        min(page_indices.size, MAX_LEN) if max_total_pages is None else max_total_pages,
        0,
        MAX_LEN,
    )
    ends_of_kinds = [
        jnp.argmin(jnp.append(exists & of_this_kind, False))
        for of_this_kind in (q_lens <= 1, (q_lens <= 1).cumprod().astype(bool) | (q_lens > 1))
    ]
    count = exists.sum(dtype=jnp.int32)
    return RaggedPagedAttentionMetadata(
        kv_lens=kv_lens,
        cu_q_lens=prefix_sum(q_lens, implementation="xla"),
        page_indices=page_indices,
        flat_page_indices=_flat(page_indices, pages, max_total_pages),
        cu_kv_lens=prefix_sum(pages, implementation="xla") * page_size,
        distribution=jnp.stack([*ends_of_kinds, count]).astype(jnp.int32),
        num_seqs=count[None],
    )


def _flat(page_indices: Array, pages: jax.Array, capacity: int) -> jax.Array:
    """int32 [capacity], the first pages[i] columns of each row one behind the other, then 0."""
    rows, columns = page_indices.shape
    if not rows:
        return jnp.zeros(capacity, jnp.int32)
    row, column, total = Owners.of(pages, capacity)
    is_page = (jnp.arange(capacity) < total) & (column < columns)
    return jnp.where(is_page, page_indices[row, jnp.minimum(column, columns - 1)], 0)
