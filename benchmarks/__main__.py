"""The command line of the benchmarks."""

import dataclasses
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import plots
from benchmarks.compare import changes
from benchmarks.readme import ROOT, every_table, generate, headlines
from benchmarks.report import Record, Report
from benchmarks.suite import Suite
from benchmarks.suites import SUITES
from jaxnsa.implementations.choice import get_kernel_info

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_OUT = Path(tempfile.gettempdir()) / "jaxnsa-benchmarks"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure jaxnsa. Results are checked against the reference.

    Runs write to a folder outside the source tree; `record` takes one over into the tree.
    """


def _options(command):
    for option in (
        click.option(
            "--quick", is_flag=True, help="Small problems, seconds on a CPU; nothing to quote."
        ),
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            default=DEFAULT_OUT,
            show_default=True,
            help="JSON, Markdown and plots go to DEVICE under this folder.",
        ),
        click.option("--commit", help="Recorded with the results. Default: what git says."),
        click.option("--device-name", help="Recorded with the results. Default: what JAX says."),
    ):
        command = option(command)
    return command


def _add(suite: Suite) -> None:
    def command(traces: tuple[Path, ...] = (), **options: Any) -> None:
        given = functools.partial(suite.jobs, traces=traces) if suite.replays else suite.jobs
        _run(dataclasses.replace(suite, jobs=given), **options)

    if suite.replays:
        command = click.option(
            "--trace",
            "traces",
            multiple=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Lengths of requests to replay, CSV or JSON lines. Default: synthetic ones.",
        )(command)
    help_text = f"{suite.title}.\n\n{suite.note}"
    main.command(suite.name, help=help_text)(_options(command))


for _suite in SUITES.values():
    _add(_suite)


@main.command("all")
@_options
def run_all(quick: bool, out: Path, commit: str | None, device_name: str | None) -> None:
    """Run every suite."""
    for suite in SUITES.values():
        _run(suite, quick, out, commit, device_name)


@main.command()
@click.argument("before", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--threshold",
    default=1.1,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Exit with status 1 where a time grew by more than this factor.",
)
def compare(before: Path, after: Path, threshold: float) -> None:
    """Show the ratio AFTER / BEFORE of every row of two JSON reports."""
    try:
        found = changes(Report.read(before), Report.read(after))
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    table = Table(title=f"{after} / {before}")
    for column in ("case", "name", "before", "after", "ratio"):
        table.add_column(column, justify="left" if column in ("case", "name") else "right")
    for change in found:
        case = ", ".join(f"{key} {value}" for key, value in change.case.items())
        numbers = ["-" if n is None else f"{n:.2f}" for n in (*change[2:], change.ratio)]
        table.add_row(case, change.name, *numbers)
    Console().print(table)
    if any(change.ratio is not None and not change.ratio <= threshold for change in found):
        sys.exit(1)


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def record(folder: Path) -> None:
    """Take a run over into benchmarks/results, and write the pages' tables anew.

    FOLDER is that of a device, such as OUT/nvidia-h200. Only what it holds is replaced.
    """
    if folder.resolve().is_relative_to(RESULTS.resolve()):
        raise click.ClickException(f"{folder}: got the records, expected the folder of a run")
    found = sorted(folder.glob("*.json"))
    if not found:
        raise click.ClickException(f"{folder}: expected the reports of a run, SUITE.json")
    try:
        reports = [Report.read(path) for path in found]
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    for path, report in zip(found, reports, strict=True):
        if path.stem != report.suite or report.suite not in SUITES:
            raise click.ClickException(
                f"{path}: got a report of {report.suite!r}, expected one of the suite of that name"
            )
    quick = [report.suite for report in reports if "--quick" in report.command]
    if quick:
        raise click.ClickException(
            f"{folder}: got --quick runs of {', '.join(quick)}, expected runs worth quoting"
        )
    shutil.copytree(folder, RESULTS / folder.name, dirs_exist_ok=True)
    _write_pages()


@main.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with status 1 if it would.")
def readme(check: bool) -> None:
    """Write the tables of README.md and of benchmarks/results/README.md from the records."""
    if not check:
        _write_pages()
    for page, text in _generated_pages().items():
        if text != page.read_text():
            raise click.ClickException(
                f"{page} differs from the records: python -m benchmarks readme"
            )


def _generated_pages() -> dict[Path, str]:
    pages = {}
    for page, write in ((README, headlines), (RESULTS / "README.md", every_table)):
        try:
            pages[page] = generate(page.read_text(), write, RESULTS)
        except ValueError as error:
            raise click.ClickException(f"{page}: {error}") from None
    return pages


def _write_pages() -> None:
    for page, text in _generated_pages().items():
        page.write_text(text)


def _run(suite: Suite, quick: bool, out: Path, commit: str | None, device_name: str | None) -> None:
    console = Console()
    jobs = suite.jobs(quick)
    if not jobs:
        console.print(f"{suite.name}: nothing that it measures is installed here")
        return
    info = get_kernel_info()
    device = device_name or info["devices"][0]
    folder = out / re.sub(r"[^a-z0-9]+", "-", device.lower())
    _check_can_be_made(folder)
    passes = jobs * (1 if quick else suite.passes)
    runs = [job.run() for job in track(passes, suite.name, console=Console(stderr=True))]
    records = [
        Record(
            job.case,
            job.name,
            min(runs[k :: len(jobs)], key=lambda metrics: metrics.get(suite.metric or "", 0)),
        )
        for k, job in enumerate(jobs)
    ]
    report = Report.of(
        suite,
        records,
        device=device,
        commit=commit or _git_commit(),
        command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        versions=info["versions"],
    )
    report.write(folder)
    if importlib.util.find_spec("matplotlib"):
        plots.draw(suite, report, folder)
    else:
        console.print("no plots, for want of matplotlib; run: pip install matplotlib", markup=False)
    console.print(report.terminal())
    console.print(f"{folder / suite.name}.json", soft_wrap=True, highlight=False)


def _check_can_be_made(folder: Path) -> None:
    """Raises before anything is measured where there could be no folder for it; leaves none."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out: {error}") from None
    for path in made:
        path.rmdir()


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    if not commit:
        return f"unknown, jaxnsa {version('jaxnsa')}"
    return f"{commit}, changed" if changed else commit


if __name__ == "__main__":
    main()
