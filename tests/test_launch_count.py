"""Counting launches in optimized HLO."""

import jax
import jax.numpy as jnp

from jaxnsa.app.launch_count import count_launches


def count(function, *arguments):
    return count_launches(jax.jit(function).lower(*arguments).compile())


def test_counts_work_and_not_bookkeeping():
    x = jnp.arange(8.0)
    assert count(lambda x: x, x) <= 1
    assert count(lambda x: jnp.sin(x) + 1, x) == 1
    assert count(lambda x: (jnp.sin(x) + 1, jnp.sort(-x)), x) >= 2
