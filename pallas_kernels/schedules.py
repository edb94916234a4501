"""The blocks of a launch that write what DeepGEMM, the fused top-k and FlashMLA read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxnsa.spec import Inputs, Spec
from pallas_kernels import flash_mla, paged_mqa, topk_plan
from pallas_kernels.destinations import Destinations
from pallas_kernels.kv_lens import KvLens
from pallas_kernels.lanes import LANES, Lanes
from pallas_kernels.rows import Lengths


def schedule_writers(
    lanes: Lanes, spec: Spec, *, fresh: bool
) -> tuple[Sequence[Callable[[Inputs, Any, Destinations], None]], int]:
    """What writes the schedules of a computation, for each offset of backends, the slowest first.

    Args:
      lanes: vector operations.
      spec: the computation.
      fresh: whether no results were there before.

    Returns:
      Of each block what it does, given inputs, shared memory and destinations; and how many int32
      of shared memory they take behind the first 128.
    """
    wanted, start = spec.schedules, LANES + KvLens.words(spec.rows)
    functions: list[Callable[..., None]] = []
    words = [0]
    if wanted.flash_mla and not wanted.flash_mla.is_constant:
        functions.append(flash_mla.write_schedule)
        words.append(flash_mla.words(spec))
    if wanted.paged_mqa:
        functions += [paged_mqa.write_schedule, paged_mqa.write_context_lengths]
        words.append(paged_mqa.words(spec))
    if wanted.topk_plan:
        functions.append(functools.partial(topk_plan.write_plan, fresh=fresh))

    def write(
        function: Callable[..., None],
        offset: int,
        inputs: Inputs,
        shared: Any,
        destinations: Destinations,
    ) -> None:
        lengths = Lengths(inputs.seq_lens, inputs.extend_seq_lens)
        kv_lens = KvLens.load(lanes, spec.rows_of(offset), lengths, shared, LANES)
        function(lanes, spec, kv_lens, shared, start, destinations)

    writers = [
        functools.partial(write, function, offset)
        for function in functions
        for offset in sorted(set(spec.offsets))
    ]
    if wanted.flash_mla and wanted.flash_mla.is_constant:
        writers.append(functools.partial(flash_mla.copy_schedule, lanes, spec))
    return writers, start - LANES + max(words) if functions else 0
