"""Arguments of kernels that write in place."""

from collections.abc import Sequence

import jax
from jax import lax


def in_place(
    inputs: Sequence[jax.Array], destinations: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The inputs of a kernel and the arrays that it writes, ready for its launch.

    A barrier keeps XLA from handing the kernel a slice of a larger array in place of the array that
    it is to write: the result would be another buffer, which nobody fills.

    Raises:
      NotImplementedError: under `jax.vmap`, where one of them is batched.
    """
    arrays = _unbatched([*inputs, *destinations])
    return arrays[: len(inputs)], lax.optimization_barrier(arrays[len(inputs) :])


@jax.custom_batching.custom_vmap
def _unbatched(arrays: list[jax.Array]) -> list[jax.Array]:
    """The same arrays, which `jax.vmap` may not batch."""
    return arrays


@_unbatched.def_vmap
def _refuse_batch(axis_size, batched, arrays):
    raise NotImplementedError(
        "kernels that write in place cannot run under jax.vmap: call without out=, or take another "
        "implementation"
    )
