"""`jax.jit` for the library's own functions, whatever the caller has configured JAX to be."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax


def compiled(function: Callable, **options: Any) -> Callable:
    """`jax.jit(function, **options)` under a configuration of the library's own.

    It is compiled under `jax.disable_jit` as well, where there would be no donation, and it may
    broadcast and mix dtypes where the caller's code may not.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            with jax.disable_jit(False):
                return jitted(*arguments, **keywords)
        with own_promotion():
            return function(*arguments, **keywords)

    jitted = jax.jit(run, **options)
    return jitted


@contextlib.contextmanager
def own_promotion() -> Iterator[None]:
    """Broadcasting and mixing dtypes as this library does."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
