"""One kernel launch through jax-triton; all that its versions do differently."""

import functools
import importlib
import importlib.util
import linecache
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import triton
import triton.language as tl
from jax import lax

from jaxnsa.spec import INT32_MAX

INTERPRET = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels, on the CPU."""

_INTERPRETER = threading.Lock()
"""It patches Triton while it runs, and XLA calls back from several threads."""

OLDEST_CAPABILITY = 80
"""Ampere. Where there is no GPU kernels are compiled for it, and newer ones take them."""

_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class Signature(NamedTuple):
    """A kernel and the structure of what it is called with.

    Attributes:
      kernel: the `triton.jit` function.
      inputs: of the arrays that it reads.
      results: of the arrays that it writes.
      sizes: of the numbers that may change without compiling it again.
      constants: names of what it is compiled for.
    """

    kernel: Callable
    inputs: jax.tree_util.PyTreeDef
    results: jax.tree_util.PyTreeDef
    sizes: jax.tree_util.PyTreeDef
    constants: tuple[str, ...]


def launch(
    kernel: Callable,
    inputs: Any,
    out: Any,
    shapes: Any,
    *,
    programs: int,
    warps: int,
    sizes: Any,
    constants: Mapping[str, Hashable],
) -> Any:
    """Runs a kernel, in place where it is told to.

    Args:
      kernel: a `triton.jit` function, called with `inputs` and the results, pointers in place of
        arrays, with `sizes`, and with `constants` by name. All but the constants are trees of
        tuples and NamedTuples, which may hold None.
      inputs: tree of arrays that are only read.
      out: tree of arrays to write into, or None for fresh ones.
      shapes: tree of the shapes of the results, the structure of `out`.
      programs: number of programs.
      warps: of each program.
      sizes: tree of numbers that may change without compiling the kernel again.
      constants: what it is compiled for.

    Returns:
      The results; those of `out` in its memory where it is donated.

    Under `jax.vmap`, fresh results take a launch for each element of the batch.

    Raises:
      NotImplementedError: more programs than a grid has.
    """
    if programs > INT32_MAX:
        raise NotImplementedError(
            f"the arrays are too large: got {programs} programs, expected at most {INT32_MAX}; "
            f"take another implementation"
        )
    flat_inputs, inputs_structure = jax.tree.flatten(inputs)
    flat_shapes, results_structure = jax.tree.flatten(shapes)
    flat_sizes, sizes_structure = jax.tree.flatten(sizes)
    run = functools.partial(
        _interpret if INTERPRET else _call,
        Signature(kernel, inputs_structure, results_structure, sizes_structure, tuple(constants)),
        flat_shapes,
        programs=programs,
        warps=warps,
        sizes=flat_sizes,
        constants=constants,
    )
    if out is None:
        results = jax.custom_batching.sequential_vmap(run)(*flat_inputs)
    else:
        # The barrier keeps XLA from handing the kernel a slice of a larger array in place of the
        # array that it is to write: the result would be another buffer, which nobody fills.
        results = run(*flat_inputs, *lax.optimization_barrier(jax.tree.leaves(out)))
    return jax.tree.unflatten(results_structure, results)


@functools.cache
def import_jax_triton() -> ModuleType:
    """jax-triton; ImportError where it, or the part of JAX's CUDA plugin that it needs, is missing.

    It empties TRITON_CACHE_DIR for every user of Triton, which is put back here.
    """
    if not any(map(importlib.util.find_spec, _CUDA_PLUGINS)):
        raise ImportError("JAX's CUDA plugin is not installed; run: pip install 'jax[cuda13]'")
    directory = os.environ.get("TRITON_CACHE_DIR")
    try:
        return importlib.import_module("jax_triton")
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if directory is not None:
            os.environ["TRITON_CACHE_DIR"] = directory


def _call(
    signature: Signature,
    shapes: Sequence[jax.ShapeDtypeStruct],
    *arrays: jax.Array,
    programs: int,
    warps: int,
    sizes: Sequence[int],
    constants: Mapping[str, Hashable],
) -> Sequence[jax.Array]:
    jax_triton = import_jax_triton()
    options = {
        "grid": (programs,),
        "num_warps": warps,
        "compute_capability": None if jax.default_backend() == "gpu" else OLDEST_CAPABILITY,
    }
    split = signature.inputs.num_leaves
    inputs, destinations = arrays[:split], arrays[split:]
    if hasattr(jax_triton, "TensorDescriptor"):  # 0.4: in place through refs
        refs = [jax.new_ref(array) for array in destinations]
        results = jax_triton.triton_call(
            *sizes,
            *inputs,
            *refs,
            kernel=entry(signature),
            out_type=() if refs else shapes,
            **options,
            **constants,
        )
        return [ref[...] for ref in refs] or results
    return jax_triton.triton_call(
        *sizes,
        *arrays,
        kernel=entry(signature, aliased=len(destinations)),
        out_shape=shapes,
        input_output_aliases={split + k: k for k in range(len(destinations))},
        **options,
        **constants,
    )


def _interpret(
    signature: Signature,
    shapes: Sequence[jax.ShapeDtypeStruct],
    *arrays: jax.Array,
    programs: int,
    warps: int,
    sizes: Sequence[int],
    constants: Mapping[str, Hashable],
) -> Sequence[jax.Array]:
    del warps

    def run(*arrays: jax.Array) -> list[np.ndarray]:
        import torch

        copies = [torch.from_numpy(np.array(array)) for array in arrays]
        split = signature.inputs.num_leaves
        inputs, results = copies[:split], copies[split:]
        results = results or [torch.full(s.shape, -1, dtype=torch.int32) for s in shapes]
        with _INTERPRETER:
            entry(signature)[(programs,)](*sizes, *inputs, *results, **constants)
        return [result.numpy() for result in results]

    return jax.pure_callback(run, shapes, *arrays, vmap_method="sequential")


@functools.cache
def entry(signature: Signature, aliased: int = 0) -> Any:
    """The kernel with a parameter for each number and pointer, which is what Triton launches.

    jax-triton 0.3 passes arrays that are written in place twice, the first time as inputs; those
    are `aliased`.
    """
    types: dict[str, type] = {}
    parameters: list[str] = []

    def argument(name: str, structure: jax.tree_util.PyTreeDef, value: str = "{}") -> str:
        names = [f"{name}{k}" for k in range(structure.num_leaves)]
        parameters.extend(names)
        values = map(value.format, names)
        return _source(jax.tree.unflatten(structure, values), types)

    # A number that is 1 arrives as a constant, which Triton 3.6 loses in a NamedTuple.
    sizes = argument("size", signature.sizes, "core.to_tensor({})")
    inputs = argument("input", signature.inputs)
    parameters += [f"aliased{k}" for k in range(aliased)]
    results = argument("result", signature.results)
    parameters += [f"{name}: tl.constexpr" for name in signature.constants]
    constants = [f"{name}={name}" for name in signature.constants]
    name = signature.kernel.__name__
    source = f"""\
def {name}({", ".join(parameters)}):
    kernel({", ".join([inputs, results, sizes, *constants])})
"""
    # Triton reads the source of its kernels: it has to be where the standard library looks.
    file = f"<{name} {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = {
        "kernel": signature.kernel,
        "tl": tl,
        "core": tl.core,
        "__name__": __name__,
    } | types
    exec(compile(source, file, "exec"), namespace)
    return triton.jit(namespace[name])


def _source(tree: Any, types: dict[str, type]) -> str:
    """A tree of names as Python source; adds the NamedTuples in it to `types`."""
    if not isinstance(tree, tuple):
        return str(tree)
    items = "".join(f"{_source(item, types)}, " for item in tree)
    if not hasattr(tree, "_fields"):
        return f"({items})"
    types[type(tree).__name__] = type(tree)
    return f"{type(tree).__name__}({items})"
