"""FlashMLA's schedule: which part of the GPU attends to which blocks of keys.

FlashMLA hands out blocks part by part. An item costs its blocks and an overhead; a part has room
for `step` blocks and one overhead. In units of cost, with a boundary before each item and one
behind the last, a part that begins at p ends at p + step, or on the last boundary up to one
overhead behind that: it snaps there, and all that follow begin as much later. How much later
than without snaps a part begins never falls from one to the next: it is the greatest of what the
parts before it snap by. That may bring its next boundary within reach, to which it then snaps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnsa.spec import INT32_MAX, Spec
from pallas_kernels.lanes import LANES, Lanes, power_of_2
from pallas_kernels.rows import IndexTopk
from pallas_kernels.schedule_block import ScheduleBlock
from pallas_kernels.shared_sums import SharedSums
from pallas_kernels.wide import Wide


def words(spec: Spec) -> int:
    """How many int32 of shared memory `write_schedule` takes."""
    return SharedSums.words(spec.flash_mla_items) + _PartBegins.words(_parts(spec))


def places(spec: Spec) -> int:
    """Rows of both arrays, those of each in vectors of their own."""
    return LANES * (-(-_parts(spec) // LANES) + spec.flash_mla_items // LANES + 1)


class _PartBegins:
    """Where parts begin, and behind them where the work ends, in shared memory.

    Of each part its item, the block of that, and how many parts before it begin inside an item.
    Behind the last item where no work is left.
    """

    def __init__(self, lanes: Lanes, parts: int, shared: Any, start: int):
        words = self.words(parts)
        self._lanes, self._size, self._parts = lanes, words // 3, parts
        self._memory = shared.at[pl.ds(start, words)]

    @staticmethod
    def vectors(parts: int) -> int:
        """How many of them there are."""
        return parts // LANES + 1

    @staticmethod
    def words(parts: int) -> int:
        """How many int32 of shared memory they take."""
        return 3 * LANES * _PartBegins.vectors(parts)

    def keep(self, part: jax.Array, *begin: jax.Array) -> None:
        """Keeps where parts begin: items, blocks, parts inside."""
        places = (part + k * self._size for k in range(3))
        self._lanes.scatter(self._memory, *zip(places, begin, strict=True))

    def __getitem__(self, part: jax.Array) -> list[jax.Array]:
        """Where parts begin: items, blocks, parts inside."""
        return self._lanes.gather(self._memory, *(part + k * self._size for k in range(3)))

    def inside_before(self, item: jax.Array) -> jax.Array:
        """Parts that begin inside earlier items."""
        bits = self._parts.bit_length()

        def step(k: Any, at: jax.Array) -> jax.Array:
            next = jnp.minimum(at + power_of_2(bits - 1 - k), self._parts)
            (last,) = self._lanes.gather(self._memory, next - 1)
            return jnp.where(last < item, next, at)

        # The first part that begins in the item or behind it.
        at = self._lanes.repeat(bits, step, self._lanes.zeros(LANES))
        return self[at][2]


def write_schedule(block: ScheduleBlock) -> None:
    """A block's share of `flash_mla_schedule` and `flash_mla_num_splits`."""
    lanes, spec = block.lanes, block.spec
    schedule, items, topk = spec.schedules.flash_mla, spec.flash_mla_items, IndexTopk.of(spec)
    assert schedule is not None
    parts, overhead = schedule.num_sm_parts, schedule.fixed_overhead_blocks
    dense = schedule.lengths == "cache_seqlens"
    kv_len = block.lengths(are_rows=not dense)

    def length_of(item: jax.Array) -> jax.Array:
        return kv_len(item) if dense else jnp.maximum(topk.selected(kv_len(item)), 1)

    costs = block.sums(items, lambda item: Wide.of(_blocks(length_of(item)) + overhead))
    first_begin = block.start + SharedSums.words(items)
    begins = _PartBegins(lanes, parts, block.shared, first_begin)
    _find_part_begins(lanes, parts, overhead, items, costs, block.scratch, begins)

    def write(is_part: jax.Array, row: jax.Array) -> None:
        part = jnp.minimum(row, parts - 1)
        begin_item, begin_block, count = begins[part]
        inside = begins.inside_before(lanes.select(is_part, begin_item, row))

        def write_splits() -> None:
            item = jnp.where(row <= items, row, -1)
            block.store("flash_mla_num_splits", item, row + inside)

        def write_part() -> None:
            next_item, next_block, _ = begins[part + 1]
            split = jnp.where(begin_block > 0, count - inside + 1, 0)
            end_item = jnp.where(next_block > 0, next_item, next_item - 1)
            length = length_of(end_item)
            whole = _blocks(length)
            end_block = jnp.where(next_block > 0, next_block, jnp.where(length > 0, whole, 0))
            zero = lanes.zeros(LANES)
            if schedule.layout == "legacy":
                columns = [begin_item, begin_block, end_item, end_block, split, zero, zero, zero]
            else:
                is_split = begin_block > 0, (end_block != whole) & (length > 0)
                both = (begin_item == end_item) & (is_split[0] | is_split[1])
                flags = [jnp.where(flag | both, 1, 0) for flag in is_split]
                columns = [begin_item, end_item, begin_block, end_block, split, *flags, zero]
            block.store("flash_mla_schedule", jnp.where(row < parts, row, -1), *columns)

        lax.cond(is_part, write_part, write_splits)

    _for_rows(block, write)


