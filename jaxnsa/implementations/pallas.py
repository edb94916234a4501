"""The Pallas implementation: `pallas_kernels`, which is imported when it is first used."""

import importlib.metadata
import importlib.util
from typing import Any

import jax

from jaxnsa.implementations.gpu import reason_to_refuse, unbatched
from jaxnsa.metadata import DraftExtendSeqlens, NSAMetadata
from jaxnsa.spec import Inputs, Spec


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    if importlib.util.find_spec("jax.experimental.mosaic.gpu") is None:
        return "this jaxlib has no Mosaic GPU; install jax[cuda13]"
    if platform is None or _interpret():
        return None
    return reason_to_refuse(platform, 9.0, "Hopper")


def version() -> str:
    """Of the jax that holds Pallas."""
    return f"jax {importlib.metadata.version('jax')}"


def prefix_sum(x: jax.Array) -> jax.Array:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
    import pallas_kernels

    return pallas_kernels.prefix_sum(x, interpret=_interpret())


def fill_draft_extend_metadata(
    extend_seq_lens: jax.Array, seq_lens: jax.Array, **sizes: int
) -> DraftExtendSeqlens:
    """See `jaxnsa.fill_draft_extend_metadata`."""
    import pallas_kernels

    return pallas_kernels.fill_draft_extend_metadata(
        extend_seq_lens, seq_lens, **sizes, interpret=_interpret()
    )


def fused_metadata(
    inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of `spec` for all of its destinations."""
    import pallas_kernels

    inputs, out = unbatched(inputs, out)
    return pallas_kernels.fused_metadata(inputs, out, spec, interpret=_interpret())


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies `src` to `num_backends` destinations; its live columns only with `live`."""
    import pallas_kernels

    src, out = unbatched(src, out)
    return pallas_kernels.copy(
        src, out, num_backends=num_backends, live=live, interpret=_interpret()
    )


def _interpret() -> Any:
    """The parameters of JAX's own `force_gpu_interpret_mode`, if it is in force."""
    from pallas_kernels.jax_internals import interpret_params

    return interpret_params()
