"""The command line: `jaxnsa demo`, `jaxnsa verify`, `jaxnsa info`."""

import collections
import importlib.util
import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxnsa.app import demo as simulation
from jaxnsa.app import verify as verification
from jaxnsa.app.fuzz import search as fuzzing
from jaxnsa.app.request_traces import read_trace, synthetic_requests
from jaxnsa.config import settings
from jaxnsa.implementations import IMPLEMENTATIONS
from jaxnsa.implementations.choice import (
    ImplementationUnavailableError,
    candidates,
    choose,
    get_kernel_info,
)
from jaxnsa.implementations.measurements import (
    MEASURED_ON,
    MEASUREMENTS,
    Call,
    measured_platform,
    nearest,
    rule,
)
from jaxnsa.spec import MAX_BACKENDS, MAX_LEN, MAX_ROWS

console = Console()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jaxnsa")
def main() -> None:
    """Attention metadata for DeepSeek sparse attention, in one launch for all backends."""
    try:
        candidates(None, settings(), jax.default_backend(), Call())
    except ValueError as error:  # a setting in the environment
        raise click.ClickException(str(error)) from None
    except (RuntimeError, AssertionError) as error:  # JAX's own setting
        platforms = os.environ.get("JAX_PLATFORMS")
        found = str(error) or "unset it, or use cpu"
        raise click.ClickException(
            f"JAX_PLATFORMS: got {platforms!r}, expected platforms that JAX finds here: {found}"
        ) from None


