"""The prefix sum of a vector in one launch.

Grid: a program for each 1,024 elements. Program: adds up all elements before its own, out of the L2
cache, and then scans its own; it waits for no other.
Inputs: int32 [n]. Outputs: int32 [n + 1].
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxnsa.implementations.triton_kernels.launch import launch

_BLOCK = 1024  # elements that one program scans


def prefix_sum(x: jax.Array) -> jax.Array:
    """0, then the inclusive prefix sum; wraps as int32 does.

    Args:
      x: int32 [n], n >= 1.

    Returns:
      int32 [n + 1].
    """
    (n,) = x.shape
    block = min(_BLOCK, triton.next_power_of_2(n))
    return launch(
        _prefix_sum,
        x,
        None,
        jax.ShapeDtypeStruct((n + 1,), jnp.int32),
        programs=-(-n // block),
        warps=4,
        sizes=n,
        constants={"BLOCK": block},
    )


@triton.jit
def _prefix_sum(x, sums, n, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    lanes = tl.arange(0, BLOCK)
    values = tl.load(x + first + lanes, first + lanes < n, 0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, first, BLOCK):
        before += tl.load(x + start + lanes)
    scanned = tl.sum(before) + tl.cumsum(values, 0)
    tl.store(sums + first + lanes + 1, scanned, first + lanes < n)
    if first == 0:
        tl.store(sums, 0)
