"""Random inputs, comparison with the reference, and what the tests look at from outside."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnsa
from jaxnsa import ForwardMode, reference
from jaxnsa.implementations import native_library, triton

DEFAULT = jaxnsa.get_kernel_info()["default"]
"""What computes a broadcast to a few requests where nothing is named."""


def of_blocks(*values):
    """Values of a parameter that differ from smaller ones in a kernel's blocks and tiles alone."""
    return [pytest.param(value, marks=pytest.mark.blocks) for value in values]


TABLE_MODES = [mode for mode in ForwardMode if mode is not ForwardMode.EXTEND]
"""Those with tables of their own: prefill's are decode's, and test_prefill.py is about the rest."""

TABLE_MODES_OR_ONE = [
    TABLE_MODES[0],
    *(pytest.param(mode, marks=pytest.mark.large) for mode in TABLE_MODES[1:]),
]
"""The same, but for interpreters of kernels, where a test is about what all modes share."""

BATCH_SIZES = (
    *(0, 1, 3, 33),
    *of_blocks(2, 31, 32, 127, 128, 129, 255, 256, 257, 1000, 2049),
)


def inputs(bs, *, pool_cols=200, pool_rows=None, seed=0, high=None):
    """seq_lens, req_pool_indices, req_to_token, as NumPy arrays with corner values among them."""
    rng = np.random.default_rng(seed)
    pool_rows = bs + 2 if pool_rows is None else pool_rows
    high = pool_cols + 5 if high is None else high
    return (
        rng.integers(-3, high, bs, dtype=np.int32),
        rng.integers(-2, pool_rows + 2, bs, dtype=np.int32),
        rng.integers(-50, 2**31 - 1, (pool_rows, pool_cols), dtype=np.int32),
    )


def mode_options(mode, bs, *, seed=0, slack=3):
    """The extra arguments of a forward mode; slack < 0 gives draft extend too little capacity."""
    if mode is ForwardMode.TARGET_VERIFY:
        return {"num_draft_tokens": 3}
    if mode.ragged:
        extend = np.random.default_rng(seed).integers(-1, 5, bs, dtype=np.int32)
        total = int(np.maximum(extend, 0).sum())
        options = {"extend_seq_lens": extend, "max_total_tokens": max(total + slack, 0)}
        if mode is ForwardMode.EXTEND:
            options["max_total_keys"] = 70
        return options
    return {}


def held(metadata, value=-7):
    """Writable NumPy arrays of the same shapes that hold something recognisable."""
    return jax.tree.map(lambda a: np.full(a.shape, value, np.int32), metadata)


def held_apart(tree):
    """The same, with other values in every element."""
    sizes = [array.size for array in jax.tree.leaves(tree)]
    values = np.split(-np.arange(7, 7 + sum(sizes), dtype=np.int32), np.cumsum(sizes)[:-1])
    arrays = [v.reshape(a.shape) for v, a in zip(values, jax.tree.leaves(tree), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


def on_device(tree):
    """The same arrays in memory of JAX's own, which can be donated.

    `jnp.array` would compile a function for each shape, and `jax.device_put` shares memory at a
    multiple of 64 bytes.
    """

    def put(array):
        if not array.size:
            return jnp.array(array)
        apart = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
        np.copyto(apart, array)
        return jax.device_put(apart)

    return jax.tree.map(put, tree)


def pointers(tree):
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(tree)]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(expected)]
    leaves = zip(paths, jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for path, a, e in leaves:
        assert a.dtype == np.int32, path
        assert a.shape == e.shape, path
        np.testing.assert_array_equal(np.asarray(a), e, err_msg=path)


def check_broadcast(arguments, *, strategy="ultra_fast", **options):
    """Runs the broadcast and the reference with the same arguments and compares everything."""
    implementation = options.pop("implementation")
    in_place = options.pop("in_place", False)
    expected_out = actual_out = None
    if in_place:
        fresh = reference.fused_metadata_precompute_and_broadcast(
            *arguments, **(options | {"tail": None})
        )
        expected_out = held_apart(fresh)
        actual_out = on_device(expected_out)
        before = pointers(actual_out)
    actual = jaxnsa.fused_metadata_precompute_and_broadcast(
        *arguments, out=actual_out, strategy=strategy, implementation=implementation, **options
    )
    expected = reference.fused_metadata_precompute_and_broadcast(
        *arguments, out=expected_out, **options
    )
    assert_same(actual, expected)
    if in_place:
        assert pointers(actual) == before
    return actual


def lowered_operations(function, *arguments, donate=()):
    """What XLA gets for CUDA, without what only renames or orders values and launches nothing."""
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    operations = re.findall(r'= "?stablehlo\.(\w+)', text)
    return [op for op in operations if op not in ("constant", "reshape", "optimization_barrier")]


def skip_where_it_is_not_lowered(name):
    """Skips a test that lowers an implementation, where that takes what is not installed."""
    if name == "triton" and (reason := triton._missing() or triton._import_error()):
        pytest.skip(f"runs where JAX's CUDA plugin is, as .ci/run installs it: {reason}")


def skip_without_library(on_gpu=False):
    """Skips a test that runs the native library, of the CPU or of the GPU, where there is none."""
    if reason := native_library.unavailable("gpu" if on_gpu else "cpu"):
        pytest.skip(f"runs where the native library was built: {reason}")


@contextlib.contextmanager
def count_compilations():
    """Yields a list that grows by one name per compilation inside the block."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
