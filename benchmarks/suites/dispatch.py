"""Host cost of one call by the number of arrays that cross the boundary."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import jaxnsa
from benchmarks.measure import timing
from benchmarks.problem import PAGE_SIZE, TOPK, Problem
from benchmarks.suite import Job, Plot, Suite
from jaxnsa import ForwardMode


def _measure(kind: str, n: int) -> dict[str, float]:
    problem = Problem(ForwardMode.DECODE, 8, 1024, n, 1024)
    arguments = tuple(jnp.asarray(a) for a in problem.arguments)
    broadcast: Any = functools.partial(
        jaxnsa.fused_metadata_precompute_and_broadcast,
        num_backends=n,
        nsa_index_topk=TOPK,
        real_page_size=PAGE_SIZE,
    )
    if kind == "in place":
        return timing(problem.calls(_default())[:1], cached=True)
    if kind == "one array of a larger jit":
        larger = jax.jit(lambda *a: sum(b.nsa_cu_seqlens_k[-1] for b in broadcast(*a)))
        last = problem.expected.nsa_cu_seqlens_k[-1]
        if int(larger(*arguments)) != n * int(last):
            raise AssertionError("wrong sum")
        return timing([lambda: larger(*arguments)], cached=True)
    stacked = kind == "stacked"
    result = broadcast(*arguments, stacked=stacked, tail="zero")
    problem.check(
        [jax.tree.map(lambda a, k=k: a[k], result) for k in range(n)] if stacked else result
    )
    return timing([lambda: broadcast(*arguments, stacked=stacked)], cached=True)


def _default() -> str:
    return jaxnsa.get_kernel_info()["default"]


def jobs(quick: bool) -> list[Job]:
    """Kinds of calls for a few numbers of backends."""
    kinds = ("separate", "stacked", "in place", "one array of a larger jit")
    return [
        Job({"N": n, "arrays": 7 * n}, kind, functools.partial(_measure, kind, n))
        for n in ((1, 3) if quick else (1, 2, 3, 4, 6, 8))
        for kind in kinds
    ]


SUITE = Suite(
    name="dispatch",
    title="Host time to issue one call",
    note="bs 8, max_len 1024, the default implementation. separate returns 7 N arrays, stacked 7, "
    "in place takes and returns 7 N; the last is part of a jit that returns one number.",
    jobs=jobs,
    plots=(Plot("dispatch", "Host time to issue one call", "N", "backends, N", lambda case: True),),
    metric="issue_us",
)
