"""Timing calls: device time from the profiler, host time to issue, latency end to end."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnsa.app import kernel_times as profiled

Call = Callable[[], Any]
WARM_UP_SECONDS = 0.1
"""Calls go on for so long before they are timed; the first hundreds take a third longer."""
MOST_CALLS = 1000
"""Calls that are timed, however many a suite asks for."""
COLD_BYTES = 128 * 2**20
"""More than the caches of any GPU or CPU that this is run on hold."""


class Kernel(NamedTuple):
    """One kernel of a measured call.

    Attributes:
      name: as the profiler has it.
      launches: launches per call.
      microseconds: median device time of a launch.
      p10, p90: its 10th and 90th percentiles.
    """

    name: str
    launches: float
    microseconds: float
    p10: float
    p90: float


def on_gpu() -> bool:
    """Whether there is device time to measure."""
    return jax.default_backend() == "gpu"


def rotations(bytes_touched: int, bytes_held: int) -> int:
    """How many sets of inputs and outputs to cycle through, so that no call finds its own cached.

    Args:
      bytes_touched: what one call reads and writes.
      bytes_held: memory of one set.
    """
    wanted = -(-COLD_BYTES // max(bytes_touched, 1))
    return max(1, min(wanted, 64, 2**32 // max(bytes_held, 1)))


def kernel_times(
    call: Call, calls: int = 50, wait: Callable = jax.block_until_ready
) -> list[Kernel]:
    """Every kernel that `call` launches on the GPU, over `calls` calls after three to warm up."""
    return [
        Kernel(name, len(times) / calls, *np.percentile(times, [50, 10, 90]).tolist())
        for name, times in profiled.kernel_times(call, calls, wait).items()
    ]


def step_times(calls: Sequence[Call], wait: Callable = jax.block_until_ready) -> list[float]:
    """Microseconds of each of different calls, made in turn once before.

    On a GPU of its kernels, of which each call launches equally many; elsewhere until its result is
    there.
    """
    for call in calls:
        wait(call())
    if on_gpu():
        launches = [launch.microseconds for launch in profiled.launches(calls, wait)]
        if not launches or len(launches) % len(calls):
            raise AssertionError(f"{len(launches)} launches of {len(calls)} calls")
        return np.reshape(launches, (len(calls), -1)).sum(1).tolist()
    times = []
    for call in calls:
        start = time.perf_counter()
        wait(call())
        times.append((time.perf_counter() - start) * 1e6)
    return times


def host_times(
    calls: Sequence[Call], count: int = 50, wait: Callable = jax.block_until_ready
) -> dict[str, float]:
    """What a call costs the host, over `count` of them.

    Args:
      calls: the same call on different memory, taken in turn.
      count: calls to time.
      wait: waits for a call's result.

    Returns:
      Microseconds, with their 10th and 90th percentiles: "latency_us", median from the call to its
      result on the device; "issue_us", median until the call returns.
    """
    for call in calls:
        wait(call())
    cycle = itertools.cycle(calls)
    start = time.perf_counter()
    while time.perf_counter() < start + WARM_UP_SECONDS:
        wait(next(cycle)())
    latencies, issues = [], []
    count = min(count, MOST_CALLS)
    for _ in range(count):
        call = next(cycle)
        start = time.perf_counter()
        result = call()
        issued = time.perf_counter()
        wait(result)
        latencies.append(time.perf_counter() - start)
        issues.append(issued - start)
    metrics: dict[str, float] = {}
    for name, seconds in (("latency_us", latencies), ("issue_us", issues)):
        p10, median, p90 = (np.percentile(seconds, [10, 50, 90]) * 1e6).tolist()
        metrics |= {name: median, f"{name}_p10": p10, f"{name}_p90": p90}
    return metrics


def timing(
    calls: Sequence[Call],
    count: int = 50,
    wait: Callable = jax.block_until_ready,
    cached: bool = False,
) -> dict[str, float]:
    """What a call costs the host and the device, over `count` of them.

    Args:
      calls, count, wait: as in `host_times`.
      cached: one call is repeated that finds its inputs in the caches.

    Returns:
      What `host_times` does, and on a GPU in microseconds "device_us", median time of its kernels
      in turns, with the same percentiles, unless `cached`, and "hot_device_us", the same of the
      first call repeated; and "launches", per call.
    """
    metrics = host_times(calls, count, wait)
    if on_gpu():
        count, cycle = min(count, MOST_CALLS), itertools.cycle(calls)
        kernels = kernel_times(calls[0], count, wait)
        metrics["hot_device_us"] = sum(k.launches * k.microseconds for k in kernels)
        metrics["launches"] = sum(k.launches for k in kernels)
        if not cached:
            kernels = kernel_times(lambda: next(cycle)(), count, wait)
            metrics["device_us"] = sum(k.launches * k.microseconds for k in kernels)
            metrics["device_us_p10"] = sum(k.launches * k.p10 for k in kernels)
            metrics["device_us_p90"] = sum(k.launches * k.p90 for k in kernels)
    return metrics
