"""The prefix sum of a vector in one launch."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxnsa.triton_kernels.launch import launch

_BLOCK = 1024  # elements that one program scans


def prefix_sum(x: jax.Array) -> jax.Array:
    """0, then the inclusive prefix sum; wraps as int32 does.

    Each program adds up all elements before its own, out of the L2 cache, and then scans its own
    1,024: no program waits for another.

    Args:
      x: int32 [n], n >= 1.

    Returns:
      int32 [n + 1].
    """
    (n,) = x.shape
    block = min(_BLOCK, triton.next_power_of_2(n))
    ((sums,),) = launch(
        _prefix_sum,
        (x,),
        None,
        [[jax.ShapeDtypeStruct((n + 1,), jnp.int32)]],
        programs=-(-n // block),
        warps=4,
        scalars={"n": n},
        constants={"BLOCK": block},
    )
    return sums


@triton.jit
def _prefix_sum(inputs, results, n, BLOCK: tl.constexpr):
    x, sums = inputs[0], results[0][0]
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
