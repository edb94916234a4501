"""What the README and the record's own page say of the recorded results, generated from them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from benchmarks.report import FULL, Report, table
from benchmarks.suites.roofline import ROW_COPIES, TARGETS

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- written by `python -m benchmarks readme` -->"
END = "<!-- end of what is written -->"

Reports = Mapping[tuple[str, str], Report]
"""By the folder of a device and the name of a suite."""


class Headline(NamedTuple):
    """A row of the README's table: a figure of a record beside another of the same record.

    Attributes:
      what: was measured.
      device: its folder.
      suite: of the record.
      case: identifies the record's row.
      ours: the column of this library's figure.
      beside: that of the other.
      metric: of both.
      beside_metric: of the other, where it is another.
    """

    what: str
    device: str
    suite: str
    case: dict[str, Any]
    ours: str
    beside: str
    metric: str
    beside_metric: str = ""


_DECODE = {"mode": "decode", "bs": 32, "max_len": 65_536, "N": 3, "live": 8192}
_VERIFY = {"mode": "target_verify", "bs": 64, "max_len": 65_536, "N": 3, "live": 65_536}
HEADLINES = (
    Headline(
        "decode, device time",
        "nvidia-h200",
        "roofline",
        _DECODE,
        "pallas",
        "xla",
        "hot_device_us",
    ),
    Headline(
        "decode, rows half to all filled, device time",
        "nvidia-h200",
        "roofline",
        _DECODE | {"live": 65_536},
        "pallas",
        "xla",
        "hot_device_us",
    ),
    Headline(
        "decode, all columns live: one new token a request, beside writing all, device time",
        "nvidia-h200",
        "incremental",
        {
            "history": "all rows alike",
            "slots": "stay",
            "bs": 32,
            "max_len": 65_536,
            "live": 65_536,
            "changed_percent": 0.00153,
        },
        "pallas",
        "pallas" + FULL,
        "step_us",
    ),
    Headline(
        "decode, pages alone, with the schedules of DeepGEMM, top-k and FlashMLA, beside none, "
        "device time",
        "nvidia-h200",
        "schedules",
        _DECODE
        | {
            "live": "8,192",
            "schedules": "paged MQA, top-k plan, FlashMLA",
            "replaces": 28,
            "goal": "6",
        },
        "pallas",
        "pallas",
        "hot_device_us",
        "without_us",
    ),
    Headline(
        "verify of 4 drafts, 64 requests, rows half to all filled, device time",
        "nvidia-h200",
        "roofline",
        _VERIFY,
        "pallas",
        "xla",
        "hot_device_us",
    ),
    Headline(
        "from PyTorch, until the call returns",
        "nvidia-h200",
        "torch",
        _DECODE,
        "direct",
        "torch eager x N",
        "issue_us",
    ),
    Headline(
        "decode, caches cold, from the call to its results",
        "2-core-cpu",
        "roofline",
        _DECODE,
        "ffi",
        ROW_COPIES,
        "latency_us",
    ),
    Headline(
        "from PyTorch, until it is done",
        "2-core-cpu",
        "torch",
        _DECODE,
        "direct",
        "torch eager x N",
        "latency_us",
    ),
)


def read(results: Path) -> Reports:
    """All recorded reports."""
    found = {}
    for path in sorted(results.glob("*/*.json")):
        report = Report.read(path)
        found[path.parent.name, report.suite] = report
    return found


def generate(page: str, write: Callable[[Reports], list[str]], results: Path) -> str:
    """A page with what lies between its two lines made anew from the reports under `results`."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"expected one line {BEGIN!r} and one {END!r}")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    lines = [line if line.startswith("|") else _wrapped(line) for line in write(read(results))]
    return before + "\n".join([BEGIN, "", *lines, END]) + after


def _wrapped(line: str) -> str:
    return fill(line, 100, break_long_words=False, break_on_hyphens=False)


