"""Prefill, `ForwardMode.EXTEND`: what its rows, keys and table rows have of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same,
    check_broadcast,
    held,
    inputs,
    lowered_operations,
    on_device,
    pointers,
    skip_where_it_is_not_lowered,
    skip_without_library,
)

import jaxnsa
from jaxnsa import ForwardMode, reference
from jaxnsa.metadata import FIELDS
from jaxnsa.value_checks import validate_inputs

EXTEND = ForwardMode.EXTEND
INT32_MAX = 2**31 - 1

SHAPES = {
    "short": {"max_total_tokens": 18, "max_total_keys": 60, "max_len": 17, "real_page_size": 4},
    "tiles": {"max_total_tokens": 140, "max_total_keys": 560, "max_len": 300},
    "no flat table": {"max_total_tokens": 18, "max_len": 17, "wide_table": False},
    "groups": {"max_total_tokens": 700, "max_total_keys": 3000, "max_len": 40, "real_page_size": 1},
}
BATCHES = {  # seq_lens, extend_seq_lens
    "short": (
        ([5, 9, 3, 17, 2], [2, 9, 1, 1, 2]),  # a chunk, a prompt, decoding requests
        ([-3, 0, 25, 8, 30], [4, 0, -2, 7, 99]),  # beyond every capacity
        ([INT32_MAX, INT32_MAX, 3, 4, 5], [3, INT32_MAX, 2, 2, 2]),  # beyond int32
    ),
    "tiles": (
        ([270, 2, 280], [130, 0, 5]),
        ([250, 400, 3], [250, 0, 3]),
    ),
    "no flat table": (([5, 9, 3], [2, 9, 1]),),
    "groups": (
        (np.arange(270) % 23 - 2, np.arange(270) % 5 - 1),
        (np.where(np.arange(270) == 200, 41, 1), np.where(np.arange(270) == 131, 600, 0)),
    ),
}


@pytest.mark.parametrize(
    "shape, tail, stacked",
    [
        ("tiles", "zero", False),  # what interpreters take
        *(
            pytest.param(*values, marks=pytest.mark.large)
            for values in (
                ("short", "copy", False),
                ("short", "zero", True),
                ("short", "keep", False),
                ("tiles", "copy", True),
                ("tiles", "keep", False),
                ("no flat table", "zero", False),
                ("no flat table", "keep", True),
                ("groups", "copy", False),
                ("groups", "keep", False),
            )
        ),
    ],
)
def test_rows_keys_and_tables(shape, tail, stacked, implementation):
    for lengths, extend in BATCHES[shape]:
        _, indices, pool = inputs(len(lengths), pool_cols=SHAPES[shape]["max_len"] + 3)
        check_broadcast(
            (np.array(lengths, np.int32), indices, pool),
            implementation=implementation,
            in_place=tail != "copy",
            tail=tail,
            stacked=stacked,
            num_backends=2 if shape == "short" else 1,
            forward_mode=EXTEND,
            extend_seq_lens=np.array(extend, np.int32),
            nsa_index_topk=9,
            **SHAPES[shape],
        )


@pytest.mark.large
@pytest.mark.parametrize("strategy, tail", (("fast", "keep"), ("fallback", "zero")))
def test_strategies(strategy, tail, implementation):
    (lengths, extend), *_ = BATCHES["short"]
    _, indices, pool = inputs(5, pool_cols=20)
    check_broadcast(
        (np.array(lengths, np.int32), indices, pool),
        implementation=implementation,
        in_place=True,
        tail=tail,
        strategy=strategy,
        num_backends=2,
        forward_mode=EXTEND,
        extend_seq_lens=np.array(extend, np.int32),
        **SHAPES["short"],
    )


@pytest.mark.large
@pytest.mark.parametrize(
    "bs, tokens, keys, in_place",
    ((0, 3, 4, True), (2, 0, 4, True), (2, 3, 0, False)),
    ids=("requests", "rows", "keys"),
)
def test_nothing_of_something(bs, tokens, keys, in_place, implementation):
    check_broadcast(
        inputs(bs, pool_cols=6),
        implementation=implementation,
        in_place=in_place,
        num_backends=1,
        forward_mode=EXTEND,
        extend_seq_lens=np.ones(bs, np.int32),
        max_total_tokens=tokens,
        max_total_keys=keys,
    )


@pytest.mark.large
def test_public_function(implementation):
    lengths, indices, pool = inputs(3, pool_cols=20)
    arguments = (lengths, np.array([2, 1, 3], np.int32), indices, pool)
    options = {"max_total_tokens": 8, "max_total_keys": 50, "real_page_size": 4}
    compute = functools.partial(jaxnsa.precompute_extend_metadata, implementation=implementation)
    expected = reference.precompute_extend_metadata(*arguments, **options)
    assert_same(compute(*arguments, **options), expected)
    kept = held(expected)
    out = on_device(kept)
    where = pointers(out)
    result = compute(*map(jnp.asarray, arguments), out=out, **options)
    assert_same(result, reference.precompute_extend_metadata(*arguments, out=kept, **options))
    assert pointers(result) == where
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.int64) for a in arguments[:3]]
        assert_same(compute(*wide, pool, **options), expected)


def test_under_vmap():
    batches = [inputs(3, pool_cols=20, seed=seed) for seed in range(2)]
    extend = np.array([[2, 1, 3], [0, 4, 1]], np.int32)
    options = {"max_total_tokens": 8, "max_total_keys": 50, "real_page_size": 4}
    compute = functools.partial(jaxnsa.precompute_extend_metadata, implementation="xla", **options)
    lengths, indices, pools = map(np.stack, zip(*batches, strict=True))
    result = jax.jit(jax.vmap(compute))(lengths, extend, indices, pools)
    for k, (seq_lens, slots, pool) in enumerate(batches):
        expected = reference.precompute_extend_metadata(seq_lens, extend[k], slots, pool, **options)
        assert_same(jax.tree.map(lambda array, k=k: array[k], result), expected)


@pytest.mark.parametrize("name", ("pallas", "triton"))
@pytest.mark.parametrize("in_place, stacked", ((False, True), (True, False)))
def test_one_custom_call(name, in_place, stacked):
    skip_where_it_is_not_lowered(name)
    arguments, extend = inputs(7, pool_cols=2048), np.ones(7, np.int32)
    options = {"forward_mode": EXTEND, "num_backends": 3, "stacked": stacked}
    options |= {"max_total_tokens": 900, "max_total_keys": 5000}
    compute = jaxnsa.fused_metadata_precompute_and_broadcast
    out = None
    if in_place:
        out = reference.fused_metadata_precompute_and_broadcast(
            *arguments, extend_seq_lens=extend, **options
        )
    operations = lowered_operations(
        lambda out, extend, *a: compute(
            *a, out=out, extend_seq_lens=extend, implementation=name, **options
        ),
        on_device(out),
        extend,
        *arguments,
        donate=0,
    )
    assert operations == ["custom_call"]


def test_more_keys_than_there_is_room_for_are_found():
    lengths, indices, pool = np.array([5, 6], np.int32), np.zeros(2, np.int32), inputs(1)[2]
    options = {"forward_mode": EXTEND, "extend_seq_lens": lengths, "max_total_tokens": 11}
    validate_inputs(lengths, indices, pool, max_total_keys=11, **options)
    with pytest.raises(ValueError, match="at most max_total_keys = 10"):
        validate_inputs(lengths, indices, pool, max_total_keys=10, **options)


class TestTorch:
    """Static tensors of a prefill, filled by `BackendBuffers`."""

    REQUESTS, ROWS, KEYS, MAX_LEN, PAGE = 6, 24, 90, 40, 4

    @pytest.fixture(params=("direct", "dlpack"))
    def buffers(self, request):
        torch = pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
        from jaxnsa.interop.torch import BackendBuffers, DlpackOptions

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if request.param == "direct":
            skip_without_library(device == "cuda")
        _, indices, pool = inputs(self.REQUESTS, pool_cols=self.MAX_LEN)
        empty = np.zeros(self.REQUESTS, np.int32)
        twins = held(
            reference.fused_metadata_precompute_and_broadcast(
                empty,
                indices,
                pool,
                num_backends=2,
                forward_mode=EXTEND,
                extend_seq_lens=empty,
                max_total_tokens=self.ROWS,
                max_total_keys=self.KEYS,
                real_page_size=self.PAGE,
            )
        )
        tensors = [
            {name: torch.from_numpy(a.copy()).to(device) for name, a in twin.arrays().items()}
            for twin in twins
        ]
        pool_tensor = torch.from_numpy(pool).to(device)

        def register(backends=tensors, path=request.param):
            return BackendBuffers(
                backends,
                nsa_index_topk=2048,
                real_page_size=self.PAGE,
                path=path,
                dlpack=DlpackOptions(pool_tensor, (EXTEND,)),
            )

        return register, tensors, twins, pool_tensor

    def test_update(self, buffers):
        register, tensors, twins, pool = buffers
        registered = register()
        for bs, seed in ((6, 0), (2, 1), (0, 2)):
            lengths, indices, _ = inputs(bs, pool_cols=self.MAX_LEN, pool_rows=6, seed=seed)
            extend = np.random.default_rng(seed).integers(-1, 8, bs, dtype=np.int32)
            given = [pool.new_tensor(v) for v in (lengths, indices, extend)]
            registered.update(*given[:2], pool, forward_mode=EXTEND, extend_seq_lens=given[2])
            views = [
                jaxnsa.NSAMetadata(
                    **{name: array[: self.size(name, bs)] for name, array in twin.arrays().items()}
                )
                for twin in twins
            ]
            reference.fused_metadata_precompute_and_broadcast(
                lengths,
                indices,
                pool.cpu().numpy(),
                num_backends=2,
                forward_mode=EXTEND,
                extend_seq_lens=extend,
                max_total_tokens=self.ROWS,
                max_total_keys=self.KEYS,
                real_page_size=self.PAGE,
                out=tuple(views),
            )
            for backend, twin in zip(tensors, twins, strict=True):
                for name, array in twin.arrays().items():
                    np.testing.assert_array_equal(backend[name].cpu().numpy(), array, name)

    def size(self, name, bs):
        """Elements, or rows, of an array that a step of `bs` requests writes."""
        return {
            "requests": bs,
            "requests + 1": bs + 1,
            "rows": self.ROWS,
            "rows + 1": self.ROWS + 1,
            "table": bs,
            "keys": self.KEYS,
        }[FIELDS[name].extent.value]

    def test_only_prefill_and_all_of_it(self, buffers):
        register, tensors, _, pool = buffers
        lengths = pool.new_zeros(2)
        with pytest.raises(ValueError, match="forward_mode: got ForwardMode.DECODE, expected"):
            register().update(lengths, lengths, pool)
        part = [{k: v for k, v in t.items() if k != "indexer_ke"} for t in tensors]
        with pytest.raises(ValueError, match="expected .*indexer_ke.*: all arrays of prefill or"):
            register(part)

    def test_keys_are_counted_on_request(self, buffers):
        register, tensors, _, pool = buffers
        before = tensors[0]["cache_seqlens"].clone()
        lengths, one = pool.new_tensor([40, 40, 11]), pool.new_tensor([1, 1, 1])
        with (
            jaxnsa.override(validate=True),
            pytest.raises(ValueError, match="seq_lens: got .* at most max_total_keys = 90"),
        ):
            register().update(lengths, one, pool, forward_mode=EXTEND, extend_seq_lens=one)
        assert (tensors[0]["cache_seqlens"] == before).all()
