"""FlashMLA's schedule: which part of the GPU attends to which blocks of keys.

An item costs its blocks and an overhead, and a part has room for `step` blocks and one overhead. In
units of cost, the part after one that begins at p begins at p + step; or, where an item ends in the
overhead behind that, with the next item. Then all that follow begin as much later. So every part
starts out where it begins if no item ends like that, and all are corrected for each one that does,
from the first on: the others are found together. As an item costs more than an overhead, a part
then moves into the next item at most.
"""

import dataclasses

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import store
from jaxnsa.implementations.triton_kernels.places import (
    advanced,
    count_up_to,
    first_places,
    kv_lens_of_items,
)
from jaxnsa.implementations.triton_kernels.rows import selected
from jaxnsa.schedules import FlashMlaLayout, FlashMlaSchedule
from jaxnsa.spec import Spec

_COPIED = tl.constexpr(1024)  # elements of a constant array at a time
_NONE = tl.constexpr(2**31 - 1)
_SHIFT = tl.constexpr(2**17)  # more than an overhead


@dataclasses.dataclass(frozen=True)
class FlashMlaConstants:
    """What the kernel is compiled for.

    Attributes:
      parts, is_constant, overhead, layout: of the schedule.
      of_rows: whether items are rows, otherwise requests.
      pool: tokens that are one key of the indexer.
      at_once: items that are added up as one vector.
      lanes: parts, as a power of two.
    """

    parts: int
    is_constant: bool
    overhead: int
    layout: FlashMlaLayout
    of_rows: bool
    pool: int
    at_once: int
    lanes: int

    @classmethod
    def of(cls, spec: Spec, schedule: FlashMlaSchedule) -> "FlashMlaConstants":
        """Those of a computation."""
        return cls(
            schedule.num_sm_parts,
            schedule.is_constant,
            schedule.fixed_overhead_blocks,
            schedule.layout,
            schedule.lengths != "cache_seqlens",
            spec.index_kpool,
            min(1024, triton.next_power_of_2(spec.flash_mla_items)),
            triton.next_power_of_2(schedule.num_sm_parts),
        )


@triton.jit
def _lengths(lengths, item, sizes, ROWS: tl.constexpr, F: tl.constexpr):
    """Keys of items."""
    result = kv_lens_of_items(lengths, item, sizes, F.of_rows, ROWS)
    if F.of_rows:
        result = tl.maximum(selected(result, sizes.topk, ROWS), 1)
    return result


@triton.jit
def _blocks(length):
    """Blocks of 64 keys; an empty item counts as one."""
    return (tl.maximum(length - 1, 0) >> 6) + 1


@triton.jit
def _costs(lengths, item, sizes, ROWS: tl.constexpr, F: tl.constexpr):
    return _blocks(_lengths(lengths, item, sizes, ROWS, F)) + F.overhead