def headlines(reports: Reports) -> list[str]:
    """The README's table, and what the worked decode takes."""
    cells = []
    for row in HEADLINES:
        report = reports.get((row.device, row.suite))
        if report is None:
            continue
        for case, by_name in report.rows():
            if case == row.case and {row.ours, row.beside} <= by_name.keys():
                ours = by_name[row.ours][row.metric]
                beside = by_name[row.beside][row.beside_metric or row.metric]
                cells.append(
                    [
                        f"[{row.what}](benchmarks/results/{row.device}/{row.suite}.md)",
                        report.device,
                        f"{ours:,.1f} ({row.ours})",
                        f"{beside:,.1f} ({row.beside})",
                    ]
                )
    lines = [*table(["microseconds", "machine", "jaxnsa", "beside it"], cells), ""]
    decode = reports.get(("nvidia-h200", "sparse-attention"))
    if decode is not None:
        file = f"benchmarks/results/nvidia-h200/{decode.suite}.md"
        link = f"[a whole decode of one untrained layer]({file})"
        lines += [*_decode(decode, link), ""]
    return lines


def every_table(reports: Reports) -> list[str]:
    """The tables of all suites of all devices, GPUs first."""
    folders = {folder for folder, _ in reports}
    return [
        line
        for folder in sorted(folders, key=lambda folder: (folder.endswith("cpu"), folder))
        for line in _device({s: r for (f, s), r in reports.items() if f == folder}, folder)
    ]


def _device(reports: dict[str, Report], folder: str) -> list[str]:
    """The sections of one device."""
    some = next(iter(reports.values()))
    lines = [f"## {some.device}", ""]
    for suite, section in SECTIONS.items():
        if suite in reports:
            report = reports[suite]
            lines += [*section(report), ""]
            if suite == "modes" and "torch" in reports:
                lines[-1:] = _hand_off(report, reports["torch"])
            lines += [
                f"[{suite}]({folder}/{suite}.md): commit {report.commit}, jax "
                f"{report.versions['jax']}, `{report.command}`.",
                "",
            ]
    return lines


def _roofline(report: Report) -> list[str]:
    hot = report.metric.endswith("device_us")
    lines = [
        "The whole job in place, in microseconds"
        + (" of device time, the same inputs in each call" if hot else " end to end, caches cold")
        + ". The roof is live bytes read once and written N times, over the bandwidth of a large "
        "copy.",
        "",
    ]
    rows = _with_targets(report)
    lines += table(*rows.pivot("hot_device_us" if hot else report.metric))
    missed = _missed(rows, "hot_device_us") if hot else []
    if missed:
        lines += ["", "Bold times miss their target: " + "; ".join(missed) + "."]
        cold = _missed(rows, "device_us")
        lines[-1] += f" With caches cold these miss it: {'; '.join(cold)}." if cold else ""
    return [*lines, "", *_losers(rows, "hot_device_us" if hot else report.metric)]


def _pages(report: Report) -> list[str]:
    what = "Tables of pages alone, bold where they miss their target"
    return _times(what if _has_device(report) else "Tables of pages alone", report)


def _times(what: str, report: Report) -> list[str]:
    """A table of times, of the device's where there is one."""
    hot = _has_device(report)
    return [
        f"{what}, in microseconds {'of device time' if hot else 'end to end'}:",
        "",
        *table(*report.pivot("hot_device_us" if hot else report.metric)),
    ]


def _with_targets(report: Report) -> Report:
    """The rows that targets are set for."""
    cases = [problem.case for problem in TARGETS]
    return report._replace(records=[r for r in report.records if r.case in cases])


def _missed(report: Report, metric: str) -> list[str]:
    """How many targets each name missed."""
    counts = []
    for name in report.names:
        own = [r for r in report.records if r.name == name and "target_us" in r.metrics]
        count = sum(r.metrics[metric] > r.metrics["target_us"] for r in own)
        if count:
            counts.append(f"{name} {count} of {len(own)}")
    return counts


def _losers(report: Report, metric: str) -> list[str]:
    """Who is fastest in how many rows, and who never is."""
    wins: dict[str, int] = dict.fromkeys(report.names, 0)
    rows = report.rows()
    for _, by_name in rows:
        times = {name: m[metric] for name, m in by_name.items() if metric in m}
        wins[min(times, key=lambda name: times[name])] += 1
    won = ", ".join(f"{name} in {count}" for name, count in wins.items() if count)
    never = ", ".join(name for name, count in wins.items() if not count)
    line = f"Fastest of {len(rows)} rows: {won}."
    return [line + (f" Never: {never}." if never else "")]


