"""The command line of the benchmarks."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxnsa
from benchmarks import roofline as suite
from benchmarks.measure import device_time
from jaxnsa.implementations import get_kernel_info

SMALL = (  # name, call of an implementation, target in microseconds
    ("prefix_sum, n = 32", lambda name: _prefix_sum(32, name), 1.2),
    ("prefix_sum, n = 1024", lambda name: _prefix_sum(1024, name), 1.8),
    ("prefix_sum, n = 65536", lambda name: _prefix_sum(65_536, name), 8.0),
    ("fill_draft_extend, bs 32, 384 tokens", lambda name: _fill_draft_extend(name), 2.5),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure jaxnsa. Every timed result is checked against the reference first."""


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    show_default=True,
    help="Where DEVICE/roofline.json and DEVICE/roofline.md are written.",
)
@click.option("--commit", help="Recorded with the results. Default: what git says.")
def roofline(out: Path, commit: str | None) -> None:
    """Measure the whole job on a GPU against its roof, with every implementation that runs there.

    Device time from the profiler, median of 50 calls, in place, tail "keep". The roof is the time
    of the bytes that have to move at the bandwidth of a large copy, measured in the same run.
    """
    info = get_kernel_info()
    if info["platform"] != "gpu":
        raise click.ClickException(f"needs a GPU, the default backend is {info['platform']}")
    names = [name for name, state in info["implementations"].items() if state["available"]]
    bandwidth = suite.copy_bandwidth()
    rows = []
    for p in track(suite.PROBLEMS, "problems", console=Console(stderr=True)):
        row = suite.measure(p, names)
        label = f"{p.mode.value}: {p.bs}, {p.max_len}, {p.num_backends}, live {p.live}"
        roof = row.bytes_moved / bandwidth * 1e6
        rows.append(
            {"row": label, "roof": roof, "target": p.target or 1.25 * roof, **row.microseconds}
        )
    for label, measure, target in SMALL:
        times = {name: measure(name) for name in names}
        rows.append({"row": label, "roof": None, "target": target, **times})

    device = info["devices"][0]
    record = {
        "device": device,
        "commit": commit or _git_commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "versions": info["versions"],
        "copy_bandwidth_tb_s": bandwidth / 1e12,
        "unit": "microseconds of device time, median of 50",
        "rows": rows,
    }
    folder = out / device.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "roofline.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "roofline.md").write_text(_markdown(record, names))
    Console().print(_table(record, names))


def _table(record: dict, names: list[str]) -> Table:
    table = Table(title=f"{record['device']}: {record['unit']}")
    for k, column in enumerate(_columns(names)):
        table.add_column(column, justify="right" if k else "left")
    for row in record["rows"]:
        table.add_row(*_cells(row, names))
    return table


def _markdown(record: dict, names: list[str]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    columns = _columns(names)
    lines = [
        f"# Roofline on one {record['device']}",
        "",
        f"Commit {record['commit']}, {versions}. `{record['command']}`.",
        f"{record['unit'].capitalize()}, in place, page 64, top-k 2048, tail `keep`; rows are "
        "mode, bs, max_len, N and live, lengths uniform in [live/2, live]. The roof is live bytes "
        "read once and written to each row of each backend, over the "
        f"{record['copy_bandwidth_tb_s']:.2f} TB/s of a large copy in the same run. A time above "
        "its target is in bold.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in record["rows"]:
        cells = _cells(row, names)
        for k, name in enumerate(names, 3):
            if row[name] > row["target"]:
                cells[k] = f"**{cells[k]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _columns(names: list[str]) -> list[str]:
    ratio = ["pallas / ffi"] if {"pallas", "ffi"} <= set(names) else []
    return ["mode: bs, max_len, N, live", "roof", "target", *names, *ratio]


def _cells(row: dict, names: list[str]) -> list[str]:
    roof = "-" if row["roof"] is None else f"{row['roof']:.2f}"
    cells = [row["row"], roof, f"{row['target']:.1f}", *(f"{row[name]:.2f}" for name in names)]
    if {"pallas", "ffi"} <= set(names):
        cells.append(f"{row['pallas'] / row['ffi']:.2f}")
    return cells


def _prefix_sum(n: int, name: str) -> float:
    x = jnp.arange(n, dtype=jnp.int32) % 100
    assert int(jaxnsa.prefix_sum(x, implementation=name)[-1]) == int(x.sum())
    return device_time(lambda: jaxnsa.prefix_sum(x, implementation=name))


def _fill_draft_extend(name: str) -> float:
    extend = jnp.full(32, 12, jnp.int32)
    seq_lens = jnp.arange(100, 132, dtype=jnp.int32)

    def call() -> jaxnsa.DraftExtendSeqlens:
        return jaxnsa.fill_draft_extend_metadata(
            extend, seq_lens, nsa_index_topk=2048, max_total_tokens=384, implementation=name
        )

    assert call().seqlens_expanded[-1] == 131
    return device_time(call)


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"unknown, jaxnsa {version('jaxnsa')}"


if __name__ == "__main__":
    main()
