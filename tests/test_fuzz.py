"""The fuzzer: that it finds what is planted, makes it small, and outlives a crash."""

import dataclasses
import importlib.util
import inspect
import io
import types

import pytest
from click.testing import CliRunner

from jaxnsa import operations
from jaxnsa.app import fuzz, fuzz_steps
from jaxnsa.app.command_line import main
from jaxnsa.app.fuzz_steps import BROADCAST, Call, Session
from jaxnsa.implementations import IMPLEMENTATIONS, xla

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="runs where PyTorch is installed, as .ci/run does"
)


DECODE = {name: fuzz._plain_values()[name] for name in fuzz.OPTIONS}


@pytest.fixture
def broken(monkeypatch):
    module = types.SimpleNamespace(**vars(xla))
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", module)
    return module


def test_every_argument_is_drawn_and_has_illegal_values():
    arrays = {"req_to_token", *fuzz_steps.highest((1, 1))}
    for name in (BROADCAST, *fuzz_steps.SINGLE, fuzz_steps.COPY, fuzz_steps.FILL, fuzz_steps.SUM):
        parameters = inspect.signature(getattr(operations, name)).parameters.keys()
        drawn = fuzz.OPTIONS.keys() | arrays | {"out", "implementation", "src", "x"}
        assert parameters <= drawn
        assert parameters <= fuzz.WRONG.keys()


def test_what_is_planted_is_found_and_made_small(broken, monkeypatch):
    broken.prefix_sum = lambda x: xla.prefix_sum(x) + (x.max(initial=0) > 63).astype(x.dtype)
    call = Call("prefix_sum", "broken", 1, (3, 99), tuple(DECODE.items()), transform="jit")
    call = dataclasses.replace(call, arrays="jax")
    for name, value in {
        "_calls": lambda rng, names: [call],
        "_buffers": lambda rng, names: [],
        "_MORE": (0, 9),
        "_STEPS": 2,
    }.items():
        monkeypatch.setattr(fuzz, name, value)
    finding = fuzz.search(60, "0", ["broken"], io.StringIO()).finding
    assert finding.error.startswith("AssertionError: [0]: got 1, not 0")
    steps = [line for line in finding.program.splitlines() if line.startswith("session.")]
    assert len(steps) == 1
    assert "more=0" in steps[0]
    assert "arrays='numpy'" in steps[0]
    assert "transform='eager'" in steps[0]
    program = compile(finding.program, "program", "exec")
    with pytest.raises(AssertionError, match=r"\[0\]: got 1, not 0"):
        exec(program, {})


def test_a_seed_draws_the_same_programs(monkeypatch):
    drawn = []
    monkeypatch.setattr(fuzz, "_run_step", lambda session, step: drawn.append(fuzz._line(step)))
    monkeypatch.setattr(fuzz, "_PROGRAMS", 4)
    runs = []
    for seed in ("0", "0", "1"):
        assert fuzz.search(60, seed, ["xla"], io.StringIO()).finding is None
        runs.append(list(drawn))
        drawn.clear()
    assert len(runs[0]) > 9
    assert runs[0] == runs[1] != runs[2]


def test_what_fails_once_is_a_finding_and_time_is_none(monkeypatch):
    steps = []

    def run_step(session, step):
        steps.append(step)
        if len(steps) == 30:
            raise AssertionError("only now")

    monkeypatch.setattr(fuzz, "_run_step", run_step)
    finding = fuzz.search(60, "0", ["xla"], io.StringIO()).finding
    assert finding.error == "AssertionError: only now"
    assert finding.program.endswith(fuzz._line(steps[29]) + "\n")
    steps.clear()
    monkeypatch.setattr(fuzz.time, "monotonic", lambda: float(len(steps)))
    assert fuzz.search(20.5, "0", ["xla"], io.StringIO()).finding is None
    assert len(steps) == 21


def test_needless_steps_are_dropped(monkeypatch):
    def run_step(session, step):
        assert step[0] != "bad", "bad"

    monkeypatch.setattr(fuzz, "_run_step", run_step)
    steps = [("good", {}), ("good", {"seed": 1}), ("bad", {})]
    assert fuzz._simpler(steps) == steps[2:]


def test_what_is_wrong_and_taken_is_found():
    call = Call(BROADCAST, "xla", 1, (1, 8), tuple(DECODE.items()))
    lengths = {"seq_lens": [1], "req_pool_indices": [0], "extend_seq_lens": [1]}
    Session().call(call, wrong=("max_len", "-1"), **lengths)
    with pytest.raises(AssertionError, match="max_len = 8 was taken"):
        Session().call(call, wrong=("max_len", "8"), **lengths)
    with pytest.raises(TypeError, match="unexpected keyword argument 'length'"):
        Session().call(call, wrong=("length", "8"), **lengths)


def test_a_crash_is_a_finding_with_its_program(monkeypatch):
    code = """
import os
from jaxnsa.app.fuzz_steps import Session
Session.validate = lambda self: os.abort()
Session.call = lambda self: None
"""
    lines = ["session.call()", "session.validate()", "session.call()"]
    monkeypatch.setattr(
        fuzz, "_source_of", lambda lines: code + "session = Session()\n" + "\n".join(lines)
    )
    ended = fuzz._ended(["python3", "-c", "import os; os.abort()"], 60)
    assert ended.returncode == -6
    assert fuzz._ended(["sleep", "9"], 0.1).returncode == fuzz._TIMED_OUT
    smaller = fuzz._smaller_crash(lines[:2], -6)
    assert smaller.endswith("session = Session()\nsession.validate()")


def test_the_command(monkeypatch):
    done = fuzz.Report(fuzz.collections.Counter({("xla", "prefix_sum"): 1200}))
    monkeypatch.setattr(fuzz, "run", lambda seconds, seed, names: iter([done]))
    result = CliRunner().invoke(main, ["verify", "--fuzz", "3", "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert "1,200" in result.output
    done.finding = fuzz.Finding("session.call()", "AssertionError: no")
    result = CliRunner().invoke(main, ["verify", "--fuzz", "3"])
    assert result.exit_code == 1
    assert "session.call()\nAssertionError: no" in result.output
    monkeypatch.setattr(fuzz.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["verify", "--fuzz", "3"])
    assert "hypothesis is not installed, which the extra 'test' of jaxnsa has" in result.output
    assert CliRunner().invoke(main, ["verify", "--fuzz", "0"]).exit_code == 2


def test_a_child_searches_and_reports():
    reports = list(fuzz.run(1, 1, ["xla"]))
    assert reports[-1].finding is None, reports[-1].finding
    assert reports[-1].counts.total() > 0
