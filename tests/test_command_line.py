"""The command line as a user meets it."""

import json
import re
import types

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import DEFAULT

import jaxnsa
from jaxnsa import reference
from jaxnsa.app import demo, verify
from jaxnsa.app.command_line import main
from jaxnsa.implementations import IMPLEMENTATIONS, xla


def run(*arguments):
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "100"})


def cells(output, row):
    line = next(line for line in output.splitlines() if row in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


@pytest.fixture
def broken(monkeypatch):
    """An implementation that is wrong whenever a batch has more than two requests."""
    module = types.SimpleNamespace(**vars(xla))
    module.prefix_sum = lambda x: xla.prefix_sum(x) + (len(x) > 2)
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", module)


@pytest.mark.large
def test_demo(implementation):
    result = run("demo", "--steps", "6", "--batch-size", "7", "--implementation", implementation)
    assert result.exit_code == 0, result.output
    name, steps, tokens, p50, p99, launches, mismatches = cells(
        result.output, f"│ {implementation}"
    )
    assert (name, steps, tokens, mismatches) == (implementation, "6", "42", "0")
    assert 0 < float(p50) <= float(p99)
    assert int(launches) >= 1
    assert cells(result.output, "NumPy loop")[1:3] == ["6", "42"]


def test_demo_replays_a_trace_over_and_over(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n,60,4\n,0,0\n,200000,9\n,130,1\n")
    result = run("demo", "--trace", str(trace), "--steps", "15", "--batch-size", "5")
    assert result.exit_code == 0, result.output
    assert cells(result.output, "│ xla")[-1] == "0"


def test_demo_reports_mismatches(monkeypatch):
    right = xla.fused_metadata

    def wrong(*arguments):
        first, *others = right(*arguments)
        return (type(first)(**(vars(first) | {"cu_seqlens_k": first.cu_seqlens_k + 1})), *others)

    module = types.SimpleNamespace(**(vars(xla) | {"fused_metadata": wrong}))
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", module)
    result = run("demo", "--steps", "3", "--batch-size", "2", "--implementation", "broken")
    assert result.exit_code == 1
    assert cells(result.output, "│ broken")[-1] == "3"


def test_the_loop_beside_the_demo_counts_what_it_writes():
    lengths, indices = np.array([130, 0, 64], np.int32), np.array([2, 0, 1], np.int32)
    pool = np.arange(3 * 200, dtype=np.int32).reshape(3, 200)
    expected = reference.fused_metadata_precompute_and_broadcast(
        lengths, indices, pool, num_backends=2, tail="zero"
    )
    zeros = jax.tree.map(np.zeros_like, expected)
    assert demo.numpy_loop(lengths, indices, pool, zeros) == 2 * 4 * (130 + 64 + 3 + 1)
    for backend, wanted in zip(zeros, expected, strict=True):
        np.testing.assert_array_equal(backend.page_indices, wanted.page_indices)
        np.testing.assert_array_equal(backend.real_page_table, wanted.real_page_table)


def test_demo_refuses(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n,60,x\n")
    result = run("demo", "--trace", str(trace))
    assert result.exit_code == 1
    assert f"Error: {trace}:2: GeneratedTokens: got 'x'" in result.output
    names = "expected one of 'pallas', 'ffi', 'triton', 'xla'"
    assert names in run("demo", "--implementation", "cuda").output
    assert run("demo", "--batch-size", "0").exit_code == 2
    assert run("demo", "--trace", str(tmp_path / "none")).exit_code == 2
    for command in ("demo", "verify"):
        assert "-1 is not in the range x>=0" in run(command, "--seed", "-1").output
    assert "100000 is not in the range 1<=x<=16384" in run("demo", "--batch-size", "100000").output
    assert "is not in the range 1<=x<=1024" in run("demo", "--num-backends", "1025").output
    large = run("demo", "--batch-size", "16384", "--num-backends", "1000")
    assert re.search("Error: 16384 requests and 1000 backends take 1.* GB, this", large.output)


def test_verify_passes():
    result = run("verify", "--cases", "40", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert re.search(r"xla +│ prefix_sum +│ +\d+ │ +0 │", result.output)


def test_verify_prints_a_failing_case_that_fails_when_run(broken):
    result = run("verify", "--cases", "60")
    assert result.exit_code == 1
    program = result.output[result.output.index("import jax") :]
    printed = []
    names = {"print": printed.append}
    exec(program, names)
    actual, expected = printed
    x = names["arguments"].pop("x")
    assert not names["arguments"]
    assert len(x) == 3  # enough to fail, and as few as it takes
    assert ((x >= 0) & (x < 100)).all()
    np.testing.assert_array_equal(expected, reference.prefix_sum(x))
    np.testing.assert_array_equal(actual, expected + 1)


def test_verify_counts_an_implementation_that_raises(monkeypatch):
    def fail(x):
        raise RuntimeError("no memory")

    module = types.SimpleNamespace(**(vars(xla) | {"prefix_sum": fail}))
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", module)
    result = run("verify", "--cases", "20")
    assert result.exit_code == 1, result.output
    assert re.search(r"broken +│ prefix_sum +│ +(\d+) │ +\1 │", result.output)
    program = result.output[result.output.index("import jax") :]
    with pytest.raises(RuntimeError, match="no memory"):
        exec(program, {"print": lambda result: None})


def test_verify_skips_what_cannot_run_and_says_why(monkeypatch):
    module = types.SimpleNamespace(**vars(xla))
    module.unavailable = lambda platform: "needs a GPU"
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", module)
    result = run("verify", "--cases", "5")
    assert result.exit_code == 0
    assert "skipped: needs a GPU" in result.output


def test_random_cases_repeat_with_their_seed():
    first, second = (list(verify.random_cases(30, 5)) for _ in range(2))
    assert [c.title for c in first] == [c.title for c in second]
    assert {c.function for c in verify.random_cases(200, 5)} == set(verify.FUNCTIONS)
    for case in first:
        assert hasattr(reference, case.function)


def test_info():
    result = run("info")
    assert result.exit_code == 0
    assert re.search(rf"{DEFAULT} +│ .* +│ available, default", result.output)
    assert re.search(r"^jax \d", result.output, re.MULTILINE)
    assert json.loads(json.dumps(jaxnsa.get_kernel_info()))["default"] == DEFAULT


def test_info_explains_the_choice(monkeypatch):
    result = run("info", "--explain", "32,2048,3", "1,1,1")
    assert result.exit_code == 0
    assert "bs 32, max_len 2048, N 3 on this cpu: takes " + DEFAULT in result.output
    assert "bs 1, max_len 1, N 1 on this cpu: takes " + DEFAULT in result.output
    assert "  order: ffi, xla: " in result.output
    assert "bs 32, max_len 2048, N 3, live 2048: ffi 126, xla 236 microseconds" in result.output
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "pallas,xla")
    output = run("info", "--explain", "32,2048,3").output
    assert "  the settings name pallas, xla\n  pallas cannot run here: needs an NVIDIA" in output
    assert run("info", "--explain", "32", "2048", "3").output == output
    measured = run("info", "--explain").output
    assert "bs 6, max_len 131072, N 1 on this cpu: takes " + DEFAULT in measured
    for wrong in ("32", "32,2048", "a,b,c", "0,1,1", "32,-1,3"):
        result = run("info", "--explain", wrong)
        assert result.exit_code == 2
        assert f"got '{wrong}', expected three ints >= 1" in result.output
    assert "expected --explain before it" in run("info", "32,2048,3").output


def test_help_is_there_for_every_command():
    for command in ("demo", "verify", "info"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert command in run("--help").output


def test_bad_settings_are_errors_and_not_tracebacks(monkeypatch):
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "bogus")
    result = run("info")
    assert result.exit_code == 1
    assert "Error: JAXNSA_IMPLEMENTATION: got 'bogus', expected one of" in result.output
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "xla")
    monkeypatch.setenv("JAXNSA_VALIDATE", "maybe")
    assert "Error: JAXNSA_VALIDATE: got 'maybe'" in run("verify", "--cases", "1").output


def test_info_without_an_implementation_that_runs(monkeypatch):
    module = types.SimpleNamespace(**vars(xla))
    module.unavailable = lambda platform: "needs a GPU"
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", module)
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "absent")
    result = run("info")
    assert result.exit_code == 0
    assert "default" not in result.output
    assert "cannot run here: needs a GPU" in run("demo").output
