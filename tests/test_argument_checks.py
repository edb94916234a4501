"""Wrong arguments: the error names the argument, what came and what was expected."""

import collections
import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, inputs, on_device

import jaxnsa
from jaxnsa import ForwardMode, reference
from jaxnsa.checked_calls import CheckedCalls
from jaxnsa.computation import Computation

compute = jaxnsa.fused_metadata_precompute_and_broadcast
SEQ_LENS, INDICES, POOL = inputs(4)
FRESH = reference.precompute_decode_metadata(SEQ_LENS, INDICES, POOL)


def out(**changes):
    return dataclasses.replace(on_device(FRESH), **changes)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"seq_lens": SEQ_LENS[None]}, ValueError, r"seq_lens: got shape \(1, 4\), expected 1 dim"),
        ({"seq_lens": SEQ_LENS.astype(float)}, TypeError, "seq_lens: got dtype float64, expected"),
        ({"seq_lens": SEQ_LENS.astype(np.int16)}, TypeError, "got dtype int16, expected int32 or"),
        ({"seq_lens": [1.0, 2, 3, 4]}, TypeError, "seq_lens: got dtype float64"),
        ({"req_pool_indices": INDICES[:3]}, ValueError, r"req_pool_indices: got shape \(3,\), exp"),
        ({"req_pool_indices": INDICES > 0}, TypeError, "req_pool_indices: got dtype bool"),
        (
            {"req_to_token": POOL[0]},
            ValueError,
            r"req_to_token: got shape \(200,\), expected 2 dim",
        ),
        (
            {"req_to_token": POOL.astype(np.int64)},
            TypeError,
            "req_to_token: got dtype int64, expec",
        ),
        ({"req_to_token": POOL[:0]}, ValueError, "req_to_token: got shape .0, 200., expected at"),
        ({"max_len": 0}, ValueError, r"max_len: got 0, expected an int in \[1, 200\]"),
        ({"max_len": 201}, ValueError, r"max_len: got 201, expected an int in \[1, 200\]"),
        ({"max_len": 1.5}, TypeError, "max_len: got 1.5, expected an int"),
        ({"max_len": True}, TypeError, "max_len: got True, expected an int"),
        ({"nsa_index_topk": 0}, ValueError, "nsa_index_topk: got 0"),
        ({"nsa_index_topk": 2**31}, ValueError, "nsa_index_topk: got 2147483648"),
        ({"real_page_size": 0}, ValueError, "real_page_size: got 0"),
        ({"real_page_size": "64"}, TypeError, "real_page_size: got '64', expected an int"),
        ({"wide_table": 1}, TypeError, "wide_table: got 1, expected True or False"),
        ({"wide_table": False, "real_page_size": 1}, ValueError, "wide_table: got False, expected"),
        ({"tail": "drop"}, ValueError, "tail: got 'drop', expected one of 'copy', 'zero', 'keep'"),
        ({"tail": "keep"}, ValueError, "tail: got 'keep', expected 'copy' or 'zero'"),
        ({"tail": ""}, ValueError, "tail: got '', expected one of 'copy', 'zero', 'keep'"),
        ({"tail": False}, ValueError, "tail: got False, expected one of 'copy', 'zero', 'keep'"),
        ({"tail": np.array(["copy"])}, ValueError, "tail: got <U4 ndarray of shape .1,., expected"),
        ({"strategy": ""}, ValueError, "strategy: got '', expected one of 'ultra_fast', 'fast', '"),
        ({"num_backends": 10**6}, ValueError, r"num_backends: got 1000000, .* in \[1, 1024\]"),
        (
            {"forward_mode": ForwardMode.TARGET_VERIFY, "num_draft_tokens": 2**30},
            ValueError,
            "seq_lens: got 4 requests of 1073741824 rows each, expected at most 1073741823 rows",
        ),
        (
            {
                "forward_mode": ForwardMode.DRAFT_EXTEND,
                "extend_seq_lens": SEQ_LENS,
                "max_total_tokens": 2**30 + 1,
            },
            ValueError,
            "max_total_tokens: got 1073741825",
        ),
        ({"seq_lens": [[1], [1, 2]]}, TypeError, "seq_lens: got list, expected an array"),
        ({"seq_lens": [1, None]}, TypeError, "seq_lens: got list, expected an array"),
        ({"seq_lens": None}, TypeError, "seq_lens: got NoneType, expected an array"),
        ({"seq_lens": 3}, ValueError, r"seq_lens: got shape \(\), expected 1 dimension"),
        ({"seq_lens": np.ma.array(SEQ_LENS)}, TypeError, "got int32 MaskedArray of shape .4,., ex"),
        (
            {"req_to_token": jax.ShapeDtypeStruct((2, 3), jnp.int32)},
            TypeError,
            "req_to_token: got int32 ShapeDtypeStruct of shape .2, 3., expected an array",
        ),
        ({"seq_lens": jax.random.key(0)}, TypeError, "seq_lens: got dtype key<fry>, expected int"),
        ({"num_backends": 0}, ValueError, "num_backends: got 0"),
        ({"num_backends": None}, TypeError, "num_backends: got None, expected an int"),
        ({"stacked": "yes"}, TypeError, "stacked: got 'yes'"),
        ({"strategy": "fastest"}, ValueError, "strategy: got 'fastest', expected one of"),
        ({"implementation": "cuda"}, ValueError, "implementation: got 'cuda', expected one of"),
        ({"implementation": 3}, TypeError, "implementation: got 3, expected a name or a sequence"),
        ({"implementation": ()}, ValueError, "implementation: got an empty sequence"),
        ({"forward_mode": "decode"}, TypeError, "forward_mode: got 'decode', expected a jaxnsa."),
        ({"num_draft_tokens": 2}, ValueError, "num_draft_tokens: got 2, expected None in"),
        ({"max_total_tokens": 2}, ValueError, "max_total_tokens: got 2, expected None in"),
        ({"extend_seq_lens": SEQ_LENS}, ValueError, "extend_seq_lens: got int32 ndarray of shape"),
        (
            {"forward_mode": ForwardMode.TARGET_VERIFY},
            ValueError,
            "num_draft_tokens: got None, expected a value in ForwardMode.TARGET_VERIFY",
        ),
        (
            {"forward_mode": ForwardMode.TARGET_VERIFY, "num_draft_tokens": 0},
            ValueError,
            "num_draft_tokens: got 0",
        ),
        (
            {"forward_mode": ForwardMode.DRAFT_EXTEND, "max_total_tokens": 3},
            ValueError,
            "extend_seq_lens: got None, expected a value in",
        ),
        (
            {"forward_mode": ForwardMode.DRAFT_EXTEND, "extend_seq_lens": SEQ_LENS},
            ValueError,
            "max_total_tokens: got None, expected a value in",
        ),
        (
            {
                "forward_mode": ForwardMode.DRAFT_EXTEND,
                "extend_seq_lens": SEQ_LENS[:2],
                "max_total_tokens": 3,
            },
            ValueError,
            r"extend_seq_lens: got shape \(2,\), expected \(4,\)",
        ),
        (
            {
                "forward_mode": ForwardMode.DRAFT_EXTEND,
                "extend_seq_lens": SEQ_LENS,
                "max_total_tokens": -1,
            },
            ValueError,
            "max_total_tokens: got -1",
        ),
        ({"max_total_keys": 9}, ValueError, "max_total_keys: got 9, expected None in"),
        (
            {"forward_mode": ForwardMode.EXTEND, "extend_seq_lens": SEQ_LENS},
            ValueError,
            "max_total_tokens: got None, expected a value in ForwardMode.EXTEND",
        ),
        (
            {
                "forward_mode": ForwardMode.EXTEND,
                "extend_seq_lens": SEQ_LENS,
                "max_total_tokens": 9,
                "max_total_keys": -1,
            },
            ValueError,
            "max_total_keys: got -1",
        ),
        ({"out": out()}, ValueError, "out: got NSAMetadata, expected a tuple of 1 NSAMetadata"),
        ({"out": (out(),) * 2}, ValueError, "out: got 2 of them, expected a tuple of 1"),
        ({"out": (3,)}, TypeError, r"out\[0\]: got 3, expected an NSAMetadata"),
        (
            {"out": (FRESH,)},
            TypeError,
            r"out\[0\].cache_seqlens: got int32 ndarray of shape \(4,\)",
        ),
        (
            {"out": (out(cu_seqlens_k=jnp.zeros(4, jnp.int32)),)},
            ValueError,
            r"out\[0\].cu_seqlens_k: got shape \(4,\), expected \(5,\)",
        ),
        (
            {"out": (out(cu_seqlens_k=jnp.zeros(5, jnp.float32)),)},
            TypeError,
            r"out\[0\].cu_seqlens_k: got dtype float32, expected int32",
        ),
        (
            {"out": (out(page_indices=None),)},
            ValueError,
            r"out\[0\].page_indices: got NoneType, expected int32 \(4, 200\)",
        ),
        (
            {"out": (out(),), "real_page_size": 1},
            ValueError,
            r"out\[0\].real_page_table: got int32 ArrayImpl of shape \(4, 4\), expected None",
        ),
        ({"out": out(), "stacked": True}, ValueError, r"out.cache_seqlens: got shape \(4,\), exp"),
    ],
)
def test_broadcast_refuses(changes, error, message):
    arguments = {
        "seq_lens": SEQ_LENS,
        "req_pool_indices": INDICES,
        "req_to_token": POOL,
        "num_backends": 1,
    }
    with pytest.raises(error, match=message):
        compute(**(arguments | changes))


