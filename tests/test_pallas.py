"""The Pallas kernels without a GPU: interpreted with race detection, and lowered for CUDA."""

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
    mode_options,
    on_device,
)
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
)

import jaxnsa
import pallas_kernels
import pallas_kernels.lanes
import pallas_kernels.launch
from jaxnsa import ForwardMode, reference
from nsa_kernel_types import FusedJob, Metadata, RowMap

EXTEND = ForwardMode.DRAFT_EXTEND


@pytest.fixture
def interpreted(capfd):
    """Kernels run on the CPU; a race or an access outside a buffer fails the test."""
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("bs", (0, 1, 2, 7, 33))
def test_batch_sizes(bs, mode, interpreted):
    check_broadcast(
        inputs(bs, pool_cols=6, seed=bs),
        implementation="pallas",
        num_backends=1,
        forward_mode=mode,
        real_page_size=5,
        nsa_index_topk=30,
        **mode_options(mode, bs, seed=bs),
    )


@pytest.mark.parametrize("requests", (1, 31, 32, 33, 127, 128, 129, 256, 1000, 1024, 1100, 2049))
@pytest.mark.parametrize("limit", (None, 2**31 - 1, 1000))
def test_sums_over_requests(requests, limit, interpreted):
    """More requests than a vector holds, and than are in flight at once."""
    rng = np.random.default_rng(requests)
    high = 2**31 - 1 if limit is None else limit
    values = rng.integers(0, high, requests, endpoint=True, dtype=np.int32)
    middle = requests // 2

    def kernel(_, ref, result, scratch):
        before, everything = pallas_kernels.lanes.sum_over_requests(
            pallas_kernels.lanes.Lanes(interpret=True),
            requests,
            (ref,),
            scratch,
            lambda index, exists, v: (
                jnp.where(index < middle, v, 0),
                jnp.where(exists, v, 0),
            ),
            limit=limit,
        )
        result[0], result[1] = before, everything

    sums = pallas_kernels.launch.launch(
        kernel,
        values,
        None,
        jax.ShapeDtypeStruct((2,), jnp.int32),
        blocks=1,
        name="sums",
        interpret=InterpretGPUParams(detect_races=True),
    )
    exact = [int(values[:middle].sum(dtype=np.int64)), int(values.sum(dtype=np.int64))]
    if limit is None:
        assert sums.tolist() == np.array(exact).astype(np.int32).tolist()
    else:
        assert sums.tolist() == [min(limit, total) for total in exact]


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("tail, in_place", (("copy", False), ("zero", True), ("keep", True)))
@pytest.mark.parametrize(
    "pool_cols, max_len, page",
    [
        (37, 37, 1),  # narrower than a vector
        (301, 290, 48),  # no access wider than one element, pool rows that are not whole pages
        (640, 600, 2),  # columns that fill no window, page starts as vectors
        (1152, 1100, 64),  # several windows
    ],
)
def test_shapes_and_tails(pool_cols, max_len, page, tail, in_place, mode, interpreted):
    check_broadcast(
        inputs(3, pool_cols=pool_cols, seed=page),
        implementation="pallas",
        in_place=in_place,
        tail=tail,
        num_backends=2,
        forward_mode=mode,
        max_len=max_len,
        real_page_size=page,
        **mode_options(mode, 3),
    )


def test_blocks_take_turns(interpreted):
    """More columns than blocks: the same with any block sizes."""
    lengths, indices, pool = inputs(2, pool_cols=1500)
    for tail, live in (("copy", False), ("keep", True)):
        out = held(reference.precompute_decode_metadata(lengths, indices, pool))
        expected = reference.precompute_decode_metadata(
            lengths, indices, pool, nsa_index_topk=64, tail=tail, out=out if live else None
        )
        compute = jax.jit(
            functools.partial(
                pallas_kernels.fused_metadata,
                job=FusedJob(RowMap(2, 2, 1, 0, 64), 1500, 64, True, tail, 1),
                config=pallas_kernels.BlockConfig(windows=1, scalars=4, blocks=4),
                interpret=InterpretGPUParams(detect_races=True),
            )
        )
        (actual,) = compute(
            lengths,
            indices,
            pool,
            None,
            (Metadata(**vars(on_device(held(expected)))),) if live else None,
        )
        assert_same(jaxnsa.NSAMetadata(**actual._asdict()), expected)


