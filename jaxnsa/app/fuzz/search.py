"""The search: Hypothesis draws programs, which run in child processes that may crash."""

import collections
import contextlib
import dataclasses
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxnsa.app.fuzz import kinds
from jaxnsa.app.fuzz.program import CPU_DEVICES, Step, error_of, line_of, run_step, source_of
from jaxnsa.app.fuzz.smaller import plainer, without_steps
from jaxnsa.app.fuzz.steps import Refused, Session

_CALLS = 12  # kinds of them, each compiled once, that some programs share
_PROGRAMS = 6  # of the same kinds
_STEPS = 30  # of a program
_MORE = (0, 10, 100)  # calls of a step, but for the first
_ROUNDS = 20  # of kinds in one child, whose memory grows
_PATIENCE_SECONDS = 600.0  # for a child that makes a program smaller
_TIMED_OUT = 124


@dataclasses.dataclass(frozen=True)
class Finding:
    """A program that fails.

    Attributes:
      program: its source, made as small as it got.
      error: what it ends with.
    """

    program: str
    error: str


@dataclasses.dataclass
class Report:
    """What a search did.

    Attributes:
      counts: calls by what computed and what was called.
      refused: calls that an implementation does not compute, likewise.
      finding: the first program that failed, if one did.
    """

    counts: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    refused: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    finding: Finding | None = None


def unavailable() -> str | None:
    """Why nothing can be drawn here; None where it can."""
    if importlib.util.find_spec("hypothesis") is None:
        return (
            "hypothesis is not installed, which the extra 'test' of jaxnsa has; run: pip install "
            "hypothesis"
        )
    return None


def run(seconds: float, seed: int, implementations: Sequence[str]) -> Iterator[Report]:
    """Searches in child processes, which may crash; ends at the first finding.

    Args:
      seconds: to search; making a program smaller takes more.
      seed: the same one draws the same programs, as many as the time allows.
      implementations: what computes.

    Yields:
      What was done so far.
    """
    report = Report()
    end = time.monotonic() + seconds
    number = 0
    while report.finding is None and (left := end - time.monotonic()) > 0:
        child = _run_child(left, f"{seed}.{number}", implementations)
        report.counts.update(child.counts)
        report.refused.update(child.refused)
        report.finding = child.finding
        number += 1
        yield report


