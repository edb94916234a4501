"""What is lowered for a platform where its implementation cannot run is refused with the reason.

While a caller's function is traced its platform is not known; when JAX lowers it, it is.
"""

from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxnsa.implementations.choice import check_runs

Arrays = TypeVar("Arrays")

_computed_by = Primitive("jaxnsa_computed_by")
_computed_by.def_impl(lambda array, implementation: array)
_computed_by.def_abstract_eval(lambda array, implementation: array)


def computed_by(implementation: str, arrays: Arrays) -> Arrays:
    """The same arrays, of any pytree, for an implementation to compute with.

    Lowering them raises ImplementationUnavailableError where it cannot run on the platform, but for
    a GPU where this machine has none: what is installed elsewhere is not known here.
    """
    return jax.tree.map(lambda a: _computed_by.bind(a, implementation=implementation), arrays)


def _lower(context: mlir.LoweringRuleContext, array: Any, *, implementation: str) -> list[Any]:
    for name in context.module_context.platforms:
        platform = "gpu" if name == "cuda" else name
        if platform != "gpu" or jax.default_backend() == "gpu":
            check_runs(implementation, platform)
    return [array]


def _batch(arrays, axes, *, implementation):
    return _computed_by.bind(*arrays, implementation=implementation), axes[0]


mlir.register_lowering(_computed_by, _lower)
batching.primitive_batchers[_computed_by] = _batch
