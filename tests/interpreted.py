"""The Pallas and the Triton kernels as implementations that run without a GPU."""

import functools
import importlib
import importlib.util
import sys
import types

from pallas_kernels.jax_internals import InterpretGPUParams

PALLAS, TRITON = "interpreted pallas", "interpreted triton"


def _triton_missing():
    missing = [n for n in ("triton", "torch") if importlib.util.find_spec(n) is None]
    return f"runs where {' and '.join(missing)} are installed" if missing else None


NAMES = {PALLAS: None, TRITON: _triton_missing()}
"""Why each of them cannot run here; None where it can."""


@functools.cache
def module(name):
    """The implementation by that name."""
    return _pallas() if name == PALLAS else _triton()


def _implementation(**computations):
    return types.SimpleNamespace(
        unavailable=lambda platform: None, version=lambda: "interpreted", **computations
    )


def _pallas():
    """Pallas's interpreter detects races and accesses outside a buffer, and prints them."""
    import pallas_kernels
    from jaxnsa.implementations.gpu import unbatched

    options = {"interpret": InterpretGPUParams(detect_races=True)}
    return _implementation(
        prefix_sum=functools.partial(pallas_kernels.prefix_sum, **options),
        fill_draft_extend_metadata=functools.partial(
            pallas_kernels.fill_draft_extend_metadata, **options
        ),
        fused_metadata=lambda inputs, out, spec: pallas_kernels.fused_metadata(
            *unbatched(inputs, out), spec, **options
        ),
        copy=lambda src, out, **more: pallas_kernels.copy(*unbatched(src, out), **more, **options),
    )


def _triton():
    """Whether Triton interprets is decided when kernels are defined: a second copy of them."""
    import triton

    from jaxnsa.implementations import triton as adapter

    package = "jaxnsa.implementations.triton_kernels"
    compiled = {n: m for n, m in sys.modules.items() if n.startswith(package)}
    for name in compiled:
        del sys.modules[name]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        kernels = importlib.import_module(package)
    for name in [n for n in sys.modules if n.startswith(package)]:
        del sys.modules[name]
    sys.modules.update(compiled)
    return kernels
