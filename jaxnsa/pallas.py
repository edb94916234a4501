"""The Pallas implementation: `pallas_kernels`."""

import importlib.metadata
import importlib.util
from typing import Any

from jaxnsa.kernel_package import KernelPackage, too_old


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    if importlib.util.find_spec("jax.experimental.mosaic.gpu") is None:
        return "this jaxlib has no Mosaic GPU; install jax[cuda13]"
    if platform is None or _interpret():
        return None
    return too_old(platform, 9.0, "Hopper")


def version() -> str:
    """Of the jax that holds Pallas."""
    return f"jax {importlib.metadata.version('jax')}"


def _interpret() -> Any:
    """The parameters of JAX's own `force_gpu_interpret_mode`, if it is in force."""
    from jax._src import config

    state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return (state.value if state is not None else None) or False


_package = KernelPackage("pallas_kernels", lambda: {"interpret": _interpret()})
prefix_sum = _package.prefix_sum
fill_draft_extend_metadata = _package.fill_draft_extend_metadata
broadcast = _package.broadcast
copy = _package.copy
