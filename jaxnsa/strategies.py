"""Three ways to fill N backends, with the same bits: one launch, 1 + N launches, N computations.

The last two exist to compare with and to bisect. On a CPU, XLA drops the barriers between their
steps and merges steps that are equal: copies and computations into fresh results.
"""

import jax
from jax import lax

from jaxnsa.config import Strategy
from jaxnsa.constant_schedules import with_constants
from jaxnsa.implementations import computations
from jaxnsa.implementations.lowering import computed_by
from jaxnsa.metadata import Extent, NSAMetadata
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
    if strategy == "fast" and _are_copies(inputs, out, spec):
        (source,) = module.fused_metadata(inputs, None, spec.of_backend(0))

    def step(
        source: Inputs | NSAMetadata, destination: tuple[NSAMetadata] | None, one: Spec
    ) -> tuple[NSAMetadata, ...]:
        if isinstance(source, NSAMetadata):
            live = one if spec.tail == "keep" else None
            return module.copy(source, destination, num_backends=1, live=live)
        return module.fused_metadata(source, destination, one)

    for k in range(spec.num_backends):
        (backend,) = step(source, spec.destination(out, k), spec.of_backend(k))
        # Each step waits for the one before it; otherwise XLA would merge equal steps into one.
        source, backend = lax.optimization_barrier((source, backend))
        backends.append(backend)
    return spec.joined(backends)


def _are_copies(inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec) -> bool:
    """Whether every backend gets what one computed alone has: in full, or its live columns."""
    partly_kept = out is not None and spec.fields(Extent.KEYS, Extent.PLANNED_ROWS)
    return inputs.written_lens is None and spec.backend_offsets is None and not partly_kept
