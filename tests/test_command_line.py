"""The command line as a user meets it."""

import importlib.util
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
from jaxnsa.app import demo, serving, verify
from jaxnsa.app.command_line import main
from jaxnsa.app.request_traces import synthetic_requests
from jaxnsa.implementations import IMPLEMENTATIONS, native_library, xla


def run(*arguments):
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "80"})


def cells(output, row):
    line = next(line for line in output.splitlines() if row in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


@pytest.fixture(autouse=True)
def _small_context(monkeypatch):
    for module in (demo, serving):
        monkeypatch.setattr(module, "CONTEXT_LENGTH", 1024)
    monkeypatch.setattr(demo, "_COPIED", 2**20)


@pytest.fixture
def broken(monkeypatch):
    """An implementation that is wrong whenever a batch has more than two requests."""
    module = types.SimpleNamespace(**vars(xla))
    module.prefix_sum = lambda x: xla.prefix_sum(x) + (len(x) > 2)
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", module)


@pytest.mark.large
def test_demo(implementation):
    result = run("demo", "--steps", "3", "--batch-size", "2", "--implementation", implementation)
    assert result.exit_code == 0, result.output
    name, p50, p99, *device, launches, _, mismatches = cells(result.output, "│ jaxnsa: ")
    assert (name, mismatches) == (f"jaxnsa: {implementation}", "0")
    assert 0 < float(p50) <= float(p99)
    assert len(device) == (jax.default_backend() == "gpu")
    assert float(launches) >= 3
    assert "decode, verify, draft extend; steps: 3" in result.output
    *_, roof, mismatches = cells(result.output, "  incremental ")
    assert (roof, mismatches) == ("-", "0")
    assert float(cells(result.output, "plain jnp")[1]) > 0
    if importlib.util.find_spec("torch"):
        assert cells(result.output, "PyTorch eager")[-1] == "0"


def test_demo_replays_a_trace_and_draws(tmp_path):
    trace, picture = tmp_path / "trace.csv", tmp_path / "steps.png"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n,60,4\n,0,0\n,200000,9\n,130,1\n")
    arguments = ("--steps", "5", "--batch-size", "3", "--num-backends", "1")
    result = run("demo", "--trace", str(trace), *arguments, "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert cells(result.output, "│ jaxnsa: ")[-1] == "0"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_demo_of_more_backends_than_a_launch_fills():
    pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
    from jaxnsa.app import torch_contenders

    rng = np.random.default_rng(0)
    for num_backends in (64, 65):
        batch = serving.Batch(synthetic_requests(rng), 1, num_backends, rng)
        found = torch_contenders.contenders(num_backends, batch.host)
        for contender in found:
            contender.run(contender.given(batch.device))
        names = [contender.name for contender in found]
        assert "PyTorch eager x N" in names
        fills_all = native_library.unavailable(jax.default_backend()) is None and num_backends == 64
        assert ("jaxnsa in PyTorch" in names) == fills_all


def test_demo_reports_mismatches(monkeypatch):
    right = xla.fused_metadata

    def wrong(*arguments):
        first, *others = right(*arguments)
        return (type(first)(**(vars(first) | {"cu_seqlens_k": first.cu_seqlens_k + 1})), *others)

    module = types.SimpleNamespace(**(vars(xla) | {"fused_metadata": wrong}))
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", module)
    result = run("demo", "--steps", "3", "--batch-size", "2", "--implementation", "broken")
    assert result.exit_code == 1
    assert cells(result.output, "jaxnsa: broken")[-1] == "3"


def test_bytes_of_every_backend_count():
    lengths = np.array([100, 65], np.int32)
    step = types.SimpleNamespace(seqlens_expanded=lengths, cache_seqlens=lengths)
    read, written = 165, 165 + 4  # tokens, and two pages of each
    assert demo._bytes_moved((step, step, step), 3) == 4 * (3 * read + 5 * written)


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
    assert "100000 is not in the range 1<=x<=32768" in run("demo", "--batch-size", "100000").output
    assert "is not in the range 1<=x<=1024" in run("demo", "--num-backends", "1025").output
    large = run("demo", "--batch-size", "16384", "--num-backends", "1000")
    assert re.search(r"Error: 16384 requests and 1000 backends take \d+.\d GB, this", large.output)


def test_demo_refuses_a_picture_before_it_measures(tmp_path):
    folder = tmp_path / "none" / "steps.png"
    assert f"--plot: got {folder}, expected a file in a folder" in run(
        "demo", "--plot", str(folder)
    ).output.replace("\n", "")
    assert "--plot: got .weird, expected one of" in run("demo", "--plot", "x.weird").output


def test_verify_refuses_seconds_that_are_no_number():
    assert "--fuzz: got nan, expected seconds" in run("verify", "--fuzz", "nan").output


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
    monkeypatch.setitem(IMPLEMENTATIONS, "raising", module)
    result = run("verify", "--cases", "40")
    assert result.exit_code == 1, result.output
    assert re.search(r"raising +│ prefix_sum +│ +(\d+) │ +\1 │", result.output)
    program = result.output[result.output.index("import jax") :]
    with pytest.raises(RuntimeError, match="no memory"):
        exec(program, {"print": lambda result: None})


def test_verify_skips_what_cannot_run_and_says_why(monkeypatch):
    module = types.SimpleNamespace(**vars(xla))
    module.unavailable = lambda platform: "needs a GPU"
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", module)
    result = run("verify", "--cases", "25", "--seed", "1")
    assert result.exit_code == 0
    assert "skipped absent: needs a GPU\n" in result.output
    assert "fuse…" not in result.output and "broadcast, target_verify" in result.output


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
    assert re.search("pallas +│ .* +│ cannot run here", result.output)
    assert "\npallas needs an NVIDIA GPU of compute capability 9.0 (Hopper)" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "ffi prefix_sum: block_scan, " in result.output or DEFAULT == "xla"
    assert re.search(r"^jax \d", result.output, re.MULTILINE)
    assert json.loads(json.dumps(jaxnsa.get_kernel_info()))["default"] == DEFAULT


def test_info_explains_the_choice(monkeypatch):
    result = run("info", "--explain", "32,2048,3", "1,1,1")
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in result.output.splitlines())
    assert "bs 32, max_len 2048, N 3 on this cpu: takes " + DEFAULT in result.output
    assert "bs 1, max_len 1, N 1 on this cpu: takes " + DEFAULT in result.output
    assert "  order: ffi, xla: " in result.output
    words = " ".join(result.output.split())
    assert "bs 32, max_len 2048, N 3, live 2048: ffi 165, xla 340 microseconds" in words
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "pallas,xla")
    output = run("info", "--explain", "32,2048,3").output
    assert "  the settings name pallas, xla\n  pallas cannot run here: needs an NVIDIA" in output
    assert run("info", "--explain", "32", "2048", "3").output == output
    measured = run("info", "--explain").output
    assert "bs 6, max_len 131072, N 1 on this cpu: takes xla" in measured
    for wrong in ("32", "32,2048", "a,b,c", "0,1,1", "32,-1,3", "7,1000,3000", "7,1073741825,3"):
        result = run("info", "--explain", wrong)
        assert result.exit_code == 2
        assert f"got '{wrong}', expected three ints from 1 to 1073741823," in result.output
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


def test_a_platform_that_jax_has_not_is_an_error_and_no_traceback(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'moon'")

    monkeypatch.setenv("JAX_PLATFORMS", "moon")
    monkeypatch.setattr(jax, "default_backend", fail)
    output = run("info").output
    assert "Error: JAX_PLATFORMS: got 'moon', expected platforms that JAX finds here: Una" in output


def test_info_without_an_implementation_that_runs(monkeypatch):
    module = types.SimpleNamespace(**vars(xla))
    module.unavailable = lambda platform: "needs a GPU"
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", module)
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "absent")
    result = run("info")
    assert result.exit_code == 0
    assert "default" not in result.output
    assert "cannot run here: needs a GPU" in run("demo").output
