"""What XLA gets for CUDA from a package of kernels: one custom call, and nothing beside it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import (
    inputs,
    lowered_operations,
    mode_options,
    on_device,
    skip_where_it_is_not_lowered,
    skip_without_library,
)

import jaxnsa
from jaxnsa import ForwardMode, reference


@pytest.fixture(params=("pallas", "triton"))
def name(request):
    """An implementation that lowers here, though it cannot run."""
    skip_where_it_is_not_lowered(request.param)
    return request.param


@pytest.mark.parametrize(
    "mode, in_place, stacked, bs, max_len, page, wide_table",
    (
        (ForwardMode.DECODE, True, False, 7, 2048, 64, True),
        (ForwardMode.TARGET_VERIFY, False, True, 7, 1001, 48, True),
        (ForwardMode.DRAFT_EXTEND, True, True, 1, 37, 1, True),
        (ForwardMode.TARGET_VERIFY, False, False, 7, 100, 64, False),
        (ForwardMode.DRAFT_EXTEND, True, False, 7, 2000, 2, False),
    ),
)
def test_broadcast_is_one_custom_call(name, mode, in_place, stacked, bs, max_len, page, wide_table):
    options = {"num_backends": 3, "forward_mode": mode, "stacked": stacked}
    options |= {"max_len": max_len, "real_page_size": page, "wide_table": wide_table}
    options |= mode_options(mode, bs)
    arguments = inputs(bs, pool_cols=2048)
    extend = options.pop("extend_seq_lens", None)
    compute = functools.partial(
        jaxnsa.fused_metadata_precompute_and_broadcast, implementation=name, **options
    )
    out = None
    if in_place:
        out = on_device(
            reference.fused_metadata_precompute_and_broadcast(
                *arguments, extend_seq_lens=extend, **options
            )
        )
    operations = lowered_operations(
        lambda out, extend, *a: compute(*a, out=out, extend_seq_lens=extend),
        out,
        extend,
        *arguments,
        donate=0,
    )
    assert operations == ["custom_call"]


@pytest.mark.parametrize("function", ("fused_metadata", "copy"))
@pytest.mark.parametrize("kernels", ("pallas", "ffi", "triton"))
def test_destinations_pass_a_barrier(kernels, function):
    """Without it XLA hands kernels slices of larger arrays, and loses what is written there."""
    skip_where_it_is_not_lowered(kernels)
    if kernels == "ffi":
        skip_without_library()
    arguments = inputs(7, pool_cols=256)
    out = on_device(reference.precompute_decode_metadata(*arguments))

    def compute(out, src, *arguments):
        if function == "copy":
            return jaxnsa.fused_metadata_copy(src, out=(out,), implementation=kernels)
        return jaxnsa.precompute_decode_metadata(*arguments, out=out, implementation=kernels)

    traced = jax.jit(compute, donate_argnums=0).trace(out, out, *arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (barrier,) = [line for line in text.splitlines() if "stablehlo.optimization_barrier" in line]
    assert len(re.findall(r"tensor<[0-9x]+xi32>", barrier)) == len(jax.tree.leaves(out))


@pytest.mark.parametrize("lengths", ("topk", "nsa_cache_seqlens"))
def test_schedules_belong_to_the_same_custom_call(name, lengths):
    schedules = jaxnsa.Schedules(
        jaxnsa.PagedMqaSchedule(132, "sm90"),
        jaxnsa.TopkPlan.h200(),
        jaxnsa.FlashMlaSchedule(132, lengths),
    )
    compute = functools.partial(
        jaxnsa.precompute_target_verify_metadata,
        num_draft_tokens=2,
        schedules=schedules,
        wide_table=False,
        implementation=name,
    )
    assert lowered_operations(compute, *inputs(7, pool_cols=256)) == ["custom_call"]


def test_every_function_is_one_custom_call(name):
    lengths, indices, pool = inputs(7, pool_cols=256)
    implementation = {"implementation": name}
    calls = [
        (lambda s, i, p: jaxnsa.precompute_decode_metadata(s, i, p, **implementation)),
        (
            lambda s, i, p: jaxnsa.precompute_target_verify_metadata(
                s, i, p, num_draft_tokens=2, **implementation
            )
        ),
        (
            lambda s, i, p: jaxnsa.precompute_draft_extend_metadata(
                s, i, i, p, max_total_tokens=9, **implementation
            )
        ),
        (lambda s, i, p: jaxnsa.prefix_sum(s, **implementation)),
        (
            lambda s, i, p: jaxnsa.fill_draft_extend_metadata(
                i, s, nsa_index_topk=9, max_total_tokens=9, **implementation
            )
        ),
    ]
    for call in calls:
        assert lowered_operations(call, lengths, indices, pool) == ["custom_call"]
    src = on_device(reference.precompute_decode_metadata(lengths, indices, pool))
    copy = functools.partial(jaxnsa.fused_metadata_copy, num_backends=3, **implementation)
    assert lowered_operations(copy, src) == ["custom_call"]


@pytest.mark.parametrize("strategy, launches", (("ultra_fast", 1), ("fast", 3), ("fallback", 2)))
def test_launches_of_strategies(name, strategy, launches):
    compute = functools.partial(
        jaxnsa.fused_metadata_precompute_and_broadcast,
        num_backends=2,
        strategy=strategy,
        implementation=name,
    )
    operations = lowered_operations(compute, *inputs(7, pool_cols=256))
    assert operations == ["custom_call"] * launches


def test_more_blocks_than_a_grid_has_are_refused(name):
    vector = jax.ShapeDtypeStruct((2**30 - 1,), jnp.int32)
    compute = functools.partial(
        jaxnsa.fused_metadata_precompute_and_broadcast,
        num_backends=2,
        backend_offsets=(0, 1),
        implementation=name,
    )
    with pytest.raises(NotImplementedError, match="too large: got .*, expected at most 2147483647"):
        jax.eval_shape(compute, vector, vector, jax.ShapeDtypeStruct((1, 1), jnp.int32))