def _modes(report: Report) -> list[str]:
    theirs = {"ultra_fast": 15, "fast": 35, "fallback": 80}
    lines = [
        "Three strategies at bs 32, N = 3, end to end in microseconds, beside the source "
        "documents' on an H100:",
        "",
    ]
    rows = [
        (case, by_name) for case, by_name in report.rows() if (case["bs"], case["N"]) == (32, 3)
    ]
    cells = [
        [
            case["strategy"],
            f"{theirs[case['strategy']]}",
            *(f"{by_name[name]['latency_us']:.1f}" for name in report.names),
            *(
                f"{by_name[name]['hot_device_us']:.1f}"
                for name in report.names
                if _has_device(report)
            ),
        ]
        for case, by_name in rows
    ]
    header = ["strategy", "theirs", *report.names]
    header += [f"{name}, device" for name in report.names if _has_device(report)]
    return lines + table(header, cells)


def _hand_off(modes: Report, hand_off: Report) -> list[str]:
    """The same step from PyTorch: issue, device and synchronise, beside the strategies' times."""
    cases = [case for case, _ in modes.rows() if (case["bs"], case["N"]) == (32, 3)]
    return [
        "",
        *(
            f"PyTorch's tensors filled by the direct hand-off, to the end of a synchronisation: "
            f"{by_name['direct']['latency_us']:.1f} microseconds."
            for case, by_name in hand_off.rows()
            if cases and case == {k: v for k, v in cases[0].items() if k != "strategy"}
        ),
        "",
    ]


def _has_device(report: Report) -> bool:
    return all("hot_device_us" in record.metrics for record in report.records)


def _draft_extend(report: Report) -> list[str]:
    theirs = {"Python loop": 158, "triton": 48, "ffi adaptive": 51, "ffi optimized": 35.5}
    metrics = ["latency_us", *(["hot_device_us"] if _has_device(report) else [])]
    cells = [
        [name, f"{theirs[name]:g}" if name in theirs else "-", *(f"{m[k]:.1f}" for k in metrics)]
        for case, by_name in report.rows()
        if case["bs"] == 32
        for name, m in by_name.items()
    ]
    lines = [
        "Lengths of a draft-extend step at bs 32, end to end in microseconds, beside the source "
        "documents' on an H100:",
        "",
    ]
    return lines + table(["", "theirs", "ours", "ours, device"][: 2 + len(metrics)], cells)


def _prefix_sum(report: Report) -> list[str]:
    theirs = {
        16: ("15", "0.3"),
        32: ("16", "0.5"),
        64: ("18", "1.0"),
        128: ("20", "1.5"),
        256: ("25", "2.0"),
    }
    rows = report.rows()
    device = _has_device(report)
    lines = [
        f"Prefix sums in microseconds {'of device time' if device else 'end to end'}, beside the "
        "source documents' on an H100:",
        "",
    ]
    metric = "hot_device_us" if device else "latency_us"
    cells = [
        [
            f"{case['n']:,}",
            *theirs.get(case["n"], ("-", "-")),
            *(f"{by_name[name][metric]:.2f}" if name in by_name else "-" for name in report.names),
        ]
        for case, by_name in rows
    ]
    header = ["n", "their torch ops", "their kernel", *report.names]
    return lines + table(header, cells)


def _prefill(report: Report) -> list[str]:
    return _times("All arrays of a prefill in place, N = 1", report)


def _scale(report: Report) -> list[str]:
    return _times(
        "Requests shared between devices by `shard_map`, N = 3, fresh results, for each device",
        report,
    )


