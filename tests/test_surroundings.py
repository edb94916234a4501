"""What surrounds a call: how JAX is configured, and what the caller does to its arrays next."""

import contextlib
import re

import jax
import numpy as np
import pytest
from helpers import (
    assert_same,
    held_apart,
    inputs,
    mode_options,
    on_device,
    pointers,
    skip_where_it_is_not_lowered,
    skip_without_library,
)
from jax import export

import jaxnsa
from jaxnsa import ForwardMode, operations, reference
from jaxnsa.computation import Computation
from jaxnsa.implementations import ffi, triton

ARGUMENTS = inputs(3, pool_cols=70)
compute = jaxnsa.fused_metadata_precompute_and_broadcast
specify = reference.fused_metadata_precompute_and_broadcast


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


CONFIGURATIONS = {"strict": strict, "disable_jit": jax.disable_jit, "x64": jax.enable_x64}


@pytest.mark.large
@pytest.mark.parametrize(
    "configuration, mode, tail, stacked, strategy",
    [
        ("x64", ForwardMode.DECODE, "keep", True, "ultra_fast"),
        ("x64", ForwardMode.DRAFT_EXTEND, "keep", True, "fallback"),
        ("strict", ForwardMode.TARGET_VERIFY, "zero", False, "fast"),
        ("strict", ForwardMode.DRAFT_EXTEND, "keep", False, "ultra_fast"),
        ("disable_jit", ForwardMode.DRAFT_EXTEND, "keep", False, "fallback"),
    ],
)
def test_in_place_however_jax_is_configured(
    configuration, mode, tail, stacked, strategy, implementation
):
    options = {"num_backends": 2, "stacked": stacked, "forward_mode": mode, "real_page_size": 16}
    options |= mode_options(mode, 3)
    kept = held_apart(specify(*ARGUMENTS, **options))
    with CONFIGURATIONS[configuration]():
        out = on_device(kept)
        before = pointers(out)
        options["tail"] = tail
        result = compute(
            *ARGUMENTS, out=out, strategy=strategy, implementation=implementation, **options
        )
        assert all(array.is_deleted() for array in jax.tree.leaves(out))
        if not stacked:
            assert pointers(result) == before
        assert_same(result, specify(*ARGUMENTS, out=kept, **options))


@pytest.mark.large
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_other_functions_however_jax_is_configured(configuration, implementation):
    lengths = np.array([3, 0, 5], np.int32)
    expected = reference.fill_draft_extend_metadata(lengths, lengths, nsa_index_topk=4)
    src = reference.precompute_decode_metadata(*ARGUMENTS)
    with CONFIGURATIONS[configuration]():
        filled = jaxnsa.fill_draft_extend_metadata(
            lengths, lengths, nsa_index_topk=4, implementation=implementation
        )
        assert_same(filled, expected)
        sums = jaxnsa.prefix_sum(lengths, implementation=implementation)
        assert_same(sums, reference.prefix_sum(lengths))
        copies = jaxnsa.fused_metadata_copy(src, num_backends=2, implementation=implementation)
        assert_same(copies, (src, src))
        everywhere = pointers(copies)
        assert len(set(everywhere)) == len(everywhere)


@pytest.mark.large
def test_results_without_jit_share_no_memory(implementation):
    with jax.disable_jit():
        backends = compute(*ARGUMENTS, num_backends=3, implementation=implementation)
        everywhere = pointers(backends)
        assert len(set(everywhere)) == len(everywhere)


def test_the_probe_runs_without_jit():
    skip_without_library(jax.default_backend() == "gpu")
    ffi._probe.cache_clear()
    with jax.disable_jit():
        assert jaxnsa.get_kernel_info()["implementations"]["xla"]["available"]
        assert ffi._probe("cpu") is None


def test_what_a_computation_reads_late_is_not_the_callers(monkeypatch):
    """A computation may start after the call has returned: NumPy's vectors are copied."""
    received = []
    compute_metadata = Computation.__call__

    def watched(computation, *given):
        received.extend(given)
        return compute_metadata(computation, *given)

    monkeypatch.setattr(Computation, "__call__", watched)
    for name in ("copy", "fill_draft_extend_metadata", "prefix_sum"):
        run = getattr(operations, f"_run_{name}")
        monkeypatch.setattr(
            operations,
            f"_run_{name}",
            lambda *given, run=run, **options: received.extend(given) or run(*given, **options),
        )
    for dtype in (np.int32, np.int64):
        lengths, indices = np.array([3, 0, 5], dtype), np.array([0, 1, 2], dtype)
        pool = ARGUMENTS[2]
        src = jaxnsa.precompute_draft_extend_metadata(
            lengths, lengths, indices, pool, max_total_tokens=8
        )
        src = jax.tree.map(np.array, src)
        jaxnsa.fused_metadata_copy(src, num_backends=1)
        jaxnsa.fill_draft_extend_metadata(lengths, indices, nsa_index_topk=4)
        jaxnsa.prefix_sum(lengths)
        vectors = [lengths, indices, *(a for a in src.arrays().values() if a.ndim == 1)]
        read = [a for a in jax.tree.leaves(received) if isinstance(a, np.ndarray)]
        assert len(read) >= 12
        assert not any(np.shares_memory(a, vector) for a in read for vector in vectors)