def search(seconds: float, seed: str, implementations: Sequence[str], log: IO[str]) -> Report:
    """Draws programs and runs them, here. The `log` holds the one that is running."""
    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    rng = random.Random(seed)
    report = Report()
    running = _Running(log, report, time.monotonic() + seconds)
    settings = hypothesis.settings(
        max_examples=_PROGRAMS,
        stateful_step_count=_STEPS,
        deadline=None,
        phases=(hypothesis.Phase.generate,),  # what fails is made smaller by `plainer`, sooner
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        for _ in range(_ROUNDS):
            machine = hypothesis.seed(rng.getrandbits(64))(_machine(rng, implementations, running))
            with contextlib.redirect_stdout(sys.stderr):
                run_state_machine_as_test(machine, settings=settings)
    except _OutOfTime:
        pass
    except Exception as error:
        # Hypothesis's own where a program fails once and then no more.
        steps, first = running.failed or (running.steps, error)
        steps = plainer(steps)
        last = (error_of(steps) or (first,))[0]
        program = source_of(map(line_of, steps))
        report.finding = Finding(program, f"{type(last).__name__}: {last}")
    return report


class _OutOfTime(BaseException):
    """Ends a search: Hypothesis takes an Exception for a failure, and a shorter program amiss."""


class _Running:
    """The program that is running, the latest one that failed, and what was counted."""

    def __init__(self, log: IO[str], report: Report, end: float):
        self.steps: list[Step] = []
        self.failed: tuple[list[Step], Exception] | None = None
        self._log, self._report, self._end = log, report, end

    def begin(self) -> Session:
        """A new program."""
        self.steps = []
        self._log.seek(0)
        self._log.truncate()
        return Session()

    def do(self, session: Session, step: Step) -> None:
        """Runs a step, after the end only the first, or of a program that failed once more.

        Raises:
          _OutOfTime: it is past the end.
        """
        if time.monotonic() > self._end and self.failed is None and self._report.counts:
            raise _OutOfTime
        self.steps.append(step)
        self._log.write(line_of(step) + "\n")
        self._log.flush()
        key, before = _counted(step), session.calls
        try:
            run_step(session, step)
        except Refused:
            self._report.refused[key] += 1  # the first of them
        except Exception as error:
            self.failed = self.steps, error
            raise
        else:
            self._report.counts[key] += session.calls - before


def _counted(step: Step) -> tuple[str, str]:
    """What computes, and what is called."""
    name, keywords = step
    call, of = keywords.get("call"), keywords.get("of")
    refused = ", refused" if name.startswith("wrong_") or name == "spoil" else ""
    if call is not None:
        title = call.title if name in ("call", "wrong_call") else f"{name} {call.title}"
        return call.implementation, title + refused
    if "named" in name:
        return "native library", keywords["name"] + refused
    if of is not None:
        path = of.path if of.implementation is None else f"{of.path} {of.implementation}"
        return path, name.removeprefix("wrong_") + refused
    return "native library", keywords.get("function", name)


def _machine(rng: random.Random, implementations: Sequence[str], running: _Running) -> Any:
    """A class of Hypothesis whose programs consist of steps with calls of some kinds."""
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, rule

    class Programs(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self._session = running.begin()

        @rule(step=st.one_of(_steps(rng, implementations)))
        def step(self, step: Step) -> None:
            running.do(self._session, step)

    return Programs


def _steps(rng: random.Random, implementations: Sequence[str]) -> list[Any]:
    """What a step is drawn from, evenly."""
    from hypothesis import strategies as st

    calls = kinds.calls(rng, implementations, _CALLS)
    seed = {"seed": st.integers(0, 2**24 - 1)}
    several = seed | {"more": st.sampled_from(_MORE)}

    def step(name: str, /, **keywords: Any) -> Any:
        return st.tuples(st.just(name), st.fixed_dictionaries(keywords))

    def wrong_call(call: Any) -> Any:
        eager = dataclasses.replace(call, transform="eager")
        pairs = st.sampled_from(kinds.wrong(call))
        return step("wrong_call", call=st.just(eager), wrong=pairs, **seed)

    any_call = st.sampled_from(calls)
    tracked = st.sampled_from([call for call in calls if kinds.is_tracked(call)])
    steps = [
        step("call", call=any_call, **several),
        step("call", call=any_call, **several),
        any_call.flatmap(wrong_call),
        step("validate", call=any_call, **seed),
        step("track", call=tracked, **several),
    ]
    buffers = kinds.buffers(rng, implementations) if importlib.util.find_spec("torch") else []
    if buffers:
        from jaxnsa.app.fuzz.tensor_steps import SPOILS

        of = st.sampled_from(buffers)
        wrong = [(name, value) for name, values in kinds.WRONG_TENSORS.items() for value in values]
        steps += [
            step("update", of=of, **several),
            step("update", of=of, **several),
            step("track_updates", of=of, **several),
            step("wrong_update", of=of, wrong=st.sampled_from(wrong), **seed),
            step("spoil", of=of, how=st.sampled_from(sorted(SPOILS)), field=st.integers(0, 19)),
            step("round_trip", **seed),
        ]
    direct = [of for of in buffers if of.path == "direct"]
    if direct:
        from jaxnsa.app.fuzz.sgl_steps import CALLS, LENGTHS

        of, name = st.sampled_from(direct), st.sampled_from(sorted(CALLS))
        place = {"argument": st.integers(0, 39), "value": st.integers(0, 39)}
        steps += [
            step("named", of=of, name=name, **several),
            step("wrong_named", of=of, name=name, **seed, **place),
            step("lengths", function=st.sampled_from(LENGTHS), **several),
        ]
    return steps


def child(seconds: str, seed: str, log: str, *implementations: str) -> None:
    """What a child process runs: a search whose report it prints as JSON."""
    import jax

    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    with open(log, "w") as file:
        report = search(float(seconds), seed, implementations, file)
    finding = report.finding and dataclasses.astuple(report.finding)
    print(json.dumps([list(report.counts.items()), list(report.refused.items()), finding]))


def _run_child(seconds: float, seed: str, implementations: Sequence[str]) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "program"
        code = "import sys; from jaxnsa.app.fuzz.search import child; child(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(seconds), seed, str(log), *implementations]
        ended = _ended(command, seconds + _PATIENCE_SECONDS)
        if ended.returncode == 0:
            counts, refused, finding = json.loads(ended.stdout.splitlines()[-1])
            return Report(
                collections.Counter({tuple(key): n for key, n in counts}),
                collections.Counter({tuple(key): n for key, n in refused}),
                finding and Finding(*finding),
            )
        lines = log.read_text().splitlines() if log.exists() else []
        program = _smaller_crash(lines, ended.returncode)
        error = f"the process ended with status {ended.returncode}: {ended.stderr[-2000:]}"
        return Report(finding=Finding(program, error))


def _ended(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """A process that has ended, by itself or after so many seconds."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, _TIMED_OUT, "", f"no end in {seconds:.0f} s")


def _smaller_crash(lines: list[str], status: int) -> str:
    """The program that ended a process, without the lines that it crashes without."""

    def crashes(fewer: list[str]) -> bool:
        command = [sys.executable, "-c", source_of(fewer)]
        return _ended(command, _PATIENCE_SECONDS).returncode == status

    return source_of(without_steps(lines, crashes) if status < 0 else lines)
