"""The specification of the consumers' schedules in NumPy and plain loops: a part of `reference.py`.

Lengths are lists of int, none of them negative.
"""

import numpy as np

from jaxnsa.schedules import FlashMlaSchedule, PagedMqaSchedule, TopkPlan

_KEYS_PER_SEGMENT = 256
_KEYS_PER_BLOCK = 64


def paged_mqa_schedule(lengths, next_n: int, schedule: PagedMqaSchedule) -> np.ndarray:
    """int32 [num_sms + 1, 2]: where each multiprocessor begins, (item, segment).

    As DeepGEMM computes it for items of `next_n` rows. Where all lengths are 0, where it reads out
    of bounds, nobody gets work.
    """
    num_sms, layout = schedule.num_sms, schedule.layout
    a = schedule.units_per_segment(next_n)
    segments = [-(-n // _KEYS_PER_SEGMENT) for n in lengths]
    ends = [0]  # of the units of each item, the one before the first in front
    for seg in segments:
        ends.append(ends[-1] + seg * a)
    q, r = divmod(ends[-1], num_sms)
    rows = []
    for s in range(num_sms + 1):
        unit = s * q + (max(0, s - (num_sms - r)) if layout == "sm90" else min(s, r))
        item = sum(end <= unit for end in ends[1:])
        if item == len(segments):
            rows.append((item if layout == "legacy" else item * a, 0))
            continue
        offset = unit - ends[item]
        if layout == "legacy":
            rows.append((item, offset))
        elif layout == "sm100":
            rows.append((item * a, offset // a))
        else:
            rows.append((item * a + offset // segments[item], offset % segments[item]))
    return np.array(rows, np.int32)


def topk_plan(lengths, plan: TopkPlan) -> list[tuple[int, int]]:
    """(threshold, n), then (row, length) of the n rows that are longer."""
    threshold = plan.pairs[-1][0]
    for candidate, capacity in reversed(plan.pairs):
        if sum(n > candidate for n in lengths) > capacity:
            break
        threshold = candidate
    threshold = max(threshold, plan.floor)
    planned = [(row, n) for row, n in enumerate(lengths) if n > threshold]
    return [(threshold, len(planned)), *planned]


def flash_mla_schedule(lengths, schedule: FlashMlaSchedule) -> tuple[np.ndarray, np.ndarray]:
    """int32 [num_sm_parts, 8], FlashMLA's schedule, and [items + 1], its prefix sum of splits."""
    parts, overhead = schedule.num_sm_parts, schedule.fixed_overhead_blocks
    items = len(lengths)
    last = [max(n - 1, 0) // _KEYS_PER_BLOCK for n in lengths]
    blocks = [b + 1 for b in last]
    payload = -(-(sum(blocks) + items * overhead) // parts) + overhead
    rows = []
    num_splits = np.zeros(items + 1, np.int32)
    item = block = split = total_splits = 0
    for _ in range(parts):
        begin_item, begin_block, begin_split = item, block, split
        room = payload
        while item < items:
            left = blocks[item] - block
            if room >= left + overhead:
                total_splits += split + 1
                num_splits[item + 1] = total_splits
                room -= left + overhead
                item += 1
                block = split = 0
            else:
                if room > overhead:
                    block += room - overhead
                    split += 1
                break
        end_item = item if block > 0 else item - 1
        end_block = first_is_split = last_is_split = 0
        if end_item >= 0:
            empty = lengths[end_item] == 0
            end_block = block if block > 0 else 0 if empty else last[end_item] + 1
            first_is_split = int(begin_block > 0)
            last_is_split = int(end_block != last[end_item] + 1 and not empty)
        if begin_item == end_item:
            first_is_split = last_is_split = int(first_is_split or last_is_split)
        if schedule.layout == "legacy":
            row = (begin_item, begin_block, end_item, end_block, begin_split, 0, 0, 0)
        else:
            span = (begin_item, end_item, begin_block, end_block)
            row = (*span, begin_split, first_is_split, last_is_split, 0)
        rows.append(row)
    return np.array(rows, np.int32), num_splits
