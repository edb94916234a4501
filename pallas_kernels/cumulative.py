"""Prefix sums of costs in shared memory, and the search for the item that holds a unit of cost."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lanes import LANES, Lanes

_CAPACITY = 1024  # prefix sums that are kept

Vectors = Sequence[jax.Array]


class Wide(NamedTuple):
    """Integers from 0 to 2^46, scalars or vectors: `high * 2^16 + low`, 0 <= low < 2^16."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, high: jax.Array, low: jax.Array) -> "Wide":
        """`high * 2^16 + low`, where low may be any int32 that is not negative."""
        return cls(high + (low >> 16), low & 0xFFFF)

    def __add__(self, other: Any) -> "Wide":  # type: ignore[override]
        """The sum of two of them."""
        return Wide.of(self.high + other.high, self.low + other.low)

    def times(self, factor: jax.Array | int) -> "Wide":
        """The product with an integer from 0 to 2^14."""
        return Wide.of(self.high * factor, self.low * factor)

    def divided(self, divisor: int) -> tuple["Wide", jax.Array]:
        """Quotient and remainder of the division by an integer from 1 to 2^14."""
        if divisor == 1:
            return self, jnp.zeros_like(self.low)
        high, rest = _divided(self.high, divisor)
        low, rest = _divided((rest << 16) + self.low, divisor)
        return Wide(high, low), rest

    def minus(self, other: "Wide") -> jax.Array:
        """The difference, which fits int32."""
        return ((self.high - other.high) << 16) + (self.low - other.low)

    def up_to(self, other: "Wide") -> jax.Array:
        """Whether this is at most the other."""
        is_equal = (self.high == other.high) & (self.low <= other.low)
        return (self.high < other.high) | is_equal


def _divided(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    quotient = lax.div(x, jnp.full_like(x, divisor))
    return quotient, x - quotient * divisor


@dataclasses.dataclass(frozen=True)
class Cumulative:
    """What items cost, summed up from the first.

    Shared memory keeps the prefix sums of at most 1,024 groups of as many neighbours.

    Attributes:
      lanes: vector operations.
      count: number of items.
      cost: of the items at some vectors of indices, not below 0; not called past the last item.
      shared: int32 in shared memory.
      start: where in there the prefix sums are kept: `words(count)` elements.
      total: the sum of all costs, scalars.
    """

    lanes: Lanes
    count: int
    cost: Callable[[Vectors], Vectors]
    shared: Any
    start: int
    total: Wide

    @staticmethod
    def words(count: int) -> int:
        """How many int32 of shared memory it takes."""
        return 2 * LANES * -(-_groups(count) // LANES)

    @classmethod
    def of(
        cls,
        lanes: Lanes,
        count: int,
        cost: Callable[[Vectors], Vectors],
        shared: Any,
        start: int,
    ) -> "Cumulative":
        """Adds up what `count` items cost, at least one; `shared` begins with what `sums` takes."""
        size = _group_size(count)
        groups = [k * LANES + lanes.iota(LANES) for k in range(-(-_groups(count) // LANES))]

        def add(m: Any, sums: list[Wide]) -> list[Wide]:
            indices = [group * size + m for group in groups]
            costs = cost([jnp.minimum(index, count - 1) for index in indices])
            costs = [
                jnp.where(index < count, c, 0) for index, c in zip(indices, costs, strict=True)
            ]
            return [s + Wide.of(lanes.zeros(LANES), c) for s, c in zip(sums, costs, strict=True)]

        sums = [Wide(lanes.zeros(LANES), lanes.zeros(LANES)) for _ in groups]
        sums = add(0, sums) if size == 1 else lax.fori_loop(0, size, add, sums)
        (low, low_total), (high, high_total) = lanes.cumulative_sums(
            shared.at[pl.ds(0, LANES)], [s.low for s in sums], [s.high for s in sums]
        )
        half = LANES * len(groups)
        for k, (h, lo) in enumerate(zip(high, low, strict=True)):
            ends = Wide.of(h, lo)
            shared[pl.ds(start + k * LANES, LANES)] = ends.low
            shared[pl.ds(start + half + k * LANES, LANES)] = ends.high
        plgpu.commit_smem()
        return cls(lanes, count, cost, shared, start, Wide.of(high_total, low_total))

    def locate(self, units: Sequence[Wide]) -> list[tuple[jax.Array, jax.Array]]:
        """Where units lie: for each vector of them the items, and the units before it in each.

        That is the first item with whose end the sum is above the unit; behind them all, the number
        of items, and 0.
        """
        groups, size = _groups(self.count), _group_size(self.count)
        found = [self.lanes.zeros(LANES) for _ in units]
        step = 1 << (groups.bit_length() - 1)
        while step:
            probes = [place + (step - 1) for place in found]
            ends = self._ends([jnp.where(p < groups, p, -1) for p in probes])
            found = [
                jnp.where((p < groups) & end.up_to(unit), place + step, place)
                for p, end, unit, place in zip(probes, ends, units, found, strict=True)
            ]
            step //= 2
        befores = self._ends([jnp.where(f < groups, f - 1, -1) for f in found])
        rests = [
            jnp.where(f < groups, unit.minus(before), 0)
            for f, unit, before in zip(found, units, befores, strict=True)
        ]
        if size == 1:
            return list(zip(found, rests, strict=True))

        def skip(_: Any, places: list[tuple[jax.Array, jax.Array]]) -> Any:
            costs = self.cost([jnp.minimum(item, self.count - 1) for item, _ in places])
            return [
                (jnp.where(is_past, item + 1, item), jnp.where(is_past, rest - cost, rest))
                for (item, rest), cost in zip(places, costs, strict=True)
                for is_past in [(rest >= cost) & (item < self.count)]
            ]

        items = [jnp.minimum(f * size, self.count) for f in found]
        return lax.fori_loop(0, size - 1, skip, list(zip(items, rests, strict=True)))

    def _ends(self, groups: Vectors) -> list[Wide]:
        """The sums up to the end of groups; 0 where an index is negative."""
        half = self.words(self.count) // 2
        places = [jnp.where(g < 0, g, g + self.start) for g in groups]
        places += [jnp.where(g < 0, g, g + (self.start + half)) for g in groups]
        loaded = self.lanes.gather(self.shared, *places)
        pairs = zip(loaded[: len(groups)], loaded[len(groups) :], strict=True)
        return [Wide(high, low) for low, high in pairs]


def _group_size(count: int) -> int:
    return -(-count // _CAPACITY)


def _groups(count: int) -> int:
    return -(-count // _group_size(count))
