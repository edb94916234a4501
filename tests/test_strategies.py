"""The three strategies: the same bits in the same places."""

import logging

import pytest
from helpers import check_broadcast, inputs, mode_options

import jaxnsa
from jaxnsa import ForwardMode, operations, xla
from jaxnsa.implementations import IMPLEMENTATIONS


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


def test_the_path_is_logged_once(caplog, monkeypatch):
    operations._log_path.cache_clear()
    monkeypatch.setitem(IMPLEMENTATIONS, "ffi", xla)  # whether or not its library was built
    arguments = inputs(3)
    with caplog.at_level(logging.INFO, logger="jaxnsa"):
        for _ in range(3):
            jaxnsa.fused_metadata_precompute_and_broadcast(
                *arguments, num_backends=3, implementation="ffi"
            )
        jaxnsa.fused_metadata_precompute_and_broadcast(
            *arguments, num_backends=3, strategy="fast", implementation="xla"
        )
    assert [record.getMessage() for record in caplog.records] == [
        "implementation ffi, strategy ultra_fast: fused precompute + broadcast",
        "kernel launches reduced from 1 + N to 1 (N = 3 backends)",
        "implementation xla, strategy fast: one precompute and a copy for each backend",
    ]
