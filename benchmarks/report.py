"""What was measured, as JSON, Markdown and a table in the terminal."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.suite import Suite

UNITS = {
    "device_us": "microseconds of device time with the caches cold",
    "hot_device_us": "microseconds of device time, the same inputs in each call",
    "latency_us": "microseconds from the call to its result on the device",
    "issue_us": "microseconds until the call returns",
    "step_us": "microseconds of a step's kernels, on a CPU until its result is there: the mean",
}

FULL = ", full"
"""Ends the name of a full refresh, beside that of steps that write what changed."""


class Record(NamedTuple):
    """One measured cell.

    Attributes:
      case: its row.
      name: its column.
      metrics: by name; see `measure.timing`.
    """

    case: dict[str, Any]
    name: str
    metrics: dict[str, float]


class Report(NamedTuple):
    """One suite's results.

    Attributes:
      suite: its name.
      title: of the table.
      note: what was measured.
      metric: that the table shows.
      device: where.
      commit: of what.
      command: how.
      versions: with what, by package.
      records: the results.
    """

    suite: str
    title: str
    note: str
    metric: str
    device: str
    commit: str
    command: str
    versions: dict[str, str]
    records: list[Record]

    @classmethod
    def of(cls, suite: Suite, records: list[Record], **origin: Any) -> "Report":
        """A report; `origin` holds device, commit, command and versions."""
        measured = {key for record in records for key in record.metrics}
        metric = suite.metric or next(
            key for key in ("device_us", "hot_device_us", "latency_us") if key in measured
        )
        return cls(suite.name, suite.title, suite.note, metric, records=records, **origin)

    @classmethod
    def read(cls, path: Path) -> "Report":
        """What `write` wrote; ValueError where it is something else."""
        try:
            content = json.loads(path.read_text())
            records = [Record(**record) for record in content.pop("records")]
            report = cls(**content, records=records)
            numbers = [n for record in records for n in record.metrics.values()]
            cases = [record.case.items() for record in records]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected a report of this program: {error}") from None
        if not cases or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{path}: expected a report of this program, with records of numbers")
        return report

    def write(self, folder: Path) -> None:
        """SUITE.json and SUITE.md."""
        folder.mkdir(parents=True, exist_ok=True)
        content = self._asdict() | {"records": [record._asdict() for record in self.records]}
        (folder / f"{self.suite}.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / f"{self.suite}.md").write_text(self.markdown())

    @property
    def names(self) -> list[str]:
        """Columns in the order in which they appear."""
        return list(dict.fromkeys(record.name for record in self.records))

    def rows(self) -> list[tuple[dict[str, Any], dict[str, dict[str, float]]]]:
        """Each case, and its metrics by name."""
        rows: dict[tuple, tuple[dict, dict]] = {}
        for record in self.records:
            key = tuple(record.case.items())
            rows.setdefault(key, (record.case, {}))[1][record.name] = record.metrics
        return list(rows.values())

    def pivot(self, metric: str) -> tuple[list[str], list[list[str]]]:
        """Header and cells of a table of one metric; times above a target are in bold."""
        rows = self.rows()
        extras = [
            (key, title)
            for key, title in (("roof_us", "roof"), ("target_us", "target"))
            if any(key in m for _, by_name in rows for m in by_name.values())
        ]
        ratio = {"pallas", "ffi"} <= set(self.names) and metric.endswith("device_us")
        header = [*rows[0][0], *(title for _, title in extras), *self.names]
        header += ["pallas / ffi"] if ratio else []
        cells = []
        for case, by_name in rows:
            some = next(iter(by_name.values()))
            line = [_number(value) for value in case.values()]
            line += [_time(some.get(key)) for key, _ in extras]
            for name in self.names:
                value = by_name.get(name, {}).get(metric)
                text, target = _time(value), some.get("target_us")
                missed = value is not None and target is not None and value > target
                line.append(f"**{text}**" if missed else text)
            if ratio:
                both = [m[metric] for n in ("pallas", "ffi") if metric in (m := by_name.get(n, {}))]
                line.append(f"{both[0] / both[1]:.2f}" if len(both) == 2 else "-")
            cells.append(line)
        return header, cells

    def markdown(self) -> str:
        """The table of the metric, of hot device times where there are some, and all metrics."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines = [
            f"# {self.title}: {self.device}",
            "",
            f"Commit {self.commit}, {versions}. `{self.command}`.",
            "",
            self.note,
        ]
        shown = [self.metric]
        if self.metric == "device_us":
            shown.append("hot_device_us")
        for metric in shown:
            lines += ["", f"## {UNITS[metric].capitalize()}", ""]
            lines += table(*self.pivot(metric))
            if any("target_us" in record.metrics for record in self.records):
                lines += ["", "A time above its target is in bold."]
        metrics = list(dict.fromkeys(key for r in self.records for key in r.metrics))
        lines += ["", "## Everything", ""]
        lines += table(
            [*self.records[0].case, "name", *metrics],
            [
                [
                    *map(_number, record.case.values()),
                    record.name,
                    *(_time(record.metrics.get(key)) for key in metrics),
                ]
                for record in self.records
            ],
        )
        return "\n".join(lines) + "\n"

    def terminal(self) -> Table:
        """The table of the metric."""
        header, cells = self.pivot(self.metric)
        shown = Table(title=f"{self.title}: {self.device}", caption=UNITS[self.metric])
        for column in header:
            shown.add_column(column, justify="right")
        for line in cells:
            shown.add_row(*(cell.replace("**", "") for cell in line))
        return shown


def table(header: list[str], cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(line) + " |" for line in cells]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
