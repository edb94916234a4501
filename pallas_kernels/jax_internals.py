"""Everything of JAX that is used here and that JAX does not promise to keep, in one place.

Because of these, pyproject.toml gives jax an upper bound; a new version is admitted after the tests
have passed with it, on a GPU too.

| what | why |
| --- | --- |
| `jax.experimental.mosaic.gpu` (`mgpu`): `FragmentedArray` and its layouts, `utils` | the registers that `plgpu.inline_mgpu` hands over, and addresses in memory, for PTX that Pallas has no name for |
| `jaxlib.mlir` (`ir`, `arith`, `llvm`, `vector`) | the instructions around that PTX |
| `jax._src.config.pallas_tpu_interpret_mode_context_manager` | tells whether the caller runs under `force_gpu_interpret_mode` |
| `jax._src.pallas.mosaic_gpu.interpret.params` | the interpreter of Mosaic GPU kernels, with which the tests run them without a GPU |
"""  # noqa: E501

from typing import Any

from jax._src import config
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

__all__ = [
    "InterpretGPUParams",
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
