"""DeepGEMM's paged MQA logits: context lengths, and which multiprocessor scores which keys."""

import dataclasses

import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.destinations import store
from jaxnsa.implementations.triton_kernels.places import advanced, first_places, kv_lens_of_items
from jaxnsa.schedules import PagedMqaLayout, PagedMqaSchedule
from jaxnsa.spec import Spec


@dataclasses.dataclass(frozen=True)
class PagedMqaConstants:
    """What the kernel is compiled for.

    Attributes:
      num_sms, layout: of the schedule.
      next_n: rows of an item.
      of_rows: whether items are rows, otherwise requests.
      units: of work that a segment of keys counts as.
      pool: tokens that are one key.
      at_once: items that are added up as one vector.
      lanes: rows of the schedule, as a power of two.
    """

    num_sms: int
    layout: PagedMqaLayout
    next_n: int
    of_rows: bool
    units: int
    pool: int
    at_once: int
    lanes: int

    @classmethod
    def of(cls, spec: Spec, schedule: PagedMqaSchedule) -> "PagedMqaConstants":
        """Those of a computation."""
        items, next_n = spec.paged_mqa_items
        return cls(
            schedule.num_sms,
            schedule.layout,
            next_n,
            next_n == 1,
            schedule.units_per_segment(next_n),
            spec.index_kpool,
            min(1024, triton.next_power_of_2(items)),
            triton.next_power_of_2(schedule.num_sms + 1),
        )


@triton.jit
def _segments(lengths, item, sizes, ROWS: tl.constexpr, M: tl.constexpr):
    """Segments of 256 keys of items."""
    kv_len = kv_lens_of_items(lengths, item, sizes, M.of_rows, ROWS)
    if M.pool > 1:
        kv_len = tl.maximum(kv_len // M.pool, 1)
    return (kv_len >> 8) + tl.where((kv_len & 255) > 0, 1, 0)


@triton.jit
def write_context_lengths(pointers, lengths, count, sizes, ROWS: tl.constexpr, M: tl.constexpr):
    """`paged_mqa_ctx_lens`, of `count` elements."""
    AT_ONCE: tl.constexpr = M.at_once
    for first in range(0, count, AT_ONCE):
        element = first + tl.arange(0, AT_ONCE)
        item = element // M.next_n
        kv_len = kv_lens_of_items(lengths, item, sizes, M.of_rows, ROWS)
        store(pointers, element, kv_len, element < count)


@triton.jit
def write_paged_mqa(pointers, lengths, items, sizes, ROWS: tl.constexpr, M: tl.constexpr):
    """`paged_mqa_schedule`."""
    AT_ONCE: tl.constexpr = M.at_once
    LANES: tl.constexpr = M.lanes
    sums = tl.zeros([AT_ONCE], tl.int64)
    for first in range(0, items, AT_ONCE):
        item = first + tl.arange(0, AT_ONCE)
        sums += tl.where(item < items, _segments(lengths, item, sizes, ROWS, M), 0)
    units = tl.sum(sums) * M.units
    q = units // M.num_sms
    r = units - q * M.num_sms
    s = tl.arange(0, LANES)
    extra = tl.minimum(s, r)
    if M.layout == "sm90":
        extra = tl.maximum(s - (M.num_sms - r), 0)
    unit = s * q + extra
    # Units are counted in segments, of which each is M.units of them, and in what remains.
    whole = unit // M.units
    places = first_places(whole)
    total = tl.zeros([1], tl.int64)
    for first in range(0, items, AT_ONCE):
        item = first + tl.arange(0, AT_ONCE)
        segments = tl.where(item < items, _segments(lengths, item, sizes, ROWS, M), 0)
        places = advanced(places, total + tl.cumsum(segments.to(tl.int64), 0), whole, AT_ONCE)
        total += tl.sum(segments.to(tl.int64))
    exists = places.item < items
    item = tl.minimum(places.item, items)
    segment = tl.where(exists, whole - places.start, 0)
    row = item * M.units
    if M.layout == "legacy":
        row = item
    elif M.layout != "sm100":
        offset = tl.where(exists, segment * M.units + (unit - whole * M.units), 0)
        width = tl.maximum(_segments(lengths, item, sizes, ROWS, M), 1)
        row += (offset // width).to(tl.int32)
        segment = offset % width
    store(pointers, 2 * s, row, s <= M.num_sms)
    store(pointers, 2 * s + 1, segment.to(tl.int32), s <= M.num_sms)
