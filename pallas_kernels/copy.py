"""Copies of one NSAMetadata to N destinations in one launch.

Grid: for each array the blocks of its tiles, in the order of `place`. Block: a warpgroup, which
waits for no other. Inputs: the arrays of the source, and the KV lengths of their rows where tables
are copied as far as they are live. Outputs: the same arrays of every destination.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxnsa.metadata import FIELDS, Array, Extent, ForwardMode, NSAMetadata
from jaxnsa.spec import Rows, Spec
from pallas_kernels.lanes import Lanes, access_width
from pallas_kernels.launch import launch
from pallas_kernels.rows import Lengths, Request
from pallas_kernels.tables import Source, Table, Targets
from pallas_kernels.tuning import BlockConfig, place

_MAX_FLAT = 2**31 - 1  # elements that an int32 index reaches


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
    config: BlockConfig | None = None,
    interpret: Any = False,
) -> tuple[NSAMetadata, ...]:
    """Copies every array to all destinations.

    Args:
      src: int32 arrays, none of them empty.
      out: destinations of the same shapes to fill in place, or None for fresh ones.
      num_backends: number of copies.
      live: the computation that `src` came from: only the live columns of its tables are copied,
        and the rest of their destinations is left as it is. None: everything is copied.
      config: block sizes; None: `BlockConfig.heuristic`.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      `num_backends` NSAMetadata like `src`.
    """
    lanes = Lanes(bool(interpret))
    views = {name: _view(name, array, live) for name, array in src.arrays().items()}
    tables = {}
    for name, view in views.items():
        rows, columns = view.shape
        tokens = live.tokens_per_column(FIELDS[name]) if live and _is_table(name) else 1
        tables[name] = Table.of(
            rows,
            live.max_len if live and _is_table(name) else columns,
            tokens,
            "keep" if live and _is_table(name) else "copy",
            access_width(columns),
            config or BlockConfig.heuristic(rows, rows, columns, num_backends),
        )
    counts = {name: tables[name].blocks * len(view) for name, view in views.items()}

    def kernel(index, read, results, scratch):
        sources, kv_lens = read
        first = 0
        for name, table in tables.items():
            rows = Rows.of(ForwardMode.DECODE, len(views[name]))

            @pl.when((index >= first) & (index < first + counts[name]))
            def _(name=name, table=table, rows=rows, first=first):
                row, block = place(index - first, rows.count, table.blocks)
                kv_len = kv_lens[row] if table.tail == "keep" else jnp.int32(0)
                request = Request(lanes, rows, Lengths(None, None), scratch, row, kv_len, 1)
                targets = Targets(request, [(result[name], ()) for result in results])
                table.write(lanes, block, Source(sources[name], row), [targets])

            first += counts[name]

    def held(metadata: NSAMetadata) -> dict[str, jax.Array]:
        return {name: _view(name, array, live) for name, array in metadata.arrays().items()}

    shapes = {name: jax.ShapeDtypeStruct(view.shape, view.dtype) for name, view in views.items()}
    results = launch(
        kernel,
        (views, live.table_kv_lens(src) if live else None),
        None if out is None else [held(o) for o in out],
        [shapes] * num_backends,
        blocks=sum(counts.values()),
        name="copy",
        interpret=interpret,
    )
    return tuple(
        NSAMetadata(**{name: a.reshape(getattr(src, name).shape) for name, a in result.items()})
        for result in results
    )


def _is_table(name: str) -> bool:
    return FIELDS[name].extent is Extent.TABLE


def _view(name: str, array: Array, live: Spec | None) -> jax.Array:
    """What is copied whole is one long row, where an index reaches its end."""
    flat = not (live and _is_table(name)) and array.size <= _MAX_FLAT
    return jnp.reshape(array, (1, -1) if flat else (-1, array.shape[-1]))
