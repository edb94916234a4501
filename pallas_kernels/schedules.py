"""The blocks of a launch that write what DeepGEMM, the fused top-k and FlashMLA read."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl

from jaxnsa.spec import Inputs, Spec
from pallas_kernels import flash_mla, paged_mqa, topk_plan
from pallas_kernels.destinations import Destinations
from pallas_kernels.lanes import LANES, Lanes
from pallas_kernels.rows import Share
from pallas_kernels.schedule_block import ScheduleBlock

_MOST_SHARES = 16  # blocks that share the rows of a schedule, each of which computes what all need


class _Writer(NamedTuple):
    """What writes a schedule.

    Attributes:
      first: the first block that does.
      blocks: how many blocks do, of all offsets of backends together.
      write: what one of them does.
    """

    first: int
    blocks: int
    write: Callable[[ScheduleBlock], None]


class ScheduleWriters:
    """What writes the schedules of a computation, in the first blocks of a launch.

    Args:
      spec: the computation.
      fresh: whether no results were there before.

    Attributes:
      blocks: how many blocks do.
      words: int32 of shared memory that each takes.
    """

    def __init__(self, spec: Spec, *, fresh: bool):
        wanted = spec.schedules
        self._spec = spec
        self._writers: list[_Writer] = []
        self.blocks = self.words = 0
        # FlashMLA's is the slowest.
        if wanted.flash_mla:
            constant = wanted.flash_mla.is_constant
            write = flash_mla.copy_schedule if constant else flash_mla.write_schedule
            words = 0 if constant else flash_mla.words(spec)
            self._add(write, flash_mla.places(spec), words)
        if wanted.paged_mqa:
            rows = wanted.paged_mqa.num_sms + 1
            self._add(paged_mqa.write_schedule, rows, paged_mqa.words(spec))
            self._add(paged_mqa.write_context_lengths, spec.rows.count)
        if wanted.topk_plan:
            self._add(functools.partial(topk_plan.write_plan, fresh=fresh), 1)

    def _add(self, write: Callable[[ScheduleBlock], None], rows: int, words: int = 0) -> None:
        shares = min(-(-rows // LANES), _MOST_SHARES)
        blocks = ScheduleBlock.blocks(self._spec, shares)
        self._writers.append(_Writer(self.blocks, blocks, write))
        self.blocks += blocks
        self.words = max(self.words, ScheduleBlock.words(self._spec) + words)

    def write(
        self,
        index: jax.Array,
        lanes: Lanes,
        inputs: Inputs,
        shared: Any,
        destinations: Destinations,
    ) -> None:
        """What block `index` of the launch does, if it is one of these."""
        if not self._writers:
            return

        @pl.when(index < self.blocks)
        def _():
            for writer in self._writers:
                share = Share(index - writer.first, writer.blocks)

                @pl.when(share.exists)
                def _(writer=writer, share=share):
                    args = lanes, self._spec, inputs, shared, destinations
                    writer.write(ScheduleBlock.of(*args, share))
