"""The whole step with all schedules, beside what it takes without them."""

import dataclasses
import functools
from typing import Any, NamedTuple

from benchmarks.measure import on_gpu, timing
from benchmarks.problem import Problem
from benchmarks.suite import Job, Suite, runnable
from jaxnsa import FlashMlaSchedule, ForwardMode, PagedMqaSchedule, Schedules, TopkPlan
from jaxnsa.implementations import FUSED
from jaxnsa.schedules import NO_SCHEDULES, PagedMqaLayout

DECODE, VERIFY = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY
EXTEND = ForwardMode.DRAFT_EXTEND

# As on an H200, where the rows of a verify are items by themselves.
PAGED_MQA = Schedules(paged_mqa=PagedMqaSchedule(132, "sm90", per_row=True))
INDEXER = dataclasses.replace(PAGED_MQA, topk_plan=TopkPlan.h200())
ALL = dataclasses.replace(INDEXER, flash_mla=FlashMlaSchedule(132, "cache_seqlens"))


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      problem: what is computed.
      goal: microseconds of device time on one H200; None where none is set.
      more_than_without: whether they count from the time without schedules.
    """

    problem: Problem
    goal: float | None = None
    more_than_without: bool = False

    @property
    def case(self) -> dict[str, Any]:
        """What identifies it."""
        names = {"paged_mqa": "paged MQA", "topk_plan": "top-k plan", "flash_mla": "FlashMLA"}
        wanted = self.problem.schedules
        described = [title for name, title in names.items() if getattr(wanted, name)]
        if wanted.paged_mqa is not None and wanted.paged_mqa.layout != "sm90":
            described[0] += f" {wanted.paged_mqa.layout}"
        more = "without + " if self.more_than_without else ""
        case = self.problem.case
        shortest = self.problem.shortest
        return case | {
            "live": f"{shortest:,} to {case['live']:,}" if shortest else f"{case['live']:,}",
            "schedules": ", ".join(described),
            "replaces": launches_replaced(wanted, self.problem.num_backends),
            "goal": "-" if self.goal is None else f"{more}{self.goal:g}",
        }


def launches_replaced(schedules: Schedules, num_backends: int) -> int:
    """Launches that SGLang 0.5.23 takes for the step.

    Its fused kernel; then for each backend a copy, DeepGEMM's schedule, its copy and the context
    lengths, the top-k plan and its copy, FlashMLA's schedule and its two copies.
    """
    each = 1
    each += 3 if schedules.paged_mqa else 0
    each += 2 if schedules.topk_plan else 0
    each += 3 if schedules.flash_mla else 0
    return 1 + num_backends * each


def _problem(
    mode: ForwardMode, bs: int, num_backends: int, schedules: Schedules, **lengths: int
) -> Problem:
    lengths = {"live": 8192} | lengths
    return Problem(mode, bs, 65_536, num_backends, wide_table=False, schedules=schedules, **lengths)


def _of_layout(layout: PagedMqaLayout) -> Schedules:
    return Schedules(paged_mqa=PagedMqaSchedule(132, layout))


GOALS = (
    Row(_problem(DECODE, 32, 3, INDEXER), 0.8, more_than_without=True),
    Row(_problem(DECODE, 1024, 3, INDEXER), 2.0, more_than_without=True),
    Row(_problem(DECODE, 32, 3, ALL), 6),
    Row(_problem(DECODE, 1000, 3, ALL), 10),
    Row(_problem(DECODE, 1000, 3, ALL, live=1200, shortest=100), 14),
    Row(_problem(DECODE, 32, 1, _of_layout("sm90")), 1.8),
    Row(_problem(DECODE, 32, 1, _of_layout("legacy")), 1.8),
    Row(_problem(DECODE, 32, 1, _of_layout("atoms")), 1.8),
    Row(_problem(DECODE, 32, 1, _of_layout("sm100")), 1.8),
)
GRID = tuple(
    Row(_problem(mode, bs, num_backends, ALL))
    for mode, bs, num_backends in (
        *((DECODE, 1, 1), (DECODE, 256, 8)),
        *((VERIFY, 1, 1), (VERIFY, 32, 3), (VERIFY, 1024, 8)),
        *((EXTEND, 1, 1), (EXTEND, 32, 3), (EXTEND, 1024, 8)),
    )
)


def _measure(row: Row, implementation: str) -> dict[str, float]:
    metrics = timing([row.problem.call(implementation)], cached=True)
    plain = _first_equal(dataclasses.replace(row.problem, schedules=NO_SCHEDULES))
    without = _without(plain, implementation)
    metrics["without_us"] = without
    if row.goal is not None and on_gpu():
        metrics["goal_us"] = row.goal + (without if row.more_than_without else 0)
    return metrics


@functools.cache
def _first_equal(problem: Problem) -> Problem:
    """One for all that are equal: its inputs are made once."""
    return problem


@functools.cache
def _without(problem: Problem, implementation: str) -> float:
    metrics = timing([problem.call(implementation)], cached=True)
    return metrics.get("hot_device_us", metrics["latency_us"])


def jobs(quick: bool) -> list[Job]:
    """The rows with goals, and every mode from one request to many, for 1, 3 and 8 backends."""
    rows = [*GOALS, *GRID]
    if quick:
        rows = [
            Row(Problem(mode, 2, 256, 2, 128, wide_table=False, schedules=INDEXER), goal, True)
            for mode, goal in ((DECODE, 0.8), (VERIFY, None))
        ]
    # On a GPU, those that take one launch.
    names = [name for name in runnable() if name in FUSED or not on_gpu()]
    return [
        Job(row.case, name, functools.partial(_measure, row, name))
        for row in rows
        for name in names
    ]


SUITE = Suite(
    name="schedules",
    title="The whole step with the consumers' schedules",
    note="In place, page 64, pages alone, top-k 2048, 132 multiprocessors and parts, the same "
    "inputs in each call; lengths uniform in [live/2, live] where no range is given. `replaces` "
    "counts the launches that SGLang 0.5.23 takes for the step; `without_us` is the time of the "
    "same step without schedules, and a goal may count from it.",
    jobs=jobs,
)
