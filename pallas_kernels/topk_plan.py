"""The plan of SGLang's fused top-k: which rows are so long that clusters share them."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lanes import LANES
from pallas_kernels.schedule_block import ScheduleBlock


def write_plan(block: ScheduleBlock, *, fresh: bool) -> None:
    """`topk_plan`, by one block; where results are fresh, with zeros behind its end."""
    lanes, plan, rows = block.lanes, block.spec.schedules.topk_plan, block.spec.rows.count
    assert plan is not None
    kv_len = block.lengths(are_rows=True)
    zero = lanes.zeros(LANES)

    def length_of(row: jax.Array) -> jax.Array:
        # Past the last row, longer than no threshold.
        return jnp.where(row < rows, kv_len(jnp.minimum(row, rows - 1)), -1)

    def count(row: jax.Array, counts: list[jax.Array]) -> list[jax.Array]:
        length = length_of(row)
        return [
            counted + jnp.where(length > threshold, 1, 0)
            for (threshold, _), counted in zip(plan.pairs, counts, strict=True)
        ]

    counts = lanes.for_neighbours(rows, count, [zero] * len(plan.pairs))
    longer = lanes.sums(block.scratch, *counts)
    threshold = jnp.int32(plan.pairs[-1][0])
    fits = jnp.bool_(True)
    for (candidate, capacity), rows_longer in reversed(list(zip(plan.pairs, longer, strict=True))):
        fits = fits & (rows_longer <= capacity)
        threshold = jnp.where(fits, candidate, threshold)
    threshold = jnp.maximum(threshold, plan.floor)

    def count_planned(row: jax.Array, planned: jax.Array) -> jax.Array:
        return planned + jnp.where(length_of(row) > threshold, 1, 0)

    planned = lanes.for_neighbours(rows, count_planned, zero)
    ((before, planned),) = lanes.exclusive_sums(block.scratch, planned)

    def write(row: jax.Array, place: jax.Array) -> jax.Array:
        length = length_of(row)
        is_planned = length > threshold
        place = place + jnp.where(is_planned, 1, 0)
        block.store("topk_plan", jnp.where(is_planned, place, -1), row, length)
        return place

    lanes.for_neighbours(rows, write, before)
    head = jnp.where(lanes.iota(LANES) == 0, 0, -1)
    block.store("topk_plan", head, zero + threshold, zero + planned)

    def clear(k: Any, _: Any) -> Any:
        row = k * LANES + lanes.iota(LANES)
        place = jnp.where((row >= planned) & (row < rows), row + 1, -1)
        block.store("topk_plan", place, zero, zero)
        return _

    if fresh:
        lanes.repeat(-(-rows // LANES), clear, None)
