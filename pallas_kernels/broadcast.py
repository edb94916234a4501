"""Copies of one source to N destinations in one launch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lanes import Lanes, access_width
from pallas_kernels.launch import launch
from pallas_kernels.rows import Location, Request
from pallas_kernels.tables import Table, Targets
from pallas_kernels.tuning import BlockConfig

_MAX_FLAT = 2**31 - 1  # elements that an int32 index reaches


def broadcast(
    source: Any,
    out: tuple[Any, ...] | None,
    *,
    num_backends: int,
    column_tokens: list[int] | None = None,
    kv_lens: jax.Array | None = None,
    config: BlockConfig | None = None,
    interpret: Any = False,
) -> tuple[Any, ...]:
    """Copies every array of a pytree to all destinations.

    Args:
      source: pytree of int32 arrays of one or two dimensions.
      out: destinations of the same structure to fill in place, or None for fresh ones.
      num_backends: number of copies.
      column_tokens: for each leaf, the tokens that a column stands for: it is copied as far as
        `kv_lens` reaches, and the rest of its destinations is left as it is. 0, or None for all
        leaves: it is copied whole.
      kv_lens: int32 [rows] of the leaves that are not copied whole.
      config: block sizes; None: `BlockConfig.heuristic`.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      `num_backends` pytrees like `source`.
    """
    lanes = Lanes(bool(interpret))
    leaves, structure = jax.tree.flatten(source)
    tokens = column_tokens or [0] * len(leaves)
    # Whole arrays are copied as one long row, where an index reaches their end.
    flat = [not t and leaf.size <= _MAX_FLAT for t, leaf in zip(tokens, leaves, strict=True)]

    def view(arrays: list[jax.Array]) -> list[jax.Array]:
        return [a.reshape(1, -1) if f else a for a, f in zip(arrays, flat, strict=True)]

    sources = view(leaves)
    tables = []
    for t, leaf in zip(tokens, sources, strict=True):
        rows, columns = leaf.shape
        blocks = config or BlockConfig.heuristic(rows, columns, num_backends)
        tail, width = "keep" if t else "copy", access_width(columns)
        tables.append(Table.of(rows, columns, t or 1, tail, width, blocks))
    counts = [t.blocks * len(s) for t, s in zip(tables, sources, strict=True)]

    def kernel(index, inputs, results, _):
        first = 0
        for k, (table, count) in enumerate(zip(tables, counts, strict=True)):

            @pl.when((index >= first) & (index < first + count))
            def _(k=k, table=table, first=first):
                row = lax.rem(index - first, jnp.int32(len(sources[k])))
                block = lax.div(index - first, jnp.int32(len(sources[k])))
                kv_len = inputs["kv_lens"][row] if tokens[k] else jnp.int32(0)
                table.write(
                    lanes,
                    block,
                    lambda columns: inputs["sources"][k][row, columns],
                    Request(kv_len, 1),
                    lambda: Location(row, 1, len(sources[k])),
                    lambda location, body: None,
                    Targets([(result[k], ()) for result in results]),
                )

            first += count

    inputs = {"sources": sources} | ({"kv_lens": kv_lens} if any(tokens) else {})
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
