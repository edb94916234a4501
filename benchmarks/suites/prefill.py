"""All arrays of a prefill: per token, per request and per key."""

import functools

from benchmarks.measure import on_gpu, timing
from benchmarks.problem import Problem
from benchmarks.suite import Job, Suite, runnable
from jaxnsa import ForwardMode

# By problem, the target in microseconds of device time on one H200.
PROBLEMS = {
    Problem(ForwardMode.EXTEND, 8, 16_384, 1, 16_384, new_tokens=8192): 4.0,
    Problem(ForwardMode.EXTEND, 1, 65_536, 1, 65_536, new_tokens=65_536): 4.0,
    Problem(ForwardMode.EXTEND, 256, 4096, 1, 512, new_tokens=8192): None,
}


def _measure(problem: Problem, target: float | None, implementation: str) -> dict[str, float]:
    metrics = timing(problem.calls(implementation))
    return metrics | ({"target_us": target} if target and on_gpu() else {})


def jobs(quick: bool) -> list[Job]:
    """Few long prompts, one long prompt, many short ones."""
    problems: dict[Problem, float | None] = dict(PROBLEMS)
    if quick:
        problems = {Problem(ForwardMode.EXTEND, 2, 128, 1, 100, new_tokens=64): None}
    return [
        Job(
            {"bs": p.bs, "new tokens": p.new_tokens, "keys": p.bs * p.live, "max_len": p.max_len},
            name,
            functools.partial(_measure, p, target, name),
        )
        for p, target in problems.items()
        for name in runnable()
    ]


SUITE = Suite(
    name="prefill",
    title="All arrays of a prefill",
    note="In place, N = 1, page 64, top-k 2048; both page tables, the flat one, and the arrays of "
    "each new token. Requests are equally long.",
    jobs=jobs,
)
