"""The default of a CPU: `ffi` where what is lowered runs in this process, otherwise `xla`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ON_GPU
from helpers import inputs, on_device, pointers
from jax import export

import jaxnsa
from jaxnsa import reference
from jaxnsa.implementations import ffi, native_library

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="runs where a CPU is the default device"),
    pytest.mark.skipif(
        native_library.unavailable("cpu") is not None,
        reason="runs where a C++ compiler built the library",
    ),
]
ARGUMENTS = inputs(3)
FUNCTIONS = {
    "prefix_sum": lambda s, i, p: jaxnsa.prefix_sum(s),
    "fill_draft_extend_metadata": lambda s, i, p: jaxnsa.fill_draft_extend_metadata(
        i, s, nsa_index_topk=2, max_total_tokens=4
    ),
    "fused_metadata": jaxnsa.precompute_decode_metadata,
    "copy": lambda s, i, p: jaxnsa.fused_metadata_copy(
        jaxnsa.precompute_decode_metadata(s, i, p, implementation="xla"), num_backends=1
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_lowered_decides(name):
    traced = jax.jit(FUNCTIONS[name]).trace(*ARGUMENTS)
    call = f"jaxnsa_{name}"
    assert call in traced.lower(lowering_platforms=("cpu",)).as_text()
    for platforms in (("tpu",), ("cpu", "tpu"), ("cuda",)):
        assert "jaxnsa_" not in traced.lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gpu_takes_it_where_its_library_runs(name, monkeypatch):
    monkeypatch.setattr(ffi, "unavailable", lambda platform: None)  # as on a machine that has one
    arguments = inputs(11)  # of a shape that no other test lowers, as JAX keeps what it lowered
    traced = jax.jit(FUNCTIONS[name]).trace(*arguments)
    assert f"jaxnsa_{name}" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("platforms", (("cpu",), ("cuda", "cpu")))
def test_an_exported_function_needs_no_library(platforms):
    exported = export.export(jax.jit(jaxnsa.prefix_sum), platforms=platforms)(ARGUMENTS[0])
    restored = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(ARGUMENTS[0]), reference.prefix_sum(ARGUMENTS[0]))


def test_batches_are_computed_at_once():
    batch = np.stack([ARGUMENTS[0], ARGUMENTS[0][::-1]])
    batched = jax.vmap(jaxnsa.prefix_sum)
    assert "while" not in jax.jit(batched).lower(batch).as_text()
    for actual, x in zip(batched(batch), batch, strict=True):
        np.testing.assert_array_equal(actual, reference.prefix_sum(x))


def test_destinations_are_filled_in_place_under_the_callers_jit():
    read = on_device(ARGUMENTS)
    out = on_device(reference.precompute_decode_metadata(*ARGUMENTS))
    before = pointers(out)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(out, seq_lens, indices, pool):
        return jaxnsa.precompute_decode_metadata(seq_lens + 1, indices, pool, out=out)

    out = step(out, *read)
    assert pointers(out) == before
    lengths = np.maximum(ARGUMENTS[0] + 1, 0)
    np.testing.assert_array_equal(out.cache_seqlens, lengths)
    assert "jaxnsa_fused_metadata" in step.lower(out, *read).as_text()


def test_shards_compute_with_it():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    sums = jax.shard_map(
        lambda x: jaxnsa.prefix_sum(x)[1:], mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jnp.arange(6, dtype=jnp.int32)
    assert jax.jit(sums)(x).tolist() == [0, 1, 3, 3, 7, 12]