def test_tables_have_as_many_columns_as_kernels_count():
    pool = jax.ShapeDtypeStruct((1, 2**30 + 1), jnp.int32)

    def columns(pool, **options):
        table = jax.eval_shape(
            lambda pool: compute(SEQ_LENS, INDICES, pool, num_backends=1, **options), pool
        )[0].page_indices
        return table.shape[1]

    assert columns(pool, max_len=2**30) == 2**30
    for wide in ({}, {"max_len": 2**30 + 1}):
        with pytest.raises(ValueError, match=r"max_len: got 1073741825, .* in \[1, 1073741824\]"):
            columns(pool, **wide)


def deleted(array):
    array = jnp.array(array)
    array.delete()
    return array


@pytest.mark.parametrize("name", ("seq_lens", "req_pool_indices", "req_to_token"))
def test_inputs_must_be_alive(name):
    given = {"seq_lens": SEQ_LENS, "req_pool_indices": INDICES, "req_to_token": POOL}
    given[name] = deleted(given[name])
    extend = {"extend_seq_lens": SEQ_LENS, "max_total_tokens": 1}
    for function, options in (
        (jaxnsa.precompute_decode_metadata, {}),
        (jaxnsa.precompute_target_verify_metadata, {"num_draft_tokens": 1}),
        (jaxnsa.precompute_draft_extend_metadata, extend),
        (compute, {"num_backends": 1}),
        (jaxnsa.validate_inputs, {}),
    ):
        with pytest.raises(ValueError, match=f"{name}: got a deleted array, expected one not don"):
            function(**given, **options)


