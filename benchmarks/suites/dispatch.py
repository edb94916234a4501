"""Host cost of one call by the number of arrays that cross the boundary."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import jaxnsa
from benchmarks.measure import host_times
from benchmarks.problem import PAGE_SIZE, TOPK, Problem
from benchmarks.suite import Job, Plot, Suite
from jaxnsa import ForwardMode

IDENTITY = "identity"
ONE_OF_A_LARGER_JIT = "one array of a larger jit"
KINDS = (
    "separate",
    "stacked",
    "in place",
    f"in place, {IDENTITY}",
    "stacked in place",
    f"stacked in place, {IDENTITY}",
    ONE_OF_A_LARGER_JIT,
)


def _measure(kind: str, n: int, count: int) -> dict[str, float]:
    problem = Problem(ForwardMode.DECODE, 4, 256, n, 64)
    arguments = tuple(jnp.asarray(a) for a in problem.arguments)
    broadcast: Any = functools.partial(
        jaxnsa.fused_metadata_precompute_and_broadcast,
        num_backends=n,
        nsa_index_topk=TOPK,
        real_page_size=PAGE_SIZE,
    )
    if kind == ONE_OF_A_LARGER_JIT:
        larger = jax.jit(lambda *a: sum(b.nsa_cu_seqlens_k[-1] for b in broadcast(*a)))
        last = problem.expected.nsa_cu_seqlens_k[-1]
        if int(larger(*arguments)) != n * int(last):
            raise AssertionError("wrong sum")
        return host_times([lambda: larger(*arguments)], count)
    stacked = kind.startswith("stacked")
    result = broadcast(*arguments, stacked=stacked, tail="zero")
    problem.check(
        [jax.tree.map(lambda a, k=k: a[k], result) for k in range(n)] if stacked else result
    )
    if kind in ("separate", "stacked"):
        return host_times([lambda: broadcast(*arguments, stacked=stacked)], count)
    identity = jax.jit(lambda out, *read: out, donate_argnums=0, keep_unused=True)
    state = [result]

    def call() -> Any:
        if kind.endswith(IDENTITY):
            state[0] = identity(state[0], *arguments)
        else:
            state[0] = broadcast(*arguments, stacked=stacked, out=state[0])
        return state[0]

    return host_times([call], count)


def jobs(quick: bool) -> list[Job]:
    """Kinds of calls for a few numbers of backends."""
    return [
        Job(
            {"N": n, "arrays": 7 * n},
            kind,
            functools.partial(_measure, kind, n, 50 if quick else 300),
        )
        for n in ((1, 3) if quick else (1, 2, 3, 4, 6, 8))
        for kind in KINDS
    ]


SUITE = Suite(
    name="dispatch",
    title="Host time to issue one call",
    note="bs 4, max_len 256, 64 columns live: next to no work, the default implementation. "
    "separate returns 7 N arrays, stacked 7; in place they are donated as well, and identity is "
    "jax.jit of the identity on the same arrays, donated: what JAX itself takes. The last is part "
    "of a jit that returns one number. Each is the median of the fastest of twenty passes.",
    jobs=jobs,
    plots=(
        Plot(
            "dispatch",
            "Host time to issue one call: bs 4, max_len 256",
            "N",
            "backends, N",
            lambda case: True,
            without=("separate", "stacked"),  # next to those in place
        ),
    ),
    metric="issue_us",
    passes=20,
)
