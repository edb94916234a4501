"""The Pallas and the Triton kernels as implementations that run without a GPU."""

import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import types

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from jaxnsa.implementations import xla
from jaxnsa.implementations.gpu import unbatched
from pallas_kernels.jax_internals import InterpretGPUParams

PALLAS, TRITON = "interpreted pallas", "interpreted triton"


def _triton_missing():
    missing = [n for n in ("triton", "torch") if importlib.util.find_spec(n) is None]
    if missing:
        return f"runs with {' and '.join(missing)}, as .ci/run installs"
    number = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    return (
        None if number >= (3, 9) else "runs with Triton 3.9 or newer, whose interpreter wraps int32"
    )


NAMES = {PALLAS: None, TRITON: _triton_missing()}
"""Why each of them cannot run here; None where it can."""


@functools.cache
def module(name):
    """The implementation by that name."""
    if name == TRITON:
        return _implementation(triton_kernels())
    # This interpreter detects races and accesses outside a buffer, and prints them.
    return _implementation(pallas_kernels, interpret=InterpretGPUParams(detect_races=True))


def _implementation(kernels, **options):
    """Kernels of a package with the interface of implementations."""

    def fused_metadata(inputs, out, spec):
        return kernels.fused_metadata(*unbatched(inputs, out), spec=spec, **options)

    def copy(src, out, **more):
        return kernels.copy(*unbatched(src, out), **more, **options)

    return types.SimpleNamespace(
        unavailable=lambda platform: None,
        version=lambda: "interpreted",
        prefix_sum=functools.partial(kernels.prefix_sum, **options),
        fill_draft_extend_metadata=functools.partial(kernels.fill_draft_extend_metadata, **options),
        fused_metadata=fused_metadata,
        copy=copy,
    )


@functools.cache
def triton_kernels():
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    child = concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _interpret_triton
    )

    def remote(function):
        def call(*arrays, **options):
            known = {name: value for name, value in options.items() if name != "config"}
            compute = functools.partial(getattr(xla, function), **known)
            return jax.pure_callback(
                lambda *arrays: child.submit(_run, function, arrays, options).result(),
                jax.eval_shape(compute, *arrays),
                *arrays,
                vmap_method="sequential",
            )

        return call

    names = ("prefix_sum", "fill_draft_extend_metadata", "fused_metadata", "copy")
    return types.SimpleNamespace(**{name: remote(name) for name in names})


def _interpret_triton():
    os.environ["TRITON_INTERPRET"] = "1"


def _run(function, arrays, options):
    """In the child: a computation by the Triton kernels."""
    from jaxnsa.implementations import triton_kernels

    arrays = jax.tree.map(jnp.asarray, arrays)
    return jax.tree.map(np.asarray, getattr(triton_kernels, function)(*arrays, **options))
