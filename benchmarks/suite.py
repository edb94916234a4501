"""What a suite is: jobs, each of which measures one cell of a table."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxnsa.implementations.choice import get_kernel_info


class Job(NamedTuple):
    """One measurement.

    Attributes:
      case: what identifies the row of the table.
      name: what identifies its column: an implementation, a variant, a strategy.
      run: makes the inputs, checks the result against the reference, and returns metrics.
    """

    case: dict[str, Any]
    name: str
    run: Callable[[], dict[str, float]]


class Plot(NamedTuple):
    """A picture of some of the records, a line for each name.

    Attributes:
      file: name of the picture.
      title: what it shows.
      x: key of the case along the horizontal axis.
      label: of that axis, with its unit.
      where: tells by the case whether a record is drawn.
      roof: whether to draw the metric "roof_us".
      log: whether the horizontal axis is logarithmic, as the vertical one is.
      without: names that are left out.
    """

    file: str
    title: str
    x: str
    label: str
    where: Callable[[dict[str, Any]], bool]
    roof: bool = False
    log: bool = True
    without: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Suite:
    """One table.

    Attributes:
      name: its subcommand.
      title: of the table.
      note: what was measured, for readers of the table.
      jobs: the measurements; of small problems, a few seconds on a CPU, where its argument is True.
      plots: the pictures.
      metric: that the table shows; None: device time on a GPU, "latency_us" elsewhere.
      replays: whether `jobs` takes the paths of traces too.
      passes: over all jobs, far apart, of which each keeps that with the least "metric": what else
        runs on a shared host takes part in some.
    """

    name: str
    title: str
    note: str
    jobs: Callable[..., list[Job]]
    plots: tuple[Plot, ...] = ()
    metric: str | None = None
    replays: bool = False
    passes: int = 1


def runnable() -> list[str]:
    """Names of the implementations that run here."""
    states = get_kernel_info()["implementations"]
    return [name for name, state in states.items() if state["available"]]