def test_calls_with_tracers_among_their_arrays_are_like_no_other():
    calls = CheckedCalls(jaxnsa.precompute_decode_metadata)
    lengths, indices, pool = on_device((SEQ_LENS, INDICES, POOL))

    @jax.jit
    def remember(indices):
        calls.remember((lengths, indices, pool), None, {}, None, False)
        return indices

    remember(indices)
    assert not calls._known
    calls.remember((lengths, indices, pool), None, {}, None, False)
    assert len(calls._known) == 1


def test_destinations_of_a_class_of_their_own():
    class Mine(jaxnsa.NSAMetadata):
        pass

    arguments = on_device((SEQ_LENS, INDICES, POOL))
    for _ in range(2):
        fresh = jaxnsa.precompute_decode_metadata(*arguments)
        filled = jaxnsa.precompute_decode_metadata(*arguments, out=Mine(**vars(fresh)))
        assert type(filled) is jaxnsa.NSAMetadata
        assert filled.cache_seqlens.tolist() == np.maximum(SEQ_LENS, 0).tolist()


def test_nobody_asks_for_the_platform_of_a_deleted_array():
    """JAX ends the process then, but not always."""
    asked = []
    gone = types.SimpleNamespace(
        aval=jnp.zeros(3).aval, is_deleted=lambda: True, platform=lambda: asked.append("cpu")
    )
    calls = CheckedCalls(jaxnsa.precompute_decode_metadata)
    assert calls.compute_as_before((gone, gone, gone), None, {}) is None
    assert not asked


