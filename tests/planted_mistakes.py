"""Plants mistakes in copies of this tree, one at a time, and runs the tests that should see them.

    python tests/planted_mistakes.py [--only NAME]... [--list]

They are those of mistakes.py. A mistake replaces a text that occurs exactly once in a file. It is
caught if a test fails with it and passes without; those in `ffi/` are compiled first, the CUDA
kernels for the simulator of tests/cuda_simulator, without nvcc. Exits with status 1 if a mistake is
not caught or cannot be planted. Takes what `pip install '.[test,torch]' nanobind cmake ninja`
installs, a C++ compiler, no GPU, and about twenty minutes on two CPUs.
"""

import concurrent.futures
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
from mistakes import MISTAKES, Mistake
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 400  # for the tests of one mistake; whoever takes longer has not caught it
TESTS_FAILED = 1  # pytest's exit status; another one, but for a crash, says nothing about a mistake


class Result(NamedTuple):
    """Whether a mistake was caught, by which tests (unknown after a crash), or what went wrong."""

    mistake: Mistake
    verdict: str
    failed: list[str]
    seconds: float


CAUGHT, CRASHED, NOT_CAUGHT = "caught", "caught by a crash", "NOT CAUGHT"


class Builder:
    """A copy of the tree, in a folder of its own, and the native library that was built of it."""

    def __init__(self, folder: Path):
        self.tree = folder / "tree"
        self._folder = folder
        listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, text=True).split("\0"):
            if name and (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.tree / name)

    def build(self, simulated: bool) -> Path:
        """Compiles what has changed; RuntimeError where it does not compile.

        Returns:
          A folder for PYTHONPATH with a distribution of jaxnsa that has the library and no more.
        """
        kind = "simulated" if simulated else "cpu"
        build, site = self._folder / f"{kind}-build", self._folder / f"{kind}-site"
        options = {
            "NVCC": "OFF",
            "JAXNSA_SIMULATE_CUDA": "ON" if simulated else "OFF",
            "CMAKE_BUILD_TYPE": "Debug",
            "Python_EXECUTABLE": sys.executable,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        for command in (
            ["cmake", "-G", "Ninja", *defines, "-S", self.tree / "ffi", "-B", build],
            ["cmake", "--build", build],
            ["cmake", "--install", build, "--prefix", site],
        ):
            done = subprocess.run(command, capture_output=True, text=True, env=_environment())
            if done.returncode:
                raise RuntimeError(f"{kind} library: {(done.stdout + done.stderr)[-2000:]}")
        metadata = site / "jaxnsa-0.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text("Metadata-Version: 2.1\nName: jaxnsa\nVersion: 0\n")
        return site

    def test(self, site: Path, arguments: list[str]) -> tuple[int, list[str], str]:
        """Pytest's exit status, the tests that failed, and what it printed."""
        cache = self._folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-o", f"cache_dir={cache}"]
        environment = _environment() | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [*command, *arguments],
                cwd=self.tree,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return 2, [], f"took more than {SECONDS} s"
        failed = cache / "v" / "cache" / "lastfailed"
        return (
            done.returncode,
            list(json.loads(failed.read_text())) if failed.exists() else [],
            done.stdout,
        )


def _environment() -> dict[str, str]:
    """With the programs that were installed beside this Python, such as cmake and ninja."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _simulated(mistake: Mistake) -> bool:
    return mistake.file.startswith("ffi/cuda/")


def _try(mistake: Mistake, builder: Builder, unchanged: Path) -> Result:
    """Plants a mistake, runs its tests and takes it back."""
    start = time.perf_counter()
    path = builder.tree / mistake.file
    text = path.read_text() if path.exists() else ""
    failed: list[str] = []
    if (count := text.count(mistake.old)) != 1:
        verdict = f"{mistake.file}: the old text occurs {count} times, expected once"
        return Result(mistake, verdict, failed, 0)
    path.write_text(text.replace(mistake.old, mistake.new))
    try:
        native = mistake.file.startswith("ffi/")
        site = builder.build(_simulated(mistake)) if native else unchanged
        words = shlex.split(mistake.tests)
        tests = [f"tests/{word}" if word.startswith("test_") else word for word in words]
        status, failed, output = builder.test(site, ["-x", *tests])
        verdict = {TESTS_FAILED: CAUGHT, 0: NOT_CAUGHT}.get(status, output[-2000:])
        verdict = CRASHED if status < 0 else verdict
    except RuntimeError as error:
        verdict = f"does not compile: {error}"
    finally:
        path.write_text(text)
    return Result(mistake, verdict, failed, time.perf_counter() - start)


def _fail_anyway(results: list[Result], builder: Builder) -> set[str]:
    """The tests that caught a mistake and fail without it too."""
    failing: set[str] = set()
    for simulated in (False, True):
        found = {t for r in results if _simulated(r.mistake) == simulated for t in r.failed}
        if found:
            _, failed, _ = builder.test(builder.build(simulated), sorted(found))
            failing.update(failed)
    return failing


@click.command()
@click.option("--only", multiple=True, help="A mistake, or part of the names of several.")
@click.option("--list", "only_list", is_flag=True, help="Print the names of all mistakes.")
def main(only: tuple[str, ...], only_list: bool) -> None:
    """Plant mistakes and run the tests that should see them."""
    chosen = [m for m in MISTAKES if not only or any(part in m.name for part in only)]
    if only_list or not chosen:
        click.echo("\n".join(m.name for m in MISTAKES))
        sys.exit(not only_list)
    console = Console()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        workers = min(os.cpu_count() or 1, len(chosen))
        builders = [Builder(Path(name, str(k))) for k in range(workers)]
        free: queue.SimpleQueue[Builder] = queue.SimpleQueue()
        unchanged = Path(shutil.copytree(builders[0].build(False), Path(name, "unchanged")))
        for builder in builders:
            free.put(builder)

        def attempt(mistake: Mistake) -> Result:
            builder = free.get()
            try:
                result = _try(mistake, builder, unchanged)
            finally:
                free.put(builder)
            console.print(escape(f"{result.seconds:4.0f} s  {mistake.name}: {result.verdict}"))
            return result

        # Those that are compiled first: they take longest.
        order = sorted(chosen, key=lambda m: (not m.file.startswith("ffi/"), m.file))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(attempt, order))
        anyway = _fail_anyway(results, builders[0])
    table = Table()
    for column in ("mistake", "result", "by"):
        table.add_column(column, overflow="fold")
    good = 0
    for mistake, verdict, failed, _ in results:
        if anyway.intersection(failed):
            verdict = "its test fails without it too"
        good += verdict in (CAUGHT, CRASHED)
        by = ", ".join(test.removeprefix("tests/") for test in failed)
        table.add_row(mistake.name, escape(verdict.splitlines()[-1]), escape(by))
    console.print(table)
    took = time.perf_counter() - start
    console.print(f"{good} of {len(results)} mistakes caught, {took / 60:.0f} minutes")
    sys.exit(good < len(results))


if __name__ == "__main__":
    main()
