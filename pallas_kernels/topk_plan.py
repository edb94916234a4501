"""The plan of SGLang's fused top-k: which rows are so long that clusters share them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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

    # What a row has to be longer than to count for a pair, and to be planned with it.
    planned_from = [max(threshold, plan.floor) for threshold, _ in plan.pairs]
    limits = sorted({*(threshold for threshold, _ in plan.pairs), *planned_from})

    def count(row: jax.Array, counts: list[jax.Array]) -> list[jax.Array]:
        length = length_of(row)
        return [
            counted + jnp.where(length > limit, 1, 0)
            for limit, counted in zip(limits, counts, strict=True)
        ]

    counts = lanes.for_neighbours(rows, count, [zero] * len(limits))
    of_thread = dict(zip(limits, counts, strict=True))
    longer = lanes.sums(block.scratch, *(of_thread[threshold] for threshold, _ in plan.pairs))
    threshold, planned = jnp.int32(planned_from[-1]), of_thread[planned_from[-1]]
    fits = jnp.bool_(True)
    for k in reversed(range(len(plan.pairs))):
        fits = fits & (longer[k] <= plan.pairs[k][1])
        threshold = jnp.where(fits, planned_from[k], threshold)
        planned = lanes.select(fits, of_thread[planned_from[k]], planned)
    ((before, planned),) = lanes.exclusive_sums(block.scratch, planned)

    def write(row: jax.Array, place: jax.Array) -> jax.Array:
        length = length_of(row)
        is_planned = length > threshold
        place = place + jnp.where(is_planned, 1, 0)
        block.store("topk_plan", jnp.where(is_planned, place, -1), row, length)
        return place

    @pl.when(planned > 0)
    def _():
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
