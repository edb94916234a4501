"""What a GPU spends in kernels, from JAX's profiler."""

import collections
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
      name: of the kernel, as the profiler has it.
      microseconds: of device time.
    """

    name: str
    microseconds: float


def kernel_times(call: Callable[[], Any], calls: int, wait: Callable) -> dict[str, list[float]]:
    """Microseconds of each launch of each kernel that some calls make, by the kernel's name.

    Args:
      call: makes one call.
      calls: how many to profile, after three to warm up.
      wait: waits for a call's result.
    """
    for _ in range(3):
        wait(call())
    times: dict[str, list[float]] = collections.defaultdict(list)
    for launch in launches([call] * calls, wait):
        times[launch.name].append(launch.microseconds)
    return times


def launches(calls: Iterable[Callable[[], Any]], wait: Callable) -> list[Launch]:
    """The launches of calls, in the order in which they began."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for call in calls:
                result = call()
            wait(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    found = [
        (event.start_ns, Launch(event.name, event.duration_ns / 1e3))
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return [launch for _, launch in sorted(found, key=lambda pair: pair[0])]
