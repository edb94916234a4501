"""The whole job against its roof: live bytes read once and written N times."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Call, on_gpu, rotations, timing
from benchmarks.problem import DRAFT_TOKENS, PAGE_SIZE, Problem
from benchmarks.suite import Job, Plot, Suite, runnable
from jaxnsa import ForwardMode
from jaxnsa.metadata import NSAMetadata

DECODE, VERIFY = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY
EXTEND = ForwardMode.DRAFT_EXTEND

# The rows that targets are set for, in microseconds of device time on one H200; None: 1.25 times
# the roof.
TARGETS = {
    Problem(DECODE, 32, 2048, 3, 2048): 2.0,
    Problem(DECODE, 32, 65_536, 3, 8192): 3.0,
    Problem(DECODE, 32, 65_536, 3, 65_536): 7.0,
    Problem(DECODE, 6, 131_072, 1, 131_072): 2.5,
    Problem(DECODE, 256, 32_768, 8, 16_384): 31.0,
    Problem(DECODE, 128, 131_072, 3, 131_072): 53.0,
    Problem(DECODE, 1024, 32_768, 3, 4096): 16.0,
    Problem(VERIFY, 64, 65_536, 3, 65_536): None,
    Problem(EXTEND, 64, 65_536, 3, 65_536): None,
    Problem(EXTEND, 32, 65_536, 3, 8192): 3.2,
}
SGLANG_COLUMNS = 4 + DRAFT_TOKENS  # of SGLang's pools, behind the longest context
PAGES = {
    Problem(mode, bs, max_len, n, live, wide_table=False, more_columns=SGLANG_COLUMNS): target
    for mode, bs, max_len, n, live, target in (
        (DECODE, 32, 131_072, 3, 131_072, None),
        (DECODE, 256, 131_072, 1, 131_072, 8.2),
        (DECODE, 1024, 32_768, 3, 4096, 2.6),
        (VERIFY, 64, 65_536, 3, 65_536, None),
        (EXTEND, 64, 65_536, 3, 65_536, None),
        (EXTEND, 8, 131_072, 1, 8192, 2.1),
        (ForwardMode.EXTEND, 8, 65_536, 1, 65_536, None),
    )
}
SWEEP_MAX_LEN = tuple(2**k for k in range(11, 18))
SWEEP_BS = (1, 4, 16, 64, 256)
GRID = tuple(
    Problem(DECODE, bs, max_len, n, max_len // part)
    for bs, max_len, part, n in itertools.product((8, 64), (8192, 65_536), (8, 1), (1, 4))
)
ROW_COPIES = "NumPy row copies"


def numpy_loop(
    seq_lens: np.ndarray,
    req_pool_indices: np.ndarray,
    req_to_token: np.ndarray,
    backends: tuple[NSAMetadata, ...],
) -> int:
    """The live table columns of all backends, row by row; returns the bytes written."""
    written = 0
    for backend in backends:
        wide: Any = backend.page_indices
        real: Any = backend.real_page_table
        for i, (length, row) in enumerate(zip(seq_lens, req_pool_indices, strict=True)):
            tokens = req_to_token[row, :length]
            wide[i, :length] = tokens
            pages = tokens[::PAGE_SIZE] // PAGE_SIZE
            real[i, : len(pages)] = pages
            written += tokens.nbytes + pages.nbytes
    return written


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written; on a CPU, of one thread's memcpy."""
    if on_gpu():
        source = jnp.zeros(2**28, jnp.int32)
        copy = jax.jit(lambda x: x + 1)
        return 2 * source.nbytes / (timing([lambda: copy(source)], count=10)["device_us"] * 1e-6)
    here, there = np.ones(2**25, np.int32), np.zeros(2**25, np.int32)
    metrics = timing([lambda: np.copyto(there, here)], count=10, wait=lambda result: result)
    return 2 * here.nbytes / (metrics["latency_us"] * 1e-6)


