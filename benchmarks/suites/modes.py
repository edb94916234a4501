"""The three strategies of the source documents, and what the number of backends costs."""

import functools

from benchmarks.measure import timing
from benchmarks.problem import Problem
from benchmarks.suite import Job, Plot, Suite, runnable
from jaxnsa import ForwardMode

STRATEGIES = ("ultra_fast", "fast", "fallback")


def _measure(problem: Problem, implementation: str, strategy: str) -> dict[str, float]:
    return timing(problem.calls(implementation, strategy))


def jobs(quick: bool) -> list[Job]:
    """Strategies at N = 3, and "ultra_fast" from 1 to 8 backends."""
    bs, max_len, live = (4, 1024, 1024) if quick else (32, 65_536, 8192)
    counts = (1, 3) if quick else range(1, 9)
    made = []
    for n in counts:
        problem = Problem(ForwardMode.DECODE, bs, max_len, n, live)
        for strategy in STRATEGIES if n == 3 else STRATEGIES[:1]:
            for name in runnable():
                case = {"strategy": strategy} | problem.case
                run = functools.partial(_measure, problem, name, strategy)
                made.append(Job(case, name, run))
    return made


SUITE = Suite(
    name="modes",
    title="Strategies, and the number of backends",
    note="Decode in place, tail `keep`. ultra_fast is one fused launch, fast one computation and N "
    "copies, fallback N computations.",
    jobs=jobs,
    plots=(
        Plot(
            "backends",
            "One refresh of N backends, caches cold: bs 32, max_len 65,536",
            "N",
            "backends, N",
            lambda case: case["strategy"] == "ultra_fast",
        ),
    ),
)
