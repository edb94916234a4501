"""The XLA implementation: plain `jax.numpy` and `lax`, for every platform."""

import dataclasses
import functools
import importlib.metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.metadata import Array, DraftExtendSeqlens, ForwardMode, NSAMetadata
from jaxnsa.spec import Rows, Spec

# Tokens that one in-place update moves on the CPU: enough to hide the loop's step, few enough that
# the masked last update of a row is cheap.
_CHUNK = 4096


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    return None


def version() -> str:
    """Of the jaxlib that compiles it."""
    return f"jaxlib {importlib.metadata.version('jaxlib')}"


def prefix_sum(x: Array) -> Array:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(x, dtype=jnp.int32)])


def fill_draft_extend_metadata(
    extend_seq_lens: Array, seq_lens: Array, *, nsa_index_topk: int, max_total_tokens: int
) -> DraftExtendSeqlens:
    """See `jaxnsa.fill_draft_extend_metadata`."""
    rows = Rows.of(ForwardMode.DRAFT_EXTEND, len(seq_lens), max_total_tokens=max_total_tokens)
    kv_len = row_lengths(rows, seq_lens, extend_seq_lens)
    return DraftExtendSeqlens(
        seqlens_expanded=kv_len,
        nsa_cache_seqlens=jnp.minimum(kv_len, nsa_index_topk),
        total_tokens=jnp.sum(jnp.maximum(extend_seq_lens, 0), dtype=jnp.int32),
    )


def broadcast(
    seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    extend_seq_lens: Array | None,
    out: tuple[NSAMetadata, ...] | None,
    spec: Spec,
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of `spec` for all of its destinations."""
    cache_seqlens = jnp.maximum(seq_lens, 0) + spec.rows.added_tokens
    owners = _owners(spec.rows, cache_seqlens, extend_seq_lens)
    nsa_cache_seqlens = jnp.minimum(owners.kv_len, spec.nsa_index_topk)
    pool_rows = jnp.clip(req_pool_indices, 0, len(req_to_token) - 1)
    source_rows = pool_rows[owners.request] if spec.rows.requests else owners.request
    page = spec.real_page_size
    values = {
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_k": prefix_sum(cache_seqlens),
        "seqlens_expanded": owners.kv_len,
        "nsa_cache_seqlens": nsa_cache_seqlens,
        "nsa_cu_seqlens_k": prefix_sum(nsa_cache_seqlens),
        "page_indices": _Table(req_to_token, source_rows, owners, spec.max_len, 1, 1),
        "real_page_table": _Table(req_to_token, source_rows, owners, spec.pages, page, page),
    }
    return _store(values, out, spec)


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies `src` to `num_backends` destinations.

    With `live`, the computation that `src` came from, only the live columns of its tables.
    """
    if out is None:
        return tuple(jax.tree.map(jnp.copy, src) for _ in range(num_backends))
    if live is None:
        return tuple(jax.tree.map(_overwrite, destination, src) for destination in out)
    rows = jnp.arange(live.rows.count, dtype=jnp.int32)
    owners = _Owners(rows, src.seqlens_expanded, None)
    page = live.real_page_size
    values = vars(src) | {
        "page_indices": _Table(src.page_indices, rows, owners, live.max_len, 1, 1),
        "real_page_table": _Table(src.real_page_table, rows, owners, live.pages, 1, page),
    }
    return _store(values, out, dataclasses.replace(live, num_backends=num_backends))


def row_lengths(rows: Rows, seq_lens: Array, extend_seq_lens: Array | None) -> Array:
    """int32 [rows], the tokens that each row sees: `seqlens_expanded`."""
    cache_seqlens = jnp.maximum(seq_lens, 0) + rows.added_tokens
    return _owners(rows, cache_seqlens, extend_seq_lens).kv_len


class _Owners(NamedTuple):
    """Which request each row belongs to.

    Attributes:
      request: int32 [rows], any valid request for the rows past the total.
      kv_len: int32 [rows], tokens that the row sees; 0 past the total.
      total: int32 [], rows that stand for a token; None where all do.
    """

    request: Array
    kv_len: Array
    total: Array | None


def _owners(rows: Rows, cache_seqlens: Array, extend_seq_lens: Array) -> _Owners:
    row = jnp.arange(rows.count, dtype=jnp.int32)
    if rows.tokens_per_request is not None:
        request, token = row // rows.tokens_per_request, row % rows.tokens_per_request
        kv_len = cache_seqlens[request] - rows.tokens_per_request + 1 + token
        return _Owners(request, jnp.maximum(kv_len, 0), None)
    if rows.requests == 0:
        return _Owners(jnp.zeros_like(row), jnp.zeros_like(row), jnp.int32(0))
    q = jnp.maximum(extend_seq_lens, 0)
    # A sum of nonnegative int32 turns negative where it first leaves int32, and so past any row.
    ends = jnp.cumsum(q, dtype=jnp.int32)
    overflown = lax.cummax((ends < 0).astype(jnp.int32)) > 0
    ends = jnp.where(overflown, rows.count, jnp.minimum(ends, rows.count))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    request = jnp.searchsorted(ends, row, side="right", method="scan_unrolled").astype(jnp.int32)
    request = jnp.minimum(request, rows.requests - 1)
    kv_len = cache_seqlens[request] - q[request] + 1 + row - starts[request]
    total = ends[-1]
    return _Owners(request, jnp.where(row < total, jnp.maximum(kv_len, 0), 0), total)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["source", "source_rows", "owners"],
    meta_fields=["columns", "stride", "tokens"],
)
@dataclasses.dataclass(frozen=True)
class _Table:
    """A page table: `source[source_rows, ::stride] // stride`, `columns` wide.

    A column stands for `tokens` tokens: it is live where the first of them is.
    """

    source: Array
    source_rows: Array
    owners: _Owners
    columns: int
    stride: int
    tokens: int

    def live(self) -> Array:
        """int32 [rows], the live columns of each row."""
        kv_len = jnp.minimum(self.owners.kv_len, self.columns * self.tokens)
        return (kv_len + self.tokens - 1) // self.tokens

    def gather(self) -> Array:
        """All columns of all rows, int32 [rows, columns]."""
        last = (self.columns - 1) * self.stride + 1
        source = lax.slice_in_dim(self.source, 0, last, self.stride, axis=1)
        return source.at[self.source_rows].get(mode="promise_in_bounds") // self.stride

    def gather_part(self, row: Array, start: Array, size: int) -> Array:
        """`size` columns of a row from column `start` on, int32 [size]."""
        last = (size - 1) * self.stride + 1
        begin = (self.source_rows[row], start * self.stride)
        part = lax.dynamic_slice(self.source, begin, (1, last))
        return part[0, :: self.stride] // self.stride


