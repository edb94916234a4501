"""One kernel launch on a grid of independent warpgroups."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnsa.spec import INT32_MAX
from pallas_kernels.jax_internals import aliased_kernel
from pallas_kernels.lanes import LANES


def launch(
    kernel: Callable,
    inputs: Any,
    out: Any,
    shapes: Any,
    *,
    blocks: int,
    shared: tuple[int, ...] = (LANES,),
    name: str,
    interpret: Any,
) -> Any:
    """Runs a kernel, in place where it is told to.

    Args:
      kernel: called for each block with its index, `inputs` and the results as refs, and an
        int32 ref in shared memory.
      inputs: pytree of arrays that are only read.
      out: pytree of arrays to write into, or None for fresh ones.
      shapes: pytree of the shapes of the results, the structure of `out`.
      blocks: number of blocks, each a warpgroup of 128 threads.
      shared: shape of the shared memory.
      name: name of the kernel, for profilers.
      interpret: `InterpretGPUParams` to run without a GPU, or False.

    Returns:
      The results; those of `out` in its memory where it is donated.

    Under `jax.vmap`, fresh results take a launch for each element of the batch.

    Raises:
      NotImplementedError: more blocks than a grid has.
    """
    if blocks > INT32_MAX:
        raise NotImplementedError(
            f"the arrays are too large: got {blocks} blocks, expected at most {INT32_MAX}; take "
            f"another implementation"
        )
    flat_inputs, structure = jax.tree.flatten(inputs)
    flat_shapes, out_structure = jax.tree.flatten(shapes)
    split = len(flat_inputs)

    def body(*refs):
        def scoped(scratch):
            kernel(
                lax.axis_index("block"),
                jax.tree.unflatten(structure, refs[:split]),
                jax.tree.unflatten(out_structure, refs[-len(flat_shapes) :]),
                scratch,
            )

        pl.run_scoped(scoped, plgpu.SMEM(shared, jnp.int32))

    def run(*arrays):
        aliases = {split + k: k for k in range(len(arrays) - split)}
        return aliased_kernel(
            body,
            out_type=_varying(flat_shapes, arrays),
            input_output_aliases=aliases,
            mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",)),
            # A kernel whose threads read what others have written says where they must wait.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
            interpret=interpret,
            name=name,
        )(*arrays)

    if out is None:
        results = jax.custom_batching.sequential_vmap(run)(*flat_inputs)
    else:
        # The barrier keeps XLA from handing the kernel a slice of a larger array in place of the
        # array that it is to write: the result would be another buffer, which nobody fills.
        results = run(*flat_inputs, *lax.optimization_barrier(jax.tree.leaves(out)))
    return jax.tree.unflatten(out_structure, results)


def _varying(shapes: list[jax.ShapeDtypeStruct], arrays: Any) -> list[jax.ShapeDtypeStruct]:
    """The shapes of results that differ along those axes of `jax.shard_map` that an input does."""
    types = [jax.typeof(array).manual_axis_type for array in arrays]
    axes = types[0].update(varying=frozenset().union(*(t.varying for t in types)))
    return [shape.update(manual_axis_type=axes) for shape in shapes]
