"""The fuzzer: that it finds what is planted, makes it small, and outlives a crash."""

import inspect
import io
import types

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import jaxnsa
from jaxnsa import BatchTracker
from jaxnsa.app.command_line import main
from jaxnsa.app.fuzz import kinds, program, search, smaller, steps
from jaxnsa.app.fuzz.steps import BROADCAST, Call, Session
from jaxnsa.implementations import IMPLEMENTATIONS, xla

DECODE = tuple((name, kinds.plain_values()[name]) for name in kinds.OPTIONS)
FUNCTIONS = (BROADCAST, *steps.SINGLE, steps.COPY, steps.FILL, steps.SUM, steps.RAGGED)


@pytest.fixture
def broken(monkeypatch):
    module = types.SimpleNamespace(**vars(xla))
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", module)
    jax.clear_caches()  # of what others have planted under that name
    return module


def test_every_function_is_called_and_every_argument_drawn():
    arrays = {"req_to_token", *steps.highest((1, 1))}
    drawn = kinds.OPTIONS.keys() | arrays | {"out", "implementation", "src", "x", "num_seqs"}
    for name in FUNCTIONS:
        parameters = steps.parameters(getattr(jaxnsa, name))
        assert parameters <= drawn
        assert parameters <= kinds.WRONG.keys()
    public = {name for name in jaxnsa.__all__ if inspect.isfunction(getattr(jaxnsa, name))}
    assert public - set(FUNCTIONS) == {"get_kernel_info", "override", "validate_inputs"}


def test_every_argument_of_an_update_is_drawn_and_has_illegal_values():
    pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
    from jaxnsa.app.fuzz import tensor_steps
    from jaxnsa.interop.torch import BackendBuffers

    parameters = steps.parameters(BackendBuffers.update) - {"self"}
    assert parameters == kinds.WRONG_TENSORS.keys()
    rng = np.random.default_rng(0)
    kind = {"path": "direct", "implementation": None, "requests": 8, "rows": 24, "pool": (9, 64)}
    of = tensor_steps.Buffers(**kind, max_len=64, page=1, count=1, wide=True)
    drawn = {name for _ in range(50) for name in tensor_steps.drawn(rng, of)}
    assert drawn == parameters - {"req_to_token", "request_ids"} | {"dtype", "layout"}


def only(monkeypatch, *drawn, **settings):
    """A search draws these steps, of which "more" makes some calls."""

    def strategies(rng, implementations):
        from hypothesis import strategies as st

        drawn_from = {"seed": st.integers(0, 99), "more": st.sampled_from((0, 9))}
        return [
            st.tuples(
                st.just(name),
                st.fixed_dictionaries(
                    {"call": st.just(call)}
                    | {k: v for k, v in drawn_from.items() if k in keywords_of(name)}
                ),
            )
            for name, call in drawn
        ]

    def keywords_of(name):
        return inspect.signature(program.function_of(name)).parameters

    monkeypatch.setattr(search, "_steps", strategies)
    for name, value in settings.items():
        monkeypatch.setattr(search, name, value)


def test_what_is_planted_is_found_and_made_small(broken, monkeypatch):
    broken.prefix_sum = lambda x: xla.prefix_sum(x) + (x.max(initial=0) > 63).astype(x.dtype)
    call = Call("prefix_sum", "broken", 1, (3, 99), DECODE, transform="jit", arrays="jax")
    only(monkeypatch, ("call", call), ("validate", call), _STEPS=2)
    finding = search.search(60, "0", ["broken"], io.StringIO()).finding
    assert finding.error.startswith("AssertionError: [0]: got 1, not 0")
    lines = [line for line in finding.program.splitlines() if "(session, " in line]
    assert len(lines) == 1
    assert "more=0" in lines[0]
    assert "'seq_lens': [" in lines[0]
    assert "jit" not in lines[0]
    assert "arrays" not in lines[0]
    code = compile(finding.program, "program", "exec")
    with pytest.raises(AssertionError, match=r"\[0\]: got 1, not 0"):
        exec(code, {})