def _schedules(report: Report) -> list[str]:
    hot = _has_device(report)
    metric = "hot_device_us" if hot else report.metric
    lines = [
        "A step with the consumers' schedules, and behind it the same step without them, in "
        f"microseconds {'of device time' if hot else 'end to end'}; `replaces` counts the launches "
        "that SGLang 0.5.23 takes for it. Bold times miss their goal.",
        "",
    ]
    cells = []
    for case, by_name in report.rows():
        cell = [str(value) for value in case.values()]
        for name in report.names:
            found = by_name[name]
            mark = "**" if found[metric] > found.get("goal_us", found[metric]) else ""
            cell += [f"{mark}{found[metric]:.1f}{mark}", f"{found['without_us']:.1f}"]
        cells.append(cell)
    header = [*report.records[0].case]
    header += [title for name in report.names for title in (name, "without")]
    return lines + table(header, cells)


def _torch(report: Report) -> list[str]:
    lines = [
        "Host time to refresh a PyTorch engine's buffers, in microseconds until the call returns:",
        "",
    ]
    return lines + table(*report.pivot("issue_us"))


def _dispatch(report: Report) -> list[str]:
    lines = [
        "Host time to issue one call by what it returns, in microseconds:",
        "",
    ]
    return lines + table(*report.pivot("issue_us"))


def _incremental(report: Report) -> list[str]:
    """A line for each history, and one for each shape: there, of the fewest columns that change."""
    lines = [
        "Decode steps that write what changed (N = 3, both tables): microseconds of their kernels, "
        "on a CPU end to end, and megabytes of the pool and the tables. The last column is the "
        "share of live columns from which on a full refresh is as fast.",
        "",
    ]
    header = ["history", "slots", "bs", "max_len", "live", "changed", "by", "MB", "mean", "p50"]
    header += ["p99", "full: MB", "mean", "as fast at"]
    cells, shapes = [], set()
    for case, by_name in report.rows():
        shape = case["history"], case["slots"], case["bs"], case["max_len"], case["live"]
        if shape in shapes:
            continue
        shapes.add(shape)
        for name, metrics in by_name.items():
            full = by_name.get(name + FULL)
            if full is None:
                continue
            even = metrics.get("break_even_percent")
            cells.append(
                [
                    *(f"{value:,}" if isinstance(value, int) else value for value in shape),
                    f"{case['changed_percent']:g}%",
                    name,
                    f"{metrics['bytes_moved'] / 1e6:.3g}",
                    *(f"{metrics[key]:.2f}" for key in ("step_us", "step_us_p50", "step_us_p99")),
                    f"{full['bytes_moved'] / 1e6:.3g}",
                    f"{full['step_us']:.2f}",
                    "-" if even is None else f"{even:.0f}%",
                ]
            )
    return lines + table(header, cells)


def _decode(report: Report, title: str) -> list[str]:
    """What the steps of the worked decode accept and take."""
    case, metrics = report.records[0].case, report.records[0].metrics
    verified, step, metadata = case["drafts"] + 1, metrics["step_us"], metrics.get("metadata_us")
    columns = {
        title: f"{case['requests']} requests, {case['drafts']} drafts",
        "machine": report.device,
        "steps": str(case["steps"]),
        "tokens that a request accepts of a step": f"{metrics['tokens']:.2f} of {verified}",
        "microseconds of a step": f"{step:,.0f}",
        "of these metadata": f"{metadata:.1f}, {metadata / step:.1%}" if metadata else "-",
    }
    return table([*columns], [[*columns.values()]])


def _sparse_attention(report: Report) -> list[str]:
    return [
        "A whole sparse-attention decode of one untrained layer, which drafts with fewer keys, [in "
        "one file](../sparse_attention.py) from prefill to a speculative loop in `lax.scan`, whose "
        "tokens equal those of an oracle without pages and those of the same loop [in "
        "PyTorch](../sparse_attention_torch.py):",
        "",
        *_decode(report, "batch"),
    ]


SECTIONS = {
    "roofline": _roofline,
    "pages": _pages,
    "modes": _modes,
    "draft-extend": _draft_extend,
    "prefill": _prefill,
    "schedules": _schedules,
    "incremental": _incremental,
    "sparse-attention": _sparse_attention,
    "prefix-sum": _prefix_sum,
    "torch": _torch,
    "dispatch": _dispatch,
    "scale": _scale,
}