@triton.jit
def write_flash_mla(parts, num_splits, lengths, items, sizes, ROWS: tl.constexpr, F: tl.constexpr):
    """`flash_mla_schedule` and `flash_mla_num_splits`."""
    AT_ONCE: tl.constexpr = F.at_once
    LANES: tl.constexpr = F.lanes
    sums = tl.zeros([AT_ONCE], tl.int64)
    for first in range(0, items, AT_ONCE):
        item = first + tl.arange(0, AT_ONCE)
        sums += tl.where(item < items, _costs(lengths, item, sizes, ROWS, F), 0)
    step = tl.cdiv(tl.sum(sums), F.parts)
    part = tl.arange(0, LANES)
    unit = part * step
    places = first_places(unit)
    total = tl.zeros([1], tl.int64)
    for first in range(0, items, AT_ONCE):
        item = first + tl.arange(0, AT_ONCE)
        costs = tl.where(item < items, _costs(lengths, item, sizes, ROWS, F), 0).to(tl.int64)
        places = advanced(places, total + tl.cumsum(costs, 0), unit, AT_ONCE)
        total += tl.sum(costs)
    found = tl.minimum(places.item, items)
    block = tl.where(found < items, unit - places.start, 0).to(tl.int32)

    cost = _costs(lengths, tl.minimum(found, items - 1), sizes, ROWS, F)
    end = _next_end(part, block, cost, F)
    while end != _NONE:
        by = end % _SHIFT
        block += tl.where((part >= end // _SHIFT) & (found < items), by, 0)
        is_left = block >= cost
        found += tl.where(is_left, 1, 0)
        block = tl.where(is_left, block - cost, block)
        # Past the last item there is nothing to begin with.
        block = tl.where(found < items, block, 0)
        cost = _costs(lengths, tl.minimum(found, items - 1), sizes, ROWS, F)
        end = _next_end(part, block, cost, F)

    exists = part < F.parts
    found = tl.where(exists, found, items)
    block = tl.where(exists, block, 0)
    is_inside = tl.where(block > 0, 1, 0)
    inside = tl.cumsum(is_inside, 0)
    later = tl.minimum(part + 1, LANES - 1)
    next_item = tl.where(part + 1 < F.parts, tl.gather(found, later, 0), items)
    next_block = tl.where(part + 1 < F.parts, tl.gather(block, later, 0), 0)
    end_item = tl.where(next_block > 0, next_item, next_item - 1)
    end_length = _lengths(lengths, end_item, sizes, ROWS, F)
    whole = tl.where(end_length > 0, _blocks(end_length), 0)
    end_block = tl.where(next_block > 0, next_block, whole)
    first_is_split = block > 0
    last_is_split = (end_block != whole) & (end_length > 0)
    both = (found == end_item) & (first_is_split | last_is_split)
    split = tl.where(first_is_split, inside - _splits_before(found, inside, found, F), 0)
    row = 8 * part
    if F.layout == "legacy":
        store(parts, row + 1, block, exists)
        store(parts, row + 2, end_item, exists)
        store(parts, row + 5, 0, exists)
        store(parts, row + 6, 0, exists)
    else:
        store(parts, row + 1, end_item, exists)
        store(parts, row + 2, block, exists)
        store(parts, row + 5, (first_is_split | both).to(tl.int32), exists)
        store(parts, row + 6, (last_is_split | both).to(tl.int32), exists)
    store(parts, row, found, exists)
    store(parts, row + 3, end_block, exists)
    store(parts, row + 4, split, exists)
    store(parts, row + 7, 0, exists)
    for first in range(0, items + 1, AT_ONCE):
        item = first + tl.arange(0, AT_ONCE)
        splits = item + _splits_before(found, inside, item, F)
        store(num_splits, item, splits, item <= items)


@triton.jit
def copy_flash_mla(parts, num_splits, constants, items, F: tl.constexpr):
    """Constant `flash_mla_schedule` and `flash_mla_num_splits`."""
    SIZE: tl.constexpr = F.parts * 8
    for first in range(0, SIZE, _COPIED):
        place = first + tl.arange(0, _COPIED)
        store(parts, place, tl.load(constants + place, place < SIZE), place < SIZE)
    for first in range(0, items + 1, _COPIED):
        place = first + tl.arange(0, _COPIED)
        splits = tl.load(constants + SIZE + place, place <= items)
        store(num_splits, place, splits, place <= items)


@triton.jit
def _next_end(part, block, cost, F: tl.constexpr):
    """The first part that an item's end moves and by how much, in one number."""
    moves = (part < F.parts) & (block > 0) & (cost - block <= F.overhead)
    return tl.min(tl.where(moves, part * _SHIFT + (cost - block), _NONE))


@triton.jit
def _splits_before(found, inside, item, F: tl.constexpr):
    """Parts that begin inside the items before some."""
    LANES: tl.constexpr = F.lanes
    count = count_up_to(found, item - 1, LANES)
    return tl.where(count > 0, tl.gather(inside, tl.maximum(count - 1, 0), 0), 0)