def _row_copies(problem: Problem) -> dict[str, float]:
    """memcpy of the live bytes, row by row: what a CPU could do at best with one thread."""
    seq_lens, indices, pool = problem.arguments
    held = pool.nbytes * (1 + problem.num_backends)

    def copies() -> Call:
        source = pool.copy()
        backends = tuple(
            jax.tree.map(np.zeros_like, problem.expected) for _ in range(problem.num_backends)
        )
        return lambda: numpy_loop(seq_lens, indices, source, backends)

    calls = [copies() for _ in range(rotations(problem.bytes_moved, held))]
    return timing(calls, wait=lambda result: result)


def _measure(problem: Problem, implementation: str) -> dict[str, float]:
    metrics = (
        _row_copies(problem)
        if implementation == ROW_COPIES
        else timing(problem.calls(implementation))
    )
    seconds = metrics.get("device_us", metrics["latency_us"]) * 1e-6
    rate = problem.bytes_moved / seconds
    metrics |= {
        "bytes": problem.bytes_moved,
        "roof_us": problem.bytes_moved / copy_bandwidth() * 1e6,
        "tb_s": rate / 1e12,
        "percent_of_copy": 100 * rate / copy_bandwidth(),
    }
    target = PAGES.get(problem)
    if problem in TARGETS:
        target = TARGETS[problem] or 1.25 * metrics["roof_us"]
    return metrics | ({"target_us": target} if target and on_gpu() else {})


def _full(case: dict) -> bool:
    return case["mode"] == "decode" and case["live"] == case["max_len"]


def jobs(quick: bool) -> list[Job]:
    """The rows with targets, sweeps of max_len and of bs, and a grid of bs, max_len, live, N."""
    if quick:
        problems = [Problem(mode, 3, 2048, 2, 1024) for mode in ForwardMode]
    else:
        problems = [*TARGETS, Problem(DECODE, 256, 32_768, 8, 32_768)]
        problems += [Problem(DECODE, 32, n, 3, n) for n in SWEEP_MAX_LEN]
        problems += [Problem(DECODE, bs, 32_768, 3, 32_768) for bs in SWEEP_BS]
        problems += GRID
    names = (*runnable(), ROW_COPIES)
    return [
        Job(problem.case, name, functools.partial(_measure, problem, name))
        for problem in dict.fromkeys(problems)
        for name in names
        if name != ROW_COPIES or (problem.mode is DECODE and not on_gpu())
    ]


def pages_jobs(quick: bool) -> list[Job]:
    """Every mode without the wide table."""
    small = Problem(EXTEND, 3, 2048, 2, 1024, wide_table=False, more_columns=SGLANG_COLUMNS)
    problems = [small] if quick else list(PAGES)
    return [
        Job(problem.case, name, functools.partial(_measure, problem, name))
        for problem in problems
        for name in runnable()
    ]


PAGES_SUITE = Suite(
    name="pages",
    title="Tables of pages alone against their roof",
    note="As `roofline`, with `wide_table=False`, from a pool whose rows, as SGLang's, are "
    f"{SGLANG_COLUMNS} columns longer than `max_len`. The roof counts the 4 bytes of a page that "
    "are read; memory hands out 32 at least.",
    jobs=pages_jobs,
)

SUITE = Suite(
    name="roofline",
    title="The whole job against its roof",
    note="In place, page 64, top-k 2048, tail `keep`; lengths uniform in [live/2, live]. The roof "
    "is live bytes read once and written to each row of each backend, over the bandwidth of a "
    "large copy in the same run.",
    jobs=jobs,
    plots=(
        Plot(
            "max_len",
            "One refresh, caches cold: bs 32, N = 3, rows half to all filled",
            "max_len",
            "max_len, tokens",
            lambda case: _full(case) and (case["bs"], case["N"]) == (32, 3),
            roof=True,
        ),
        Plot(
            "bs",
            "One refresh, caches cold: max_len 32,768, N = 3, rows half to all filled",
            "bs",
            "requests, bs",
            lambda case: _full(case) and (case["max_len"], case["N"]) == (32_768, 3),
            roof=True,
        ),
    ),
)
