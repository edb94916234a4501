"""One kernel launch through jax-triton; all that its versions do differently."""

import functools
import importlib
import inspect
import linecache
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import triton
import triton.language as tl
from jax.interpreters import partial_eval
from jaxlib import gpu_triton

from nsa_kernel_types import in_place

INTERPRET = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels, on the CPU."""

_INTERPRETER = threading.Lock()
"""It patches Triton while it runs, and XLA calls back from several threads."""

OLDEST_CAPABILITY = 80
"""Ampere. Where there is no GPU kernels are compiled for it, and newer ones take them."""


def launch(
    kernel: Callable,
    inputs: Sequence[Any],
    out: list[list[jax.Array]] | None,
    shapes: list[list[jax.ShapeDtypeStruct]],
    *,
    programs: int,
    warps: int,
    scalars: Mapping[str, int | tuple[int, ...]],
    constants: dict[str, Any],
) -> list[list[jax.Array]]:
    """Runs a kernel, in place where it is told to.

    Args:
      kernel: a `triton.jit` function of the pointers of `inputs`, a tuple, and of those of the
        results, a tuple of groups, and of `scalars` and `constants` by name.
      inputs: arrays that are only read.
      out: groups of arrays to write into, or None for fresh ones.
      shapes: groups of the shapes of the results.
      programs: number of programs.
      warps: of each program.
      scalars: numbers, and tuples of them, that may change without compiling the kernel again.
      constants: what it is compiled for.

    Returns:
      The results; those of `out` in its memory where it is donated.

    Under `jax.vmap`, fresh results take a launch for each element of the batch; with `out` it
    raises NotImplementedError.
    """
    leaves, structure = jax.tree.flatten(shapes)
    held = jax.tree.leaves(out)
    run = functools.partial(
        _interpret if INTERPRET else _call,
        _Signature(
            kernel,
            len(inputs),
            tuple(map(len, shapes)),
            tuple((n, len(v) if isinstance(v, tuple) else 0) for n, v in scalars.items()),
            tuple(constants),
        ),
        leaves,
        programs=programs,
        warps=warps,
        scalars=jax.tree.leaves(list(scalars.values())),
        constants=constants,
    )
    if held:
        arrays, destinations = in_place(inputs, held)
        results = run(*arrays, *destinations)
    else:
        results = jax.custom_batching.sequential_vmap(run)(*inputs)
    return jax.tree.unflatten(structure, results)


class _Signature(NamedTuple):
    """A kernel and what it is called with.

    Attributes:
      kernel: the `triton.jit` function.
      inputs: pointers that it reads.
      groups: pointers of each group that it writes.
      scalars: names, each with the length of its tuple, or 0 for a number.
      constants: names.
    """

    kernel: Callable
    inputs: int
    groups: tuple[int, ...]
    scalars: tuple[tuple[str, int], ...]
    constants: tuple[str, ...]


@functools.cache
def import_jax_triton() -> ModuleType:
    """jax-triton; ImportError where it, or the part of JAX's CUDA plugin that it needs, is missing.

    It empties TRITON_CACHE_DIR for every user of Triton, which is put back here. Its rule for what
    XLA may drop is that of jax 0.11, which gives rules one argument less than jax 0.12.
    """
    directory = os.environ.get("TRITON_CACHE_DIR")
    try:
        jax_triton = importlib.import_module("jax_triton")
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if directory is not None:
            os.environ["TRITON_CACHE_DIR"] = directory
    if not hasattr(gpu_triton, "TritonKernel"):
        raise ImportError("JAX's CUDA plugin is not installed")
    if jax.__version_info__ >= (0, 12):
        call = importlib.import_module("jax_triton.triton_lib").triton_kernel_call_p
        rules: dict[Any, Any] = partial_eval.dce_rules
        rule = rules.get(call)
        if rule and len(inspect.signature(rule).parameters) == 2:
            rules[call] = lambda used, live, equation: rule(used, equation)
    return jax_triton


def _call(signature, shapes, *arrays, programs, warps, scalars, constants):
    jax_triton = import_jax_triton()
    options = {
        "grid": (programs,),
        "num_warps": warps,
        "compute_capability": None if jax.default_backend() == "gpu" else OLDEST_CAPABILITY,
    }
    inputs, destinations = arrays[: signature.inputs], arrays[signature.inputs :]
    if hasattr(jax_triton, "TensorDescriptor"):  # 0.4: in place through refs
        refs = [jax.new_ref(array) for array in destinations]
        results = jax_triton.triton_call(
            *scalars,
            *inputs,
            *refs,
            kernel=_entry(signature),
            out_type=() if refs else shapes,
            **options,
            **constants,
        )
        return [ref[...] for ref in refs] or results
    return jax_triton.triton_call(
        *scalars,
        *arrays,
        kernel=_entry(signature, aliased=len(destinations)),
        out_shape=shapes,
        input_output_aliases={len(inputs) + k: k for k in range(len(destinations))},
        **options,
        **constants,
    )


def _interpret(signature, shapes, *arrays, programs, warps, scalars, constants):
    del warps

    def run(*arrays):
        import torch

        copies = [torch.from_numpy(np.array(array)) for array in arrays]
        inputs, results = copies[: signature.inputs], copies[signature.inputs :]
        results = results or [torch.full(s.shape, -1, dtype=torch.int32) for s in shapes]
        with _INTERPRETER:
            _entry(signature)[(programs,)](*scalars, *inputs, *results, **constants)
        return [result.numpy() for result in results]

    return jax.pure_callback(run, shapes, *arrays, vmap_method="sequential")


@functools.cache
def _entry(signature: _Signature, aliased: int = 0) -> Any:
    """The kernel with a parameter for each pointer, which is what Triton launches.

    jax-triton 0.3 passes arrays that are written in place twice, the first time as inputs; those
    are `aliased`.
    """
    inputs = [f"input{k}" for k in range(signature.inputs)]
    held = [f"aliased{k}" for k in range(aliased)]
    groups = [[f"result{g}_{k}" for k in range(n)] for g, n in enumerate(signature.groups)]
    results = [name for group in groups for name in group]
    scalars, values = [], {name: name for name in signature.constants}
    for name, length in signature.scalars:
        parts = [f"{name}{k}" for k in range(length)]
        scalars += parts or [name]
        values[name] = _tuple(parts) if parts else name
    typed = [f"{name}: tl.constexpr" for name in signature.constants]
    options = [f"{name}={value}" for name, value in values.items()]
    name = signature.kernel.__name__
    source = f"""\
def {name}({", ".join([*scalars, *inputs, *held, *results, *typed])}):
    kernel({_tuple(inputs)}, {_tuple(map(_tuple, groups))}, {", ".join(options)})
"""
    # Triton reads the source of its kernels: it has to be where the standard library looks.
    file = f"<{name} {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = {"kernel": signature.kernel, "tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return triton.jit(namespace[name])


def _tuple(items: Iterable[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"
