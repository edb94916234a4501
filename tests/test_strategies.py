"""The three strategies: the same bits in the same places."""

import logging

import jax
import jax.extend
import pytest
from helpers import (
    TABLE_MODES,
    check_broadcast,
    inputs,
    mode_options,
    of_blocks,
    skip_without_library,
)

import jaxnsa
from jaxnsa import operations
from jaxnsa.app.launch_count import count_launches
from jaxnsa.implementations import IMPLEMENTATIONS, xla


@pytest.mark.parametrize("strategy", ("ultra_fast", "fast", "fallback"))
@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("tail, in_place", (("copy", False), ("keep", True), ("zero", True)))
@pytest.mark.parametrize("bs", (2, *of_blocks(64)))
def test_same_bits(strategy, mode, stacked, tail, in_place, bs, implementation):
    check_broadcast(
        inputs(bs, pool_cols=128 if bs > 6 else 9),
        implementation=implementation,
        strategy=strategy,
        in_place=in_place,
        tail=tail,
        num_backends=2,
        forward_mode=mode,
        stacked=stacked,
        nsa_index_topk=6,
        **mode_options(mode, bs),
    )


def in_place(strategy, implementation, n):
    """The broadcast to n donated backends, and arguments for it."""
    arguments = inputs(7, pool_cols=256)
    out = jaxnsa.fused_metadata_precompute_and_broadcast(*arguments, num_backends=n)

    def compute(out, *arguments):
        return jaxnsa.fused_metadata_precompute_and_broadcast(
            *arguments,
            out=out,
            num_backends=n,
            strategy=strategy,
            implementation=implementation,
        )

    return jax.jit(compute, donate_argnums=0), (out, *arguments)


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize(
    "strategy, launches",
    (("ultra_fast", lambda n: 1), ("fast", lambda n: 1 + n), ("fallback", int)),
)
def test_launches_of_the_ffi_library(strategy, launches, n):
    skip_without_library(jax.default_backend() == "gpu")
    compute, arguments = in_place(strategy, "ffi", n)
    assert count_launches(compute.lower(*arguments).compile()) == launches(n)


def test_computations_of_plain_xla():
    """What XLA is given: it may merge equal computations where it drops the barriers, on a CPU."""

    def prefix_sums(strategy, n):
        compute, arguments = in_place(strategy, "xla", n)
        jaxpr = compute.trace(*arguments).jaxpr
        return sum(eqn.primitive.name == "cumsum" for eqn in equations(jaxpr.jaxpr))

    one = prefix_sums("ultra_fast", 1)
    assert one == 2
    assert prefix_sums("ultra_fast", 3) == one
    assert prefix_sums("fast", 3) == one
    assert prefix_sums("fallback", 3) == 3 * one


def equations(jaxpr):
    """All equations, those of inner functions for each call."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


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
        "implementation xla, strategy fast: one precompute and a copy for each backend, "
        "where copies will do",
    ]
