"""Prefix sums that a block keeps in shared memory and looks up."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lanes import LANES, Lanes, power_of_2
from pallas_kernels.wide import Wide

_MOST_SUMS = 1024


class Found(NamedTuple):
    """The last place whose sum is at most a number, and that sum."""

    place: jax.Array
    sum: Wide


class SharedSums:
    """0 and the inclusive prefix sums of `count` values, none of them negative.

    Where there are more than 1,024, those of groups of neighbours; a lookup then adds up values by
    itself. A block does this once, and what it waits for are its instructions: loops are loops.

    Args:
      lanes: vector operations.
      count: number of values, at least 1.
      value: the values at a vector of indices, each below `count`.
      shared: int32 in shared memory, which begins with what scans take.
      start: where in there the sums are kept: `words(count)` elements.
    """

    def __init__(
        self,
        lanes: Lanes,
        count: int,
        value: Callable[[jax.Array], Wide],
        shared: Any,
        start: int,
    ):
        self._lanes, self._count, self._value = lanes, count, value
        self._size = size = _group_size(count)
        self._groups = groups = -(-count // size)
        words = self.words(count)
        self._memory = shared.at[pl.ds(start, words)]

        def add_group(group: jax.Array, total: Wide) -> Wide:
            self._keep(group, total)

            def add(k: Any, total: Wide) -> Wide:
                index = group * size + k
                value = self._value(jnp.minimum(index, count - 1))
                return total + Wide(*(jnp.where(index < count, part, 0) for part in value))

            return lanes.repeat(size, add, total)

        zero = Wide(lanes.zeros(LANES), lanes.zeros(LANES))
        of_thread = lanes.for_neighbours(groups, add_group, zero)
        (high, all_high), (low, all_low) = lanes.exclusive_sums(
            shared.at[pl.ds(0, LANES)], *of_thread
        )
        before = Wide.of(low, high)
        self.total = Wide.of(all_low, all_high)

        def add_before(group: jax.Array, _: Any) -> Any:
            self._keep(group, self._sum(group) + before)
            return _

        lanes.for_neighbours(groups, add_before, None)
        # What lies behind them is the total as well.
        self._keep(words // 2 - LANES + lanes.iota(LANES), zero + self.total)
        plgpu.commit_smem()

    @staticmethod
    def words(count: int) -> int:
        """How many int32 of shared memory it takes."""
        groups = -(-count // _group_size(count))
        return 2 * LANES * (-(-groups // LANES) + 1)

    def value(self, index: jax.Array) -> jax.Array:
        """The values at indices below `count`, as int32."""
        if self._size == 1:
            return self._sum(index + 1).minus(self._sum(index))
        high, low = self._value(index)
        return (high << 16) + low

    def find(self, number: Wide) -> Found:
        """Looks up numbers."""
        bits = self._groups.bit_length()

        def step(k: Any, at: jax.Array) -> jax.Array:
            next = jnp.minimum(at + power_of_2(bits - 1 - k), self._groups)
            return jnp.where(self._sum(next).up_to(number), next, at)

        group = self._lanes.repeat(bits, step, self._lanes.zeros(LANES))
        index = jnp.minimum(group * self._size, self._count)
        if self._size == 1:
            return Found(index, self._sum(index))

        def skip(_: Any, found: Found) -> Found:
            next = found.sum + self._value(jnp.minimum(found.place, self._count - 1))
            is_past = (found.place < self._count) & next.up_to(number)
            parts = zip(next, found.sum, strict=True)
            sum = Wide(*(jnp.where(is_past, later, part) for later, part in parts))
            return Found(found.place + jnp.where(is_past, 1, 0), sum)

        return self._lanes.repeat(self._size, skip, Found(index, self._sum(group)))

    def _sum(self, group: jax.Array) -> Wide:
        low, high = self._lanes.gather(self._memory, group, group + self.words(self._count) // 2)
        return Wide(high, low)

    def _keep(self, group: jax.Array, sum: Wide) -> None:
        high = group + self.words(self._count) // 2
        self._lanes.scatter(self._memory, (group, sum.low), (high, sum.high))


def _group_size(count: int) -> int:
    return -(-count // _MOST_SUMS)
