"""The benchmarks: every suite runs, what it writes can be read, a wrong result stops it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import skip_without_library

import benchmarks.__main__ as commands
from benchmarks import measure, readme, report
from benchmarks.__main__ import RESULTS, main
from benchmarks.measure import rotations, timing
from benchmarks.problem import Problem
from benchmarks.replay import replay, totals, windows
from benchmarks.report import Report
from benchmarks.suites import SUITES, incremental, modes, roofline, schedules, torch_handoff
from jaxnsa import ForwardMode, reference
from jaxnsa.app.request_traces import Request
from jaxnsa.implementations import IMPLEMENTATIONS, xla
from jaxnsa.implementations.choice import get_kernel_info


def run(*arguments):
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "150"})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def hasty(monkeypatch):
    """Times mean nothing here: no warming up, few calls, and few sets of memory to take turns."""
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(measure, "MOST_CALLS", 5)
    monkeypatch.setattr(measure, "COLD_BYTES", 2**17)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs(suite, results):
    if suite == "torch":
        pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
        skip_without_library(jax.default_backend() == "gpu")
    done = run(suite, "--quick", "--out", str(results), "--commit", "abc", "--device-name", "A B")
    assert done.exit_code == 0, done.output
    folder = results / "a-b"
    found = Report.read(folder / f"{suite}.json")
    assert (found.suite, found.device, found.commit) == (suite, "A B", "abc")
    assert found.versions["jax"] == jax.__version__
    for record in found.records:
        timed = {name for name in record.metrics if "_us" in name and name != "roof_us"}
        assert timed and found.metric in record.metrics
        assert all(0 < record.metrics[name] < 60e6 for name in timed), record
    text = (folder / f"{suite}.md").read_text()
    assert "Commit abc" in text
    assert found.note in text
    for plot in SUITES[suite].plots:
        if len({r.case[plot.x] for r in found.records if plot.where(r.case)}) > 1:
            assert (folder / f"{plot.file}.png").read_bytes().startswith(b"\x89PNG")
    assert SUITES[suite].title.split(" ")[0] in done.output


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    done = run("modes", "--out", str(tmp_path / "file" / "results"))
    assert done.exit_code == 1
    assert "Error: --out: [Errno 20] Not a directory" in done.output


@pytest.mark.usefixtures("hasty")
def test_without_matplotlib_there_are_no_plots(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    done = run("dispatch", "--quick", "--out", str(tmp_path), "--device-name", "/../x")
    assert done.exit_code == 0
    assert "no plots, for want of matplotlib; run: pip install matplotlib" in done.output
    assert sorted(path.name for path in (tmp_path / "-x").iterdir()) == [
        "dispatch.json",
        "dispatch.md",
    ]


def test_a_wrong_result_stops_the_run(monkeypatch, tmp_path):
    def fused_metadata(*arguments):
        backends = xla.fused_metadata(*arguments)
        return jax.tree.map(lambda x: x + 1, backends)

    class Wrong:
        unavailable = staticmethod(lambda platform: None)
        version = staticmethod(lambda: "1")

    Wrong.fused_metadata = staticmethod(fused_metadata)
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Wrong)
    done = run("roofline", "--quick", "--out", str(tmp_path))
    assert isinstance(done.exception, AssertionError)
    assert "of backend 0 is wrong for {'mode': 'decode'" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_wrong_tensors_stop_the_run():
    pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
    problem = Problem(ForwardMode.DECODE, 3, 128, 2, 128)
    with pytest.raises(AssertionError, match="cache_seqlens is wrong for {'mode': 'decode'"):
        torch_handoff._measure(lambda problem, tensors: lambda: None, problem)


def test_inputs_take_turns():
    order = []
    calls = [lambda k=k: order.append(k) for k in range(3)]
    metrics = timing(calls, count=6, wait=lambda result: result)
    if jax.default_backend() == "cpu":  # on a GPU the first is repeated under the profiler
        assert order == [k % 3 for k in range(len(order))]
    assert len(order) > 9
    assert 0 <= metrics["latency_us_p10"] <= metrics["latency_us"] <= metrics["latency_us_p90"]
    assert rotations(2**40, 2**20) == 1
    assert rotations(2**20, 2**20) == 64
    assert rotations(2**26, 2**20) == 2
    assert rotations(1, 2**31) == 2


@pytest.mark.parametrize("compacts", (False, True))
def test_a_replay_counts_what_rows_do_not_hold(compacts):
    requests = [Request(5, 2), Request(9, 3), Request(4, 0), Request(90, 50), Request(7, 7)]
    history = list(replay(requests, 2, 64, compacts))
    steps = [some.step(k) for some in history for k in range(some.number)]
    seen = [(*s.request_ids.tolist(), *s.seq_lens.tolist(), *s.held.tolist()) for s in steps]
    expected = [(0, 1, 6, 10, 0, 0), (0, 1, 7, 11, 6, 10)]
    if compacts:
        expected += [(1, 2, 12, 5, 0, 0), (3, 4, 15, 8, 0, 0)]
    else:
        expected += [(2, 1, 5, 12, 0, 11), (3, 4, 15, 8, 0, 0)]  # the prompt is cut to the table
    expected += [(3, 4, 15 + k, 8 + k, 14 + k, 7 + k) for k in range(1, 7)]
    assert seen == expected
    rows = {ids: row for s in steps for ids, row in zip(s.request_ids, s.pool_rows, strict=True)}
    assert sorted(rows.values()) == list(range(5))
    live, changed = (
        sum(int(a.sum()) for a in arrays)
        for arrays in ((s.seq_lens for s in steps), (s.seq_lens - s.held for s in steps))
    )
    assert totals(iter(history)) == (len(steps), live, changed)
    found = windows(iter(history), len(steps), 3, 4)
    for run, first in zip(found, (0, 3, 6), strict=True):
        assert [s.seq_lens.tolist() for s in run] == [
            s.seq_lens.tolist() for s in steps[first : first + 4]
        ]


@pytest.mark.usefixtures("hasty")
def test_replays_of_traces(monkeypatch, tmp_path):
    trace = tmp_path / "some.csv"
    trace.write_text("input_length,output_length\n" + "30,9\n" * 200)
    monkeypatch.setattr(incremental, "ROWS", ())
    name = get_kernel_info()["default"]
    monkeypatch.setattr(incremental, "runnable", lambda: [name])
    done = run("incremental", "--trace", str(trace), "--out", str(tmp_path), "--device-name", "x")
    assert done.exit_code == 0, done.output
    found = Report.read(tmp_path / "x" / "incremental.json")
    records = found.records
    assert {(r.case["history"], r.case["bs"], r.case["slots"]) for r in records} == {
        ("some", 32, "stay"),
        ("some", 32, "compacted"),
    }  # there are too few requests for larger batches
    assert all(r.case["live"] == 35 for r in records)
    moved = {r.name: r.metrics["bytes_moved"] for r in records}
    full = moved[f"{name}, full"]
    assert 16 * 32 * 31 < full < 32 * 32 * 39  # at least four columns, three of them written
    assert 16 * 32 < moved[name] < full
    lines = readme.SECTIONS["incremental"](found)
    assert {line.split(" | ")[1] for line in lines[4:]} == {"stay", "compacted"}
    assert run("incremental", "--trace", str(tmp_path / "none")).exit_code == 2


def test_the_loop_of_row_copies_counts_what_it_writes():
    lengths, indices = np.array([130, 0, 64], np.int32), np.array([2, 0, 1], np.int32)
    pool = np.arange(3 * 200, dtype=np.int32).reshape(3, 200)
    expected = reference.fused_metadata_precompute_and_broadcast(
        lengths, indices, pool, num_backends=2, tail="zero"
    )
    zeros = jax.tree.map(np.zeros_like, expected)
    assert roofline.numpy_loop(lengths, indices, pool, zeros) == 2 * 4 * (130 + 64 + 3 + 1)
    for backend, wanted in zip(zeros, expected, strict=True):
        np.testing.assert_array_equal(backend.page_indices, wanted.page_indices)
        np.testing.assert_array_equal(backend.real_page_table, wanted.real_page_table)


def test_bytes_are_counted():
    problem = Problem(ForwardMode.DECODE, 3, 128, 2, 128)
    live = problem.arguments[0].astype(int)
    pages = np.ceil(live / 64).astype(int)
    assert problem.bytes_moved == 4 * (live.sum() + 2 * (live.sum() + pages.sum()))
    verify = Problem(ForwardMode.TARGET_VERIFY, 1, 128, 1, 64)
    (length,) = verify.arguments[0]
    assert verify.bytes_moved == 4 * (length + 4 * (length + 1))


def test_the_table_of_schedules():
    rows = [row for row in schedules.GOALS if row.goal in (0.8, 14)]
    records = [
        report.Record(row.case, name, {"hot_device_us": 3.0, "without_us": 2.0, "goal_us": goal})
        for row in rows
        for name, goal in (("a", 2.8), ("b", 3.1))
    ]
    origin = {"device": "D", "commit": "c", "command": "x", "versions": {"jax": "1"}}
    table = readme.SECTIONS["schedules"](Report.of(schedules.SUITE, records, **origin))
    with_plan = "paged MQA, top-k plan"
    assert table[-2:] == [
        f"| decode | 32 | 65536 | 3 | 8,192 | {with_plan} | 19 | without + 0.8 | **3.0** | 2.0 | "
        "3.0 | 2.0 |",
        f"| decode | 1000 | 65536 | 3 | 100 to 1,200 | {with_plan}, FlashMLA | 28 | 14 | **3.0** | "
        "2.0 | 3.0 | 2.0 |",
    ]


def make_report(**times):
    records = [
        report.Record({"bs": bs}, name, {"latency_us": time})
        for name, series in times.items()
        for bs, time in enumerate(series)
    ]
    origin = {"device": "D", "commit": "c", "command": "x", "versions": {"jax": "1"}}
    return Report.of(modes.SUITE, records, **origin)


def test_compare(tmp_path):
    make_report(a=(1.0, 2.0), b=(3.0,)).write(tmp_path / "before")
    make_report(a=(1.05, 1.0), c=(3.0,)).write(tmp_path / "after")
    before, after = (str(tmp_path / side / "modes.json") for side in ("before", "after"))
    done = run("compare", before, after)
    assert done.exit_code == 0, done.output
    assert "1.05" in done.output and "0.50" in done.output
    assert run("compare", before, after, "--threshold", "1.01").exit_code == 1
    assert run("compare", after, before, "--threshold", "1.9").exit_code == 1
    changed = json.loads(Path(after).read_text()) | {"device": "E"}
    Path(after).write_text(json.dumps(changed))
    done = run("compare", before, after)
    assert done.exit_code == 1
    assert "device: got 'D' and 'E', expected the same" in done.output
    Path(after).write_text("[1]")
    assert "expected a report of this program" in run("compare", before, after).output
    assert run("compare", before, str(tmp_path / "none")).exit_code == 2


def test_the_pages_say_what_was_recorded():
    assert run("readme", "--check").exit_code == 0, "run: python -m benchmarks readme"
    pages = commands._generated_pages()
    table = pages[readme.ROOT / "README.md"].split(readme.BEGIN)[1].split(readme.END)[0]
    assert table.count("\n| [") == len(readme.HEADLINES) + 1  # the whole decode
    assert len(pages[readme.ROOT / "README.md"].splitlines()) <= 200
    everything = pages[RESULTS / "README.md"]
    assert "| ultra_fast | 15 |" in everything
    assert "direct hand-off, to the end of a synchronisation: " in everything
    for page, text in pages.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / target).exists(), target
    with pytest.raises(ValueError, match="expected one line"):
        readme.generate("nothing", readme.headlines, RESULTS)


def test_runs_leave_the_tree_alone_and_are_recorded_by_a_verb_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "DEFAULT_OUT", tmp_path / "out")
    assert RESULTS not in [commands.DEFAULT_OUT, *commands.DEFAULT_OUT.parents]
    for name in ("out", "results", "README.md"):
        assert not (tmp_path / name).exists()
    monkeypatch.setattr(commands, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(commands, "README", tmp_path / "README.md")
    page = f"a\n{readme.BEGIN}\n{readme.END}\nb\n"
    (tmp_path / "README.md").write_text(page)
    folder = tmp_path / "out" / "d"
    recorded = Report.read(RESULTS / "2-core-cpu" / "modes.json")
    recorded._replace(device="D").write(folder)
    quick = json.loads((folder / "modes.json").read_text()) | {"command": "x --quick"}
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "modes.json").write_text(json.dumps(quick))
    assert "got --quick runs of modes" in run("record", str(tmp_path / "quick")).output
    for name, content, message in (
        ("other", recorded._asdict(), "got a report of 'modes', expected one of the suite of that"),
        ("modes", recorded._asdict() | {"records": []}, "expected a report of this program, with"),
        ("modes", [], "expected a report of this program: "),
    ):
        (tmp_path / "wrong").mkdir()
        wrong = tmp_path / "wrong" / f"{name}.json"
        records = content and [record._asdict() for record in content["records"]]
        wrong.write_text(json.dumps(content and content | {"records": records}))
        assert message in run("record", str(wrong.parent)).output
        shutil.rmtree(wrong.parent)
    assert "expected the reports of a run" in run("record", str(tmp_path)).output
    assert not (tmp_path / "results").exists()
    (tmp_path / "results").mkdir()
    assert "got the records" in run("record", str(tmp_path / "results")).output
    (tmp_path / "results" / "README.md").write_text(page)
    done = run("record", str(folder))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "results" / "d" / "modes.md").exists()
    assert "## D" in (tmp_path / "results" / "README.md").read_text()


def test_help_is_there_for_every_command():
    assert run("--help").exit_code == 0
    for command in (*SUITES, "all", "compare", "record", "readme"):
        assert run(command, "--help").exit_code == 0
    assert run("nonsense").exit_code == 2