@pytest.mark.parametrize("name", ("pallas", "triton"))
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs on a machine without a GPU")
def test_lowering_for_a_platform_where_nothing_runs_says_why(name):
    missing = name == "triton" and triton.unavailable(None)
    reason = missing or "needs an NVIDIA GPU of compute capability"
    lengths = np.array([3, 0, 5], np.int32)
    src = reference.precompute_decode_metadata(*ARGUMENTS)
    options = {"implementation": name}
    functions = (
        lambda x: jaxnsa.prefix_sum(x, **options),
        lambda x: jaxnsa.precompute_decode_metadata(x, *ARGUMENTS[1:], **options),
        lambda x: jaxnsa.fill_draft_extend_metadata(
            x, x, nsa_index_topk=1, max_total_tokens=9, **options
        ),
        lambda x: jaxnsa.fused_metadata_copy(
            jax.tree.map(lambda a: a + x[0], src), num_backends=1, **options
        ),
        lambda x: jax.vmap(lambda y: jaxnsa.prefix_sum(y, **options))(x[None]),
    )
    for function in functions:
        with pytest.raises(
            jaxnsa.ImplementationUnavailableError,
            match=f"implementation '{name}' cannot run here: {re.escape(reason)}",
        ):
            jax.jit(function)(lengths)


@pytest.mark.parametrize("name", ("pallas", "triton"))
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs on a machine without a GPU")
def test_what_is_for_another_platform_may_be_what_cannot_run_here(name):
    skip_where_it_is_not_lowered(name)
    chosen = jax.jit(
        lambda x: jax.lax.platform_dependent(
            x,
            cpu=lambda x: jaxnsa.prefix_sum(x, implementation="xla"),
            cuda=lambda x: jaxnsa.prefix_sum(x, implementation=name),
        )
    )
    assert chosen(np.array([3, 0, 5], np.int32)).tolist() == [0, 3, 3, 8]


def test_exported_functions_are_serialised_for_fixed_sizes():
    lengths, _, pool = ARGUMENTS

    def step(metadata, lengths):
        filled = jaxnsa.fill_draft_extend_metadata(
            lengths, lengths, nsa_index_topk=9, max_total_tokens=70
        )
        return filled, jaxnsa.fused_metadata_copy(metadata, num_backends=1)[0]

    src = reference.precompute_decode_metadata(*ARGUMENTS)
    exported = export.export(jax.jit(step))(src, lengths)
    filled, copied = export.deserialize(exported.serialize()).call(src, lengths)
    expected = reference.fill_draft_extend_metadata(
        lengths, lengths, nsa_index_topk=9, max_total_tokens=70
    )
    assert_same(filled, expected)
    assert_same(copied, src)
    (size,) = export.symbolic_shape("b")
    symbolic = jax.ShapeDtypeStruct((size,), np.int32)
    for name, function in {
        "x": jaxnsa.prefix_sum,
        "seq_lens": lambda x: jaxnsa.precompute_decode_metadata(x, x, pool),
        "req_pool_indices": lambda x: jaxnsa.precompute_decode_metadata(lengths, x, pool),
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: got shape \(b,\), expected numbers"):
            export.export(jax.jit(function))(symbolic)


def test_a_tracker_and_a_mode_are_serialised():
    def step(tracker, mode, lengths):
        return tracker.step(lengths, lengths, forward_mode=mode)

    tracker, lengths = jaxnsa.BatchTracker.empty(3), np.array([4, 5, 6], np.int32)
    exported = export.export(jax.jit(step))(tracker, ForwardMode.DECODE, lengths)
    restored = export.deserialize(exported.serialize())
    _, tracker = restored.call(tracker, ForwardMode.DECODE, lengths)
    written, _ = restored.call(tracker, ForwardMode.DECODE, lengths)
    assert written.tolist() == [4, 5, 6]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_ragged_paged_attention_however_jax_is_configured(configuration):
    lengths = np.array([3, 2**32 + 5, -(2**62)])
    with CONFIGURATIONS[configuration]():
        metadata = jaxnsa.ragged_paged_attention_metadata(
            lengths, lengths, ARGUMENTS[1], ARGUMENTS[2], page_size=16, num_seqs=2, max_num_seqs=4
        )
    assert metadata == metadata  # as itself only: its arrays have no one truth value
    assert metadata.kv_lens.tolist() == [3, 2**31 - 1, 0, 0]
    assert metadata.cu_q_lens.tolist() == [0, 3, -(2**31) + 2, -(2**31) + 2, -(2**31) + 2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_seqs": -1}, r"num_seqs: got -1, expected an int in \[0, 3\]"),
        ({"num_seqs": 4}, r"num_seqs: got 4, expected an int in \[0, 3\]"),
        ({"num_seqs": "two"}, "num_seqs: got dtype <U3, expected int32 or int64"),
        ({"num_seqs": np.zeros(2, np.int32)}, r"num_seqs: got shape \(2,\), expected 0 dim"),
        ({"max_num_seqs": 2**30}, "max_num_seqs: got 1073741824, expected an int in"),
    ],
)
def test_ragged_paged_attention_refuses(changes, message):
    seq_lens, indices, pool = ARGUMENTS
    with pytest.raises((TypeError, ValueError), match=message):
        jaxnsa.ragged_paged_attention_metadata(
            seq_lens, None, indices, pool, page_size=16, **changes
        )
