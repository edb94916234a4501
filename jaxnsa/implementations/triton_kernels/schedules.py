"""The programs of a launch that write what DeepGEMM, the fused top-k and FlashMLA read."""

import dataclasses
from typing import Any, NamedTuple

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import of_backends
from jaxnsa.implementations.triton_kernels.flash_mla import (
    FlashMlaConstants,
    copy_flash_mla,
    write_flash_mla,
)
from jaxnsa.implementations.triton_kernels.paged_mqa import (
    PagedMqaConstants,
    write_context_lengths,
    write_paged_mqa,
)
from jaxnsa.implementations.triton_kernels.topk_plan import TopkPlanConstants, write_topk_plan
from jaxnsa.spec import Spec


class ScheduleArrays(NamedTuple):
    """The arrays that they write."""

    paged_mqa_ctx_lens: Any
    paged_mqa_schedule: Any
    topk_plan: Any
    flash_mla_schedule: Any
    flash_mla_num_splits: Any


@dataclasses.dataclass(frozen=True)
class ScheduleConstants:
    """What the kernel is compiled for; None where a schedule is not wanted.

    Attributes:
      flash_mla: FlashMLA's.
      paged_mqa: DeepGEMM's.
      topk_plan: of the fused top-k.
    """

    flash_mla: FlashMlaConstants | None
    paged_mqa: PagedMqaConstants | None
    topk_plan: TopkPlanConstants | None

    @classmethod
    def of(cls, spec: Spec, *, fresh: bool) -> "ScheduleConstants":
        """Those of a computation, whose results are fresh or not."""
        wanted = spec.schedules
        return cls(
            FlashMlaConstants.of(spec, wanted.flash_mla) if wanted.flash_mla else None,
            PagedMqaConstants.of(spec, wanted.paged_mqa) if wanted.paged_mqa else None,
            TopkPlanConstants.of(spec, wanted.topk_plan, fresh) if wanted.topk_plan else None,
        )

    @property
    def programs(self) -> int:
        """Programs of each offset of backends."""
        wanted = (self.flash_mla, self.paged_mqa, self.paged_mqa, self.topk_plan)
        return sum(constants is not None for constants in wanted)


@triton.jit
def write_schedules(
    arrays,
    program,
    lengths,
    constants,
    sizes,
    OFFSETS: tl.constexpr,
    K: tl.constexpr,
    CASE: tl.constexpr,
):
    """What one of the programs of an offset's backends writes; it waits for no other.

    Args:
      arrays: ScheduleArrays.
      program: which of them.
      lengths: of all requests.
      constants: FlashMLA's arrays one behind the other, if its schedule is constant.
      sizes: RowSizes.
      OFFSETS: OffsetConstants of all offsets.
      K: which of them.
      CASE: ScheduleConstants.
    """
    ROWS: tl.constexpr = OFFSETS[K].rows
    BACKENDS: tl.constexpr = OFFSETS[K].backends
    COUNT: tl.constexpr = OFFSETS[K].count
    if CASE.flash_mla is not None:
        F: tl.constexpr = CASE.flash_mla
        if program == 0:
            items = sizes.rows if F.of_rows else sizes.requests
            parts = of_backends((arrays.flash_mla_schedule,), F.parts * 8, BACKENDS, COUNT)
            splits = of_backends((arrays.flash_mla_num_splits,), items + 1, BACKENDS, COUNT)
            if F.is_constant:
                copy_flash_mla(parts[0], splits[0], constants, items, F)
            else:
                write_flash_mla(parts[0], splits[0], lengths, items, sizes, ROWS, F)
        program -= 1
    if CASE.paged_mqa is not None:
        M: tl.constexpr = CASE.paged_mqa
        items = sizes.rows if M.of_rows else sizes.requests
        if program == 0:
            size = M.num_sms * 2 + 2
            schedule = of_backends((arrays.paged_mqa_schedule,), size, BACKENDS, COUNT)
            write_paged_mqa(schedule[0], lengths, items, sizes, ROWS, M)
        if program == 1:
            elements = items * M.next_n
            ctx_lens = of_backends((arrays.paged_mqa_ctx_lens,), elements, BACKENDS, COUNT)
            write_context_lengths(ctx_lens[0], lengths, elements, sizes, ROWS, M)
        program -= 2
    if CASE.topk_plan is not None:
        P: tl.constexpr = CASE.topk_plan
        if program == 0:
            plan = of_backends((arrays.topk_plan,), (sizes.rows + 1) * 2, BACKENDS, COUNT)
            write_topk_plan(plan[0], lengths, sizes, ROWS, P)
