"""The FFI library: variants, checks in the handlers, export, and how it is found and probed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ON_GPU
from helpers import TABLE_MODES, assert_same, check_broadcast, inputs, mode_options
from jax import export

import jaxnsa
from jaxnsa import ForwardMode, reference
from jaxnsa.config import Settings
from jaxnsa.implementations import IMPLEMENTATIONS, ffi, native_library
from jaxnsa.implementations.choice import choose
from jaxnsa.implementations.measurements import Call
from jaxnsa.metadata import FIELDS
from jaxnsa.spec import Rows, Spec

pytestmark = pytest.mark.skipif(
    native_library.unavailable("cpu") is not None,
    reason=f"runs where a C++ compiler built the library: {native_library.unavailable('cpu')}",
)

BS = (0, 1, 6, 7, 15, 16, 17, 100, 257, 1000)


def eager(function, *arguments, **options):
    return jax.jit(functools.partial(function, **options))(*arguments)


@pytest.mark.parametrize("variant", ffi.VARIANTS["prefix_sum"])
@pytest.mark.parametrize("n", (*BS, 1023, 1024, 1025, 5000))
def test_prefix_sum_variants(n, variant):
    x = np.random.default_rng(n).integers(-(2**31), 2**31, n).astype(np.int32)
    assert_same(eager(ffi.prefix_sum, x, variant=variant), reference.prefix_sum(x))


@pytest.mark.parametrize("variant", ffi.VARIANTS["fill_draft_extend_metadata"])
@pytest.mark.parametrize("bs", BS)
def test_draft_extend_variants(bs, variant):
    seq_lens, _, _ = inputs(bs, seed=bs)
    extend = mode_options(ForwardMode.DRAFT_EXTEND, bs, seed=bs)["extend_seq_lens"]
    for capacity in (0, bs, 3 * bs + 5):
        options = {"nsa_index_topk": 64, "max_total_tokens": capacity}
        actual = eager(ffi.fill_draft_extend_metadata, extend, seq_lens, variant=variant, **options)
        assert_same(actual, reference.fill_draft_extend_metadata(extend, seq_lens, **options))


@pytest.mark.parametrize("name", [pytest.param("ffi", marks=[pytest.mark.gpu] if ON_GPU else [])])
@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("num_backends", (8, 9, 64, 65))
def test_numbers_of_backends(num_backends, mode, name):
    """One CUDA kernel takes up to 8, another up to 64; more take another launch."""
    check_broadcast(
        inputs(7, pool_cols=1000),
        implementation=name,
        in_place=True,
        num_backends=num_backends,
        forward_mode=mode,
        real_page_size=16,
        **mode_options(mode, 7),
    )


@pytest.mark.parametrize("name", [pytest.param("ffi", marks=[pytest.mark.gpu] if ON_GPU else [])])
def test_more_requests_than_rows_of_a_grid(name):
    check_broadcast(
        inputs(32_800, pool_cols=12),
        implementation=name,
        num_backends=2,
        max_len=9,
        real_page_size=3,
        nsa_index_topk=4,
    )


@pytest.mark.parametrize("name", [pytest.param("ffi", marks=[pytest.mark.gpu] if ON_GPU else [])])
@pytest.mark.parametrize("tail", ("copy", "keep"))
@pytest.mark.parametrize("bs, max_len", ((600, 1201), (6000, 1301)))
def test_pages_in_turns(bs, max_len, tail, name):
    """A CUDA thread has several pages of a request, and more where there are many requests."""
    check_broadcast(
        inputs(bs, pool_cols=max_len, pool_rows=7),
        implementation=name,
        in_place=True,
        num_backends=2,
        wide_table=False,
        real_page_size=2,
        tail=tail,
    )


def test_unknown_variant():
    with pytest.raises(
        Exception, match="prefix_sum: variant: got fast, expected one of block_scan"
    ):
        eager(ffi.prefix_sum, np.arange(3, dtype=np.int32), variant="fast")


def shape(*dims, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(dims, dtype)


def raw_call(target, shapes, *operands, **attributes):
    """A call that no check of the Python side has seen."""
    return jax.jit(lambda *a: jax.ffi.ffi_call(target, shapes)(*a, **attributes))(*operands)


X = np.arange(3, dtype=np.int32)
SPEC = Spec(
    rows=Rows.of(ForwardMode.DECODE, 3),
    max_len=4,
    nsa_index_topk=2,
    real_page_size=2,
    wide_table=True,
    tail="copy",
)
NAMES = list(SPEC.shapes())
TOKENS = np.array([{"page_indices": 1, "real_page_table": 2}.get(name, 0) for name in NAMES])
NONE = np.zeros(0, np.int64)
FUSED = {
    "fields": np.arange(len(NAMES)),
    "tokens_per_column": TOKENS,
    "slots_per_page": TOKENS,
    "rows": np.int64(3),
    "rows_per_request": np.int64(1),
    "added_tokens": np.int64(0),
    "prefill": False,
    "max_total_keys": np.int64(0),
    "max_len": np.int64(4),
    "nsa_index_topk": np.int64(2),
    "index_kpool": np.int64(1),
    "paged_mqa": NONE,
    "topk_plan": NONE,
    "flash_mla": NONE,
    "tail": "copy",
    "num_backends": np.int64(1),
    "stacked": False,
    "backend_offsets": np.zeros(1, np.int64),
    "written": False,
    "max_new_tokens": np.int64(4),
}
FUSED_OPERANDS = (X, X, np.zeros((2, 5), np.int32))
FUSED_RESULTS = list(SPEC.shapes().values())


def with_result(name, result):
    return replaced(FUSED_RESULTS, NAMES.index(name), result)


def replaced(sequence, k, value):
    return [*sequence[:k], value, *sequence[k + 1 :]]


@pytest.mark.parametrize(
    "operands, results, attributes, message",
    [
        (
            replaced(FUSED_OPERANDS, 0, X.astype(np.float32)),
            None,
            {},
            "seq_lens: got F32, expected int32 or",
        ),
        (replaced(FUSED_OPERANDS, 0, X[None]), None, {}, r"seq_lens: got shape \[1, 3\], expected"),
        (replaced(FUSED_OPERANDS, 1, X[:2]), None, {}, r"req_pool_indices: got shape \[2\], expec"),
        (
            replaced(FUSED_OPERANDS, 2, X),
            None,
            {},
            r"req_to_token: got shape \[3\], expected \[\*, ",
        ),
        (
            replaced(FUSED_OPERANDS, 2, np.zeros((0, 5), np.int32)),
            None,
            {},
            "req_to_token: got no rows, expected at least one",
        ),
        (FUSED_OPERANDS[:2], None, {}, "operands: got 2, expected 3 and nothing or"),
        (
            None,
            FUSED_RESULTS[:-1],
            {},
            f"results: got {len(NAMES) - 1} arrays, expected {len(NAMES)} ",
        ),
        (None, with_result("page_indices", shape(3, 3)), {}, r"page_indices: got shape \[3, 3\]"),
        (None, with_result("cu_seqlens_k", shape(3)), {}, r"cu_seqlens_k: got shape \[3\], exp"),
        (
            None,
            with_result("seqlens_expanded", shape(2)),
            {},
            r"seqlens_expanded: got shape \[2\], exp",
        ),
        (
            None,
            with_result("seqlens_expanded", shape()),
            {},
            r"seqlens_expanded: got shape \[\], expec",
        ),
        (
            None,
            with_result("cache_seqlens", shape(3, dtype=jnp.float32)),
            {},
            "cache_seqlens: got F32, expected int32",
        ),
        (
            None,
            None,
            {"max_len": np.int64(6)},
            "req_to_token: got 5 columns, expected at least max",
        ),
        (None, None, {"max_len": np.int64(-1)}, "max_len: got -1, expected an int32 of at least 1"),
        (
            None,
            None,
            {"tokens_per_column": TOKENS % 2},
            "real_page_table: tokens_per_column: got 0, expected an int32 of at least 1",
        ),
        (
            None,
            None,
            {"tokens_per_column": TOKENS[1:]},
            f"tokens_per_column, slots_per_page: got {len(TOKENS) - 1} and {len(TOKENS)} numbers",
        ),
        (None, None, {"index_kpool": np.int64(0)}, "index_kpool: got 0, expected an int32 of at"),
        (None, None, {"paged_mqa": np.arange(2)}, "paged_mqa: got 2 numbers, expected 3"),
        (None, None, {"paged_mqa": np.arange(3)}, "paged_mqa: got 0, expected 1 to 1024"),
        (None, None, {"topk_plan": np.arange(4)}, "topk_plan: got 4 numbers, expected 5"),
        (None, None, {"flash_mla": np.array([66, 3, 5, 0])}, "flash_mla: got 3, expected 0"),
        (None, None, {"paged_mqa": np.array([4, 0, 0])}, "paged_mqa: got numbers without arrays"),
        (None, None, {"topk_plan": np.array([9, 9, 9])}, "topk_plan: got numbers without arrays"),
        (
            None,
            None,
            {"flash_mla": np.array([66, 0, 5, 0])},
            "flash_mla: got numbers without arrays",
        ),
        (
            None,
            None,
            {"fields": np.arange(len(NAMES)) + len(FIELDS)},
            f"fields: got index {len(FIELDS)}, expected those of",
        ),
        (
            None,
            None,
            {"fields": np.arange(len(NAMES))[::-1]},
            "fields: got index .*, expected those",
        ),
        (None, None, {"rows": np.int64(4)}, "rows: got 4, expected 1 for each of 3 requests"),
        (None, None, {"rows": np.int64(2**31)}, "rows: got 2147483648, expected an int32 of at"),
        (
            None,
            None,
            {"num_backends": np.int64(0)},
            "num_backends: got 0, expected an int32 of at least 1",
        ),
        (
            None,
            None,
            {"num_backends": np.int64(2), "backend_offsets": np.zeros(2, np.int64)},
            f"results: got {len(NAMES)} arrays, expected {len(NAMES)} of each of 2 destinations",
        ),
        (None, None, {"tail": "drop"}, "tail: got drop, expected one of copy, zero, keep"),
    ],
)
def test_handlers_name_what_is_wrong(operands, results, attributes, message):
    call = functools.partial(raw_call, "jaxnsa_fused_metadata")
    raw = call(FUSED_RESULTS, *FUSED_OPERANDS, **FUSED)
    assert raw[0].tolist() == [0, 1, 2]
    with pytest.raises(Exception, match=f"fused_metadata: {message}"):
        jax.block_until_ready(
            call(results or FUSED_RESULTS, *(operands or FUSED_OPERANDS), **(FUSED | attributes))
        )


@pytest.mark.parametrize(
    "target, results, operands, attributes, message",
    [
        (
            "jaxnsa_prefix_sum",
            shape(3),
            (X,),
            {"variant": "block_scan"},
            r"result: got shape \[3\]",
        ),
        (
            "jaxnsa_prefix_sum",
            shape(4),
            (X.astype(np.uint32),),
            {"variant": "block_scan"},
            "x: got U32, expected int32",
        ),
        (
            "jaxnsa_fill_draft_extend_metadata",
            (shape(4), shape(5), shape(), shape(0)),
            (X, X),
            {"nsa_index_topk": np.int64(2), "variant": "optimized"},
            r"nsa_cache_seqlens: got shape \[5\], expected \[4\]",
        ),
        (
            "jaxnsa_fill_draft_extend_metadata",
            (shape(4), shape(4), shape(), shape(0)),
            (X, X),
            {"nsa_index_topk": np.int64(2), "variant": "basic"},
            r"offsets: got shape \[0\], expected \[4\]",
        ),
        (
            "jaxnsa_copy",
            (shape(4),),
            (X,),
            {"num_backends": np.int64(1), "tokens_per_column": np.array([0])},
            r"result 0: got shape \[4\], expected \[3\]",
        ),
        (
            "jaxnsa_copy",
            (shape(2, 3),),
            (np.zeros((2, 3), np.int32), X),
            {"num_backends": np.int64(1), "tokens_per_column": np.array([1])},
            r"kv_lens: got shape \[3\], expected \[2\]",
        ),
    ],
)
def test_other_handlers_name_what_is_wrong(target, results, operands, attributes, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(raw_call(target, results, *operands, **attributes))


def test_handlers_take_int64_lengths():
    with jax.enable_x64(True):
        wide = jnp.array([2**40, -5, 1])
        raw = raw_call(
            "jaxnsa_fused_metadata",
            FUSED_RESULTS,
            wide,
            wide,
            FUSED_OPERANDS[2],
            **FUSED,
        )
    assert raw[0].tolist() == [2**31 - 1, 0, 1]


def test_exported_function_runs():
    arguments = inputs(5)
    function = jax.jit(functools.partial(jaxnsa.precompute_decode_metadata, implementation="ffi"))
    exported = export.export(function, disabled_checks=ffi.EXPORT_CHECKS)(*arguments)
    restored = export.deserialize(exported.serialize())
    expected = reference.precompute_decode_metadata(*arguments)
    for actual, wanted in zip(
        jax.tree.leaves(restored.call(*arguments)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)
    with pytest.raises(ValueError, match="jaxnsa_fused_metadata"):
        export.export(function)(*arguments)


@pytest.fixture
def fresh_probe():
    def forget():
        jax.clear_caches()
        native_library._find.cache_clear()
        ffi._probe.cache_clear()

    forget()
    yield
    forget()


def test_a_library_that_was_not_built_says_what_builds_it(fresh_probe, monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "library_path", lambda platform: tmp_path / "jaxnsa_cpu.so")
    reason = IMPLEMENTATIONS["ffi"].unavailable("cpu")
    assert "jaxnsa_cpu.so was not built when jaxnsa was installed, which takes a C++17" in reason
    assert "pip install --force-reinstall" in reason
    with pytest.raises(jaxnsa.ImplementationUnavailableError, match="was not built"):
        choose("ffi", Settings(), "cpu", Call())


def test_a_library_that_does_not_load_says_so(fresh_probe, monkeypatch, tmp_path):
    damaged = tmp_path / "jaxnsa_cpu.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(native_library, "library_path", lambda platform: damaged)
    assert "could not be loaded" in IMPLEMENTATIONS["ffi"].unavailable("cpu")


def _with_another_field(fields):
    return fields | {"another": dataclasses.replace(fields["seqlens_expanded"], name="another")}


def _with_another_extent(fields):
    extent = fields["nsa_cu_seqlens_k"].extent
    return fields | {
        "seqlens_expanded": dataclasses.replace(fields["seqlens_expanded"], extent=extent)
    }


@pytest.mark.parametrize(
    "change, named",
    (
        (_with_another_field, "['another']"),
        (_with_another_extent, "['seqlens_expanded', 'seqlens_expanded']"),
        (lambda fields: dict(reversed(fields.items())), "their order"),
    ),
)
def test_a_library_for_other_fields_is_refused(change, named, fresh_probe, monkeypatch):
    """What is left of an older build, where fields were added or moved since."""
    monkeypatch.setattr(native_library, "FIELDS", change(dict(FIELDS)))
    reason = IMPLEMENTATIONS["ffi"].unavailable("cpu")
    assert f"was built for other fields of NSAMetadata than this jaxnsa has ({named})" in reason
    assert "pip install --force-reinstall" in reason
    with pytest.raises(RuntimeError, match="was built for other fields"):
        native_library.library("cpu")


def test_a_refused_library_names_both_versions(fresh_probe, monkeypatch):
    """What a runtime that refuses the handler does: the first call fails."""
    monkeypatch.setattr(ffi, "_PREFIX_SUM", "jaxnsa_of_another_api")
    reason = IMPLEMENTATIONS["ffi"].unavailable("cpu")
    assert "was built with XLA FFI API 0." in reason
    assert f"this jaxlib has {ffi._runtime_api()}" in reason
    assert "pip install --force-reinstall" in reason


def test_probe_runs_while_a_caller_traces(fresh_probe):
    step = jax.jit(lambda x: jaxnsa.prefix_sum(x, implementation=("ffi", "xla")))
    assert step(X).tolist() == [0, 0, 1, 3]


def test_library_tells_the_api_it_was_built_with():
    major, minor = native_library.library("cpu").xla_ffi_api
    assert (major, minor) == (0, 3) or minor > 3
    built, runtime = (version.split(".") for version in (ffi._built_api("cpu"), ffi._runtime_api()))
    assert [*map(int, built)] <= [*map(int, runtime)]


def test_the_library_has_a_handler_for_each_target():
    assert set(native_library.library("cpu").xla_handlers()) == set(ffi._TARGETS)