def copy_schedule(block: ScheduleBlock) -> None:
    """A block's share of a constant `flash_mla_schedule` and `flash_mla_num_splits`."""
    parts, items = _parts(block.spec), block.spec.flash_mla_items

    def copy(name: str, first: int, row: jax.Array, rows: int, columns: int) -> None:
        place = first + columns * jnp.minimum(row, rows - 1)
        values = block.lanes.gather(block.inputs.flash_mla, *(place + k for k in range(columns)))
        block.store(name, jnp.where(row < rows, row, -1), *values)

    def write(is_part: jax.Array, row: jax.Array) -> None:
        lax.cond(
            is_part,
            lambda: copy("flash_mla_schedule", 0, row, parts, 8),
            lambda: copy("flash_mla_num_splits", 8 * parts, row, items + 1, 1),
        )

    _for_rows(block, write)


def _for_rows(block: ScheduleBlock, write: Callable) -> None:
    """Calls `write(is_part, rows)` for a block's share of both arrays' rows, those of parts first.

    The last of each go past the end.
    """
    end = LANES * -(-_parts(block.spec) // LANES)

    def of_tile(first: Any) -> None:
        is_part = first < end
        write(is_part, first - jnp.where(is_part, 0, end) + block.lanes.iota(LANES))

    block.share.for_tiles(places(block.spec), of_tile)


def _find_part_begins(
    lanes: Lanes,
    parts: int,
    overhead: int,
    items: int,
    costs: SharedSums,
    scratch: Any,
    begins: _PartBegins,
) -> None:
    """Finds where parts begin, 128 at a time, and behind them where the work ends."""
    step, rest = costs.total.divided(parts)
    step = step + jnp.where(rest > 0, 1, 0)

    def find(k: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        earlier, inside = carry  # by how much the parts before these begin later
        part = k * LANES + lanes.iota(LANES)
        begin = step.times(jnp.minimum(part, parts)) + earlier  # if none of these 128 snaps
        found = costs.find(begin + overhead)

        # How far the item's boundary is behind `begin`, and the next one; by how much a part begins
        # later than `begin` if it does not snap, and those behind the 128.
        def reach(state: tuple) -> tuple:
            item, at, next, later, _, _ = state
            is_reached = next - later <= overhead
            item = item + jnp.where(is_reached, 1, 0)
            at = jnp.where(is_reached, next, at)
            next = at + costs.value(jnp.minimum(item, items - 1))
            next = jnp.where(item < items, next, INT32_MAX)
            at = jnp.where(item < items, at, 0)
            later, latest = lanes.exclusive_maximum(scratch, jnp.maximum(at, 0))
            return item, at, next, later, latest, lanes.any(next - later <= overhead)

        zero, at = lanes.zeros(LANES), found.sum.minus(begin)
        state = found.place, at, zero + INT32_MAX, zero, jnp.int32(0), jnp.bool_(True)
        item, at, _, later, latest, _ = lax.while_loop(lambda state: state[-1], reach, state)
        block = jnp.where(item < items, jnp.maximum(later - at, 0), 0)
        ((before, count),) = lanes.exclusive_sums(scratch, jnp.where(block > 0, 1, 0))
        begins.keep(part, item, block, inside + before)
        return earlier + latest, inside + count

    lanes.repeat(begins.vectors(parts), find, (jnp.int32(0), jnp.int32(0)))
    plgpu.commit_smem()


def _parts(spec: Spec) -> int:
    assert spec.schedules.flash_mla is not None
    return spec.schedules.flash_mla.num_sm_parts


def _blocks(length: jax.Array) -> jax.Array:
    """Blocks of keys of a length; an empty item counts as one."""
    return (jnp.maximum(length - 1, 0) >> 6) + 1