@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("strategy", ("ultra_fast", "fast", "fallback"))
def test_strategies(strategy, stacked, interpreted):
    check_broadcast(
        inputs(2, pool_cols=200),
        implementation="pallas",
        in_place=True,
        strategy=strategy,
        stacked=stacked,
        num_backends=2,
        real_page_size=100,
    )


def test_no_wide_table(interpreted):
    check_broadcast(
        inputs(3, pool_cols=300),
        implementation="pallas",
        in_place=True,
        wide_table=False,
        num_backends=2,
        real_page_size=2,
    )


@pytest.mark.parametrize("slack", (-1000, -2, 0, 9))
def test_draft_extend_capacity(slack, interpreted):
    check_broadcast(
        inputs(5, pool_cols=20),
        implementation="pallas",
        num_backends=1,
        forward_mode=EXTEND,
        real_page_size=4,
        **mode_options(EXTEND, 5, slack=slack),
    )


@pytest.mark.parametrize("bs", (5, 35))
def test_draft_extend_totals_past_int32(bs, interpreted):
    extend = np.full(bs, 2**31 - 1, np.int32)
    extend[0] = 2
    check_broadcast(
        inputs(bs, pool_cols=8),
        implementation="pallas",
        num_backends=1,
        forward_mode=EXTEND,
        real_page_size=1,
        extend_seq_lens=extend,
        max_total_tokens=9,
    )


@pytest.mark.parametrize("tail", ("copy", "zero", "keep"))
def test_extreme_values(tail, interpreted):
    low, high = -(2**31), 2**31 - 1
    lengths = np.array([low, high, 0, high - 2], np.int32)
    pool = np.array([[low, high, -1, 0], [1, -64, 63, 64]], np.int32)
    for mode in ForwardMode:
        check_broadcast(
            (lengths, lengths[::-1], pool),
            implementation="pallas",
            in_place=True,
            tail=tail,
            num_backends=1,
            forward_mode=mode,
            real_page_size=3,
            **mode_options(mode, 4),
        )


@pytest.mark.parametrize(
    "n", (0, 1, 2, 7, 31, 32, 33, 127, 128, 129, 1000, 1024, 1025, 2049, 20_000)
)
def test_prefix_sum(n, interpreted):
    x = np.random.default_rng(n).integers(-(2**31), 2**31, n).astype(np.int32)
    assert_same(jaxnsa.prefix_sum(x, implementation="pallas"), reference.prefix_sum(x))


def test_copy(interpreted):
    src = reference.precompute_decode_metadata(*inputs(3, pool_cols=700), max_len=690)
    out = tuple(on_device(held(src)) for _ in range(2))
    for copy in jaxnsa.fused_metadata_copy(on_device(src), out=out, implementation="pallas"):
        assert_same(copy, src)


def test_vmap(interpreted):
    seq_lens, indices, pool = inputs(3, pool_cols=200)
    batches = np.stack([seq_lens, seq_lens[::-1]])
    result = jax.vmap(
        lambda lens: jaxnsa.precompute_decode_metadata(lens, indices, pool, implementation="pallas")
    )(batches)
    for k, lens in enumerate(batches):
        expected = reference.precompute_decode_metadata(lens, indices, pool)
        assert_same(jax.tree.map(lambda array, k=k: array[k], result), expected)


def test_vmap_in_place_says_what_to_do(interpreted):
    arguments = inputs(3, pool_cols=200)
    out = jaxnsa.precompute_decode_metadata(*arguments)
    stacked = jax.tree.map(lambda array: array[None], out)
    with pytest.raises(NotImplementedError, match=r"cannot run under jax.vmap: call without out="):
        jax.vmap(
            lambda out: jaxnsa.precompute_decode_metadata(
                *arguments, out=out, implementation="pallas"
            )
        )(stacked)


def test_unavailable_on_the_cpu_says_what_it_needs():
    with pytest.raises(
        jaxnsa.ImplementationUnavailableError,
        match=r"'pallas' cannot run here: needs an NVIDIA GPU of compute capability 9.0 \(Hopper\)",
    ):
        jaxnsa.prefix_sum(np.arange(3, dtype=np.int32), implementation="pallas")
