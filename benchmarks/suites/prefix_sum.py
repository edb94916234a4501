"""Prefix sums: what the source documents compare, and everything here."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnsa
from benchmarks.measure import rotations, timing
from benchmarks.suite import Job, Plot, Suite, runnable
from jaxnsa import reference
from jaxnsa.implementations import ffi


def _cumsum(x: Any) -> Any:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(x, dtype=jnp.int32)])


def contenders() -> dict[str, Callable]:
    """Functions of a vector by name."""
    found: dict[str, Callable] = {"jnp.cumsum": jax.jit(_cumsum)}
    names = runnable()
    for name in names:
        if name == "ffi":
            for variant in ffi.VARIANTS["prefix_sum"]:
                call = functools.partial(ffi.prefix_sum, variant=variant)
                found[f"ffi {variant}"] = jax.jit(call)
        elif name != "xla":
            found[name] = functools.partial(jaxnsa.prefix_sum, implementation=name)
    return found


def _measure(function: Callable, n: int) -> dict[str, float]:
    x = np.random.default_rng(n).integers(0, 131_072, n, dtype=np.int32)
    vectors = [jnp.array(x) for _ in range(rotations(8 * n, 8 * n))]
    if not np.array_equal(function(vectors[0]), reference.prefix_sum(x)):
        raise AssertionError(f"wrong prefix sum of {n}")
    return timing([functools.partial(function, v) for v in vectors], count=300)


def jobs(quick: bool) -> list[Job]:
    """Every contender at every size."""
    sizes = (16, 1000) if quick else (16, 32, 64, 128, 256, 1024, 8192, 65_536)
    return [
        Job({"n": n}, name, functools.partial(_measure, function, n))
        for n in sizes
        for name, function in contenders().items()
        if not (name in ("ffi sequential", "ffi blelloch") and n > 8192)
    ]


SUITE = Suite(
    name="prefix-sum",
    title="Prefix sum of n lengths",
    note="int32 [n] to int32 [n + 1], 0 first.",
    jobs=jobs,
    plots=(Plot("prefix-sum", "Prefix sum", "n", "elements, n", lambda case: True),),
)
