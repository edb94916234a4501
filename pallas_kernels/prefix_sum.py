"""The prefix sum of a vector in one launch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lanes import LANES, Lanes
from pallas_kernels.launch import launch

_BLOCK = 1024  # elements that one block scans
_SERIAL = 32  # elements up to which one thread's additions are faster than a scan
_IN_FLIGHT = 16  # blocks that are read at once while adding up what comes before


def prefix_sum(x: jax.Array, *, interpret: Any = False) -> jax.Array:
    """0, then the inclusive prefix sum; wraps as int32 does.

    Each block adds up all elements before its own, out of the L2 cache, and then scans its own
    1,024 after Hillis and Steele, "Data parallel algorithms" (1986): no block waits for another.

    Args:
      x: int32 [n], n >= 1.
      interpret: `InterpretGPUParams` to run without a GPU.

    Returns:
      int32 [n + 1].
    """
    (n,) = x.shape
    lanes = Lanes(bool(interpret))
    size = min(_BLOCK, -(-n // LANES) * LANES)
    blocks = -(-n // size)

    def scan_serially(_, ref, out, scratch):
        del scratch
        values = [ref[k] for k in range(n)]
        total = jnp.int32(0)
        out[0] = total
        for k, value in enumerate(values):
            total = total + value
            out[k + 1] = total

    def scan(block, ref, out, scratch):
        def scan_own(first, count):
            whole, rest = count // LANES * LANES, count % LANES
            for k in range(0, whole, LANES):
                scratch[pl.ds(size + k, LANES)] = ref[pl.ds(first + k, LANES)]
            if rest:
                scratch[pl.ds(size + whole, LANES)] = lanes.load_first(ref, first + whole, rest)
            scratch[pl.ds(0, size)] = lanes.zeros(size)
            plgpu.commit_smem()
            base = _sum_before(lanes, ref, block, size) if blocks > 1 else 0
            sums = base + _scan_shared(lanes, scratch, size)
            if count == size:
                out[pl.ds(first + 1, size)] = sums
                return
            plgpu.commit_smem()
            scratch[pl.ds(size, size)] = sums
            plgpu.commit_smem()
            for k in range(0, whole, LANES):
                out[pl.ds(first + 1 + k, LANES)] = lanes.load(scratch, pl.ds(size + k, LANES))
            if rest:
                last = lanes.load(scratch, pl.ds(size + whole, LANES))
                lanes.store_first(out, first + 1 + whole, last, rest)

        in_last = n - (blocks - 1) * size
        pl.when(block == 0)(lambda: out.__setitem__(0, jnp.int32(0)))
        if in_last == size:
            scan_own(block * size, size)
        else:
            pl.when(block == blocks - 1)(lambda: scan_own((blocks - 1) * size, in_last))
            if blocks > 1:
                pl.when(block < blocks - 1)(lambda: scan_own(block * size, size))

    serial = n <= _SERIAL
    return launch(
        scan_serially if serial else scan,
        x,
        None,
        jax.ShapeDtypeStruct((n + 1,), jnp.int32),
        blocks=blocks,
        shared=(2 * size,),
        name="prefix_sum",
        interpret=interpret,
    )


def _sum_before(lanes: Lanes, ref, block: jax.Array, size: int) -> jax.Array:
    """The sum of the blocks before one."""

    def step(k, total):
        first = k * _IN_FLIGHT
        blocks = [first + b for b in range(_IN_FLIGHT)]
        loaded = [lanes.load(ref, pl.ds(jnp.minimum(b, block - 1) * size, size), 4) for b in blocks]
        for b, values in zip(blocks, loaded, strict=True):
            total = total + values * (b < block).astype(jnp.int32)
        return total

    rounds = lax.div(block + (_IN_FLIGHT - 1), jnp.int32(_IN_FLIGHT))
    return jnp.sum(lax.fori_loop(0, rounds, step, lanes.zeros(size, 4)))


def _scan_shared(lanes: Lanes, scratch, size: int) -> jax.Array:
    """The inclusive scan of the upper half of shared memory, whose lower half is 0.

    Hillis and Steele's algorithm with four terms in each step, so that half as many are needed.
    """

    def shifted(distance):
        return lanes.load(scratch, pl.ds(size - distance, size))

    sums = shifted(0)
    distance = 1
    while distance < size:
        terms = [shifted(k * distance) for k in (1, 2, 3) if k * distance < size]
        sums = functools.reduce(jnp.add, terms, sums)
        distance *= 4
        if distance < size:
            plgpu.commit_smem()
            scratch[pl.ds(size, size)] = sums
            plgpu.commit_smem()
    return sums
