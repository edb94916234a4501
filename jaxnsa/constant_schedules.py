"""Schedules that follow from the description of a computation alone, computed once."""

import functools

import numpy as np

from jaxnsa.reference_schedules import flash_mla_schedule
from jaxnsa.spec import Inputs, Spec


def with_constants(inputs: Inputs, spec: Spec) -> Inputs:
    """The inputs of a computation, its constants among them."""
    return inputs._replace(flash_mla=flash_mla_constants(spec))


@functools.lru_cache(maxsize=64)
def flash_mla_constants(spec: Spec) -> np.ndarray | None:
    """FlashMLA's arrays, one behind the other; None where there are none that are constant.

    Returns:
      int32 [num_sm_parts * 8 + items + 1]: `flash_mla_schedule`, row by row, then
      `flash_mla_num_splits`.
    """
    schedule = spec.schedules.flash_mla
    if schedule is None or not schedule.is_constant:
        return None
    arrays = flash_mla_schedule([spec.nsa_index_topk] * spec.flash_mla_items, schedule)
    return np.concatenate([array.ravel() for array in arrays])
