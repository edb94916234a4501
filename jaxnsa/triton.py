"""The Triton implementation: `jaxnsa.triton_kernels`."""

import functools
import importlib.metadata
import importlib.util

from jaxnsa.kernel_package import KernelPackage, too_old


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    if missing := _missing():
        return f"{' and '.join(missing)} not installed; run: pip install 'jaxnsa[triton]'"
    if platform is None or (platform != "gpu" and _interpreted()):
        return None
    return too_old(platform, 8.0, "Ampere") or _import_error()


def version() -> str | None:
    """Of jax-triton and Triton; None where one is missing."""
    if _missing():
        return None
    packages = ("jax-triton", "triton")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


@functools.cache  # an eager call asks each time, and looking for what is not there is slow
def _missing() -> list[str]:
    return [name for name in ("jax_triton", "triton") if not importlib.util.find_spec(name)]


def _interpreted() -> bool:
    from jaxnsa.triton_kernels.launch import INTERPRET

    return INTERPRET


@functools.cache
def _import_error() -> str | None:
    from jaxnsa.triton_kernels.launch import import_jax_triton

    try:
        import_jax_triton()
    except ImportError as error:
        return f"jax_triton cannot be imported: {str(error).splitlines()[0]}"
    return None


_package = KernelPackage("jaxnsa.triton_kernels")
prefix_sum = _package.prefix_sum
fill_draft_extend_metadata = _package.fill_draft_extend_metadata
broadcast = _package.broadcast
copy = _package.copy
