"""What a GPU spends in kernels, from JAX's profiler."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernel_times(call: Callable[[], Any], calls: int, wait: Callable) -> dict[str, list[float]]:
    """Microseconds of each launch of each kernel that some calls make, by the kernel's name.

    Args:
      call: makes one call.
      calls: how many to profile, after three to warm up.
      wait: waits for a call's result.
    """
    for _ in range(3):
        wait(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = call()
            wait(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    times: dict[str, list[float]] = collections.defaultdict(list)
    for plane in profile.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    times[event.name].append(event.duration_ns / 1e3)
    return times
