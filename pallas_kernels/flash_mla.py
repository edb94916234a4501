"""FlashMLA's schedule: which part of the GPU attends to which blocks of keys.

An item costs its blocks and an overhead, and a part has room for `step` blocks and one overhead. In
units of cost, the part after one that begins at p begins at p + step; or, where an item ends in the
overhead behind that, with the next item. Then all that follow begin as much later. So every part
starts out where it begins if no item ends like that, and all are corrected for each one that does,
from the first on: the others are found together. As an item costs more than an overhead, a part
then moves into the next item at most.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnsa.spec import Inputs, Spec
from pallas_kernels.cumulative import Cumulative, Vectors, Wide
from pallas_kernels.destinations import Destinations
from pallas_kernels.kv_lens import KvLens
from pallas_kernels.lanes import LANES, Lanes
from pallas_kernels.rows import IndexTopk

_KEYS_PER_BLOCK = 64
_NONE = 2**31 - 1
_SHIFT = 2**17  # more than an overhead


def words(spec: Spec) -> int:
    """How many int32 of shared memory `write_schedule` takes."""
    return Cumulative.words(spec.flash_mla_items) + 3 * LANES * _vectors(spec)


def write_schedule(
    lanes: Lanes, spec: Spec, kv_lens: KvLens, shared: Any, start: int, destinations: Destinations
) -> None:
    """`flash_mla_schedule` and `flash_mla_num_splits`; shared memory from `start` on is free."""
    schedule, items = spec.schedules.flash_mla, spec.flash_mla_items
    assert schedule is not None
    topk = IndexTopk.of(spec)
    parts, overhead = schedule.num_sm_parts, schedule.fixed_overhead_blocks
    scratch = shared.at[pl.ds(0, LANES)]

    def lengths_of(indices: Vectors) -> Vectors:
        if schedule.lengths == "cache_seqlens":
            return kv_lens.of_requests(indices)
        lengths = [topk.selected(n) for n in kv_lens.of_rows(indices)]
        return [jnp.maximum(n, 1) for n in lengths]

    def blocks_of(indices: Vectors) -> Vectors:
        """Blocks of keys; past the last item those of the last."""
        lengths = lengths_of([jnp.minimum(index, items - 1) for index in indices])
        return [_blocks(n) for n in lengths]

    def costs_of(indices: Vectors) -> Vectors:
        return [blocks + overhead for blocks in blocks_of(indices)]

    sums = Cumulative.of(lanes, items, costs_of, shared, start)
    step, rest = sums.total.divided(parts)
    step = step + Wide(jnp.int32(0), jnp.where(rest > 0, 1, 0))
    part = [k * LANES + lanes.iota(LANES) for k in range(_vectors(spec))]
    begins = sums.locate([step.times(jnp.minimum(p, parts)) for p in part])

    def next_end(state: tuple) -> jax.Array:
        """The first part that an item's end moves and by how much, in one number."""
        _, blocks, costs = state
        candidates = []
        for p, block, cost in zip(part, blocks, costs, strict=True):
            moves = (p < parts) & (block > 0) & (cost - block <= overhead)
            candidates.append(jnp.where(moves, p * _SHIFT + (cost - block), _NONE))
        return lanes.minimum(scratch, *candidates)

    def correct(carry: tuple) -> tuple:
        end, (found, blocks, costs) = carry
        first = lax.div(end, jnp.int32(_SHIFT))
        by = end - first * _SHIFT
        blocks = [
            jnp.where((p >= first) & (item < items), block + by, block)
            for p, item, block in zip(part, found, blocks, strict=True)
        ]
        left = [block >= cost for block, cost in zip(blocks, costs, strict=True)]
        blocks = [
            jnp.where(is_left, block - cost, block)
            for is_left, block, cost in zip(left, blocks, costs, strict=True)
        ]
        found = [
            jnp.where(is_left, item + 1, item) for is_left, item in zip(left, found, strict=True)
        ]
        # Past the last item there is nothing to begin with.
        blocks = [
            jnp.where(item < items, block, 0) for item, block in zip(found, blocks, strict=True)
        ]
        state = found, blocks, costs_of(found)
        return next_end(state), state

    found = [item for item, _ in begins]
    state = found, [block for _, block in begins], costs_of(found)
    _, (found, blocks, _) = lax.while_loop(
        lambda carry: carry[0] != _NONE, correct, (next_end(state), state)
    )

    # Where parts begin, and how many before one begin inside an item.
    vectors = _vectors(spec)
    first_item = start + Cumulative.words(items)
    first_block, first_count = (first_item + k * LANES * vectors for k in (1, 2))
    is_inside = [
        jnp.where((p < parts) & (block > 0), 1, 0) for p, block in zip(part, blocks, strict=True)
    ]
    ((counts, inside),) = lanes.cumulative_sums(scratch, is_inside)
    before = [count - i for count, i in zip(counts, is_inside, strict=True)]
    for k in range(vectors):
        for begin, vector in ((first_item, found), (first_block, blocks), (first_count, before)):
            shared[pl.ds(begin + k * LANES, LANES)] = vector[k]
    plgpu.commit_smem()

    def splits_before(indices: Vectors) -> Vectors:
        """Parts that begin inside the items before some."""
        place = [lanes.zeros(LANES) for _ in indices]
        step = 1 << (parts.bit_length() - 1)
        while step:
            probes = [p + (step - 1) for p in place]
            reached = [jnp.where(p < parts, p + first_item, -1) for p in probes]
            place = [
                jnp.where((probe < parts) & (item < index), p + step, p)
                for probe, item, index, p in zip(
                    probes, lanes.gather(shared, *reached), indices, place, strict=True
                )
            ]
            step //= 2
        loaded = lanes.gather(shared, *[jnp.where(p < parts, p + first_count, -1) for p in place])
        return [jnp.where(p < parts, n, inside) for p, n in zip(place, loaded, strict=True)]

    later = [jnp.where(p + 1 < parts, p + 1, -1) for p in part]
    next_items = lanes.gather(shared, *[jnp.where(p < 0, -1, p + first_item) for p in later])
    next_blocks = lanes.gather(shared, *[jnp.where(p < 0, -1, p + first_block) for p in later])
    next_items = [jnp.where(p < 0, items, i) for p, i in zip(later, next_items, strict=True)]
    end_items = [
        jnp.where(block > 0, item, item - 1)
        for item, block in zip(next_items, next_blocks, strict=True)
    ]
    end_lengths = lengths_of(end_items)
    splits = splits_before(found)
    for k, p in enumerate(part):
        whole = jnp.where(end_lengths[k] > 0, _blocks(end_lengths[k]), 0)
        end_block = jnp.where(next_blocks[k] > 0, next_blocks[k], whole)
        first_is_split = blocks[k] > 0
        last_is_split = (end_block != whole) & (end_lengths[k] > 0)
        both = (found[k] == end_items[k]) & (first_is_split | last_is_split)
        split = jnp.where(first_is_split, counts[k] - splits[k], 0)
        zero = lanes.zeros(LANES)
        if schedule.layout == "legacy":
            columns = [found[k], blocks[k], end_items[k], end_block, split, zero, zero, zero]
        else:
            flags = [
                jnp.where(first_is_split | both, 1, 0),
                jnp.where(last_is_split | both, 1, 0),
            ]
            columns = [found[k], end_items[k], blocks[k], end_block, split, *flags, zero]
        row = jnp.where(p < parts, p, -1)
        for ref, lead in destinations.of("flash_mla_schedule", kv_lens.rows.offset):
            lanes.store_rows(ref, lead, row, *columns)

    def write_num_splits(indices: Vectors) -> None:
        for index, more in zip(indices, splits_before(indices), strict=True):
            place = jnp.where(index <= items, index, -1)
            for ref, lead in destinations.of("flash_mla_num_splits", kv_lens.rows.offset):
                lanes.store_rows(ref, lead, place, index + more)

    lanes.for_indices(items + 1, write_num_splits)


