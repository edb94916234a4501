"""Random programs of library calls, run where a crash ends a child and not the search.

Hypothesis draws programs of the steps in `fuzz_steps` and `fuzz_torch_steps` and makes those that
fail smaller. It is an optional package: the extra `test` has it.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxnsa import operations
from jaxnsa.app.fuzz_steps import (
    BROADCAST,
    COPY,
    FILL,
    SINGLE,
    SUM,
    SURROUNDINGS,
    Call,
    Refused,
    arguments_of,
    extremes,
    highest,
    is_ragged,
)
from jaxnsa.metadata import ForwardMode
from jaxnsa.schedules import FlashMlaSchedule, PagedMqaSchedule, Schedules, TopkPlan
from jaxnsa.spec import INT32_MAX

Options = dict[str, Any]

_CALLS_PER_SEARCH = 40  # kinds of calls, each compiled once
_STEPS = 25  # of a program
_MORE = (0, 20, 200)  # calls of a step, but for the one whose lengths can be made smaller
_PROGRAMS = 100  # of a child, whose kinds of calls are its own
_PATIENCE_SECONDS = 600.0  # for a child that makes a program smaller
_CRASH_TRIES = 40
_TIMED_OUT = 124

_MODES: Mapping[str, ForwardMode] = {**SINGLE, FILL: ForwardMode.DRAFT_EXTEND}

OPTIONS: Mapping[str, Callable[[random.Random, Options, Call], Any]] = {
    "forward_mode": lambda r, o, c: _MODES.get(c.function) or r.choice(list(ForwardMode)),
    "num_draft_tokens": lambda r, o, c: (
        r.randint(1, 4) if o["forward_mode"] is ForwardMode.TARGET_VERIFY else None
    ),
    "max_total_tokens": lambda r, o, c: (
        r.randint(0, 3 * c.bs + 4) if is_ragged(o["forward_mode"]) else None
    ),
    "max_total_keys": lambda r, o, c: (
        r.choice([None, r.randint(0, 3 * c.pool[1])])
        if o["forward_mode"] is ForwardMode.EXTEND
        else None
    ),
    "num_backends": lambda r, o, c: r.randint(1, 3),
    "max_len": lambda r, o, c: r.choice([None, r.randint(1, c.pool[1])]),
    "nsa_index_topk": lambda r, o, c: r.choice([1, 17, 64, 2048, INT32_MAX]),
    "real_page_size": lambda r, o, c: r.choice([1, 2, 3, 16, 64, INT32_MAX]),
    "wide_table": lambda r, o, c: o["real_page_size"] == 1 or r.random() < 0.7,
    "index_kpool": lambda r, o, c: (
        r.choice([1, 1, 1, 1, 2, 4, 7]) if o["real_page_size"] < 99 else 1
    ),
    "schedules": lambda r, o, c: _schedules(r) if r.random() < 0.15 else None,
    "stacked": lambda r, o, c: r.random() < 0.3,
    "tail": lambda r, o, c: r.choice(
        [None, "keep"]
        if c.written
        else [None, "copy", "zero"] + (["keep", "keep"] if c.in_place else [])
    ),
    "max_new_tokens": lambda r, o, c: r.choice([None, 1, 40]) if c.written else None,
    "backend_offsets": lambda r, o, c: (
        tuple(r.randint(-3, 3) for _ in range(o["num_backends"]))
        if r.random() < 0.2 and o["forward_mode"] is not ForwardMode.EXTEND
        else None
    ),
    "strategy": lambda r, o, c: r.choice([None, "ultra_fast", "fast", "fallback"]),
}
"""How the options of the broadcast are drawn, from what was drawn before them and from the call.
A new one goes here, and its illegal values to `WRONG`."""

_NO_ARRAYS = (
    "None",
    "3",
    "'abc'",
    "[[1], [1, 2]]",
    "[None]",
    "np.ma.array(given)",
    "np.asarray(given, np.float32)",
    "np.asarray(given, np.int16)",
    "jax.ShapeDtypeStruct(np.shape(given), jnp.int32)",
    "jax.random.key(0)",
    "deleted(given)",
    "np.asarray(given)[None]",
    "np.asarray(given).astype('>i4')",
)
_NO_INTEGERS = ("-1", "0.5", "'1'", "True", "2**31", "2**64", "[1]", "np.ones(2, int)", "np.nan")
_NO_FLAGS = ("1", "None", "'yes'", "np.True_", "np.ones(2)")
_NO_NAMES = ("''", "'copies'", "0", "False", "['copy']", "np.array(['copy'])")

WRONG: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(
        ("seq_lens", "req_pool_indices", "extend_seq_lens", "req_to_token"), _NO_ARRAYS
    ),
    "written_lens": [expression for expression in _NO_ARRAYS if expression != "None"],
    "x": [e for e in _NO_ARRAYS if "np.int16" not in e],
    "src": ("None", "3", "deleted(given)", "jax.tree.map(lambda a: a.astype(np.float32), given)"),
    "out": ("3", "(None,)", "()", "deleted(given)", "jax.tree.map(np.asarray, given)"),
    "forward_mode": ("None", "'decode'", "0"),
    **dict.fromkeys(
        (
            "num_draft_tokens",
            "max_total_tokens",
            "max_total_keys",
            "max_len",
            "nsa_index_topk",
            "real_page_size",
        ),
        _NO_INTEGERS,
    ),
    "index_kpool": (*_NO_INTEGERS, "0"),
    "num_backends": (*_NO_INTEGERS, "0", "10**6"),
    "schedules": ("1", "'sm90'", "()"),
    "max_new_tokens": _NO_INTEGERS,
    "backend_offsets": ("1", "'ab'", "()", "(0.5,) * 9", "{0}"),
    "wide_table": _NO_FLAGS,
    "stacked": _NO_FLAGS,
    "tail": _NO_NAMES,
    "strategy": _NO_NAMES,
    "implementation": ("'cuda'", "''", "()", "3", "('xla', 3)", "['cuda']"),
}
"""Illegal values of every argument, as expressions of `given`, the legal one."""

WRONG_TENSORS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(
        ("seq_lens", "req_pool_indices"),
        (
            "None",
            "3",
            "given.cpu().numpy()",
            "given.float()",
            "given[None]",
            "given.to('meta')",
            "given.to_sparse()",
            "engine.backends[0]['cu_seqlens_k'][: len(given)]",
        ),
    ),
    "req_to_token": ("None", "given[0]", "given.long()", "given[:, :0]", "given[:0]", "given.t()"),
    "forward_mode": ("None", "'decode'", "0"),
    "num_draft_tokens": ("0", "'2'", "2**31", "10**30"),
    "max_total_tokens": ("-1", "'2'", "10**30", "2.0"),
    "extend_seq_lens": ("3", "torch.ones(99)"),
}
"""The same of `BackendBuffers.update`."""


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
    calls = _calls(rng, implementations)
    buffers = _buffers(rng, implementations) if importlib.util.find_spec("torch") else []
    report = Report()
    running = _Running(log, report, time.monotonic() + seconds)
    settings = hypothesis.settings(
        max_examples=_PROGRAMS,
        stateful_step_count=_STEPS,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    machine = hypothesis.seed(rng.getrandbits(64))(_machine(calls, buffers, running))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            run_state_machine_as_test(machine, settings=settings)
    except _OutOfTime:
        pass
    except Exception as error:
        # Hypothesis's own where a program fails once and then no more.
        steps, first = running.failed or (running.steps, error)
        steps = _simpler(steps)
        last = _error_of(steps) or first
        report.finding = Finding(_program(steps), f"{type(last).__name__}: {last}")
    return report


Step = tuple[str, Options]
"""The name of a step and its keyword arguments."""


class _OutOfTime(BaseException):
    """Ends a search: Hypothesis takes an Exception for a failure, and a shorter program amiss."""


class _Running:
    """The program that is running, the latest one that failed, and what was counted."""

    def __init__(self, log: IO[str], report: Report, end: float):
        self.steps: list[Step] = []
        self.failed: tuple[list[Step], Exception] | None = None
        self._log, self._report, self._end = log, report, end

    def begin(self) -> Any:
        """A new program; returns its session."""
        self.steps = []
        self._log.seek(0)
        self._log.truncate()
        return _session()

    def do(self, session: Any, step: Step) -> None:
        """Runs a step, after the end only where a program that failed is made smaller.

        Raises:
          _OutOfTime: it is past the end.
        """
        if time.monotonic() > self._end and self.failed is None:
            raise _OutOfTime
        self.steps.append(step)
        self._log.write(_line(step) + "\n")
        self._log.flush()
        key = _counted(step)
        try:
            _run_step(session, step)
        except Refused:
            self._report.refused[key] += 1  # the first of them
        except Exception as error:
            self.failed = self.steps, error
            raise
        else:
            self._report.counts[key] += 1 + step[1].get("more", 0)


def _session() -> Any:
    if importlib.util.find_spec("torch"):
        from jaxnsa.app.fuzz_torch_steps import TorchSession

        return TorchSession()
    from jaxnsa.app.fuzz_steps import Session

    return Session()


def _run_step(session: Any, step: Step) -> None:
    name, keywords = step
    getattr(session, name)(**keywords)


def _counted(step: Step) -> tuple[str, str]:
    name, keywords = step
    call, of = keywords.get("call"), keywords.get("of")
    wrong = ", refused" if keywords.get("wrong") or name == "spoil" else ""
    if call is not None:
        return call.implementation, (
            "validate_inputs" if name == "validate" else call.title
        ) + wrong
    if of is not None:
        path = of.path if of.implementation is None else f"{of.path} {of.implementation}"
        return ("direct" if name == "sgl_broadcast" else path), name + wrong
    return "torch", keywords.get("function", name)


def _calls(rng: random.Random, implementations: Sequence[str]) -> list[Call]:
    """The kinds of calls of a search."""
    return [_call(rng, rng.choice(implementations)) for _ in range(_CALLS_PER_SEARCH)]


def _call(rng: random.Random, implementation: str) -> Call:
    function = rng.choice([BROADCAST] * 5 + list(SINGLE) + [COPY] * 2 + [FILL, SUM])
    bs = rng.choice([0, 1, 2, 3, 5, 5, 8, 33])
    pool = (rng.randint(1, bs + 3), rng.choice([1, 7, 63, 64, 70, 200]))
    alone = function in (FILL, SUM)
    in_place = not alone and rng.random() < 0.5
    transforms = ["eager"] * 4 + ["jit"] * 2
    if bs and not in_place and function != COPY:
        transforms.append("vmap")
    call = Call(
        function,
        implementation,
        bs,
        pool,
        (),
        in_place,
        rng.choice(transforms),
        rng.choice(["numpy", "jax"]),
        surroundings=rng.choice(["plain"] * 6 + list(SURROUNDINGS)),
        written=in_place and function != COPY and rng.random() < 0.3,
    )
    if call.surroundings == "x64" or (call.transform, call.arrays) == ("eager", "numpy"):
        call = dataclasses.replace(call, dtype=rng.choice(["int32", "int64"]))
    options: Options = {}
    for name, draw in OPTIONS.items():
        options[name] = draw(rng, options, call)
    if function == FILL and call.transform == "eager" and rng.random() < 0.3:
        options["max_total_tokens"] = None
    return dataclasses.replace(call, options=tuple(options.items()))


def _schedules(rng: random.Random) -> Schedules:
    return Schedules(
        paged_mqa=rng.choice(
            [
                None,
                PagedMqaSchedule(
                    rng.choice([1, 4, 132]),
                    rng.choice(["legacy", "atoms", "sm90", "sm100"]),
                    rng.random() < 0.5,
                ),
            ]
        ),
        topk_plan=rng.choice([None, TopkPlan(((8, 2), (64, 3)), rng.choice([0, 16]))]),
        flash_mla=rng.choice(
            [
                None,
                FlashMlaSchedule(
                    rng.choice([1, 3, 66]),
                    rng.choice(["topk", "nsa_cache_seqlens", "cache_seqlens"]),
                    rng.choice([3, 5]),
                    rng.choice(["current", "legacy"]),
                ),
            ]
        ),
    )


def _buffers(rng: random.Random, implementations: Sequence[str]) -> list[Any]:
    """Registered tensors of a search, of either path."""
    from jaxnsa.app.fuzz_torch_steps import DEVICE, Buffers
    from jaxnsa.implementations.native_library import unavailable as library_unavailable
    from jaxnsa.interop.tensor_checks import platform_of

    direct = "ffi" in implementations and library_unavailable(platform_of(DEVICE)) is None
    kinds: list[tuple[str, str | None]] = [("dlpack", name) for name in implementations]
    kinds += [("direct", None)] * 4 if direct else []

    def drawn(path: str, implementation: str | None) -> Buffers:
        page = rng.choice([1, 3, 16, INT32_MAX])
        max_len = rng.choice([7, 64, 130])
        pages_fit = path == "direct" and page < INT32_MAX
        columns = max_len + (rng.choice([-5, 0, 9]) if pages_fit else rng.choice([0, 9]))
        return Buffers(
            path=path,
            implementation=implementation,
            requests=rng.choice([2, 5, 8]),
            rows=rng.choice([9, 24]),
            pool=(rng.randint(2, 9), columns),
            max_len=max_len,
            page=page,
            count=rng.choice([1, 2, 3]),
            wide=page in (1, INT32_MAX) or rng.random() < 0.7,
            gap=rng.choice([0, 0, 4]) if path == "direct" else 0,
        )

    return [drawn(*kind) for kind in kinds]


def _machine(calls: list[Call], buffers: list[Any], running: _Running) -> Any:
    """A class of Hypothesis that draws programs of steps."""
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, rule

    kinds = ["call"] * 8 + ["wrong call"] * 2 + ["validate"]
    if buffers:
        kinds += ["update"] * 6 + ["wrong update"] * 2
        kinds += ["spoil", "sgl_fill", "sgl_broadcast", "round_trip"]

    def vector(size: int, high: int, dtype: str, far: bool = True) -> Any:
        drawn = st.integers(-3, high)
        if far:
            drawn |= st.sampled_from(extremes(dtype))
        return st.lists(drawn, min_size=size, max_size=size)

    def lengths(data: Any, size: int, pool: tuple[int, int], dtype: str, far: bool) -> Options:
        return {
            name: data.draw(vector(size, high, dtype, far or name == "req_pool_indices"))
            for name, high in highest(pool).items()
        }

    def call_step(data: Any, kind: str) -> Step:
        call = data.draw(st.sampled_from(calls))
        keywords: Options = {"call": call, "seed": data.draw(st.integers(0, 99))}
        keywords |= lengths(data, call.bs, call.pool, call.dtype, call.far)
        if kind == "call":
            keywords["more"] = data.draw(st.sampled_from(_MORE))
        if kind == "wrong call":
            names = sorted(_names_of(call) & WRONG.keys())
            name = data.draw(st.sampled_from(names))
            keywords["wrong"] = (name, data.draw(st.sampled_from(WRONG[name])))
            keywords["call"] = dataclasses.replace(call, transform="eager")
        return ("validate" if kind == "validate" else "call"), keywords

    def update_step(data: Any, kind: str) -> Step:
        from jaxnsa.app.fuzz_torch_steps import MODES

        of = data.draw(st.sampled_from(buffers))
        mode = data.draw(st.sampled_from(MODES))
        most = min(of.requests, of.rows // (3 if mode is ForwardMode.TARGET_VERIFY else 1))
        bs = data.draw(st.integers(0 if kind == "update" else 1, most))
        dtype = data.draw(st.sampled_from(["int32", "int64"]))
        seed = data.draw(st.integers(0, 99))
        keywords: Options = {"of": of, "mode": mode, "seed": seed, "dtype": dtype}
        keywords |= lengths(data, bs, of.pool, dtype, True)
        if mode is ForwardMode.DRAFT_EXTEND:
            keywords["max_total_tokens"] = data.draw(st.none() | st.integers(0, of.rows))
        if kind == "update":
            layouts = ["plain"] * 4 + ["offset", "strided", "expanded"]
            keywords["layout"] = data.draw(st.sampled_from(layouts))
            keywords["more"] = data.draw(st.sampled_from(_MORE))
        else:
            name = data.draw(st.sampled_from(sorted(WRONG_TENSORS)))
            keywords["wrong"] = (name, data.draw(st.sampled_from(WRONG_TENSORS[name])))
        return "update", keywords

    def other_step(data: Any, kind: str) -> Step:
        from jaxnsa.app import fuzz_torch_steps as torch_steps

        if kind == "round_trip":
            dtype = data.draw(st.sampled_from(["int32", "int64"]))
            return kind, {"values": data.draw(vector(3, 9, dtype)), "dtype": dtype}
        if kind == "sgl_fill":
            bs = data.draw(st.integers(0, 6))
            function = data.draw(st.sampled_from(torch_steps.SGL_FILLS))
            return kind, {
                "function": function,
                "capacity": data.draw(st.integers(0, 20)),
                "seq_lens": data.draw(vector(bs, 70, "int64")),
                "extend": data.draw(vector(bs, 5, "int64", far=not function.endswith("simple"))),
            }
        of = data.draw(st.sampled_from(buffers))
        if kind == "spoil":
            how = data.draw(st.sampled_from(sorted(torch_steps.SPOILS)))
            return kind, {"of": of, "field": data.draw(st.integers(0, 9)), "how": how}
        drawn = lengths(data, data.draw(st.integers(0, of.requests)), of.pool, "int64", True)
        del drawn["extend_seq_lens"], drawn["written_lens"]
        return kind, {"of": of, "seed": data.draw(st.integers(0, 3))} | drawn

    class Programs(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self._session = running.begin()

        @rule(data=st.data())
        def step(self, data: Any) -> None:
            kind = data.draw(st.sampled_from(kinds))
            draw = call_step if "call" in kind or kind == "validate" else other_step
            if "update" in kind:
                draw = update_step
            running.do(self._session, draw(data, kind))

    return Programs


def _simpler(steps: list[Step]) -> list[Step]:
    """The program with fewer steps, plainer calls and lengths, as long as it fails alike."""
    failure = _failure(steps)
    if failure is None:
        return steps
    steps = _with_plain_lengths(steps, failure)
    for step in steps[:-1]:
        fewer = [other for other in steps if other is not step]
        if _failure(fewer) == failure:
            steps = fewer
    for call in dict.fromkeys(keywords["call"] for _, keywords in steps if "call" in keywords):
        current = call
        for name, default in _plain_values().items():
            plainer = _with(current, name, default)
            changed = [
                (step, k | {"call": plainer} if k.get("call") == current else k)
                for step, k in steps
            ]
            if plainer != current and _failure(changed) == failure:
                steps, current = changed, plainer
    return steps


def _with_plain_lengths(steps: list[Step], failure: tuple[str, str]) -> list[Step]:
    """The same program, in which the last step makes the one call that fails."""
    *before, (name, keywords) = steps
    if "more" not in keywords:
        return steps
    session = _session()
    with contextlib.suppress(Exception):
        for step in steps:
            with contextlib.suppress(Refused):
                _run_step(session, step)
    candidate = [*before, (name, keywords | dict(session.lengths) | {"more": 0})]
    if _failure(candidate) != failure:
        return steps
    steps = candidate
    for vector in session.lengths:
        for k in range(len(session.lengths[vector])):
            keywords = steps[-1][1]
            values = [*keywords[vector][:k], 0, *keywords[vector][k + 1 :]]
            candidate = [*before, (name, keywords | {vector: values})]
            if _failure(candidate) == failure:
                steps = candidate
    return steps


def _failure(steps: list[Step]) -> tuple[str, str] | None:
    """How a program fails: the error and what its message begins with; None where it does not."""
    error = _error_of(steps)
    if error is None:
        return None
    return type(error).__name__, re.split(r"[:\d]", str(error))[0]


def _error_of(steps: list[Step]) -> Exception | None:
    """What a program ends with."""
    session = _session()
    try:
        for step in steps:
            with contextlib.suppress(Refused):
                _run_step(session, step)
    except Exception as error:
        return error
    return None


def _plain_values() -> Options:
    """The plainest value of everything that a `Call` is drawn with."""
    plain: Options = {
        field.name: field.default
        for field in dataclasses.fields(Call)
        if field.default is not dataclasses.MISSING
    }
    parameters = inspect.signature(getattr(operations, BROADCAST)).parameters
    for name in OPTIONS:
        default = parameters[name].default
        plain[name] = 1 if default is inspect.Parameter.empty else default
    return plain


def _with(call: Call, name: str, value: Any) -> Call:
    options = dict(call.options)
    if name in options:
        return dataclasses.replace(call, options=tuple((options | {name: value}).items()))
    return call if name in OPTIONS else dataclasses.replace(call, **{name: value})


def _program(steps: Iterable[Step]) -> str:
    """A program as its source."""
    return _source_of(map(_line, steps))


def _source_of(lines: Iterable[str]) -> str:
    tensors = "_torch" if importlib.util.find_spec("torch") else ""
    header = (
        "from jaxnsa import *",
        f"from jaxnsa.app.fuzz{tensors}_steps import *",
        "from jaxnsa.app.fuzz_steps import Call",
        "",
        f"session = {'TorchSession' if tensors else 'Session'}()",
    )
    return "\n".join((*header, *lines)) + "\n"


def _line(step: Step) -> str:
    name, keywords = step
    given = ", ".join(f"{key}={_literal(value)}" for key, value in keywords.items())
    return f"session.{name}({given})"


def _literal(value: Any) -> str:
    if isinstance(value, ForwardMode):
        return str(value)
    if isinstance(value, tuple):
        return f"({''.join(_literal(item) + ', ' for item in value)})"
    if dataclasses.is_dataclass(value):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(f'{n}={_literal(v)}' for n, v in fields)})"
    return repr(value)


def child(seconds: str, seed: str, log: str, *implementations: str) -> None:
    """What a child process runs: a search whose report it prints as JSON."""
    with open(log, "w") as file:
        report = search(float(seconds), seed, implementations, file)
    finding = report.finding and dataclasses.astuple(report.finding)
    print(json.dumps([list(report.counts.items()), list(report.refused.items()), finding]))


def _run_child(seconds: float, seed: str, implementations: Sequence[str]) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "program"
        code = "import sys; from jaxnsa.app.fuzz import child; child(*sys.argv[1:])"
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
    for line in lines[-_CRASH_TRIES:-1] if status < 0 else ():
        fewer = [other for other in lines if other is not line]
        ended = _ended([sys.executable, "-c", _source_of(fewer)], _PATIENCE_SECONDS)
        if ended.returncode == status:
            lines = fewer
    return _source_of(lines)


def _names_of(call: Call) -> set[str]:
    """The arguments that a call is made with."""
    vectors = dict.fromkeys(highest(call.pool), [0] * call.bs)
    names = {name for given in arguments_of(call, 0, vectors) for name in given}
    return names | {"implementation"} | ({"out"} if call.in_place else set())
