"""Checks of values: on the host, through the settings, and through checkify inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxnsa
from jaxnsa import ForwardMode, value_checks

POOL = np.zeros((4, 100), np.int32)
LEGAL = {
    "seq_lens": [5, 0, 100],
    "req_pool_indices": [0, 3, 3],
}
EXTEND = {
    "forward_mode": ForwardMode.DRAFT_EXTEND,
    "extend_seq_lens": [2, 0, 1],
    "max_total_tokens": 3,
}
VERIFY = {"forward_mode": ForwardMode.TARGET_VERIFY, "num_draft_tokens": 2}

ILLEGAL = [
    ({"seq_lens": [5, -1, -2]}, "seq_lens: got -1", "1, 2", "lengths >= 0"),
    ({"seq_lens": [5, 101, 100]}, "seq_lens: got 101", "1", "at most max_len = 100"),
    (
        {"seq_lens": [5, 5 * 10**9, 2**63 - 1]},
        "seq_lens: got 5000000000",
        "1, 2",
        "at most max_len",
    ),
    ({"max_len": 99}, "seq_lens: got 100", "2", "at most max_len = 99"),
    ({"req_pool_indices": [4, 0, -1]}, "req_pool_indices: got 4", "0, 2", r"rows in \[0, 4\)"),
    (EXTEND | {"extend_seq_lens": [-1, 0, 0]}, "extend_seq_lens: got -1", "0", "lengths >= 0"),
    (EXTEND | {"extend_seq_lens": [1, 1, 0]}, "extend_seq_lens: got 1", "1", "at most seq_lens"),
    (EXTEND | {"max_total_tokens": 2}, "extend_seq_lens: got 3", "2", "max_total_tokens = 2"),
]


def arguments(changes):
    values = LEGAL | {"req_to_token": POOL} | changes
    for name in ("seq_lens", "req_pool_indices", "extend_seq_lens"):
        if name in values:
            wide = np.array(values[name], np.int64)
            values[name] = wide if wide.max() > 2**31 else wide.astype(np.int32)
    return values


@pytest.mark.parametrize("options", ({}, EXTEND, VERIFY))
def test_legal_values_pass(options):
    jaxnsa.validate_inputs(**arguments(options))
    error, _ = checkify.checkify(
        jax.jit(lambda seq_lens: jaxnsa.validate_inputs(**(arguments(options) | seq_lens)))
    )({"seq_lens": arguments({})["seq_lens"]})
    error.throw()


@pytest.mark.parametrize("changes, got, rows, expected", ILLEGAL)
def test_illegal_values_name_the_rows(changes, got, rows, expected):
    with pytest.raises(ValueError, match=rf"{got}.* at row\(s\) {rows}, expected .*{expected}"):
        jaxnsa.validate_inputs(**arguments(changes))


@pytest.mark.parametrize("changes, got, rows, expected", ILLEGAL)
def test_illegal_values_inside_jit(changes, got, rows, expected):
    values = arguments(changes)
    if values["seq_lens"].dtype == np.int64:
        values["seq_lens"] = values["seq_lens"].clip(max=2**31 - 1).astype(np.int32)
        got = got.replace("5000000000", "2147483647")
    traced = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in values.items() if k not in traced}
    checked = checkify.checkify(jax.jit(lambda traced: jaxnsa.validate_inputs(**traced, **static)))
    error, _ = checked(traced)
    row = rows.split(",")[0]
    with pytest.raises(
        checkify.JaxRuntimeError, match=f"{got} at row {row}, expected .*{expected}"
    ):
        error.throw()


def test_only_the_first_offending_rows_are_shown():
    values = arguments({"seq_lens": [-1] * 9, "req_pool_indices": [0] * 9})
    with pytest.raises(ValueError, match="at row.s. 0, 1, 2, 3, 4 and 4 more, expected"):
        jaxnsa.validate_inputs(**values)


@pytest.mark.parametrize("topk, sums", ((2048, "cache_seqlens"), (2**31 - 1, "nsa_cache_seqlens")))
def test_sums_past_int32(topk, sums):
    pool = jnp.zeros((1, 2**20), jnp.int32)
    if sums == "cache_seqlens":
        bs, options = 2049, {}
    else:
        bs, options = 300, {"forward_mode": ForwardMode.TARGET_VERIFY, "num_draft_tokens": 8}
    lengths = np.full(bs, 2**20 - 8, np.int32)
    values = {"req_pool_indices": np.zeros(bs, np.int32), "req_to_token": pool} | options
    message = f"a prefix sum of {sums} inside int32"
    with pytest.raises(ValueError, match=message):
        jaxnsa.validate_inputs(lengths, nsa_index_topk=topk, **values)
    check = jax.jit(lambda x: jaxnsa.validate_inputs(x, nsa_index_topk=topk, **values))
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        checkify.checkify(check)(lengths)[0].throw()


def test_sums_of_pooled_selections_past_int32():
    """With top-k 1 a row that sees no full pool of keys has all of its tokens selected."""
    length = 2**20 - 5
    values = {
        "req_pool_indices": np.zeros(600, np.int32),
        "req_to_token": jnp.zeros((1, 2**20), jnp.int32),
        "forward_mode": ForwardMode.TARGET_VERIFY,
        "num_draft_tokens": 4,
        "nsa_index_topk": 1,
    }
    lengths = np.full(600, length, np.int32)
    jaxnsa.validate_inputs(lengths, **values)
    jaxnsa.validate_inputs(lengths, **values, index_kpool=2**10)
    message = "a prefix sum of nsa_cache_seqlens inside int32"
    with pytest.raises(ValueError, match=message):
        jaxnsa.validate_inputs(lengths, **values, index_kpool=2**20)
    check = jax.jit(lambda x: jaxnsa.validate_inputs(x, **values, index_kpool=2**20))
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        checkify.checkify(check)(lengths)[0].throw()


def test_lengths_of_every_backend():
    lengths, columns = np.array([60, 3], np.int32), np.zeros((1, 64), np.int32)
    given = (lengths, np.zeros(2, np.int32), columns)
    jaxnsa.validate_inputs(*given, backend_offsets=(0, -70, 4))
    message = r"seq_lens: got 60 at row\(s\) 0, expected at most max_len - 5 = 59"
    with pytest.raises(ValueError, match=message):
        jaxnsa.validate_inputs(*given, backend_offsets=(0, 5))
    with jaxnsa.override(validate=True), pytest.raises(ValueError, match=message):
        jaxnsa.fused_metadata_precompute_and_broadcast(
            *given, num_backends=2, backend_offsets=(5, 0)
        )
    many = np.full(2048, 2**20 - 5, np.int32), np.zeros(2048, np.int32)
    pool = jnp.zeros((1, 2**20), jnp.int32)
    jaxnsa.validate_inputs(*many, pool, backend_offsets=(-2, 4), nsa_index_topk=1)
    with pytest.raises(ValueError, match="inside int32 with 5 tokens more"):
        jaxnsa.validate_inputs(*many, pool, backend_offsets=(-2, 5), nsa_index_topk=1)
    for wrong, got in ((5, "5"), ((), "0 of them"), ("ab", "'ab'")):
        with pytest.raises(ValueError, match=f"backend_offsets: got {got}, expected a tuple of i"):
            jaxnsa.validate_inputs(*given, backend_offsets=wrong)


def test_every_function_validates_on_request(monkeypatch):
    values = arguments({"seq_lens": [5, -1, 3]})
    jaxnsa.precompute_decode_metadata(**values)
    with jaxnsa.override(validate=True):
        with pytest.raises(ValueError, match="seq_lens: got -1"):
            jaxnsa.precompute_decode_metadata(**values)
        with pytest.raises(ValueError, match="seq_lens: got -1"):
            jaxnsa.precompute_target_verify_metadata(**values, num_draft_tokens=2)
        with pytest.raises(ValueError, match="seq_lens: got -1"):
            jaxnsa.fused_metadata_precompute_and_broadcast(**values, num_backends=2)
        with pytest.raises(ValueError, match="extend_seq_lens: got 6 at row.s. 1"):
            jaxnsa.fill_draft_extend_metadata(
                np.array([1, 6]), np.array([5, 5]), nsa_index_topk=2, max_total_tokens=9
            )
    monkeypatch.setenv("JAXNSA_VALIDATE", "1")
    with pytest.raises(ValueError, match="seq_lens: got -1"):
        jaxnsa.precompute_decode_metadata(**values)
    with jaxnsa.override(validate=False):
        jaxnsa.precompute_decode_metadata(**values)


def test_validation_inside_jit_needs_checkify_and_says_so(caplog):
    value_checks._say_what_jit_needs.cache_clear()
    values = arguments({"seq_lens": [5, -1, 3]})
    lengths = values.pop("seq_lens")
    step = jax.jit(lambda x: jaxnsa.precompute_decode_metadata(x, **values).cache_seqlens)
    with jaxnsa.override(validate=True):
        assert step(lengths).tolist() == [5, 0, 3]
        assert "they are checked where the function is transformed by" in caplog.text
        error, _ = checkify.checkify(step)(lengths)
    with pytest.raises(checkify.JaxRuntimeError, match="seq_lens: got -1 at row 1"):
        error.throw()


def test_illegal_values_leave_destinations_alone():
    values = arguments({})
    out = jaxnsa.precompute_decode_metadata(**values)
    before = np.array(out.cache_seqlens)
    values["seq_lens"] = np.array([1, 2, -3], np.int32)
    with jaxnsa.override(validate=True), pytest.raises(ValueError, match="seq_lens"):
        jaxnsa.precompute_decode_metadata(**values, out=out)
    np.testing.assert_array_equal(out.cache_seqlens, before)
