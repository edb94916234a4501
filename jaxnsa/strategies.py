"""Three ways to fill N backends, with the same bits: one launch, 1 + N launches, N computations.

The last two exist to compare with and to bisect. On a CPU, XLA drops the barriers between their
steps and merges steps that are equal: copies and computations into fresh results.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxnsa.config import Strategy
from jaxnsa.constant_schedules import with_constants
from jaxnsa.implementations import computations
from jaxnsa.implementations.lowering import computed_by
from jaxnsa.metadata import NSAMetadata
from jaxnsa.row_owners import Owners
from jaxnsa.spec import Inputs, Spec, saturated


def fused_metadata(
    inputs: Inputs,
    out: tuple[NSAMetadata, ...] | None,
    spec: Spec,
    *,
    strategy: Strategy,
    implementation: str,
) -> tuple[NSAMetadata, ...]:
    """The metadata of `spec` in each of its destinations."""
    module = computations(implementation)
    inputs = jax.tree.map(saturated, with_constants(inputs, spec))
    inputs = computed_by(implementation, inputs)
    if strategy == "ultra_fast":
        return module.fused_metadata(inputs, out, spec)

    backends: list[NSAMetadata] = []
    source: Inputs | NSAMetadata = inputs
    if strategy == "fast" and inputs.written_lens is None and spec.backend_offsets is None:
        (source,) = module.fused_metadata(inputs, None, spec.of_backend(0))

    def step(
        source: Inputs | NSAMetadata, destination: tuple[NSAMetadata] | None, one: Spec
    ) -> tuple[NSAMetadata, ...]:
        if isinstance(source, NSAMetadata):
            live = one if spec.tail == "keep" else None
            source = _up_to_the_plans_end(source, destination)
            source = _with_held_keys(source, destination, live)
            return module.copy(source, destination, num_backends=1, live=live)
        return module.fused_metadata(source, destination, one)

    for k in range(spec.num_backends):
        (backend,) = step(source, spec.destination(out, k), spec.of_backend(k))
        # Each step waits for the one before it; otherwise XLA would merge equal steps into one.
        source, backend = lax.optimization_barrier((source, backend))
        backends.append(backend)
    return spec.joined(backends)


def _with_held_keys(
    source: NSAMetadata, destination: tuple[NSAMetadata] | None, live: Spec | None
) -> NSAMetadata:
    """`source`, with what a destination holds in place of padding keys that are to be kept."""
    keys = source.flat_page_indices
    if destination is None or keys is None or live is None:
        return source
    total = Owners.of(jnp.asarray(source.cache_seqlens), len(keys)).total
    held = jnp.asarray(destination[0].flat_page_indices)
    kept = jnp.where(jnp.arange(len(keys)) < total, keys, held)
    return dataclasses.replace(source, flat_page_indices=kept)


def _up_to_the_plans_end(
    source: NSAMetadata, destination: tuple[NSAMetadata] | None
) -> NSAMetadata:
    """`source`, past the end of its top-k plan with what a destination holds there."""
    if destination is None or source.topk_plan is None:
        return source
    plan = jnp.asarray(source.topk_plan)
    is_planned = jnp.arange(len(plan))[:, None] <= plan[0, 1]
    held = jnp.asarray(destination[0].topk_plan)
    return dataclasses.replace(source, topk_plan=jnp.where(is_planned, plan, held))
