"""Every implementation of every function in every mode: correct, its device time, its launches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxnsa
from benchmarks.measure import timing
from benchmarks.problem import PAGE_SIZE, Problem
from benchmarks.suite import Job, Suite, runnable
from benchmarks.suites import draft_extend
from jaxnsa import ForwardMode, reference


def _broadcast(problem: Problem, strategy: str, name: str) -> dict[str, float]:
    return timing([problem.call(name, strategy)], cached=True)


def _prefix_sum(n: int, name: str) -> dict[str, float]:
    x = np.arange(n, dtype=np.int32) % 1000
    on_device = jnp.asarray(x)
    call = functools.partial(jaxnsa.prefix_sum, on_device, implementation=name)
    if not np.array_equal(call(), reference.prefix_sum(x)):
        raise AssertionError(f"wrong prefix sum of {n}")
    return timing([call], cached=True)


def _fill(bs: int, name: str) -> dict[str, float]:
    function = functools.partial(draft_extend.implementation, name)
    return draft_extend.measure(function, bs, draft_extend.TOKENS)


def _copy(problem: Problem, name: str) -> dict[str, float]:
    source = jax.tree.map(jnp.asarray, problem.expected)
    state = [tuple(jax.tree.map(jnp.zeros_like, source) for _ in range(problem.num_backends))]

    def call():
        state[0] = jaxnsa.fused_metadata_copy(source, out=state[0], implementation=name)
        return state[0]

    problem.check(call())
    return timing([call], cached=True)


def jobs(quick: bool) -> list[Job]:
    """Functions x modes x strategies x implementations."""
    bs, max_len, n = (4, 512, 100) if quick else (32, 16_384, 1024)
    made: list[tuple[dict, functools.partial]] = [
        ({"function": "prefix_sum", "mode": f"n = {n}"}, functools.partial(_prefix_sum, n)),
        (
            {"function": "fill_draft_extend_metadata", "mode": f"bs = {bs}"},
            functools.partial(_fill, bs),
        ),
    ]
    for mode in ForwardMode:
        problem = Problem(mode, bs, max_len, 3, max_len)
        strategies = ("ultra_fast", "fast", "fallback")
        for strategy in strategies[:1] if quick and mode is not ForwardMode.DECODE else strategies:
            case = {"function": f"broadcast, {strategy}", "mode": mode.value}
            made.append((case, functools.partial(_broadcast, problem, strategy)))
    problem = Problem(ForwardMode.DECODE, bs, max_len, 3, max_len)
    case = {"function": "fused_metadata_copy", "mode": "decode"}
    made.append((case, functools.partial(_copy, problem)))
    names = runnable()
    return [Job(case, name, functools.partial(run, name)) for case, run in made for name in names]


SUITE = Suite(
    name="functions",
    title="Implementations, functions and modes",
    note=f"Each checked against the reference before it is timed. Broadcasts and copies: bs 32, "
    f"max_len 16384, N = 3, page {PAGE_SIZE}, in place. Inputs are the same in each call.",
    jobs=jobs,
)
