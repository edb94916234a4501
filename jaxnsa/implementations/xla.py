"""The XLA implementation: plain `jax.numpy` and `lax`, for every platform."""

import dataclasses
import functools
import importlib.metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.implementations.xla_schedules import (
    flash_mla_schedule,
    paged_mqa_schedule,
    topk_plan,
)
from jaxnsa.metadata import FIELDS, DraftExtendSeqlens, Extent, Field, ForwardMode, NSAMetadata
from jaxnsa.row_owners import Owners, RowOwners, cache_seqlens, row_owners
from jaxnsa.schedules import FlashMlaSchedule
from jaxnsa.spec import Inputs, Rows, Spec

# Tokens that one in-place update moves on the CPU: enough to hide the loop's step, few enough that
# the masked last update of a row is cheap.
_TILE_TOKENS = 4096


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    return None


def version() -> str:
    """Of the jaxlib that compiles it."""
    return f"jaxlib {importlib.metadata.version('jaxlib')}"


def prefix_sum(x: jax.Array) -> jax.Array:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(x, dtype=jnp.int32)])


def fill_draft_extend_metadata(
    extend_seq_lens: jax.Array,
    seq_lens: jax.Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int,
) -> DraftExtendSeqlens:
    """See `jaxnsa.fill_draft_extend_metadata`."""
    rows = Rows.of(ForwardMode.DRAFT_EXTEND, len(seq_lens), max_total_tokens=max_total_tokens)
    kv_len = row_owners(rows, seq_lens, extend_seq_lens).kv_len
    return DraftExtendSeqlens(
        seqlens_expanded=kv_len,
        nsa_cache_seqlens=jnp.minimum(kv_len, nsa_index_topk),
        total_tokens=jnp.sum(jnp.maximum(extend_seq_lens, 0), dtype=jnp.int32),
    )


