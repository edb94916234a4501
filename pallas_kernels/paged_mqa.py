"""DeepGEMM's paged MQA logits: context lengths, and which multiprocessor scores which keys."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.spec import Spec
from pallas_kernels.cumulative import Cumulative, Vectors, Wide
from pallas_kernels.destinations import Destinations
from pallas_kernels.kv_lens import KvLens
from pallas_kernels.lanes import LANES, Lanes

_KEYS_PER_SEGMENT = 256


def words(spec: Spec) -> int:
    """How many int32 of shared memory `write_schedule` takes."""
    return Cumulative.words(spec.paged_mqa_items[0])


def write_context_lengths(
    lanes: Lanes, spec: Spec, kv_lens: KvLens, shared: Any, start: int, destinations: Destinations
) -> None:
    """`paged_mqa_ctx_lens`."""
    del shared, start
    items, next_n = spec.paged_mqa_items
    rows = items * next_n

    def lengths_of(indices: Vectors) -> Vectors:
        if next_n == 1:
            return kv_lens.of_rows(indices)
        return kv_lens.of_requests([lax.div(r, jnp.full_like(r, next_n)) for r in indices])

    def write(indices: Vectors) -> None:
        lengths = lengths_of([jnp.minimum(row, rows - 1) for row in indices])
        for row, length in zip(indices, lengths, strict=True):
            place = jnp.where(row < rows, row, -1)
            for ref, lead in destinations.of("paged_mqa_ctx_lens", kv_lens.rows.offset):
                lanes.store_rows(ref, lead, place, length)

    lanes.for_indices(rows, write)


def write_schedule(
    lanes: Lanes, spec: Spec, kv_lens: KvLens, shared: Any, start: int, destinations: Destinations
) -> None:
    """`paged_mqa_schedule`; shared memory from `start` on is free."""
    schedule = spec.schedules.paged_mqa
    assert schedule is not None
    items, next_n = spec.paged_mqa_items
    of_items = kv_lens.of_rows if next_n == 1 else kv_lens.of_requests
    num_sms, a = schedule.num_sms, schedule.units_per_segment(next_n)

    def segments(indices: Vectors) -> Vectors:
        lengths = of_items(indices)
        if spec.pooled:
            pool = spec.index_kpool
            lengths = [jnp.maximum(lax.div(n, jnp.full_like(n, pool)), 1) for n in lengths]
        # Rounded up, where the sum with 255 may leave int32.
        return [(n >> 8) + jnp.where((n & (_KEYS_PER_SEGMENT - 1)) > 0, 1, 0) for n in lengths]

    sums = Cumulative.of(lanes, items, segments, shared, start)
    q, r = sums.total.times(a).divided(num_sms)
    vectors = -(-(num_sms + 1) // LANES)
    sms = [k * LANES + lanes.iota(LANES) for k in range(vectors)]

    def first_unit(s: jax.Array) -> Wide:
        s = jnp.minimum(s, num_sms)
        late = schedule.layout == "sm90"
        extra = jnp.maximum(s - (num_sms - r), 0) if late else jnp.minimum(s, r)
        return q.times(s) + Wide.of(jnp.zeros_like(extra), extra)

    # Units are counted in segments, of which each is `a` of them, and in what remains.
    units = [first_unit(s).divided(a) for s in sms]
    places = sums.locate([whole for whole, _ in units])
    widths = segments([jnp.minimum(item, items - 1) for item, _ in places])
    for s, (_, rest), (item, segment), width in zip(sms, units, places, widths, strict=True):
        row = jnp.where(s <= num_sms, s, -1)
        if schedule.layout == "legacy":
            columns = item, segment
        elif schedule.layout == "sm100":
            columns = item * a, segment
        else:
            # Past the end there is nothing left of the units, but the width of the last item.
            offset = jnp.where(item < items, segment * a + rest, 0)
            width = jnp.maximum(width, 1)
            atom = lax.div(offset, width)
            columns = item * a + atom, offset - atom * width
        for ref, lead in destinations.of("paged_mqa_schedule", kv_lens.rows.offset):
            lanes.store_rows(ref, lead, row, *columns)