def _store(
    values: dict[str, Array | _Table], out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """Every array and table of the metadata, written to every destination."""
    stored = {}
    for field, shape in vars(spec.shapes()).items():
        destinations = None if out is None else [getattr(d, field) for d in out]
        if shape is None:
            stored[field] = [None] * spec.destinations
        else:
            stored[field] = _write(values[field], destinations, spec)
    return tuple(
        NSAMetadata(**{field: arrays[k] for field, arrays in stored.items()})
        for k in range(spec.destinations)
    )


def _write(value: Array | _Table, destinations: list[Array] | None, spec: Spec) -> list[Array]:
    if isinstance(value, _Table):
        if destinations is not None and spec.tail == "keep":
            return list(_keep(value, tuple(destinations)))
        value = _whole(value, spec.tail)
    if destinations is None:
        return [jnp.broadcast_to(value, (*spec.lead, *value.shape))] * spec.destinations
    return [_overwrite(d, value) for d in destinations]


def _overwrite(destination: Array, value: Array) -> Array:
    # Depends on what was there, so that a donated array stays an argument and is reused.
    value = jnp.broadcast_to(value, destination.shape)
    return lax.dynamic_update_slice(destination, value, (0,) * destination.ndim)


def _whole(table: _Table, tail: str) -> Array:
    """A table in full: 0 past the live columns for "zero", and in rows past the total."""
    if tail == "zero":
        limit = table.live()[:, None]
    elif table.owners.total is not None:
        row = jnp.arange(len(table.source_rows))[:, None]
        limit = jnp.where(row < table.owners.total, table.columns, 0)
    else:
        return table.gather()
    return jnp.where(jnp.arange(table.columns) < limit, table.gather(), 0)


@jax.custom_batching.custom_vmap
def _keep(table: _Table, destinations: tuple[Array, ...]) -> tuple[Array, ...]:
    """The live columns of a table over what each destination held."""
    return lax.platform_dependent(table, destinations, cpu=_keep_by_row, default=_keep_by_select)


@_keep.def_vmap
def _keep_vmap(axis_size, batched, table, destinations):
    # A batch of the loops below would step all of them together and copy the tables at each step.
    axes = jax.tree.map(lambda b: 0 if b else None, batched)
    kept = jax.vmap(_keep_by_select, axes, axis_size=axis_size)(table, destinations)
    return kept, jax.tree.map(lambda _: True, kept)


def _keep_by_select(table: _Table, destinations: tuple[Array, ...]) -> tuple[Array, ...]:
    """One pass over the whole tables: where launches cost more than columns."""
    live = jnp.arange(table.columns) < table.live()[:, None]
    value = table.gather()
    return tuple(jnp.where(live, value, d) for d in destinations)


def _keep_by_row(table: _Table, destinations: tuple[Array, ...]) -> tuple[Array, ...]:
    """Row by row, as many chunks as are live: touches nothing else."""
    size = min(max(_CHUNK // table.tokens, 1), table.columns)
    live = table.live()
    if not len(live):
        return destinations

    def row_step(row, destinations):
        def update(destination, start, part):
            index = (*(0,) * (destination.ndim - 2), row, start)
            return lax.dynamic_update_slice(destination, part, index)

        def chunk_step(chunk, destinations):
            start = chunk * size
            part = table.gather_part(row, start, size)
            return tuple(
                update(d, start, jnp.broadcast_to(part, (*d.shape[:-2], 1, size)))
                for d in destinations
            )

        whole_chunks = live[row] // size
        destinations = lax.fori_loop(jnp.int32(0), whole_chunks, chunk_step, destinations)
        start = jnp.minimum(whole_chunks * size, table.columns - size)
        part = table.gather_part(row, start, size)
        is_live = start + jnp.arange(size) < live[row]

        def masked_update(destination):
            index = (*(0,) * (destination.ndim - 2), row, start)
            held = lax.dynamic_slice(destination, index, (*destination.shape[:-2], 1, size))
            return update(destination, start, jnp.where(is_live, part, held))

        return tuple(masked_update(d) for d in destinations)

    rows = jnp.int32(len(live)) if table.owners.total is None else table.owners.total
    return lax.fori_loop(jnp.int32(0), rows, row_step, destinations)
