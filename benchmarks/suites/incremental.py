"""Steps that write what changed beside full refreshes: histories of batches, and shares of rows."""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnsa
from benchmarks.measure import Call, on_gpu, step_times
from benchmarks.problem import PAGE_SIZE, TOPK
from benchmarks.replay import SPARE_POOL_ROWS, Steps, replay, totals, windows
from benchmarks.report import FULL
from benchmarks.suite import Job, Plot, Suite, runnable
from jaxnsa.app.request_traces import Request, read_trace, synthetic_requests
from jaxnsa.implementations import native_library
from jaxnsa.implementations.choice import get_kernel_info
from jaxnsa.metadata import NSAMetadata
from jaxnsa.spec import Rows, Spec

NUM_BACKENDS = 3
ROWS = ((32, 65_536, 65_536), (128, 131_072, 131_072), (1024, 32_768, 4096))
"""bs, max_len and live tokens of rows that all change alike."""
SHARES = (0, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 1)
"""Of the live columns, those that change; 0: the last one alone."""
SYNTHETIC_REQUESTS = 4000
LAUNCH_SIZES = (1, 4096, 16_384, 65_536)
"""`max_new_tokens` of steps that write no more; others are launched for whole rows."""


class Shape(NamedTuple):
    """Of a batch.

    Attributes:
      bs: requests.
      max_len: columns of the tables, in tokens.
    """

    bs: int
    max_len: int

    @property
    def spec(self) -> Spec:
        """What its tables hold."""
        rows = Rows(self.bs, self.bs, 1, 0)
        return Spec(rows, self.max_len, TOPK, PAGE_SIZE, True, "keep", NUM_BACKENDS)


def _max_new_tokens(step: Steps, shape: Shape) -> int:
    new = int((step.seq_lens - step.held).max())
    return next((size for size in LAUNCH_SIZES if new <= size), shape.max_len)


class _Arrays:
    """In-place calls of an implementation of `jaxnsa`, told `written_lens`.

    `call` makes one of a step; without `max_new_tokens` a full refresh.
    """

    def __init__(self, implementation: str, shape: Shape):
        self._options = {
            "num_backends": NUM_BACKENDS,
            "nsa_index_topk": TOPK,
            "real_page_size": PAGE_SIZE,
            "implementation": implementation,
        }
        self._pool = jnp.asarray(_pool(shape))
        spec = shape.spec
        self.out: Any = tuple(
            spec.metadata({n: jnp.zeros(a.shape, a.dtype) for n, a in spec.shapes().items()})
            for _ in range(NUM_BACKENDS)
        )

    def call(self, step: Steps, max_new_tokens: int | None) -> Call:
        lengths, rows, held = (
            jnp.asarray(a.astype(np.int32)) for a in (step.seq_lens, step.pool_rows, step.held)
        )
        options: dict[str, Any] = dict(self._options)
        if max_new_tokens is not None:
            options |= {"written_lens": held, "max_new_tokens": max_new_tokens}

        def call() -> Any:
            self.out = jaxnsa.fused_metadata_precompute_and_broadcast(
                lengths, rows, self._pool, out=self.out, **options
            )
            return self.out

        return call

    wait = staticmethod(jax.block_until_ready)

    def tables(self) -> NSAMetadata:
        return self.out[-1]


