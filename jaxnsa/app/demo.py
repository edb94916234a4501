"""The main job in small: the steps of a speculative server, computed in several ways side by side.

The batch's lengths and pool live on the device and are advanced there. A step is timed from the
call until its results are there, on a device that has just run the same step; what a step is
checked against is computed outside of that.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa.app.contenders import Contender, contenders, expected, same
from jaxnsa.app.kernel_times import kernel_times
from jaxnsa.app.request_traces import Request
from jaxnsa.app.serving import CONTEXT_LENGTH, PAGE_SIZE, Batch
from jaxnsa.metadata import NSAMetadata

_PROFILED_STEPS = 20
_COPIED = 2**27  # bytes; more than caches hold


@dataclasses.dataclass
class Row:
    """How a contender did.

    Attributes:
      name: of the contender.
      latencies: seconds of each step.
      device_us: microseconds of a step's kernels; None on a CPU.
      launches: of a step; None where nobody can tell.
      mismatches: steps in which an array was not the reference's.
      incremental: whether columns that are there already were left alone.
    """

    name: str
    incremental: bool
    latencies: list[float] = dataclasses.field(default_factory=list)
    device_us: float | None = None
    launches: float | None = None
    mismatches: int = 0

    @property
    def seconds(self) -> float:
        """Of a step: device time where there is one, otherwise the median latency."""
        if self.device_us is not None:
            return self.device_us / 1e6
        return float(np.median(self.latencies))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a demo did.

    Attributes:
      tokens: that were accepted.
      bytes_moved: by a full step on average: live elements read once and written wherever they go.
      bandwidth: bytes a second of a large copy.
      rows: of each contender, the library first.
    """

    tokens: int
    bytes_moved: float
    bandwidth: float
    rows: list[Row]


def bytes_needed(batch_size: int, num_backends: int) -> int:
    """Memory that the demo takes: pools, the tables of up to five contenders and of the check."""
    table = batch_size * CONTEXT_LENGTH * 4
    tables = 5 * 3 * num_backends + 2 * num_backends + 1
    return 2 * table + tables * (table + table // PAGE_SIZE)


def run(
    requests: Iterator[Request],
    *,
    batch_size: int,
    num_backends: int,
    steps: int,
    implementation: str | None,
    chosen: str,
    seed: int,
    progress: Callable[[int], object],
) -> Report:
    """Runs the simulation, checking every step against the reference.

    What is not in place rewrites whole tables, and is checked in every tenth step.

    Args:
      requests: endless.
      batch_size: requests in the batch.
      num_backends: draft steps, each with its own metadata buffers.
      steps: to run.
      implementation: that the library is told to take.
      chosen: that it takes.
      seed: of everything random.
      progress: called with the number of finished steps.
    """
    batch = Batch(requests, batch_size, num_backends, np.random.default_rng(seed))
    found = contenders(implementation, chosen, num_backends, batch.host)
    rows = [Row(contender.name, contender.incremental) for contender in found]
    held = jax.tree.map(np.zeros_like, expected(batch.host, num_backends, None))
    tokens, bytes_moved = 0, 0
    for step in range(steps):
        for contender, row in zip(found, rows, strict=True):
            given = jax.block_until_ready(contender.given(batch.device))
            contender.wait(contender.run(given))
            start = time.perf_counter()
            contender.wait(contender.run(given))
            row.latencies.append(time.perf_counter() - start)
        held = expected(batch.host, num_backends, held)
        bytes_moved += _bytes_moved(held, num_backends)
        wanted = [held[0]] * num_backends + [*held[1:]]
        for contender, row in zip(found, rows, strict=True):
            if contender.in_place or step % 10 == 0:
                pairs = zip(contender.metadata(), wanted, strict=True)
                row.mismatches += not all(
                    [same(actual, metadata, whole=contender.in_place) for actual, metadata in pairs]
                )
        tokens += batch.step()
        progress(step + 1)
    for contender, row in zip(found, rows, strict=True):
        _count(contender, row, contender.given(batch.device))
    return Report(tokens, bytes_moved / steps, _copy_bandwidth(), rows)


def _count(contender: Contender, row: Row, given: object) -> None:
    """Launches of a step and, on a GPU, their time."""
    if jax.default_backend() != "gpu":
        row.launches = contender.launches(given)
        return
    times = kernel_times(lambda: contender.run(given), _PROFILED_STEPS, contender.wait)
    launches = [microseconds for each in times.values() for microseconds in each]
    row.launches = len(launches) / _PROFILED_STEPS
    row.device_us = sum(launches) / _PROFILED_STEPS


def _bytes_moved(step: tuple[NSAMetadata, ...], num_backends: int) -> int:
    """Bytes of the live elements of the pool, read once in each mode, and of the live columns."""
    moved = 0
    for metadata, copies in zip(step, (num_backends, 1, 1), strict=True):
        live = np.minimum(metadata.seqlens_expanded, CONTEXT_LENGTH).astype(np.int64)
        written = (live + -(-live // PAGE_SIZE)).sum() * copies
        read = np.minimum(metadata.cache_seqlens, CONTEXT_LENGTH).sum(dtype=np.int64)
        moved += 4 * int(read + written)
    return moved


def _copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy; on a CPU, of one thread's memcpy."""
    if jax.default_backend() == "gpu":
        source = jnp.zeros(_COPIED // 4, jnp.int32)
        copy = jax.jit(lambda x: x + 1)
        times = kernel_times(lambda: copy(source), 5, jax.block_until_ready)
        return 2 * source.nbytes / (min(min(each) for each in times.values()) / 1e6)
    here, there = np.ones(_COPIED // 4, np.int32), np.zeros(_COPIED // 4, np.int32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(there, here)
        seconds.append(time.perf_counter() - start)
    return 2 * here.nbytes / min(seconds)


def draw(report: Report, file: Path) -> None:
    """A picture of the latency of every step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for row in report.rows:
        label = row.name.strip()
        if row.device_us is not None:
            label += f" (on the GPU {row.device_us:.1f} µs)"
        marker = "o" if len(row.latencies) < 10 else None
        milliseconds = np.array(row.latencies) * 1e3
        steps = np.arange(1, len(milliseconds) + 1)
        axes.plot(steps, milliseconds, label=label, linewidth=1.2, marker=marker)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step")
    axes.set_ylabel("milliseconds")
    axes.set_title("Metadata of a speculative step, from the call to its results")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