def test_a_tracker_that_claims_too_much_is_found(monkeypatch):
    call = Call(BROADCAST, "xla", 2, (4, 30), DECODE, True, "jit", written=True)
    steps.track(Session(), call, seed=1, more=9)
    monkeypatch.setattr(BatchTracker, "invalidate", lambda tracker, ids: tracker)
    steps._tracking.cache_clear()
    with pytest.raises(AssertionError, match="page_indices"):
        steps.track(Session(), call, seed=1, more=9)
    steps._tracking.cache_clear()


def test_a_seed_draws_the_same_programs(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        search, "run_step", lambda session, step: drawn.append(program.line_of(step))
    )
    monkeypatch.setattr(search, "_ROUNDS", 2)
    monkeypatch.setattr(search, "_PROGRAMS", 2)
    runs = []
    for seed in ("0", "0", "1"):
        assert search.search(60, seed, ["xla"], io.StringIO()).finding is None
        runs.append(list(drawn))
        drawn.clear()
    assert len(runs[0]) > 9
    assert runs[0] == runs[1] != runs[2]


def test_what_fails_once_is_a_finding_and_time_is_none(monkeypatch):
    ran = []

    def run_step(session, step):
        ran.append(step)
        if len(ran) == 30:
            raise AssertionError("only now")

    monkeypatch.setattr(search, "run_step", run_step)
    monkeypatch.setattr(search, "plainer", lambda steps: steps)
    monkeypatch.setattr(search, "error_of", lambda steps: None)
    finding = search.search(60, "0", ["xla"], io.StringIO()).finding
    assert finding.error == "AssertionError: only now"
    assert finding.program.endswith(program.line_of(ran[29]) + "\n")
    ran.clear()
    monkeypatch.setattr(search.time, "monotonic", lambda: float(len(ran)))
    assert search.search(20.5, "0", ["xla"], io.StringIO()).finding is None
    assert len(ran) == 21


def test_needless_steps_are_dropped():
    assert smaller.without_steps([1, 2, 3, 4], lambda steps: {2, 4} <= set(steps)) == [2, 4]


def test_what_is_wrong_and_taken_is_found():
    call = Call(BROADCAST, "xla", 1, (1, 8), DECODE)
    steps.wrong_call(Session(), call, wrong=("max_len", "-1"))
    with pytest.raises(AssertionError, match="max_len = 8 was taken"):
        steps.wrong_call(Session(), call, wrong=("max_len", "8"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'length'"):
        steps.wrong_call(Session(), call, wrong=("length", "8"))


def test_a_crash_is_a_finding_with_its_program(monkeypatch):
    lines = ["os.getpid()", "os.nice(0)", "os.abort()"]
    monkeypatch.setattr(search, "source_of", lambda lines: "\n".join(["import os", *lines]))
    ended = search._ended(["python3", "-c", search.source_of(lines)], 60)
    assert ended.returncode == -6
    assert search._ended(["sleep", "9"], 0.1).returncode == search._TIMED_OUT
    assert search._smaller_crash(lines, -6) == "import os\nos.abort()"


def test_the_command(monkeypatch):
    done = search.Report(search.collections.Counter({("xla", "prefix_sum"): 1200}))
    monkeypatch.setattr(search, "run", lambda seconds, seed, names: iter([done]))
    result = CliRunner().invoke(main, ["verify", "--fuzz", "3", "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert "1,200" in result.output
    done.finding = search.Finding("session.call()", "AssertionError: no")
    result = CliRunner().invoke(main, ["verify", "--fuzz", "3"])
    assert result.exit_code == 1
    assert "session.call()\nAssertionError: no" in result.output
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["verify", "--fuzz", "3"])
    assert "hypothesis is not installed, which the extra 'test' of jaxnsa has" in result.output
    assert CliRunner().invoke(main, ["verify", "--fuzz", "0"]).exit_code == 2


def test_a_child_searches_and_reports():
    reports = list(search.run(1, 1, ["xla"]))
    assert reports[-1].finding is None, reports[-1].finding
    assert reports[-1].counts.total() > 0
