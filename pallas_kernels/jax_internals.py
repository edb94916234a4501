"""Everything of JAX that is used here and that JAX does not promise to keep, in one place.

Because of these, pyproject.toml gives jax an upper bound; a new version is admitted after the tests
have passed with it, on a GPU too.

| what | why |
| --- | --- |
| `jax.experimental.mosaic.gpu` (`mgpu`): `FragmentedArray` and its layouts, `utils` | the registers that `plgpu.inline_mgpu` hands over, and addresses in memory, for PTX that Pallas has no name for |
| `jaxlib.mlir` (`ir`, `arith`, `llvm`, `vector`) | the instructions around that PTX |
| `jax._src.config.pallas_tpu_interpret_mode_context_manager` | tells whether the caller runs under `force_gpu_interpret_mode` |
| `jax._src.pallas.mpmd._mpmd_map` | what `pl.kernel` calls, with aliases of arguments and results besides: `jax.new_ref`, the public way to write in place, is refused by jax 0.11 where `jax.shard_map` checks what varies |
| `jax._src.pallas.mosaic_gpu.interpret.params` | the interpreter of Mosaic GPU kernels, with which the tests run them without a GPU |
"""  # noqa: E501

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax._src import config
from jax._src.pallas import mpmd
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

__all__ = [
    "InterpretGPUParams",
    "aliased_kernel",
    "arith",
    "force_gpu_interpret_mode",
    "interpret_params",
    "ir",
    "llvm",
    "mgpu",
    "vector",
]


def interpret_params() -> Any:
    """The parameters of `force_gpu_interpret_mode` where it is in force, otherwise False."""
    return config.pallas_tpu_interpret_mode_context_manager.value or False


def aliased_kernel(
    body: Callable,
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    input_output_aliases: Mapping[int, int],
    mesh: Any,
    interpret: Any,
    **options: Any,
) -> Callable:
    """`pl.kernel` whose argument k becomes its result `input_output_aliases[k]`, in its memory."""
    return mpmd._mpmd_map(
        [(mesh, body)],
        out_type,
        input_output_aliases=input_output_aliases,
        interpret=interpret_params() or interpret,
        **options,
    )
