"""The consumers' schedules in `jax.numpy`, for the XLA implementation; vectorised, without a walk.

Sums of units and blocks may leave int32: they are computed in int64, whatever JAX's default is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.schedules import FlashMlaSchedule, PagedMqaSchedule, TopkPlan

_KEYS_PER_SEGMENT = 256
_KEYS_PER_BLOCK = 64


def _in_int64(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes in int64 where it asks for it, and returns int32."""

    @functools.wraps(compute)
    def computed(*arguments: Any) -> Any:
        with jax.enable_x64(True):
            return jax.tree.map(lambda x: x.astype(jnp.int32), compute(*arguments))

    return computed


@_in_int64
def paged_mqa_schedule(lengths: jax.Array, next_n: int, schedule: PagedMqaSchedule) -> jax.Array:
    """int32 [num_sms + 1, 2]: where each multiprocessor begins, (item, segment)."""
    items, num_sms = len(lengths), schedule.num_sms
    a = schedule.units_per_segment(next_n)
    segments = -(-lengths.astype(jnp.int64) // _KEYS_PER_SEGMENT)
    ends = _sums(segments * a)
    q, r = ends[-1] // num_sms, ends[-1] % num_sms
    s = jnp.arange(num_sms + 1)
    late = schedule.layout == "sm90"
    units = s * q + (jnp.maximum(0, s - (num_sms - r)) if late else jnp.minimum(s, r))
    item = jnp.searchsorted(ends[1:], units, side="right", method="scan_unrolled")
    offset = jnp.where(item < items, units - ends[item], 0)
    if schedule.layout == "legacy":
        return jnp.stack([item, offset], axis=-1)
    if schedule.layout == "sm100":
        return jnp.stack([item * a, offset // a], axis=-1)
    if not items:
        return jnp.zeros((num_sms + 1, 2), jnp.int32)
    # Past the end, where the offset is 0, and of no empty item.
    width = jnp.maximum(segments[jnp.minimum(item, items - 1)], 1)
    return jnp.stack([item * a + offset // width, offset % width], axis=-1)


def topk_plan(lengths: jax.Array, plan: TopkPlan) -> jax.Array:
    """int32 [rows + 1, 2]: (threshold, n), then n times (row, length), then 0."""
    threshold: Any = jnp.int32(plan.pairs[-1][0])
    fits = jnp.bool(True)
    for candidate, capacity in reversed(plan.pairs):
        fits &= jnp.sum(lengths > candidate, dtype=jnp.int32) <= capacity
        threshold = jnp.where(fits, candidate, threshold)
    threshold = jnp.maximum(threshold, plan.floor).astype(jnp.int32)
    is_planned = lengths > threshold
    place = jnp.cumsum(is_planned, dtype=jnp.int32)
    rows = jnp.arange(len(lengths), dtype=jnp.int32)
    planned = jnp.stack([rows, lengths], axis=-1)
    whole = jnp.zeros((len(lengths) + 1, 2), jnp.int32)
    whole = whole.at[jnp.where(is_planned, place, len(lengths) + 1)].set(planned, mode="drop")
    return whole.at[0].set(jnp.stack([threshold, jnp.sum(is_planned, dtype=jnp.int32)]))


@_in_int64
def flash_mla_schedule(
    lengths: jax.Array, schedule: FlashMlaSchedule
) -> tuple[jax.Array, jax.Array]:
    """int32 [num_sm_parts, 8], and [items + 1], 0 and the inclusive prefix sum of splits.

    FlashMLA hands out blocks part by part: an item costs its blocks and an overhead, and a part has
    room for `step` blocks and one overhead. In units of cost, item i from `starts[i]` on, the part
    after one that begins at p begins at p + step, or on the last item boundary up to one overhead
    behind it.
    """
    items, parts = len(lengths), schedule.num_sm_parts
    overhead = schedule.fixed_overhead_blocks
    last = jnp.maximum(lengths.astype(jnp.int64) - 1, 0) // _KEYS_PER_BLOCK
    blocks = last + 1
    starts = _sums(blocks + overhead)
    if not items:
        empty = jnp.zeros((parts, 8), jnp.int32)
        column = 2 if schedule.layout == "legacy" else 1  # of the last item
        return empty.at[:, column].set(-1), jnp.zeros(1, jnp.int32)
    step = -(-starts[-1] // parts)

    def walk(begin: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        boundary = starts[_last_up_to(starts, begin + step + overhead)]
        end = jnp.maximum(begin + step, boundary)
        return jnp.where(boundary == starts[-1], boundary, end), begin

    _, begins = lax.scan(walk, starts[0], None, length=parts)
    item = _last_up_to(starts, begins)
    block = begins - starts[item]
    is_inside = block > 0
    part = jnp.arange(parts)
    split = jnp.where(is_inside, part - _last_up_to(begins, starts)[item], 0)
    next_item = jnp.append(item[1:], items)
    next_block = jnp.append(block[1:], 0)
    end_item = jnp.where(next_block > 0, next_item, next_item - 1)
    is_empty, whole = lengths[end_item] == 0, last[end_item] + 1
    end_block = jnp.where(next_block > 0, next_block, jnp.where(is_empty, 0, whole))
    last_is_split = (end_block != whole) & ~is_empty
    both = (item == end_item) & (is_inside | last_is_split)
    splits = (is_inside | both, last_is_split | both)
    zero = jnp.zeros_like(part)
    columns = (
        (item, block, end_item, end_block, split, zero, zero, zero)
        if schedule.layout == "legacy"
        else (item, end_item, block, end_block, split, *splits, zero)
    )
    # One split for each item, and one for each part that begins inside it.
    inside = jnp.zeros(items, jnp.int64).at[item].add(is_inside, mode="drop")
    num_splits = _sums(1 + inside)
    return jnp.stack([c.astype(jnp.int32) for c in columns], axis=-1), num_splits


def _last_up_to(ascending: jax.Array, values: jax.Array) -> jax.Array:
    """The last index whose element is at most a value, for each value."""
    return jnp.searchsorted(ascending, values, side="right", method="scan_unrolled") - 1


def _sums(x: jax.Array) -> jax.Array:
    """0, then the inclusive prefix sum, in int64."""
    return jnp.concatenate([jnp.zeros(1, jnp.int64), jnp.cumsum(x, dtype=jnp.int64)])
