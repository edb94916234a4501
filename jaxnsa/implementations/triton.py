"""The Triton implementation: `triton_kernels`, which is imported when it is first used."""

import functools
import importlib.metadata
import importlib.util

import jax

from jaxnsa.implementations.gpu import reason_to_refuse, unbatched
from jaxnsa.metadata import DraftExtendSeqlens, NSAMetadata
from jaxnsa.spec import Inputs, Spec


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    if missing := _missing():
        return f"{' and '.join(missing)} not installed; run: pip install jax-triton"
    if _interpreted():
        return None if platform is None else _interpreter_missing()
    if platform is None:
        return _import_error()
    return reason_to_refuse(platform, 8.0, "Ampere") or _import_error()


def version() -> str | None:
    """Of jax-triton and Triton; None where one is missing."""
    if _missing():
        return None
    packages = ("jax-triton", "triton")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _missing() -> list[str]:
    return [name for name in ("jax_triton", "triton") if not _installed(name)]


@functools.cache  # an eager call asks each time, and looking for what is not there is slow
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _interpreted() -> bool:
    from jaxnsa.implementations.triton_kernels.launch import INTERPRET

    return INTERPRET


@functools.cache
def _interpreter_missing() -> str | None:
    if not _installed("torch"):
        return "Triton's interpreter needs PyTorch, which is not installed; run: pip install torch"
    installed = importlib.metadata.version("triton")
    if tuple(map(int, installed.split(".")[:2])) < (3, 9):
        return f"Triton {installed} interprets int32 sums that do not wrap; install Triton 3.9"
    return None


@functools.cache
def _import_error() -> str | None:
    from jaxnsa.implementations.triton_kernels.launch import import_jax_triton

    try:
        import_jax_triton()
    except ImportError as error:
        return f"jax_triton cannot be imported: {str(error).splitlines()[0]}"
    return None


def prefix_sum(x: jax.Array) -> jax.Array:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
    from jaxnsa.implementations import triton_kernels

    return triton_kernels.prefix_sum(x)


def fill_draft_extend_metadata(
    extend_seq_lens: jax.Array, seq_lens: jax.Array, **sizes: int
) -> DraftExtendSeqlens:
    """See `jaxnsa.fill_draft_extend_metadata`."""
    from jaxnsa.implementations import triton_kernels

    return triton_kernels.fill_draft_extend_metadata(extend_seq_lens, seq_lens, **sizes)


def fused_metadata(
    inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of `spec` for all of its destinations."""
    from jaxnsa.implementations import triton_kernels

    return triton_kernels.fused_metadata(*unbatched(inputs, out), spec)


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies `src` to `num_backends` destinations; its live columns only with `live`."""
    from jaxnsa.implementations import triton_kernels

    return triton_kernels.copy(*unbatched(src, out), num_backends=num_backends, live=live)
