"""The plan of SGLang's fused top-k: which rows are so long that clusters share them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxnsa.spec import Spec
from pallas_kernels.cumulative import Vectors
from pallas_kernels.destinations import Destinations
from pallas_kernels.kv_lens import KvLens
from pallas_kernels.lanes import LANES, Lanes


def write_plan(
    lanes: Lanes,
    spec: Spec,
    kv_lens: KvLens,
    shared: Any,
    start: int,
    destinations: Destinations,
    *,
    fresh: bool,
) -> None:
    """`topk_plan`; where results are fresh, with zeros behind its end."""
    del start
    scratch = shared.at[pl.ds(0, LANES)]
    plan, rows = spec.schedules.topk_plan, spec.rows.count
    assert plan is not None

    def lengths_of(indices: Vectors) -> Vectors:
        lengths = kv_lens.of_rows([jnp.minimum(row, rows - 1) for row in indices])
        # Longer than no threshold.
        return [jnp.where(r < rows, n, -1) for r, n in zip(indices, lengths, strict=True)]

    def count(indices: Vectors, counts: Vectors) -> Vectors:
        lengths = lengths_of(indices)
        return [
            sum((jnp.where(n > threshold, 1, 0) for n in lengths), counted)
            for (threshold, _), counted in zip(plan.pairs, counts, strict=True)
        ]

    counts = lanes.for_indices(rows, count, [lanes.zeros(LANES) for _ in plan.pairs])
    threshold = jnp.int32(plan.pairs[-1][0])
    fits = jnp.bool_(True)
    for (candidate, capacity), longer in reversed(
        list(zip(plan.pairs, lanes.sums(scratch, *counts), strict=True))
    ):
        fits = fits & (longer <= capacity)
        threshold = jnp.where(fits, candidate, threshold)
    threshold = jnp.maximum(threshold, plan.floor)

    def write(indices: Vectors, planned: jax.Array) -> jax.Array:
        lengths = lengths_of(indices)
        is_planned = [jnp.where(n > threshold, 1, 0) for n in lengths]
        ((places, more),) = lanes.cumulative_sums(scratch, is_planned)
        for row, length, wanted, place in zip(indices, lengths, is_planned, places, strict=True):
            place = jnp.where(wanted > 0, planned + place, -1)
            for ref, lead in destinations.of("topk_plan", kv_lens.rows.offset):
                lanes.store_rows(ref, lead, place, row, length)
        return planned + more

    planned = lanes.for_indices(rows, write, jnp.int32(0))

    def clear(indices: Vectors) -> None:
        for row in indices:
            place = jnp.where((row >= planned) & (row < rows), row + 1, -1)
            for ref, lead in destinations.of("topk_plan", kv_lens.rows.offset):
                lanes.store_rows(ref, lead, place, lanes.zeros(LANES), lanes.zeros(LANES))

    if fresh:
        lanes.for_indices(rows, clear)
    for ref, lead in destinations.of("topk_plan", kv_lens.rows.offset):
        ref[(*lead, 0, 0)] = threshold
        ref[(*lead, 0, 1)] = planned
