"""Copies of one source to N destinations in one launch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxnsa.triton_kernels.columns import load_tokens, store_tokens
from jaxnsa.triton_kernels.launch import launch
from jaxnsa.triton_kernels.tuning import BlockConfig


def broadcast(
    source: Any,
    out: tuple[Any, ...] | None,
    *,
    num_backends: int,
    column_tokens: list[int] | None = None,
    kv_lens: jax.Array | None = None,
    config: BlockConfig | None = None,
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

    Returns:
      `num_backends` pytrees like `source`.
    """
    leaves, structure = jax.tree.flatten(source)
    tokens = column_tokens or [0] * len(leaves)
    config = config or BlockConfig.heuristic(1, max(leaf.size for leaf in leaves))
    # An array that is copied whole is one long row; each program takes a piece of a row.
    shapes = [leaf.shape if t else (1, leaf.size) for t, leaf in zip(tokens, leaves, strict=True)]
    pieces = [-(-columns // config.tokens) for _, columns in shapes]
    counts = [rows * count for (rows, _), count in zip(shapes, pieces, strict=True)]
    firsts = [sum(counts[:k]) for k in range(len(counts))]
    results = launch(
        _broadcast,
        (*leaves, *([kv_lens] if any(tokens) else [])),
        None if out is None else list(map(list, zip(*map(jax.tree.leaves, out), strict=True))),
        [[jax.ShapeDtypeStruct(leaf.shape, jnp.int32)] * num_backends for leaf in leaves],
        programs=sum(counts),
        warps=config.warps,
        scalars={
            "firsts": tuple(firsts),
            "pieces": tuple(pieces),
            "units": tuple(columns // math.gcd(4, columns) for _, columns in shapes),
        },
        constants={
            "WIDTHS": tuple(math.gcd(4, columns) for _, columns in shapes),
            "COLUMN_TOKENS": tuple(tokens),
            "PIECE": config.tokens,
        },
    )
    return tuple(jax.tree.unflatten(structure, copy) for copy in zip(*results, strict=True))


@triton.jit
def _broadcast(
    inputs,
    results,
    firsts,
    pieces,
    units,
    WIDTHS: tl.constexpr,
    COLUMN_TOKENS: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0)
    for k in tl.static_range(len(results)):
        here = program - firsts[k]
        last = firsts[k + 1] if k + 1 < len(results) else tl.num_programs(0)
        if (here >= 0) & (program < last):
            row = here // pieces[k]
            start = tl.cast(here % pieces[k], tl.int64) * PIECE
            columns = tl.cast(units[k], tl.int64) * WIDTHS[k]
            live = columns
            if COLUMN_TOKENS[k] > 0:
                kv_len = tl.load(inputs[len(results)] + row)
                live_columns = tl.where(kv_len > 0, (kv_len - 1) // COLUMN_TOKENS[k] + 1, 0)
                live = tl.minimum(live_columns, columns)
            base = row * columns
            values = load_tokens(inputs[k] + base, start, live, PIECE)
            store_tokens(results[k], base, start, values, live, live, 0, 1, PIECE)
