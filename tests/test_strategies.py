"""The three strategies: the same bits in the same places."""

import pytest
from helpers import check_broadcast, inputs, mode_options

from jaxnsa import ForwardMode


@pytest.mark.parametrize("strategy", ("ultra_fast", "fast", "fallback"))
@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("tail, in_place", (("copy", False), ("keep", True), ("zero", True)))
@pytest.mark.parametrize("bs", (6, 64))
def test_same_bits(strategy, mode, stacked, tail, in_place, bs, implementation):
    check_broadcast(
        inputs(bs, pool_cols=128),
        implementation=implementation,
        strategy=strategy,
        in_place=in_place,
        tail=tail,
        num_backends=3,
        forward_mode=mode,
        stacked=stacked,
        **mode_options(mode, bs),
    )
