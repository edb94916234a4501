"""Pictures of results."""

from pathlib import Path

from benchmarks.report import FULL, Record, Report
from benchmarks.suite import Plot, Suite

LABELS = {
    "device_us": "device time, µs",
    "hot_device_us": "device time, µs",
    "latency_us": "latency, µs",
    "issue_us": "host time, µs",
    "step_us": "kernels of a step, µs",
}
# One look for each name wherever it appears; colours after P. Tol, "Colour schemes" (2021).
STYLES = {
    "pallas": ("#4477AA", "o"),
    "triton": ("#228833", "s"),
    "ffi": ("#EE6677", "^"),
    "xla": ("#CCBB44", "D"),
}
OTHERS = (
    ("#66CCEE", "v"),
    ("#AA3377", "P"),
    ("#777777", "X"),
    ("#000000", "*"),
    ("#EE7733", "<"),
    ("#009988", ">"),
    ("#882255", "h"),
)


def draw(suite: Suite, report: Report, folder: Path) -> list[Path]:
    """Writes the pictures of a suite as PNG."""
    return [path for plot in suite.plots if (path := _draw(plot, report, folder))]


def _spread(records: list[Record], name: str, x: str, metric: str) -> list[tuple]:
    """Of each point of a name the 10th and the 90th percentile, where they were recorded."""
    return sorted(
        (
            r.case[x],
            r.metrics.get(f"{metric}_p10", r.metrics[metric]),
            r.metrics.get(f"{metric}_p90", r.metrics[metric]),
        )
        for r in records
        if r.name == name
    )


def _draw(plot: Plot, report: Report, folder: Path) -> Path | None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    records = [
        record
        for record in report.records
        if plot.where(record.case)
        and record.name not in plot.without
        and report.metric in record.metrics
    ]
    ticks = sorted({record.case[plot.x] for record in records})
    if len(ticks) < 2:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    looks, others = dict(STYLES), iter(OTHERS)
    for name in report.names:
        points = sorted(
            (r.case[plot.x], r.metrics[report.metric]) for r in records if r.name == name
        )
        if points:
            own = name.removesuffix(FULL)
            color, marker = looks[own] = looks.get(own) or next(others)
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linestyle="-" if name == own else ":",
                marker=marker,
                markersize=5,
                label=name,
            )
            spread = _spread(records, name, plot.x, report.metric)
            at, low, high = zip(*spread, strict=True)
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    if plot.roof:
        roof = sorted({(r.case[plot.x], r.metrics["roof_us"]) for r in records})
        axes.plot(*zip(*roof, strict=True), color="black", linestyle="--", label="roof")
    if plot.log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel(plot.label)
    axes.set_ylabel(LABELS[report.metric])
    axes.set_title(f"{plot.title}\n{report.device}", fontsize=11)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plot.file}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
