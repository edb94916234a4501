"""Copies of one NSAMetadata to N destinations in one launch.

Grid: for each array a program for each tile, row by row. Program: copies its tile to all
destinations and waits for no other.
Inputs: the arrays of the source, and the KV lengths of their rows where tables are copied as far as
they are live. Outputs: the same arrays of every destination.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.launch import launch
from jaxnsa.implementations.triton_kernels.tables import load_columns, store_columns
from jaxnsa.implementations.triton_kernels.tuning import BlockConfig
from jaxnsa.metadata import FIELDS, Extent, NSAMetadata
from jaxnsa.spec import Spec


class Source(NamedTuple):
    """What the kernel reads.

    Attributes:
      arrays: those to copy.
      kv_lens: int32 [rows], tokens that each row sees; None where arrays are copied whole.
    """

    arrays: tuple[Any, ...]
    kv_lens: Any


class ArraySizes(NamedTuple):
    """The numbers of an array that may change without compiling the kernel again.

    Attributes:
      first_program: the first one that copies a tile of it.
      tiles: of a row.
      stride: of its rows, in units of `ArrayConstants.unit` elements.
    """

    first_program: Any
    tiles: Any
    stride: Any


@dataclasses.dataclass(frozen=True)
class ArrayConstants:
    """What the kernel is compiled for, of an array.

    Attributes:
      unit: elements that the stride is a multiple of: 4, 2 or 1.
      tokens_per_column: tokens that a column stands for; None: the array is copied whole.
    """

    unit: int
    tokens_per_column: int | None


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
    config: BlockConfig | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies every array to all destinations.

    Args:
      src: int32 arrays of one or two dimensions, none of them empty.
      out: destinations of the same shapes to fill in place, or None for fresh ones.
      num_backends: number of copies.
      live: the computation that `src` came from: only the live columns of its tables are copied,
        and the rest of their destinations is left as it is. None: everything is copied.
      config: block sizes; None: `BlockConfig.heuristic`.

    Returns:
      `num_backends` NSAMetadata like `src`.
    """
    arrays = src.arrays()
    config = config or BlockConfig.heuristic(1, max(array.size for array in arrays.values()))
    sizes, constants = [], []
    programs = 0
    for name, array in arrays.items():
        # An array that is copied whole is one long row.
        (rows, columns), tokens = (1, array.size), None
        if live and FIELDS[name].extent is Extent.TABLE:
            (rows, columns), tokens = array.shape, live.tokens_per_column(FIELDS[name])
        unit, tiles = math.gcd(4, columns), -(-columns // config.tile)
        sizes.append(ArraySizes(programs, tiles, columns // unit))
        constants.append(ArrayConstants(unit, tokens))
        programs += rows * tiles
    results = launch(
        _copy,
        Source(tuple(arrays.values()), live.table_kv_lens(src) if live else None),
        None if out is None else tuple(tuple(getattr(o, name) for o in out) for name in arrays),
        tuple((jax.ShapeDtypeStruct(a.shape, a.dtype),) * num_backends for a in arrays.values()),
        programs=programs,
        warps=config.warps,
        sizes=tuple(sizes),
        constants={"ARRAYS": tuple(constants), "TILE": config.tile},
    )
    return tuple(
        NSAMetadata(**dict(zip(arrays, copies, strict=True)))
        for copies in zip(*results, strict=True)
    )


@triton.jit
def _copy(source, results, sizes, ARRAYS: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    for k in tl.static_range(len(results)):
        index = program - sizes[k].first_program
        end = sizes[k + 1].first_program if k + 1 < len(results) else tl.num_programs(0)
        if (index >= 0) & (program < end):
            row = index // sizes[k].tiles
            start = tl.cast(index % sizes[k].tiles, tl.int64) * TILE
            columns = tl.cast(sizes[k].stride, tl.int64) * ARRAYS[k].unit
            if ARRAYS[k].tokens_per_column is None:
                _copy_tile(source.arrays[k], results[k], 0, start, columns, TILE, 1)
            else:
                tokens = columns * ARRAYS[k].tokens_per_column
                live = tl.minimum(tl.load(source.kv_lens + row), tokens)
                _copy_tile(
                    source.arrays[k],
                    results[k],
                    row * columns,
                    start,
                    live,
                    TILE,
                    ARRAYS[k].tokens_per_column,
                )


@triton.jit
def _copy_tile(
    array, pointers, base, start, live, TILE: tl.constexpr, TOKENS_PER_COLUMN: tl.constexpr
):
    """Copies the live columns of a tile to all destinations."""
    values = load_columns(array + base, start, 0, live, TILE, TOKENS_PER_COLUMN)
    store_columns(pointers, base, start, 0, values, live, live, TILE, TOKENS_PER_COLUMN)
