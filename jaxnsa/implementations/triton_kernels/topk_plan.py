"""The plan of SGLang's fused top-k: which rows are so long that clusters share them."""

import dataclasses

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import store
from jaxnsa.implementations.triton_kernels.places import kv_lens_of_rows
from jaxnsa.schedules import TopkPlan
from jaxnsa.spec import Spec


@dataclasses.dataclass(frozen=True)
class TopkPlanConstants:
    """What the kernel is compiled for.

    Attributes:
      pairs, floor: of the plan.
      count: of pairs.
      at_once: rows that are looked at as one vector.
      fresh: whether what is behind the plan becomes 0.
    """

    pairs: tuple[tuple[int, int], ...]
    count: int
    floor: int
    at_once: int
    fresh: bool

    @classmethod
    def of(cls, spec: Spec, plan: TopkPlan, fresh: bool) -> "TopkPlanConstants":
        """Those of a computation."""
        at_once = min(1024, triton.next_power_of_2(spec.rows.count))
        return cls(plan.pairs, len(plan.pairs), plan.floor, at_once, fresh)


@triton.jit
def write_topk_plan(pointers, lengths, sizes, ROWS: tl.constexpr, P: tl.constexpr):
    """`topk_plan`."""
    AT_ONCE: tl.constexpr = P.at_once
    PAIRS: tl.constexpr = P.pairs
    COUNT: tl.constexpr = P.count
    counts = tl.zeros([32], tl.int32)  # of the rows that are longer than each threshold
    pair = tl.arange(0, 32)
    for first in range(0, sizes.rows, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        kv_len = kv_lens_of_rows(lengths, row, sizes, ROWS)
        for k in tl.static_range(COUNT):
            is_longer = (row < sizes.rows) & (kv_len > PAIRS[k][0])
            counts += tl.where(pair == k, tl.sum(is_longer.to(tl.int32)), 0)
    threshold = PAIRS[COUNT - 1][0]
    fits = True
    for k in tl.static_range(COUNT):
        longer = tl.sum(tl.where(pair == COUNT - 1 - k, counts, 0))
        fits = fits & (longer <= PAIRS[COUNT - 1 - k][1])
        threshold = tl.where(fits, PAIRS[COUNT - 1 - k][0], threshold)
    threshold = tl.maximum(threshold, P.floor)
    planned = 0
    for first in range(0, sizes.rows, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        kv_len = kv_lens_of_rows(lengths, row, sizes, ROWS)
        is_planned = (row < sizes.rows) & (kv_len > threshold)
        place = planned + tl.cumsum(is_planned.to(tl.int32), 0)
        store(pointers, 2 * place, row, is_planned)
        store(pointers, 2 * place + 1, kv_len, is_planned)
        planned += tl.sum(is_planned.to(tl.int32))
    if P.fresh:
        for first in range(2 * planned + 2, 2 * sizes.rows + 2, AT_ONCE):
            element = first + tl.arange(0, AT_ONCE)
            store(pointers, element, 0, element < 2 * sizes.rows + 2)
    store(pointers, 0, threshold)
    store(pointers, 1, planned)
