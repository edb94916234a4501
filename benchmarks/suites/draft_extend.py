"""The lengths of a draft-extend step: what the source documents compare, and everything here."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnsa
from benchmarks.measure import timing
from benchmarks.suite import Job, Suite, runnable
from jaxnsa import reference
from jaxnsa.implementations import ffi

TOPK = 2048
TOKENS = 12  # of each request
SIZES = (*((bs, TOKENS) for bs in (1, 8, 32, 128, 1024)), (1, 8192))


def python_loop(extend: Any, seq_lens: Any, capacity: int) -> Any:
    """Lengths to the host, a loop over requests, the result to the device."""
    pieces = [
        np.arange(kv - q + 1, kv + 1, dtype=np.int32)
        for q, kv in zip(extend.tolist(), seq_lens.tolist(), strict=True)
    ]
    expanded = np.concatenate(pieces)
    return jnp.asarray(expanded), jnp.asarray(np.minimum(expanded, TOPK))


def numpy_on_the_host(extend: Any, seq_lens: Any, capacity: int) -> Any:
    """The same without a loop."""
    q, kv = np.asarray(extend), np.asarray(seq_lens)
    last = np.repeat(np.cumsum(q), q)
    expanded = (np.repeat(kv, q) - last + 1 + np.arange(q.sum())).astype(np.int32)
    return jnp.asarray(expanded), jnp.asarray(np.minimum(expanded, TOPK))


def contenders() -> dict[str, Callable]:
    """Functions of extend_seq_lens, seq_lens and a capacity by name."""
    found: dict[str, Callable] = {
        "Python loop": python_loop,
        "NumPy and transfer": numpy_on_the_host,
    }
    for name in runnable():
        if name == "ffi":
            for variant in reversed(ffi.VARIANTS["fill_draft_extend_metadata"]):
                found[f"ffi {variant}"] = functools.partial(_variant, variant)
        else:
            found[name] = functools.partial(implementation, name)
    return found


def implementation(name: str, extend: Any, seq_lens: Any, capacity: int) -> Any:
    """A contender: an implementation of the public function."""
    result = jaxnsa.fill_draft_extend_metadata(
        extend, seq_lens, nsa_index_topk=TOPK, max_total_tokens=capacity, implementation=name
    )
    return result.seqlens_expanded, result.nsa_cache_seqlens


@functools.partial(jax.jit, static_argnums=(0, 3))
def _variant(variant: str, extend: Any, seq_lens: Any, capacity: int) -> Any:
    result = ffi.fill_draft_extend_metadata(
        extend, seq_lens, nsa_index_topk=TOPK, max_total_tokens=capacity, variant=variant
    )
    return result.seqlens_expanded, result.nsa_cache_seqlens


def measure(function: Callable, bs: int, tokens: int) -> dict[str, float]:
    """Checks and times a contender."""
    rng = np.random.default_rng(bs)
    seq_lens = rng.integers(10_000, 100_000, bs, dtype=np.int32)
    extend = np.full(bs, tokens, np.int32)
    expected = reference.fill_draft_extend_metadata(extend, seq_lens, nsa_index_topk=TOPK)
    arguments = jnp.asarray(extend), jnp.asarray(seq_lens), bs * tokens
    expanded, clamped = function(*arguments)
    if not (
        np.array_equal(expanded, expected.seqlens_expanded)
        and np.array_equal(clamped, expected.nsa_cache_seqlens)
    ):
        raise AssertionError(f"wrong lengths of {bs} requests")
    return timing([lambda: function(*arguments)], count=500, cached=True)


def jobs(quick: bool) -> list[Job]:
    """Every contender at every size."""
    return [
        Job(
            {"bs": bs, "tokens": bs * tokens},
            name,
            functools.partial(measure, function, bs, tokens),
        )
        for bs, tokens in (((4, TOKENS), (32, TOKENS)) if quick else SIZES)
        for name, function in contenders().items()
    ]


SUITE = Suite(
    name="draft-extend",
    title="Lengths of a draft-extend step",
    note="End to end, from lengths on the device to expanded and clamped lengths on the device: "
    "the first two go through the host. Inputs are the same in each call, a few kilobytes.",
    jobs=jobs,
    metric="latency_us",
)
