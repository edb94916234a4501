"""jit, vmap, shard_map, donation and recompilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TABLE_MODES,
    assert_same,
    count_compilations,
    held,
    inputs,
    mode_options,
    on_device,
    pointers,
)
from jax.sharding import AxisType, PartitionSpec

import jaxnsa
from jaxnsa import ForwardMode, reference

compute = jaxnsa.fused_metadata_precompute_and_broadcast
specify = reference.fused_metadata_precompute_and_broadcast


@pytest.mark.large
@pytest.mark.parametrize("mode", TABLE_MODES)
def test_inside_jit(mode, implementation):
    arguments, options = inputs(3, pool_cols=70), mode_options(mode, 3)
    extend = options.pop("extend_seq_lens", None)

    @functools.partial(jax.jit, static_argnames="mode")
    def step(arguments, extend, mode):
        return compute(
            *arguments,
            extend_seq_lens=extend,
            num_backends=2,
            forward_mode=mode,
            implementation=implementation,
            **options,
        )

    expected = specify(
        *arguments, extend_seq_lens=extend, num_backends=2, forward_mode=mode, **options
    )
    assert_same(step(arguments, extend, mode), expected)


@pytest.mark.large
def test_forward_mode_is_an_argument_of_jit(implementation):
    arguments = inputs(3)

    @jax.jit
    def step(arguments, mode):
        return compute(
            *arguments,
            num_backends=1,
            forward_mode=mode,
            num_draft_tokens=2 if mode is ForwardMode.TARGET_VERIFY else None,
            implementation=implementation,
        )

    assert step(arguments, ForwardMode.DECODE)[0].page_indices.shape[0] == 3
    assert step(arguments, ForwardMode.TARGET_VERIFY)[0].page_indices.shape[0] == 6


@pytest.mark.large
@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("strategy", ("ultra_fast", "fast", "fallback"))
@pytest.mark.parametrize("tail", ("copy", "keep"))
def test_donation_inside_jit_is_in_place(mode, strategy, tail, implementation):
    arguments = inputs(2, pool_cols=70)
    options = {"num_backends": 2, "forward_mode": mode, "tail": tail} | mode_options(mode, 2)
    kept = held(specify(*arguments, **(options | {"tail": None})))
    out = on_device(kept)
    before = pointers(out)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(out, *arguments):
        return compute(
            *arguments, out=out, strategy=strategy, implementation=implementation, **options
        )

    result = step(out, *arguments)
    assert_same(result, specify(*arguments, out=kept, **options))
    assert pointers(result) == before


@pytest.mark.large
@pytest.mark.parametrize("strategy", ("ultra_fast", "fast", "fallback"))
def test_destinations_may_be_slices(strategy, implementation):
    """Slices at aligned offsets, which XLA may try to pass on without a copy."""
    arguments = inputs(16, pool_cols=16)
    options = {"num_backends": 2, "tail": "keep", "real_page_size": 4}
    kept = held(specify(*arguments, **(options | {"tail": None})))
    whole = jax.tree.map(lambda a: jnp.stack([jnp.full_like(a, 3), a]), on_device(kept))

    @jax.jit
    def step(whole, *arguments):
        out = jax.tree.map(lambda a: a[1], whole)
        return compute(
            *arguments, out=out, strategy=strategy, implementation=implementation, **options
        )

    assert_same(step(whole, *arguments), specify(*arguments, out=kept, **options))
    assert all((a[0] == 3).all() and (a[1] == -7).all() for a in jax.tree.leaves(whole))


@pytest.mark.large
def test_donated_arrays_are_gone(implementation):
    out = jaxnsa.precompute_decode_metadata(*inputs(3))
    jaxnsa.precompute_decode_metadata(*inputs(3), out=out, implementation=implementation)
    assert all(array.is_deleted() for array in jax.tree.leaves(out))


def test_destinations_over_the_same_memory_are_refused():
    """Other objects, so that no check sees it before the runtime does."""
    arguments = inputs(3)
    first, second = compute(*arguments, num_backends=2)
    (device,) = first.page_indices.devices()
    both = dataclasses.replace(second, page_indices=jax.device_put(first.page_indices, device))
    lens = jax.device_put(first.cache_seqlens, device)
    for out, options in (((first, both), {}), ((first, second), {"written_lens": lens})):
        with pytest.raises(ValueError, match="out: got arrays that share memory, with each other"):
            compute(*arguments, num_backends=2, out=out, **options)
    assert not first.page_indices.is_deleted()


@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("in_place", (False, True))
def test_vmap(mode, in_place, implementation):
    seq_lens, indices, pool = inputs(2, pool_cols=130)  # a vector of the Pallas kernels, and more
    options = {"num_backends": 2, "forward_mode": mode} | mode_options(mode, 2)
    batches = np.stack([seq_lens, seq_lens[::-1], np.zeros_like(seq_lens)])
    kept = [held(specify(seq_lens, indices, pool, **options)) for _ in batches]
    out = jax.tree.map(lambda *a: jnp.stack(a), *kept) if in_place else None
    batched = jax.vmap(
        lambda lens, out: compute(
            lens, indices, pool, out=out, implementation=implementation, **options
        )
    )
    if in_place and implementation.endswith(("pallas", "triton")):
        with pytest.raises(NotImplementedError, match="call without out="):
            batched(batches, out)
        return
    result = batched(batches, out)
    for k, lens in enumerate(batches):
        expected = specify(lens, indices, pool, out=kept[k] if in_place else None, **options)
        assert_same(jax.tree.map(lambda array, k=k: array[k], result), expected)


def test_vmap_of_the_small_functions(implementation):
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    sums = jax.vmap(functools.partial(jaxnsa.prefix_sum, implementation=implementation))(rows)
    for k, row in enumerate(rows):
        assert_same(sums[k], reference.prefix_sum(row))
    fill = functools.partial(
        jaxnsa.fill_draft_extend_metadata,
        nsa_index_topk=9,
        max_total_tokens=30,
        implementation=implementation,
    )
    filled = jax.vmap(fill)(rows % 3, rows)
    for k, row in enumerate(rows):
        expected = reference.fill_draft_extend_metadata(
            row % 3, row, nsa_index_topk=9, max_total_tokens=30
        )
        assert_same(jax.tree.map(lambda array, k=k: array[k], filled), expected)


@pytest.mark.large
@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("in_place", (False, True))
def test_shard_map_over_eight_devices(mode, in_place, implementation):
    shards, bs = 8, 3
    if jax.device_count() < shards:
        pytest.skip("needs 8 devices: a machine without a GPU simulates them")
    seq_lens, indices, pool = inputs(shards * bs)
    options = {"num_backends": 2, "forward_mode": mode}
    extend = None
    if mode is ForwardMode.TARGET_VERIFY:
        options["num_draft_tokens"] = 2
    if mode is ForwardMode.DRAFT_EXTEND:
        extend = np.abs(seq_lens) % 4
        options["max_total_tokens"] = 10
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def expected(k, out=None):
        rows = slice(k * bs, (k + 1) * bs)
        more = options if extend is None else options | {"extend_seq_lens": extend[rows]}
        return specify(seq_lens[rows], indices[rows], pool, out=out, **more)

    kept = [held(expected(k)) for k in range(shards)]
    out = jax.tree.map(lambda *a: jnp.concatenate(a), *kept) if in_place else None
    result = jax.jit(
        jax.shard_map(
            lambda out, lens, extend, indices, pool: compute(
                lens,
                indices,
                pool,
                extend_seq_lens=extend,
                out=out,
                implementation=implementation,
                **options,
            ),
            mesh=mesh,
            in_specs=(split, split, split, split, whole),
            out_specs=split,
        )
    )(out, seq_lens, extend, indices, pool)
    wanted = [expected(k, kept[k] if in_place else None) for k in range(shards)]
    assert_same(result, jax.tree.map(lambda *a: np.concatenate(a), *wanted))


@pytest.mark.large
@pytest.mark.parametrize("mode", TABLE_MODES)
def test_new_values_never_recompile(mode, implementation):
    def call(seed):
        seq_lens, indices, pool = inputs(33, seed=seed)
        options = mode_options(mode, 33, seed=seed)
        if mode is ForwardMode.DRAFT_EXTEND:
            options["max_total_tokens"] = 70
        options |= {"forward_mode": mode, "num_backends": 2, "implementation": implementation}
        backends = compute(seq_lens, indices, pool, **options)
        compute(seq_lens, indices, pool, out=backends, **options)
        jaxnsa.prefix_sum(seq_lens, implementation=implementation)
        jaxnsa.fill_draft_extend_metadata(
            seq_lens % 3,
            seq_lens,
            nsa_index_topk=seed + 9 - seed,
            max_total_tokens=70,
            implementation=implementation,
        )

    with count_compilations() as compiled:
        call(0)
    assert compiled
    with count_compilations() as compiled:
        for seed in range(1, 6):
            call(seed)
    assert not compiled


@pytest.mark.parametrize("options", ({}, {"wide_table": False}, {"tail": "zero"}))
def test_materialises_no_more_than_it_returns(options):
    seq_lens, indices, _ = inputs(32)
    pool = np.zeros((256, 65_536), np.int32)
    functions = {
        "decode": lambda s, e, i, p: compute(s, i, p, num_backends=3, **options),
        "verify": lambda s, e, i, p: jaxnsa.precompute_target_verify_metadata(
            s, i, p, num_draft_tokens=4, **options
        ),
        "extend": lambda s, e, i, p: jaxnsa.precompute_draft_extend_metadata(
            s, e, i, p, max_total_tokens=64, **options
        ),
    }
    for name, function in functions.items():
        jitted = jax.jit(lambda *a, f=function: f(*a))
        analysis = jitted.lower(seq_lens, seq_lens, indices, pool).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < 4096, name
