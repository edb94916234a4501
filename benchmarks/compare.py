"""Two runs of one suite side by side."""

from typing import Any, NamedTuple

from benchmarks.report import Report


class Change(NamedTuple):
    """One cell of both reports.

    Attributes:
      case: its row.
      name: its column.
      before, after: the metric, in microseconds; None where a report has no such cell.
    """

    case: dict[str, Any]
    name: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """after / before."""
        if self.before is None or self.after is None:
            return None
        return self.after / self.before


def changes(before: Report, after: Report) -> list[Change]:
    """Every cell of either report; ValueError where they cannot be compared."""
    for field in ("suite", "metric", "device"):
        if getattr(before, field) != getattr(after, field):
            raise ValueError(
                f"{field}: got {getattr(before, field)!r} and {getattr(after, field)!r}, expected "
                f"the same"
            )
    values: dict[tuple, list] = {}
    for side, report in enumerate((before, after)):
        for record in report.records:
            cell = values.setdefault(
                (tuple(record.case.items()), record.name), [record.case, record.name, None, None]
            )
            cell[2 + side] = record.metrics.get(report.metric)
    return [Change(*cell) for cell in values.values()]