def test_what_fails_after_its_checks_says_why(monkeypatch):
    """Not that its destinations are gone, which it was given."""
    arguments = on_device((SEQ_LENS, INDICES, POOL))
    metadata = jaxnsa.precompute_decode_metadata(*arguments)
    metadata = jaxnsa.precompute_decode_metadata(*arguments, out=metadata)
    compute = Computation.__call__

    def fail(*args):
        compute(*args)
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is lost")

    monkeypatch.setattr(Computation, "__call__", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is lost"):
        jaxnsa.precompute_decode_metadata(*arguments, out=metadata)


def test_other_inputs_must_be_alive():
    gone = deleted(SEQ_LENS)
    fill = functools.partial(jaxnsa.fill_draft_extend_metadata, nsa_index_topk=1)
    extend = {"extend_seq_lens": gone, "max_total_tokens": 1}
    given = (SEQ_LENS, INDICES, POOL)
    for name, call in {
        "x": lambda: jaxnsa.prefix_sum(gone),
        "extend_seq_lens": lambda: fill(gone, SEQ_LENS),
        "seq_lens": lambda: fill(SEQ_LENS, gone),
        "src.cu_seqlens_k": lambda: jaxnsa.fused_metadata_copy(
            dataclasses.replace(FRESH, cu_seqlens_k=gone), num_backends=1
        ),
        r"out\[0\].page_indices": lambda: jaxnsa.fused_metadata_copy(
            FRESH, out=(out(page_indices=deleted(FRESH.page_indices)),)
        ),
        "extend_seq_lens ": lambda: compute(
            *given, num_backends=1, forward_mode=ForwardMode.DRAFT_EXTEND, **extend
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: got a deleted array"):
            call()


def test_out_arrays_must_be_alive_and_distinct():
    with pytest.raises(ValueError, match=r"out\.cache_seqlens: got a deleted array"):
        jaxnsa.precompute_decode_metadata(
            SEQ_LENS, INDICES, POOL, out=out(cache_seqlens=deleted(SEQ_LENS))
        )
    twice = out()
    with pytest.raises(ValueError, match=r"out\[1\]\.cache_seqlens: got the array of out\[0\]\.ca"):
        compute(SEQ_LENS, INDICES, POOL, num_backends=2, out=(twice, twice))
    same = out()
    same = dataclasses.replace(same, nsa_cache_seqlens=same.seqlens_expanded)
    with pytest.raises(
        ValueError, match="nsa_cache_seqlens: got the array of out.seqlens_expanded"
    ):
        jaxnsa.precompute_decode_metadata(SEQ_LENS, INDICES, POOL, out=same)


def test_out_arrays_must_not_be_inputs():
    lengths = jnp.asarray(SEQ_LENS)
    with pytest.raises(ValueError, match="out.cache_seqlens: got the array of seq_lens, expected"):
        jaxnsa.precompute_decode_metadata(lengths, INDICES, POOL, out=out(cache_seqlens=lengths))
    src = out()
    with pytest.raises(ValueError, match=r"out\[0\].cache_seqlens: got the array of src.cache_seq"):
        jaxnsa.fused_metadata_copy(src, out=(src,))


def test_refused_destinations_keep_their_values():
    destination = out()
    with pytest.raises(ValueError, match="max_len"):
        jaxnsa.precompute_decode_metadata(SEQ_LENS, INDICES, POOL, max_len=0, out=destination)
    np.testing.assert_array_equal(destination.page_indices, FRESH.page_indices)


def test_fused_metadata_copy_refuses():
    with pytest.raises(TypeError, match="src: got 3, expected an NSAMetadata"):
        jaxnsa.fused_metadata_copy(3, num_backends=1)
    with pytest.raises(ValueError, match="num_backends: got None"):
        jaxnsa.fused_metadata_copy(FRESH)
    with pytest.raises(ValueError, match="out: got 1 of them, expected a tuple of 2"):
        jaxnsa.fused_metadata_copy(FRESH, num_backends=2, out=(out(),))
    for wrong, got in ((out(), "NSAMetadata"), ((), "tuple")):
        with pytest.raises(ValueError, match=f"out: got {got}, expected a tuple of at least one"):
            jaxnsa.fused_metadata_copy(FRESH, out=wrong)
    for wrong, error, message in (
        (np.zeros(4), TypeError, "got dtype float64, expected int32"),
        (np.int32(4), ValueError, r"got shape \(\), expected 1 dimension"),
        (None, TypeError, "got NoneType, expected an array"),
    ):
        with pytest.raises(error, match=f"src.cache_seqlens: {message}"):
            src = dataclasses.replace(FRESH, cache_seqlens=wrong)
            jaxnsa.fused_metadata_copy(src, num_backends=1)
    with pytest.raises(ValueError, match=r"num_backends: got 1000000, expected an int in \[1, 10"):
        jaxnsa.fused_metadata_copy(FRESH, num_backends=10**6)
    with pytest.raises(ValueError, match=r"out\[0\].real_page_table: got NoneType"):
        jaxnsa.fused_metadata_copy(FRESH, out=(out(real_page_table=None),))


def test_fill_draft_extend_metadata_refuses():
    fill = jaxnsa.fill_draft_extend_metadata
    with pytest.raises(ValueError, match=r"extend_seq_lens: got shape \(3,\), expected \(4,\)"):
        fill(SEQ_LENS[:3], SEQ_LENS, nsa_index_topk=2)
    with pytest.raises(ValueError, match="max_total_tokens: got None, expected an int as extend"):
        jax.jit(lambda q: fill(q, SEQ_LENS, nsa_index_topk=2))(SEQ_LENS)
    with pytest.raises(TypeError, match="nsa_index_topk: got None"):
        fill(SEQ_LENS, SEQ_LENS, nsa_index_topk=None)
    with pytest.raises(
        ValueError, match="extend_seq_lens: got 8589934588 rows in all, expected at"
    ):
        fill(np.full(4, 2**62), SEQ_LENS, nsa_index_topk=2)


def test_an_empty_list_is_of_integers():
    assert jaxnsa.prefix_sum([]).tolist() == [0]
    (metadata,) = compute([], (), POOL, num_backends=1)
    assert metadata.cu_seqlens_k.tolist() == [0]


def test_prefix_sum_refuses():
    with pytest.raises(TypeError, match="x: got dtype float32"):
        jaxnsa.prefix_sum(jnp.ones(3))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 2\), expected 1 dim"):
        jaxnsa.prefix_sum(jnp.ones((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="x: got 1073741824 elements, expected at most 1073741823"):
        jax.eval_shape(jaxnsa.prefix_sum, jax.ShapeDtypeStruct((2**30,), jnp.int8))


def test_lengths_are_counted_in_32_bits():
    lengths = jax.ShapeDtypeStruct((2**30,), jnp.int32)
    with pytest.raises(ValueError, match="seq_lens: got 1073741824 elements, expected at most"):
        jax.eval_shape(lambda s: jaxnsa.precompute_decode_metadata(s, s, POOL), lengths)


def test_numbers_of_a_top_k_plan_are_counted_in_32_bits():
    def plan(lengths):
        schedules = jaxnsa.Schedules(topk_plan=jaxnsa.TopkPlan(((1, 1),)))
        return jaxnsa.precompute_decode_metadata(
            lengths, lengths, POOL, wide_table=False, schedules=schedules, implementation="xla"
        ).topk_plan

    most = jax.eval_shape(plan, jax.ShapeDtypeStruct((2**30 - 1,), jnp.int32))
    assert most.size - 1 == 2**31 - 1
    with pytest.raises(ValueError, match="seq_lens: got 1073741824 elements, expected at most"):
        jax.eval_shape(plan, jax.ShapeDtypeStruct((2**30,), jnp.int32))


def test_metadata_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FRESH.cache_seqlens = None


def test_metadata_is_equal_to_itself_only():
    assert FRESH == FRESH
    assert out() != FRESH
    assert len({FRESH, FRESH, out()}) == 2


def test_calls_like_one_before_are_checked_for_what_can_differ():
    """Each of these follows a call that was right, and differs from it in one thing."""
    arguments = on_device(inputs(3))
    options = {"num_backends": 2, "nsa_index_topk": 1, "real_page_size": 64}

    def fill(out, arguments=arguments, **changed):
        return jaxnsa.fused_metadata_precompute_and_broadcast(
            *arguments, out=out, **(options | changed)
        )

    out = fill(fill(fill(fill(None), backend_offsets=(0, 1))))
    shorter = jax.tree.map(lambda a: a[:-1], out[1])
    paged = dataclasses.replace(out[1], page_indices=None)
    more = dataclasses.replace(out[1], token_to_request=jnp.zeros(3, jnp.int32))
    host = dataclasses.replace(out[1], cache_seqlens=np.zeros(3, np.int32))
    deleted = dataclasses.replace(out[1], seqlens_expanded=jnp.zeros(3, jnp.int32))
    deleted.seqlens_expanded.delete()
    for wrong, message in (
        ((out[0], out[0]), r"out\[1\].cache_seqlens: got the array of out\[0\].cache_seqlens"),
        ((out[0], shorter), r"out\[1\].cache_seqlens: got shape \(2,\), expected \(3,\)"),
        ((out[0], paged), r"out\[1\].page_indices: got NoneType, expected int32"),
        ((out[0], more), r"out\[1\].token_to_request: got int32 .*, expected None"),
        ((out[0], deleted), r"out\[1\].seqlens_expanded: got a deleted array"),
        (out[:1], "out: got 1 of them, expected a tuple of 2"),
        (list(out[:1]) * 3, "out: got 3 of them"),
        ({*out}, "out: got set, expected a tuple of 2"),
        (out[0], "out: got NSAMetadata, expected a tuple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(wrong)
    for wrong, message in (
        ((out[0], host), r"out\[1\].cache_seqlens: got int32 ndarray .*, expected a jax.Array"),
        ((out[0], vars(out[1])), r"out\[1\]: got dict, expected an NSAMetadata"),
    ):
        with pytest.raises(TypeError, match=message):
            fill(wrong)
    for name, value in (("nsa_index_topk", True), ("real_page_size", 64.0)):
        with pytest.raises(TypeError, match=f"{name}: got {value}, expected an int"):
            fill(out, **{name: value})
    Pair = collections.namedtuple("Pair", "first second")
    out = fill(out, backend_offsets=Pair(0, 1))
    for value, kind in itertools.product((True, 1.0), (lambda *pair: pair, Pair)):
        with pytest.raises(TypeError, match=rf"backend_offsets\[1\]: got {value}, expected an int"):
            fill(out, backend_offsets=kind(0, value))
    with pytest.raises(ValueError, match="the array of seq_lens, expected its own"):
        fill(out, arguments=(out[0].cache_seqlens, *arguments[1:]))
    with (
        jaxnsa.override(validate=True),
        pytest.raises(ValueError, match="req_pool_indices: got .* at row"),
    ):
        fill(out, arguments=(arguments[0], arguments[1] + 99, arguments[2]))
    with pytest.raises(TypeError, match="seq_lens"):
        fill(out, seq_lens=None)
    # Nothing of it was written or donated.
    again = fill(jax.tree.map(jnp.copy, out))
    jax.tree.map(np.testing.assert_array_equal, fill(out), again)


@pytest.mark.parametrize(
    "names",
    (
        ("seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token"),
        ("req_to_token", "req_pool_indices", "extend_seq_lens", "seq_lens"),
    ),
)
@pytest.mark.parametrize("positional", (0, 1, 4))
def test_calls_alike_read_their_own_arrays(names, positional):
    """However they are given: the first is checked, and the others run what it did."""
    for seed in range(3):
        seq_lens, indices, pool = inputs(4, seed=seed)
        extend = np.random.default_rng(seed).integers(0, 3, 4, np.int32)
        given = dict(
            zip(
                ("seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token"),
                (seq_lens, extend, indices, pool),
                strict=True,
            )
        )
        arrays = list(given)[:positional]
        named = {name: given[name] for name in names if name not in arrays}
        options = {"max_total_tokens": 9, "real_page_size": 3}
        expected = reference.precompute_draft_extend_metadata(**given, **options)
        for _ in range(2):
            actual = jaxnsa.precompute_draft_extend_metadata(
                *(on_device(given[name]) for name in arrays), **on_device(named), **options
            )
            assert_same(actual, expected)