def fused_metadata(
    inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of `spec` for all of its destinations."""
    if spec.backend_offsets is None:
        return _of_rows(spec.rows, inputs, out, spec)
    backends = [
        _of_rows(spec.rows_of(offset), inputs, spec.destination(out, k), spec.of_backend(k))[0]
        for k, offset in enumerate(spec.backend_offsets)
    ]
    return spec.joined(backends)


def _of_rows(
    rows: Rows, inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """The metadata of `spec`, of which all backends have these rows."""
    owners = row_owners(rows, inputs.seq_lens, inputs.extend_seq_lens)
    table_owners = row_owners(rows.tables, inputs.seq_lens, inputs.extend_seq_lens)
    pool = jnp.asarray(inputs.req_to_token)
    pool_rows = jnp.clip(inputs.req_pool_indices, 0, len(pool) - 1)
    source_rows = pool_rows[table_owners.request] if rows.requests else table_owners.request
    written = None
    if inputs.written_lens is not None and rows.requests:
        written = jnp.maximum(inputs.written_lens, 0)[table_owners.request]
    kv_lens = cache_seqlens(rows, inputs.seq_lens)
    pooled, unpooled = owners.kv_len // spec.index_kpool, owners.kv_len % spec.index_kpool
    values = {
        "cache_seqlens": kv_lens,
        "seqlens_expanded": owners.kv_len,
        "nsa_cache_seqlens": jnp.minimum(pooled * spec.index_kpool, spec.nsa_index_topk) + unpooled,
        "pooled_cache_seqlens": pooled,
    }
    if spec.prefill:
        assert owners.total is not None
        is_row = jnp.arange(rows.count) < owners.total
        first_key = jnp.where(is_row, prefix_sum(kv_lens)[owners.request], 0)
        values |= {
            "token_to_request": jnp.where(is_row, owners.request, 0),
            "indexer_ks": first_key,
            "indexer_ke": first_key + owners.kv_len,
            "topk_indices_offset": first_key,
        }
    values |= _schedules(values, inputs, spec)

    def value(field: Field) -> jax.Array | _Table | _Keys:
        if field.sum_of is not None:
            return prefix_sum(values[field.sum_of])
        if field.extent is Extent.TABLE:
            stride, page_size = spec.tokens_per_column(field), spec.slots_per_page(field)
            return _Table.of(
                field, spec, table_owners, pool, source_rows, stride, page_size, written
            )
        if field.extent is Extent.KEYS:
            return _Keys.of(spec, kv_lens, pool, pool_rows)
        return values[field.name]

    return _stored({field.name: value(field) for field in spec.fields()}, out, spec)


def _schedules(lengths: dict[str, jax.Array], inputs: Inputs, spec: Spec) -> dict[str, jax.Array]:
    """The schedules that are wanted."""
    wanted, values = spec.schedules, {}
    if wanted.paged_mqa is not None:
        shape = spec.paged_mqa_items
        items = lengths["seqlens_expanded" if shape[1] == 1 else "cache_seqlens"]
        values["paged_mqa_ctx_lens"] = jnp.broadcast_to(items[:, None], shape)
        if spec.pooled:
            items = jnp.maximum(items // spec.index_kpool, 1)
        values["paged_mqa_schedule"] = paged_mqa_schedule(items, shape[1], wanted.paged_mqa)
    if wanted.topk_plan is not None:
        values["topk_plan"] = topk_plan(lengths["seqlens_expanded"], wanted.topk_plan)
    if wanted.flash_mla is not None:
        arrays = _flash_mla_schedule(lengths, inputs, wanted.flash_mla)
        values["flash_mla_schedule"], values["flash_mla_num_splits"] = arrays
    return values


def _flash_mla_schedule(
    lengths: dict[str, jax.Array], inputs: Inputs, schedule: FlashMlaSchedule
) -> tuple[jax.Array, jax.Array]:
    if inputs.flash_mla is not None:
        rows, num_splits = jnp.split(jnp.asarray(inputs.flash_mla), [8 * schedule.num_sm_parts])
        return rows.reshape(-1, 8), num_splits
    items = lengths[schedule.lengths]
    if schedule.lengths == "nsa_cache_seqlens":
        items = jnp.maximum(items, 1)
    return flash_mla_schedule(items, schedule)


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies `src` to `num_backends` destinations; its live columns only with `live`."""
    if out is None:
        return tuple(jax.tree.map(jnp.copy, src) for _ in range(num_backends))
    if live is None:
        return tuple(jax.tree.map(_overwrite, destination, src) for destination in out)
    rows = jnp.arange(live.rows.tables.count, dtype=jnp.int32)
    owners = RowOwners(rows, jnp.asarray(live.table_kv_lens(src)), None)

    def value(name: str, array: jax.Array) -> jax.Array | _Table | _Keys:
        if FIELDS[name].extent is Extent.TABLE:
            return _Table.of(FIELDS[name], live, owners, array, rows, 1, 1)
        return array

    values = {name: value(name, jnp.asarray(array)) for name, array in src.arrays().items()}
    return _stored(values, out, dataclasses.replace(live, num_backends=num_backends))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["source", "source_rows", "owners", "written"],
    meta_fields=["columns", "stride", "page_size", "tokens_per_column", "max_len", "tile"],
)
@dataclasses.dataclass(frozen=True)
class _Table:
    """A page table: `source[source_rows, ::stride] // page_size`, `columns` wide.

    Column c is live where token c * tokens_per_column is, one of the first max_len of a row. The
    columns of the first `written` tokens of a row, if that is not None, are left alone. Columns are
    moved by tiles of `tile`.
    """

    source: jax.Array
    source_rows: jax.Array
    owners: RowOwners
    written: jax.Array | None
    columns: int
    stride: int
    page_size: int
    tokens_per_column: int
    max_len: int
    tile: int

    @classmethod
    def of(
        cls,
        field: Field,
        spec: Spec,
        owners: RowOwners,
        source: jax.Array,
        source_rows: jax.Array,
        stride: int,
        page_size: int,
        written: jax.Array | None = None,
    ) -> "_Table":
        """The table of a field."""
        tokens = spec.tokens_per_column(field)
        columns = spec.columns(field)
        tile = min(max(min(_TILE_TOKENS, spec.max_new_tokens) // tokens, 1), columns)
        sizes = (columns, stride, page_size, tokens, spec.max_len, tile)
        return cls(source, source_rows, owners, written, *sizes)

    def live_tokens(self) -> jax.Array:
        """int32 [rows], the tokens of each row that columns stand for."""
        return jnp.minimum(self.owners.kv_len, self.max_len)

    def live_columns(self) -> jax.Array:
        """int32 [rows], the live columns of each row."""
        return self._columns_of(self.live_tokens())

    def first_columns(self) -> jax.Array:
        """int32 [rows], the first live column of each row that is not written, or its live ones."""
        if self.written is None:
            return jnp.zeros_like(self.source_rows)
        return self._columns_of(jnp.minimum(self.written, self.live_tokens()))

    def _columns_of(self, tokens: jax.Array) -> jax.Array:
        """The columns whose first token is one of so many."""
        # Rounded up without leaving int32, whatever a page holds.
        return tokens // self.tokens_per_column + (tokens % self.tokens_per_column > 0)

    def gather(self) -> jax.Array:
        """All columns of all rows, int32 [rows, columns]."""
        last = (self.columns - 1) * self.stride + 1
        source = lax.slice_in_dim(self.source, 0, last, self.stride, axis=1)
        return source.at[self.source_rows].get(mode="promise_in_bounds") // self.page_size

    def gather_tile(self, row: jax.Array, start: jax.Array, size: int) -> jax.Array:
        """`size` columns of a row from column `start` on, int32 [size]."""
        last = (size - 1) * self.stride + 1
        begin = (self.source_rows[row], start * self.stride)
        columns = lax.dynamic_slice(self.source, begin, (1, last))
        return columns[0, :: self.stride] // self.page_size


class _Keys(NamedTuple):
    """The keys of all requests: int32 [max_total_keys] slots, and which are no padding keys."""

    slots: jax.Array
    is_key: jax.Array

    @classmethod
    def of(cls, spec: Spec, kv_lens: jax.Array, pool: jax.Array, pool_rows: jax.Array) -> "_Keys":
        """The keys of requests of the given KV lengths, whose slots are in these rows."""
        capacity = spec.max_total_keys
        assert capacity is not None
        if not spec.rows.requests:
            return cls(jnp.zeros(capacity, jnp.int32), jnp.zeros(capacity, bool))
        request, column, total = Owners.of(kv_lens, capacity)
        is_key = jnp.arange(capacity) < total
        slots = pool[pool_rows[request], jnp.minimum(column, spec.max_len - 1)]
        return cls(jnp.where(is_key & (column < spec.max_len), slots, 0), is_key)


def _stored(
    values: dict[str, jax.Array | _Table | _Keys], out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """Every array and table of the metadata, written to every destination."""
    stored = {
        name: _write(name, value, None if out is None else [getattr(d, name) for d in out], spec)
        for name, value in values.items()
    }
    return tuple(
        spec.metadata({name: arrays[k] for name, arrays in stored.items()})
        for k in range(spec.destinations)
    )


def _write(
    name: str,
    value: jax.Array | _Table | _Keys,
    destinations: list[jax.Array] | None,
    spec: Spec,
) -> list[jax.Array]:
    if isinstance(value, _Table):
        if destinations is not None and spec.tail == "keep":
            return list(_keep(value, tuple(destinations)))
        value = _whole(value, spec.tail)
    if isinstance(value, _Keys):
        if destinations is not None and spec.tail == "keep":
            return [jnp.where(value.is_key, value.slots, d) for d in destinations]
        value = value.slots
    if destinations is None:
        return [jnp.broadcast_to(value, (*spec.lead, *value.shape))] * spec.destinations
    if FIELDS[name].extent is Extent.PLANNED_ROWS:
        is_planned = jnp.arange(len(value))[:, None] <= value[0, 1]
        return [_overwrite(d, jnp.where(is_planned, value, d)) for d in destinations]
    return [_overwrite(d, value) for d in destinations]


def _overwrite(destination: jax.Array, value: jax.Array) -> jax.Array:
    # Depends on what was there, so that a donated array stays an argument and is reused.
    value = jnp.broadcast_to(value, destination.shape)
    return lax.dynamic_update_slice(destination, value, (0,) * destination.ndim)


def _whole(table: _Table, tail: str) -> jax.Array:
    """A table in full: 0 past the live columns for "zero", and in rows past the total."""
    if tail == "zero":
        limit = table.live_columns()[:, None]
    elif table.owners.total is not None:
        row = jnp.arange(len(table.source_rows))[:, None]
        limit = jnp.where(row < table.owners.total, table.columns, 0)
    else:
        return table.gather()
    return jnp.where(jnp.arange(table.columns) < limit, table.gather(), 0)


@jax.custom_batching.custom_vmap
def _keep(table: _Table, destinations: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The live columns of a table over what each destination held."""
    by_launch = _keep_by_select if table.written is None else _keep_by_tile
    return lax.platform_dependent(table, destinations, cpu=_keep_by_row, default=by_launch)


@_keep.def_vmap
def _keep_vmap(axis_size, batched, table, destinations):
    # A batch of the loops below would step all of them together and copy the tables at each step.
    axes = jax.tree.map(lambda b: 0 if b else None, batched)
    kept = jax.vmap(_keep_by_select, axes, axis_size=axis_size)(table, destinations)
    return kept, jax.tree.map(lambda _: True, kept)


def _keep_by_select(table: _Table, destinations: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """One pass over the whole tables: where launches cost more than columns."""
    column = jnp.arange(table.columns)
    is_new = column < table.live_columns()[:, None]
    if table.written is not None:
        is_new &= column >= table.first_columns()[:, None]
    value = table.gather()
    return tuple(jnp.where(is_new, value, d) for d in destinations)


def _keep_by_tile(table: _Table, destinations: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """A tile of all rows at once, until no row has another."""
    first, live = table.first_columns(), table.live_columns()
    rows = jnp.arange(len(first))[:, None]

    def tile_step(k: jax.Array, destinations: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns = first[:, None] + k * table.tile + jnp.arange(table.tile)
        read = jnp.minimum(columns, table.columns - 1) * table.stride
        values = table.source[table.source_rows[:, None], read] // table.page_size
        columns = jnp.where(columns < live[:, None], columns, table.columns)  # past it: dropped
        return tuple(d.at[..., rows, columns].set(values, mode="drop") for d in destinations)

    most = jnp.max(live - first, initial=0)
    tiles = most // table.tile + (most % table.tile > 0)
    return lax.fori_loop(jnp.int32(0), tiles, tile_step, destinations)


def _keep_by_row(table: _Table, destinations: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Row by row, as many tiles as are live and not written: touches nothing else."""
    tile, first, live = table.tile, table.first_columns(), table.live_columns()
    if not len(live):
        return destinations

    def row_step(row: jax.Array, destinations: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        def update(destination: jax.Array, start: jax.Array, columns: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(destination, columns, _index(destination, row, start))

        def tile_step(k: jax.Array, destinations: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            start = first[row] + k * tile
            columns = table.gather_tile(row, start, tile)
            return tuple(
                update(d, start, jnp.broadcast_to(columns, (*d.shape[:-2], 1, tile)))
                for d in destinations
            )

        whole_tiles = (live[row] - first[row]) // tile
        destinations = lax.fori_loop(jnp.int32(0), whole_tiles, tile_step, destinations)
        start = jnp.minimum(first[row] + whole_tiles * tile, table.columns - tile)
        columns = table.gather_tile(row, start, tile)
        column = start + jnp.arange(tile)
        is_new = (column >= first[row]) & (column < live[row])

        def masked_update(destination: jax.Array) -> jax.Array:
            shape = (*destination.shape[:-2], 1, tile)
            held = lax.dynamic_slice(destination, _index(destination, row, start), shape)
            return update(destination, start, jnp.where(is_new, columns, held))

        return tuple(masked_update(d) for d in destinations)

    rows = jnp.int32(len(live)) if table.owners.total is None else table.owners.total
    return lax.fori_loop(jnp.int32(0), rows, row_step, destinations)


def _index(table: jax.Array, row: jax.Array, column: jax.Array) -> list[jax.Array]:
    """Where a row's column is, in the first of the copies that a table leads with."""
    return [*[jnp.int32(0)] * (table.ndim - 2), row, column]
