"""Measuring: device time of kernels from the profiler."""

import collections
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """One kernel of a measured call.

    Attributes:
      name: as the profiler has it.
      launches: launches per call.
      microseconds: median device time of a launch.
    """

    name: str
    launches: float
    microseconds: float


def kernel_times(call: Callable[[], Any], calls: int = 50) -> list[Kernel]:
    """Every kernel that `call` launches on the GPU, over `calls` calls after three to warm up."""
    for _ in range(3):
        jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    durations: dict[str, list[float]] = collections.defaultdict(list)
    for plane in profile.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    durations[event.name].append(event.duration_ns / 1e3)
    return [
        Kernel(name, len(times) / calls, statistics.median(times))
        for name, times in durations.items()
    ]


def device_time(call: Callable[[], Any], calls: int = 50) -> float:
    """Microseconds of device time in one call: its launches times their medians."""
    return sum(k.launches * k.microseconds for k in kernel_times(call, calls))
