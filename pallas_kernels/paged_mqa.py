"""DeepGEMM's paged MQA logits: context lengths, and which multiprocessor scores which keys."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.spec import Spec
from pallas_kernels.lanes import LANES
from pallas_kernels.schedule_block import ScheduleBlock
from pallas_kernels.shared_sums import SharedSums
from pallas_kernels.wide import Wide, quotient_and_rest

_KEYS_PER_SEGMENT = 256
_MOST_UNITS = 2**8  # of a segment: an item has 2^23 segments at most, and its units fit int32


def words(spec: Spec) -> int:
    """How many int32 of shared memory `write_schedule` takes."""
    return SharedSums.words(spec.paged_mqa_items[0])


def write_context_lengths(block: ScheduleBlock) -> None:
    """A block's share of `paged_mqa_ctx_lens`."""
    items, next_n = block.spec.paged_mqa_items
    rows = items * next_n
    kv_len = block.lengths(are_rows=next_n == 1)

    def write(first: Any) -> None:
        row = first + block.lanes.iota(LANES)
        item, _ = quotient_and_rest(jnp.minimum(row, rows - 1), next_n)
        block.store("paged_mqa_ctx_lens", jnp.where(row < rows, row, -1), kv_len(item))

    block.share.for_tiles(rows, write)


def write_schedule(block: ScheduleBlock) -> None:
    """A block's share of `paged_mqa_schedule`."""
    lanes, spec = block.lanes, block.spec
    schedule = spec.schedules.paged_mqa
    assert schedule is not None
    items, next_n = spec.paged_mqa_items
    num_sms, a = schedule.num_sms, schedule.units_per_segment(next_n)
    if a > _MOST_UNITS:
        raise NotImplementedError(
            f"num_draft_tokens: got {next_n}, which count as {a} units of a paged MQA schedule, "
            f"expected at most {_MOST_UNITS}; take another implementation"
        )
    kv_len = block.lengths(are_rows=next_n == 1)

    def segments(item: jax.Array) -> jax.Array:
        length = kv_len(item)
        if spec.pooled:
            length = jnp.maximum(quotient_and_rest(length, spec.index_kpool)[0], 1)
        # Rounded up, where the sum with 255 may leave int32.
        return (length >> 8) + jnp.where((length & (_KEYS_PER_SEGMENT - 1)) > 0, 1, 0)

    starts = block.sums(items, lambda item: Wide.of(segments(item)).times(a))
    quotient, remainder = starts.total.divided(num_sms)

    def write(first: Any) -> None:
        row = first + lanes.iota(LANES)
        s = jnp.minimum(row, num_sms)
        late = schedule.layout == "sm90"
        extra = jnp.maximum(s - (num_sms - remainder), 0) if late else jnp.minimum(s, remainder)
        unit = quotient.times(s) + extra
        item, begin = starts.find(unit)
        # Past the last item there is nothing to begin with.
        offset = jnp.where(item < items, unit.minus(begin), 0)
        if schedule.layout == "legacy":
            columns = item, offset
        elif schedule.layout == "sm100":
            columns = item * a, quotient_and_rest(offset, a)[0]
        else:
            width = jnp.maximum(segments(jnp.minimum(item, items - 1)), 1)
            atom = lax.div(offset, width)
            columns = item * a + atom, offset - atom * width
        block.store("paged_mqa_schedule", jnp.where(row <= num_sms, row, -1), *columns)

    block.share.for_tiles(num_sms + 1, write)
