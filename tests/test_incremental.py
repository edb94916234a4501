"""What a step leaves alone, and backends that see more tokens than others."""

import interpreted
import numpy as np
import pytest
from helpers import TABLE_MODES_OR_ONE, check_broadcast, inputs, mode_options

from jaxnsa import ForwardMode

POOL_COLS, BS = 640, 4


def steps(mode, implementation):
    """Lengths of steps, and claims of what is written that are right, too low and too high."""
    for seed in range(1 if implementation in interpreted.NAMES else 12):
        arguments = inputs(BS, pool_cols=POOL_COLS, seed=seed)
        rng = np.random.default_rng(seed)
        arguments[0][:3] = rng.permutation([POOL_COLS - 1, 130, 2**31 - 2])
        written = np.clip(arguments[0], 0, 600) - rng.integers(-4, 6, BS, dtype=np.int32)
        written[3] = (POOL_COLS - 2, 63, 0, -5, 2**31 - 1)[seed % 5]
        yield arguments, mode_options(mode, BS, seed=1), written


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize(
    "wide_table, page, max_len, stacked, max_new_tokens, offsets",
    [
        (True, 64, 640, False, None, None),
        (True, 48, 601, False, 0, (3, -2)),  # no access wider than one element
        (False, 2, 640, False, 1, (0, 1)),  # more than one are written all the same
        (True, 7, 37, True, 40, (2**30, -(2**30))),  # narrower than a vector
        pytest.param(True, 1, 640, True, 8, None, marks=pytest.mark.large),
    ],
)
def test_written_columns_are_left_alone(
    mode, wide_table, page, max_len, stacked, max_new_tokens, offsets, implementation
):
    for arguments, options, written in steps(mode, implementation):
        check_broadcast(
            arguments,
            implementation=implementation,
            in_place=True,
            num_backends=2,
            forward_mode=mode,
            wide_table=wide_table,
            real_page_size=page,
            max_len=max_len,
            stacked=stacked,
            written_lens=written,
            max_new_tokens=max_new_tokens,
            backend_offsets=None if mode is ForwardMode.EXTEND else offsets,
            **options,
        )


@pytest.mark.parametrize("mode", TABLE_MODES_OR_ONE)
@pytest.mark.parametrize(
    "tail, in_place, wide_table, page, max_len, stacked",
    [
        ("copy", False, True, 64, 640, False),
        ("zero", True, True, 64, 640, False),
        ("keep", True, True, 64, 640, True),
        ("zero", False, False, 48, 601, True),
    ],
)
def test_backend_offsets(mode, tail, in_place, wide_table, page, max_len, stacked, implementation):
    for arguments, options, _ in steps(mode, implementation):
        check_broadcast(
            arguments,
            implementation=implementation,
            in_place=in_place,
            num_backends=3,
            forward_mode=mode,
            tail=tail,
            wide_table=wide_table,
            real_page_size=page,
            max_len=max_len,
            stacked=stacked,
            backend_offsets=(1, -130, 1),
            **options,
        )
