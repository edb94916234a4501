"""Long histories of a scheduler: tables that are kept equal those that are refreshed in full.

    python tests/fuzz_histories.py --steps 100000 direct xla

Tables are "direct" or "dlpack", those of BackendBuffers by that path, or the name of an
implementation, also an interpreted one: arrays of a jitted step with a BatchTracker.
"""

import time

import click
import interpreted
from kept_tables import JaxTables, TorchTables

from jaxnsa.implementations import IMPLEMENTATIONS

SHAPES = ((40, (0, 2, -3)), (1200, (0, 0)), (150, (0,)), (40, (5, 1)))
"""Columns of the tables, of which 512 are a block's, and offsets of their backends."""
HISTORY = 5000
"""Steps of a history; each has tables of its own."""


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--steps", default=100_000, show_default=True, help="For each of NAMES.")
@click.option("--seed", default=0, show_default=True, help="Of the first history.")
@click.option("--device", default="cpu", show_default=True, help="Of PyTorch's tensors.")
def main(names, steps, seed, device):
    """Run histories until so many steps are done; fails at the first difference."""
    for name in names:
        start, left_alone = time.perf_counter(), 0
        for k, done in enumerate(range(0, steps, HISTORY)):
            columns, offsets = SHAPES[k % len(SHAPES)]
            options = {"seed": seed + k, "columns": columns, "backend_offsets": offsets}
            if name in ("direct", "dlpack"):
                tables = TorchTables(name, device, **options)
            else:
                if name in interpreted.NAMES:
                    IMPLEMENTATIONS[name] = interpreted.module(name)
                tables = JaxTables(name, **options)
            tables.run(min(HISTORY, steps - done))
            left_alone += tables.left_alone
        seconds = time.perf_counter() - start
        print(f"{name}: {steps} steps equal, {left_alone} tokens left alone, {seconds:.0f} s")


if __name__ == "__main__":
    main()
