"""A block that writes a schedule: what it reads, what it computes with, and where results go."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxnsa.spec import Inputs, Spec
from pallas_kernels.destinations import Destinations
from pallas_kernels.item_lengths import ItemLengths
from pallas_kernels.lanes import LANES, Lanes
from pallas_kernels.rows import Lengths, Share
from pallas_kernels.shared_sums import SharedSums
from pallas_kernels.wide import Wide


@dataclasses.dataclass(frozen=True)
class ScheduleBlock:
    """One of the blocks that write a schedule to the backends of an offset.

    Attributes:
      lanes: vector operations.
      spec: the computation.
      inputs: refs of what it reads.
      shared: int32 in shared memory.
      destinations: what the kernel writes.
      offset: which of the computation's offsets, in ascending order; a scalar.
      share: which rows of the schedule are its own.
    """

    lanes: Lanes
    spec: Spec
    inputs: Inputs
    shared: Any
    destinations: Destinations
    offset: jax.Array
    share: Share

    @classmethod
    def of(
        cls,
        lanes: Lanes,
        spec: Spec,
        inputs: Inputs,
        shared: Any,
        destinations: Destinations,
        block: Share,
    ) -> "ScheduleBlock":
        """One of the blocks of all offsets."""
        shares = block.blocks // len(_offsets(spec))
        offset = lax.div(block.block, jnp.int32(shares))
        share = Share(block.block - offset * shares, shares)
        return cls(lanes, spec, inputs, shared, destinations, offset, share)

    @staticmethod
    def blocks(spec: Spec, shares: int) -> int:
        """How many there are where so many share the rows for each offset."""
        return shares * len(_offsets(spec))

    @staticmethod
    def words(spec: Spec) -> int:
        """How many int32 of shared memory it takes before `start`."""
        return LANES + ItemLengths.words(spec.rows)

    @property
    def start(self) -> int:
        """Where shared memory is free."""
        return self.words(self.spec)

    @property
    def scratch(self) -> Any:
        """What reductions and scans take."""
        return self.shared.at[pl.ds(0, LANES)]

    def lengths(self, are_rows: bool) -> ItemLengths:
        """KV lengths, of rows or of requests."""
        of_requests = Lengths(self.inputs.seq_lens, self.inputs.extend_seq_lens)
        rows = [self.spec.rows_of(offset) for offset in _offsets(self.spec)]
        return ItemLengths(self.lanes, of_requests, rows, self.offset, are_rows, self.shared, LANES)

    def sums(self, count: int, value: Callable[[jax.Array], Wide]) -> SharedSums:
        """Prefix sums, in the first of what is free of shared memory."""
        return SharedSums(self.lanes, count, value, self.shared, self.start)

    def store(self, name: str, row: jax.Array, *columns: jax.Array) -> None:
        """Stores rows of an array of its backends; see `Lanes.store_rows`."""
        offsets = _offsets(self.spec)
        for k, offset in enumerate(offsets):

            def of_offset(offset: int = offset) -> None:
                for ref, lead in self.destinations.of(name, offset):
                    self.lanes.store_rows(ref, lead, row, *columns)

            if len(offsets) == 1:
                of_offset()
            else:
                pl.when(self.offset == k)(of_offset)


def _offsets(spec: Spec) -> list[int]:
    return sorted(set(spec.offsets))