@main.command()
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Request lengths: an Azure LLM inference or a Mooncake trace, CSV or JSON lines, plain "
    "or gzip. Default: lengths drawn from a distribution fitted to those traces.",
)
@click.option(
    "--batch-size",
    default=32,
    show_default=True,
    type=click.IntRange(1, 2**31 // simulation.CONTEXT_LENGTH),  # KV slots are int32
)
@click.option(
    "--num-backends",
    default=3,
    show_default=True,
    type=click.IntRange(1, MAX_BACKENDS),
    help="Draft steps, each with its own metadata buffers.",
)
@click.option("--steps", default=50, show_default=True, type=click.IntRange(1))
@click.option(
    "--implementation",
    metavar="NAME",
    help="What computes: " + ", ".join(IMPLEMENTATIONS) + ". Default: the fastest that runs here.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Of everything random."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Draw each step's time; needs matplotlib.",
)
def demo(
    trace: Path | None,
    batch_size: int,
    num_backends: int,
    steps: int,
    implementation: str | None,
    seed: int,
    plot: Path | None,
) -> None:
    """Run the main job: the metadata of a speculative server's steps, computed in several ways.

    Simulates continuous batching. Requests arrive from a trace, a page allocator fills the
    request-to-token pool on the device, and each step drafts tokens with all backends, verifies
    them and extends by those that are accepted. The table compares this library with the same
    computed N times by plain jnp under jax.jit, and with PyTorch's ways where it is installed. What
    is filled in place is checked in each step, every element, against the NumPy reference; what
    rewrites whole tables in every tenth, as far as they are live.

    The roof is the bytes of all live columns, which a full refresh moves, over the bandwidth of a
    large copy; an incremental one writes only what is new. Launches are those of a whole step: of
    this library's, one for each of the three modes, the others read the results and, where it is
    incremental, keep account of rows; on a CPU they are the operations of the compiled step. Exits
    with status 1 on any mismatch.
    """
    try:
        call = Call(requests=batch_size, num_backends=num_backends, even=False)  # of all modes
        name = choose(implementation, settings(), jax.default_backend(), call)
        requests = (
            itertools.cycle(read_trace(trace))
            if trace
            else synthetic_requests(np.random.default_rng(seed))
        )
    except (ValueError, ImplementationUnavailableError) as error:
        raise click.ClickException(str(error)) from None
    if plot is not None:
        _check_can_be_drawn(plot)
    needed = simulation.bytes_needed(batch_size, num_backends)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed:
        raise click.ClickException(
            f"{batch_size} requests and {num_backends} backends take {needed / 1e9:.1f} GB, this "
            f"machine has {installed / 1e9:.1f} GB"
        )
    with _progress() as progress:
        task = progress.add_task("decode steps", total=steps)
        report = simulation.run(
            requests,
            batch_size=batch_size,
            num_backends=num_backends,
            steps=steps,
            implementation=implementation,
            chosen=name,
            seed=seed,
            progress=lambda done: progress.update(task, completed=done),
        )
    console.print(_demo_table(report, batch_size, num_backends, steps))
    if plot is not None:
        simulation.draw(report, plot)
    if any(row.mismatches for row in report.rows):
        sys.exit(1)


def _check_can_be_drawn(plot: Path) -> None:
    """Raises before anything is measured where there could be no picture of it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException(
            "--plot: needs matplotlib, which is not installed; run: pip install matplotlib"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix and plot.suffix[1:].lower() not in kinds:
        raise click.ClickException(
            f"--plot: got {plot.suffix}, expected one of {', '.join(sorted(kinds))}"
        )
    if not os.access(plot.parent, os.W_OK):
        raise click.ClickException(
            f"--plot: got {plot}, expected a file in a folder that can be written to"
        )


def _demo_table(report: simulation.Report, batch_size: int, num_backends: int, steps: int) -> Table:
    table = Table(
        title=f"bs {batch_size}, N = {num_backends}, context {simulation.CONTEXT_LENGTH:,}: "
        f"{_bytes(report.bytes_moved)} moved a step",
        caption=f"decode, verify, draft extend; steps: {steps:,}, accepted: {report.tokens:,}",
    )
    on_gpu = report.rows[0].device_us is not None
    table.add_column("computed by", no_wrap=True)
    columns = ("p50 ms", "p99 ms", *(["GPU µs"] if on_gpu else []), "launches", "of roof", "wrong")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        share = report.bytes_moved / report.bandwidth / row.seconds
        roof = f"{100 * share:.2g}%" if share <= 1 else "in cache"
        table.add_row(
            row.name,
            *_percentiles(row.latencies),
            *([f"{row.device_us:.1f}"] if row.device_us is not None else []),
            "-" if row.launches is None else f"{row.launches:g}",
            "-" if row.incremental else roof,
            str(row.mismatches),
        )
    return table


def _bytes(number: float) -> str:
    """A number of bytes in three digits."""
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


@main.command()
@click.option("--cases", default=500, show_default=True, type=click.IntRange(1))
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="The same seed gives the same cases.",
)
@click.option(
    "--fuzz",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Draw programs of calls for so long instead; needs hypothesis.",
)
def verify(cases: int, seed: int, fuzz: float | None) -> None:
    """Compare every implementation that runs here with the NumPy reference.

    Random shapes, values and options, the corner cases among them. Exits with status 1 on any
    mismatch, or where an implementation raises an error, and prints the smallest failing case as a
    program.

    With --fuzz, programs of many steps: calls of every public function in every way that JAX can
    be asked to make them, PyTorch tensors where PyTorch is installed, and wrong arguments, which
    are to be refused by name. They run in child processes, whose crash is a failure like others.
    """
    if fuzz is not None:
        if math.isnan(fuzz):
            raise click.BadParameter("got nan, expected seconds", param_hint="--fuzz")
        _fuzz(fuzz, seed)
        return
    info = get_kernel_info()["implementations"]
    runnable = [name for name, state in info.items() if state["available"]]
    ran: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: dict[tuple[str, str], list[verification.Case]] = collections.defaultdict(list)
    with _progress() as progress:
        for case in progress.track(
            verification.random_cases(cases, seed), total=cases, description="cases"
        ):
            ran.update((name, case.title) for name in runnable)
            for name in case.failing(runnable):
                failures[name, case.title].append(case)
    table = Table(title=f"{cases} random cases, seed {seed}")
    table.add_column("implementation")
    table.add_column("function")
    table.add_column("cases", justify="right")
    table.add_column("mismatches", justify="right")
    for key in sorted(ran):
        table.add_row(*key, str(ran[key]), str(len(failures[key])))
    console.print(table)
    for name in sorted(set(info) - set(runnable)):
        reason = info[name]["reason"].partition("; ")[0]
        console.print(f"skipped {name}: {escape(reason)}", no_wrap=True, overflow="ellipsis")
    failed = [(name, case) for (name, _), found in failures.items() for case in found]
    if failed:
        name, case = min(failed, key=lambda f: (len(f[1].seq_lens), f[1].req_to_token.size))
        console.print("The smallest failing case:\n")
        click.echo(verification.shrink(case, name).code(name))
        sys.exit(1)


@main.command()
@click.option(
    "--explain",
    is_flag=True,
    help="Tell which implementation a broadcast of each SHAPE takes, and why.",
)
@click.argument("shapes", metavar="[SHAPE]...", nargs=-1)
def info(explain: bool, shapes: tuple[str, ...]) -> None:
    """Show versions, devices, and which implementations run here or why they do not.

    A SHAPE is bs, max_len and N, such as 32,65536,3; without one, --explain takes those that were
    measured.
    """
    if shapes and not explain:
        raise click.UsageError(f"got {' '.join(shapes)}, expected --explain before it")
    kernels = get_kernel_info()
    if explain:
        for shape in _shapes(shapes, kernels["platform"]):
            _explain(*shape, kernels)
        return
    for package, version in kernels["versions"].items():
        console.print(f"{package} {version}", highlight=False)
    console.print(f"devices: {', '.join(kernels['devices'])} ({kernels['platform']})")
    console.print(f"strategy: {kernels['strategy']}")
    table = Table()
    table.add_column("implementation")
    table.add_column("version")
    table.add_column("state")
    for name, state in kernels["implementations"].items():
        described = "available" if state["available"] else "cannot run here"
        table.add_row(
            name,
            state["version"] or "-",
            described + (", default" if name == kernels["default"] else ""),
        )
    console.print(table)
    for name, state in kernels["implementations"].items():
        if not state["available"]:
            click.echo(click.wrap_text(f"{name} {state['reason']}", console.width, "", "  "))
            continue
        for function, variants in state["variants"].items():
            console.print(f"{name} {function}: {', '.join(variants)}", highlight=False)


def _fuzz(seconds: float, seed: int) -> None:
    if missing := fuzzing.unavailable():
        raise click.ClickException(missing)
    info = get_kernel_info()["implementations"]
    names = settings().implementation or [n for n, state in info.items() if state["available"]]
    done = fuzzing.Report()
    with _progress() as progress:
        task = progress.add_task("calls", total=None)
        for done in fuzzing.run(seconds, seed, names):
            progress.update(task, completed=done.counts.total())
    table = Table(title=f"random programs for {seconds:g} seconds, seed {seed}")
    table.add_column("computed by")
    table.add_column("call", overflow="fold")
    table.add_column("calls", justify="right")
    for key in sorted(done.counts | done.refused):
        table.add_row(*key, f"{done.counts[key]:,}")
    table.add_row("all", "", f"{done.counts.total():,}")
    console.print(table)
    if done.finding:
        console.print("The first failing program, made smaller:\n")
        click.echo(done.finding.program)
        click.echo(done.finding.error)
        sys.exit(1)


def _shapes(texts: tuple[str, ...], platform: str) -> list[tuple[int, int, int]]:
    """bs, max_len and N of each shape."""
    if not texts:
        measured = [m for m in MEASUREMENTS if m.platform == measured_platform(platform)]
        return list(dict.fromkeys((m.bs, m.max_len, m.num_backends) for m in measured))
    try:
        numbers = [int(number) for text in texts for number in text.split(",")]
    except ValueError:
        numbers = []
    most = (MAX_ROWS, MAX_LEN, MAX_BACKENDS)
    if (
        not numbers
        or len(numbers) % 3
        or any(not 0 < n <= m for n, m in zip(numbers, itertools.cycle(most), strict=False))
    ):
        raise click.UsageError(
            f"SHAPE: got {' '.join(texts)!r}, expected three ints from 1 to {MAX_ROWS}, {MAX_LEN} "
            f"and {MAX_BACKENDS}, such as 32,65536,3"
        )
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def _explain(bs: int, max_len: int, num_backends: int, kernels: dict[str, Any]) -> None:
    platform, here = kernels["platform"], settings()

    def detail(text: str) -> None:
        click.echo(click.wrap_text(text, console.width, "  ", "  "))

    call = Call(requests=bs, num_backends=num_backends)
    tried = candidates(None, here, platform, call)
    try:
        name = choose(None, here, platform, call)
        taken = f"takes {name}"
    except ImplementationUnavailableError:
        name, taken = None, "finds nothing that can run"
    click.echo(f"bs {bs}, max_len {max_len}, N {num_backends} on this {platform}: {taken}")
    decided = rule(platform, call)
    if here.implementation is not None:
        detail(f"the settings name {', '.join(tried)}")
    else:
        detail(f"order: {', '.join(tried)}: {decided.reason}")
    for skipped in tried[: tried.index(name) if name else None]:
        reason = kernels["implementations"][skipped]["reason"]
        detail(f"{skipped} cannot run here: {reason}")
    m = nearest(platform, bs, max_len, num_backends)
    times = sorted(m.microseconds.items(), key=lambda item: item[1])
    detail(
        f"nearest shape measured ({MEASURED_ON[measured_platform(platform)]}): "
        f"bs {m.bs}, max_len {m.max_len}, N {m.num_backends}, live {m.live}: "
        + ", ".join(f"{name} {time:g}" for name, time in times)
        + " microseconds"
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _percentiles(latencies: list[float]) -> tuple[str, str]:
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return f"{p50:.3f}", f"{p99:.3f}"