class _Tensors:
    """`BackendBuffers.update` by the path "direct", told `request_ids`: see `_Arrays`."""

    def __init__(self, shape: Shape):
        import torch

        from jaxnsa.interop.torch import BackendBuffers

        self._device = "cuda" if on_gpu() else "cpu"
        self._pool = self._tensor(_pool(shape))
        self._backends = [
            {
                name: torch.zeros(array.shape, dtype=torch.int32, device=self._device)
                for name, array in shape.spec.shapes().items()
            }
            for _ in range(NUM_BACKENDS)
        ]
        self._buffers = BackendBuffers(
            self._backends, nsa_index_topk=TOPK, real_page_size=PAGE_SIZE, path="direct"
        )

    def _tensor(self, values: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(values).to(self._device)

    def call(self, step: Steps, max_new_tokens: int | None) -> Call:
        lengths, rows = self._tensor(step.seq_lens), self._tensor(step.pool_rows)
        options: dict[str, Any] = {}
        if max_new_tokens is not None:
            ids = self._tensor(step.request_ids)
            options = {"request_ids": ids, "max_new_tokens": max_new_tokens}
        return functools.partial(self._buffers.update, lengths, rows, self._pool, **options)

    @staticmethod
    def wait(_: Any) -> None:
        if on_gpu():
            import torch

            torch.cuda.synchronize()

    def tables(self) -> NSAMetadata:
        return NSAMetadata(**{n: t.cpu().numpy() for n, t in self._backends[-1].items()})


def _ways() -> dict[str, Callable[[Shape], Any]]:
    """Everything that refreshes here, by name; on a GPU, where launches tell steps apart, what has
    equally many in each.
    """
    ways: dict[str, Callable] = {}
    platform = "gpu" if on_gpu() else "cpu"
    if importlib.util.find_spec("torch") and not native_library.unavailable(platform):
        ways["direct"] = _Tensors
    names = [name for name in runnable() if not (name == "xla" and on_gpu())]
    return ways | {name: functools.partial(_Arrays, name) for name in names}


@functools.lru_cache(1)
def _pool(shape: Shape) -> np.ndarray:
    """int32 [bs + SPARE_POOL_ROWS, max_len]."""
    rows = shape.bs + SPARE_POOL_ROWS
    return np.random.default_rng(0).integers(0, 2**22, (rows, shape.max_len), dtype=np.int32)


def _check(tables: Any, step: Steps, shape: Shape) -> None:
    """AssertionError where a live column is not the pool's."""
    for i, (row, length) in enumerate(zip(step.pool_rows, step.seq_lens, strict=True)):
        tokens = _pool(shape)[row, :length]
        pairs = (("page_indices", tokens), ("real_page_table", tokens[::PAGE_SIZE] // PAGE_SIZE))
        for name, expected in pairs:
            if not np.array_equal(np.asarray(getattr(tables, name)[i])[: len(expected)], expected):
                raise AssertionError(f"row {i} of {name} is wrong for {shape}")


def _bytes_moved(step: Steps, full: bool) -> int:
    """Bytes of the pool that are read, and of columns that are written to all backends."""
    first = np.zeros_like(step.held) if full else step.held
    columns = (step.seq_lens - first).sum()
    pages = (-(-step.seq_lens // PAGE_SIZE) - -(-first // PAGE_SIZE)).sum()
    return 4 * int(columns + NUM_BACKENDS * (columns + pages))


def _metrics(times: Sequence[float], steps: Sequence[Steps], full: bool) -> dict[str, float]:
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    return {
        "step_us": float(np.mean(times)),
        "step_us_p50": p50,
        "step_us_p99": p99,
        "bytes_moved": float(np.mean([_bytes_moved(step, full) for step in steps])),
    }


def _case(history: str, slots: str, shape: Shape, live: float, changed: float) -> dict[str, Any]:
    return {
        "history": history,
        "slots": slots,
        **shape._asdict(),
        "live": round(live),
        "changed_percent": float(f"{100 * changed:.3g}"),
    }


def _replayed(
    way: Callable, shape: Shape, runs: Sequence[Sequence[Steps]], full: bool
) -> dict[str, float]:
    """Of all steps but the first of each run, which writes everything anew."""
    tables = way(shape)
    firsts = [run[0]._replace(held=np.zeros_like(run[0].held)) for run in runs]
    steps = [step for first, run in zip(firsts, runs, strict=True) for step in (first, *run[1:])]
    sizes = [None if full else _max_new_tokens(step, shape) for step in steps]
    times = step_times(list(map(tables.call, steps, sizes)), tables.wait)
    _check(tables.tables(), steps[-1], shape)
    timed = [k for k in range(len(steps)) if k % len(runs[0])]
    return _metrics([times[k] for k in timed], [steps[k] for k in timed], full)


def _replay_jobs(history: str, requests: Sequence[Request], quick: bool) -> Iterator[Job]:
    """A history in both policies, by PyTorch's path and JAX's default."""
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    max_len = min(1 << longest.bit_length(), 131_072)
    count, length = (2, 4) if quick else (10, 31) if on_gpu() else (4, 6)
    default = get_kernel_info()["default"]
    ways = {name: way for name, way in _ways().items() if name in ("direct", default)}
    for bs, compacts in itertools.product((3,) if quick else (32, 128), (False, True)):
        shape = Shape(bs, max_len)
        make = functools.partial(replay, requests, bs, max_len, compacts)
        total = totals(make())
        if total.steps < count * length:
            continue
        runs = windows(make(), total.steps, count, length)
        slots = "compacted" if compacts else "stay"
        live, changed = total.live / total.steps / bs, total.changed / total.live
        case = _case(history, slots, shape, live, changed)
        for name, way in ways.items():
            for label, full in ((name, False), (name + FULL, True)):
                yield Job(case, label, functools.partial(_replayed, way, shape, runs, full))


@functools.lru_cache(1)
def _shares(way: Callable, shape: Shape, live: int) -> tuple[dict[float, dict], dict]:
    """By the share of columns that change, metrics of steps that write them; and of full ones.

    Rows become shorter by that share, and as long as they were by the step that is timed.
    """
    tables = way(shape)
    ids, rows = np.arange(shape.bs), np.arange(shape.bs, dtype=np.int32)

    def timed(share: float, full: bool) -> dict[str, float]:
        held = np.full(shape.bs, live - max(1, round(share * live)))
        step = Steps(1, ids, rows, np.full(shape.bs, live), held)
        size = None if full else _max_new_tokens(step, shape)
        shorter = tables.call(step._replace(seq_lens=held), size)
        tables.wait(tables.call(step._replace(held=np.zeros_like(held)), size)())
        calls = [shorter, tables.call(step, size)] * (50 if on_gpu() else 3)
        times = step_times(calls, tables.wait)[1::2]
        _check(tables.tables(), step, shape)
        return _metrics(times, [step], full)

    return {share: timed(share, False) for share in SHARES}, timed(0, True)


def _of_share(way: Callable, shape: Shape, live: int, share: float, full: bool) -> dict:
    """Metrics; "break_even_percent": the share from which on a full refresh is as fast."""
    by_share, refresh = _shares(way, shape, live)
    if full:
        return refresh
    slower = [metrics["step_us"] - refresh["step_us"] for metrics in by_share.values()]
    even = 1.0 if slower[-1] < 0 else float(np.interp(0, np.maximum.accumulate(slower), SHARES))
    return by_share[share] | {"break_even_percent": 100 * even}


def _share_jobs(shapes: Sequence[tuple[int, int, int]]) -> Iterator[Job]:
    for bs, max_len, live in shapes:
        shape = Shape(bs, max_len)
        for name, way in _ways().items():
            for label, full in ((name, False), (name + FULL, True)):
                for share in SHARES:
                    case = _case("all rows alike", "stay", shape, live, share or 1 / live)
                    run = functools.partial(_of_share, way, shape, live, share, full)
                    yield Job(case, label, run)


def jobs(quick: bool, traces: Sequence[Path] = ()) -> list[Job]:
    """Rows that all change alike, and replays of traces."""
    histories = {path.stem: read_trace(path) for path in traces}
    if not histories:
        synthetic = synthetic_requests(np.random.default_rng(0))
        histories = {"synthetic": list(itertools.islice(synthetic, SYNTHETIC_REQUESTS))}
    if quick:
        some = next(iter(histories.values()))[:40]
        histories = {
            "synthetic": [Request(r.prompt_tokens % 200, r.output_tokens % 9) for r in some]
        }
    found = list(_share_jobs([(3, 256, 200)] if quick else ROWS))
    for history, requests in histories.items():
        found += _replay_jobs(history, requests, quick)
    return found


def _plot(bs: int, live: int) -> Plot:
    return Plot(
        f"incremental_{bs}",
        f"One step that writes a share: {bs} rows of {live:,} tokens, N = 3",
        "changed_percent",
        "columns that change, percent",
        lambda case: (case["history"], case["bs"]) == ("all rows alike", bs),
        log=False,
    )


SUITE = Suite(
    name="incremental",
    title="Steps that write what changed, beside full refreshes",
    note="Decode in place, N = 3, both tables, page 64. `direct` is PyTorch's "
    "`BackendBuffers.update`, told `request_ids`; the others are JAX's implementations, told "
    "`written_lens`. Launches are sized by `max_new_tokens` of 1, 4,096, 16,384, 65,536 or all. "
    "Histories are continuous batching of a trace's requests: where slots stay, the next request "
    "takes that of one that finished, otherwise those behind it move up. `live` and "
    "`changed_percent`, columns that a row did not hold in the step before, are means of all "
    "steps; times are those of runs of consecutive steps, evenly spread.",
    jobs=jobs,
    plots=tuple(_plot(bs, live) for bs, _, live in ROWS),
    metric="step_us",
    replays=True,
)