def copy_schedule(
    lanes: Lanes, spec: Spec, inputs: Inputs, shared: Any, destinations: Destinations
) -> None:
    """A constant `flash_mla_schedule` and `flash_mla_num_splits`, to all backends."""
    del shared
    schedule, splits = spec.schedules.flash_mla, spec.flash_mla_items + 1
    assert schedule is not None
    parts = schedule.num_sm_parts

    def copy_rows(name: str, first: int, rows: int, columns: int) -> None:
        def copy(indices: Vectors) -> None:
            for index in indices:
                row = jnp.where(index < rows, index, -1)
                places = [jnp.where(row < 0, -1, first + row * columns + k) for k in range(columns)]
                values = lanes.gather(inputs.flash_mla, *places)
                for offset in set(spec.offsets):
                    for ref, lead in destinations.of(name, offset):
                        lanes.store_rows(ref, lead, row, *values)

        lanes.for_indices(rows, copy)

    copy_rows("flash_mla_schedule", 0, parts, 8)
    copy_rows("flash_mla_num_splits", 8 * parts, splits, 1)


def _blocks(length: jax.Array) -> jax.Array:
    """Blocks of keys of a length; an empty item counts as one."""
    return (jnp.maximum(length - 1, 0) >> 6) + 1


def _vectors(spec: Spec) -> int:
    schedule = spec.schedules.flash_mla
    assert schedule is not None
    return -(-schedule.num_sm_parts // LANES)
