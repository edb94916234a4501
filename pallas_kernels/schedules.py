"""The blocks of a launch that write what DeepGEMM, the fused top-k and FlashMLA read."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxnsa.spec import Spec
from pallas_kernels import flash_mla, paged_mqa, topk_plan
from pallas_kernels.lanes import LANES
from pallas_kernels.schedule_block import ScheduleBlock

_MOST_SHARES = 16  # blocks that share the rows of a schedule, each of which computes what all need


class Writer(NamedTuple):
    """What writes a schedule.

    Attributes:
      blocks: how many blocks do, of all offsets of backends together.
      write: what one of them does.
    """

    blocks: int
    write: Callable[[ScheduleBlock], None]


def schedule_writers(spec: Spec, *, fresh: bool) -> tuple[Sequence[Writer], int]:
    """What writes the schedules of a computation, FlashMLA's, the slowest, first.

    Args:
      spec: the computation.
      fresh: whether no results were there before.

    Returns:
      The writers, and how many int32 of shared memory they take.
    """
    wanted = spec.schedules
    writers: list[Writer] = []
    words = [0]

    def add(write: Callable[[ScheduleBlock], None], places: int) -> None:
        shares = min(-(-places // LANES), _MOST_SHARES)
        writers.append(Writer(ScheduleBlock.blocks(spec, shares), write))

    if wanted.flash_mla:
        constant = wanted.flash_mla.is_constant
        write = flash_mla.copy_schedule if constant else flash_mla.write_schedule
        add(write, flash_mla.places(spec))
        words.append(0 if constant else flash_mla.words(spec))
    if wanted.paged_mqa:
        add(paged_mqa.write_schedule, wanted.paged_mqa.num_sms + 1)
        add(paged_mqa.write_context_lengths, spec.rows.count)
        words.append(paged_mqa.words(spec))
    if wanted.topk_plan:
        add(functools.partial(topk_plan.write_plan, fresh=fresh), 1)
    return writers, ScheduleBlock.words(spec) + max(words) if writers else 0
