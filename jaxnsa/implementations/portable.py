"""`ffi` where it was not named but chosen by a rule: it is taken only where it can run.

What is traced may be lowered for another platform, and what is exported may run without the native
library. So it is decided when a function is lowered: `ffi` for one platform, that the library was
built for, to run in this process; `xla` for any other and for several at once, for `jax.export`,
and under `jax.vmap`, which `xla` does in one pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

from jaxnsa.implementations import ffi, xla
from jaxnsa.metadata import DraftExtendSeqlens, NSAMetadata
from jaxnsa.spec import Inputs, Spec

_either = Primitive("jaxnsa_either")
_either.multiple_results = True


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform: it always can."""
    return None


def prefix_sum(x: jax.Array) -> jax.Array:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
    return _by_either("prefix_sum", x)


def fill_draft_extend_metadata(
    extend_seq_lens: jax.Array, seq_lens: jax.Array, **sizes: int
) -> DraftExtendSeqlens:
    """See `jaxnsa.fill_draft_extend_metadata`."""
    return _by_either("fill_draft_extend_metadata", extend_seq_lens, seq_lens, **sizes)


def fused_metadata(
    inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of `spec` for all of its destinations."""
    return _by_either("fused_metadata", inputs, out, spec=spec)


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies `src` to `num_backends` destinations; its live columns only with `live`."""
    return _by_either("copy", src, out, num_backends=num_backends, live=live)


def _by_either(function: str, *arrays: Any, **options: Any) -> Any:
    leaves, structure = jax.tree.flatten(arrays)

    def computed_by(module: Any) -> Callable:
        compute = getattr(module, function)
        return lambda *leaves: compute(*jax.tree.unflatten(structure, leaves), **options)

    elsewhere, results = jax.make_jaxpr(computed_by(xla), return_shape=True)(*leaves)
    flat = _either.bind(
        *leaves,
        here=lambda *leaves: jax.tree.leaves(computed_by(ffi)(*leaves)),
        elsewhere=elsewhere,
    )
    return jax.tree.unflatten(jax.tree.structure(results), flat)


@_either.def_abstract_eval
def _(*arrays: Any, here: Callable, elsewhere: Any) -> Sequence[Any]:
    return elsewhere.out_avals


def _lower(context: mlir.LoweringRuleContext, *arrays: Any, here: Callable, elsewhere: Any) -> Any:
    module = context.module_context
    runs_here = (
        len(module.platforms) == 1
        and not module.lowering_parameters.for_export
        and ffi.unavailable("gpu" if module.platforms[0] == "cuda" else module.platforms[0]) is None
    )
    compute = here if runs_here else jaxpr_as_fun(elsewhere)
    return mlir.lower_fun(compute, multiple_results=True)(context, *arrays)


def _batch(arrays: Any, axes: Any, *, here: Callable, elsewhere: Any) -> Any:
    results = jax.vmap(jaxpr_as_fun(elsewhere), axes)(*arrays)
    return results, [0] * len(results)


mlir.register_lowering(_either, _lower)
batching.primitive_batchers[_either] = _batch
