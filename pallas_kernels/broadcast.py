"""Copies of one source to N destinations in one launch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lanes import Lanes, access_width
from pallas_kernels.launch import launch
from pallas_kernels.rows import Location, Request
from pallas_kernels.tables import Table
from pallas_kernels.tuning import BlockConfig

_MAX_FLAT = 2**31 - 1  # elements that an int32 index reaches


def broadcast(
    source: Any,
    out: tuple[Any, ...] | None,
    *,
    num_backends: int,
    live: dict[int, int] | None = None,
    kv_lens: jax.Array | None = None,
    config: BlockConfig | None = None,
    interpret: Any = False,
) -> tuple[Any, ...]:
    """Copies every array of a pytree to all destinations.

    Args:
      source: pytree of int32 arrays of one or two dimensions.
      out: destinations of the same structure to fill in place, or None for fresh ones.
      num_backends: number of copies.
      live: which leaves, by position, are copied only as far as `kv_lens` reaches, and the tokens
        that a column of each stands for. The rest of their destinations is left as it is.
      kv_lens: int32 [rows] of the leaves in `live`.
      config: block sizes; None: `BlockConfig.heuristic`.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      `num_backends` pytrees like `source`.
    """
    lanes = Lanes(bool(interpret))
    leaves, structure = jax.tree.flatten(source)
    live = live or {}
    # Whole arrays are copied as one long row, where an index reaches their end.
    flat = [k not in live and leaf.size <= _MAX_FLAT for k, leaf in enumerate(leaves)]

    def view(arrays: list[jax.Array]) -> list[jax.Array]:
        return [a.reshape(1, -1) if f else a for a, f in zip(arrays, flat, strict=True)]

    sources = view(leaves)
    tables = []
    for k, leaf in enumerate(sources):
        rows, columns = leaf.shape
        tail = "keep" if k in live else "copy"
        blocks = config or BlockConfig.heuristic(rows, columns)
        width = access_width(columns)
        tables.append(Table.of(rows, columns, live.get(k, 1), tail, width, blocks))
    counts = [t.blocks * len(s) for t, s in zip(tables, sources, strict=True)]

    def kernel(index, inputs, results, _):
        first = 0
        for k, (table, count) in enumerate(zip(tables, counts, strict=True)):

            @pl.when((index >= first) & (index < first + count))
            def _(k=k, table=table, first=first):
                row = lax.rem(index - first, jnp.int32(len(sources[k])))
                block = lax.div(index - first, jnp.int32(len(sources[k])))
                kv_len = inputs["kv_lens"][row] if k in live else jnp.int32(0)
                table.write(
                    lanes,
                    block,
                    lambda columns: inputs["sources"][k][row, columns],
                    Request(kv_len, 1),
                    lambda: Location(row, 1, len(sources[k])),
                    lambda location, body: None,
                    [(result[k], ()) for result in results],
                )

            first += count

    inputs = {"sources": sources} | ({"kv_lens": kv_lens} if live else {})
    held = None if out is None else [view(jax.tree.leaves(o)) for o in out]
    shapes = [[jax.ShapeDtypeStruct(s.shape, s.dtype) for s in sources]] * num_backends
    results = launch(
        kernel,
        inputs,
        held,
        shapes,
        blocks=sum(counts),
        name="broadcast",
        interpret=interpret,
    )
    return tuple(
        jax.tree.unflatten(
            structure, [a.reshape(leaf.shape) for a, leaf in zip(result, leaves, strict=True)]
        )
        for result in results
    )
