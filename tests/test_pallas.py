"""What the tests of every implementation do not reach of the Pallas kernels, without a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, held_apart, inputs, on_device

import jaxnsa
import pallas_kernels
import pallas_kernels.lanes
import pallas_kernels.launch
import pallas_kernels.tuning
from jaxnsa import ForwardMode, reference
from jaxnsa.spec import Inputs, Rows, Spec
from pallas_kernels.destinations import Destinations
from pallas_kernels.jax_internals import InterpretGPUParams, force_gpu_interpret_mode
from pallas_kernels.lanes import access_width
from pallas_kernels.shared_sums import SharedSums
from pallas_kernels.tables import Table
from pallas_kernels.wide import Wide

INTERPRETER = InterpretGPUParams(detect_races=True)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "requests", (1, 31, 32, 33, 127, 128, 129, 256, 1000, 1024, 1100, 1400, 2049)
)
@pytest.mark.parametrize("limit", (None, 2**31 - 1, 1000))
def test_sums_over_requests(requests, limit, capfd):
    """More requests than a vector holds, and than are in flight at once."""
    rng = np.random.default_rng(requests)
    high = 2**31 - 1 if limit is None else limit
    values = rng.integers(0, high, requests, endpoint=True, dtype=np.int32)
    middle = requests // 2

    def kernel(_, ref, result, scratch):
        sums = pallas_kernels.lanes.start_sums(
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
        result[0], result[1] = sums()

    sums = pallas_kernels.launch.launch(
        kernel,
        values,
        None,
        jax.ShapeDtypeStruct((2,), jnp.int32),
        blocks=1,
        name="sums",
        interpret=INTERPRETER,
    )
    assert "RACE DETECTED" not in capfd.readouterr().out
    exact = [int(values[:middle].sum(dtype=np.int64)), int(values.sum(dtype=np.int64))]
    if limit is None:
        assert sums.tolist() == np.array(exact).astype(np.int32).tolist()
    else:
        assert sums.tolist() == [min(limit, total) for total in exact]


@pytest.mark.interpreted
@pytest.mark.parametrize("count", (1, 257, 2100))
def test_shared_sums(count, capfd):
    """More values than a vector holds, and than sums are kept."""
    rng = np.random.default_rng(count)
    values = rng.integers(0, 2**30, count, dtype=np.int32) * rng.integers(0, 2, count, np.int32)
    sums = np.cumsum([0, *values])
    # Before, at and behind what some places begin with.
    numbers = np.resize(np.maximum(rng.choice(sums, 40)[:, None] + [-1, 0, 1], 0), 128)
    numbers[:2] = sums[-1], sums[-1] + 2**20
    lanes = pallas_kernels.lanes.Lanes(interpret=True)

    def kernel(_, read, result, shared):
        ref, high, low = read
        found = SharedSums(
            lanes, count, lambda index: Wide.of(*lanes.gather(ref, index)), shared, 128
        )
        place, begin = found.find(Wide(high[...], low[...]))
        value = found.value(jnp.minimum(place, count - 1))
        for k, vector in enumerate((place, *begin, value)):
            result[k] = vector
        result[4] = found.total.high + lanes.zeros(128)

    result = pallas_kernels.launch.launch(
        kernel,
        (values, (numbers >> 16).astype(np.int32), (numbers & 0xFFFF).astype(np.int32)),
        None,
        jax.ShapeDtypeStruct((5, 128), jnp.int32),
        blocks=1,
        shared=(128 + SharedSums.words(count),),
        name="shared_sums",
        interpret=INTERPRETER,
    )
    assert "RACE DETECTED" not in capfd.readouterr().out
    places = np.searchsorted(sums, numbers, side="right") - 1
    rows = (places, sums[places] >> 16, sums[places] & 0xFFFF, values[places.clip(max=count - 1)])
    np.testing.assert_array_equal(result, [*rows, np.full(128, sums[-1] >> 16)])


def test_schedules_of_many_items_are_no_longer_programs():
    """They are loops: what is written out takes long to compile, and to fetch."""

    def lines(bs, parts):
        compute = functools.partial(
            jaxnsa.precompute_decode_metadata,
            wide_table=False,
            schedules=jaxnsa.Schedules(
                jaxnsa.PagedMqaSchedule(parts, "sm90"),
                jaxnsa.TopkPlan.h200(),
                jaxnsa.FlashMlaSchedule(parts, "cache_seqlens"),
            ),
            implementation="pallas",
        )
        vector = jax.ShapeDtypeStruct((bs,), jnp.int32)
        pool = jax.ShapeDtypeStruct((bs, 256), jnp.int32)
        return str(jax.jit(compute).trace(vector, vector, pool).jaxpr).count("\n")

    assert lines(1000, 1000) < 1.2 * lines(129, 132)


def assert_like_reference(given, spec, config, capfd, mode=ForwardMode.DECODE):
    """Fresh, or over what was there where the tail is kept."""
    ragged = mode is ForwardMode.DRAFT_EXTEND
    compute = functools.partial(
        reference.fused_metadata_precompute_and_broadcast,
        *given[:3],
        num_backends=1,
        forward_mode=mode,
        nsa_index_topk=spec.nsa_index_topk,
        real_page_size=spec.real_page_size,
        wide_table=spec.wide_table,
        max_len=spec.max_len,
        index_kpool=spec.index_kpool,
        extend_seq_lens=given.extend_seq_lens,
        max_total_tokens=spec.rows.count if ragged else None,
    )
    out = held_apart(compute()) if spec.tail == "keep" else None
    before = None if out is None else on_device(out)
    expected = compute(tail=spec.tail, out=out)
    kernel = functools.partial(
        pallas_kernels.fused_metadata, spec=spec, config=config, interpret=INTERPRETER
    )
    assert_same(jax.jit(kernel)(given, before), expected)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("tail", ("copy", "keep"))
@pytest.mark.parametrize("vectors, blocks", ((1, 4), (2, 2), (4, 1)))
@pytest.mark.parametrize("extend", (None, (2, 0, 1)))
def test_blocks_stride_over_tiles(tail, vectors, blocks, extend, capfd):
    """More tiles than blocks: the same with any block sizes."""
    _, indices, pool = inputs(3, pool_cols=2600)
    lengths = np.array([2600, 1100, 0], np.int32)
    mode = ForwardMode.DECODE if extend is None else ForwardMode.DRAFT_EXTEND
    rows = Rows.of(mode, 3, max_total_tokens=None if extend is None else 4)
    extend_seq_lens = None if extend is None else np.array(extend, np.int32)
    assert_like_reference(
        Inputs(lengths, indices, pool, extend_seq_lens),
        Spec(rows, 2600, 64, 64, True, tail),
        pallas_kernels.BlockConfig(vectors=vectors, scalars=4, blocks=3 * blocks),
        capfd,
        mode,
    )


@pytest.mark.parametrize("tail", ("copy", "zero", "keep"))
@pytest.mark.parametrize("page_size, kpool", ((3, 1), (4, 2), (8, 1)))
def test_pages_of_a_pool_whose_rows_end_within_one(tail, page_size, kpool, capfd):
    """SGLang's pools have a few columns more than the context length."""
    max_len = 400 * page_size - 1
    _, indices, pool = inputs(3, pool_cols=max_len + 2)
    lengths = np.array([max_len, 130 * page_size + 1, 0], np.int32)
    rows = Rows.of(ForwardMode.DECODE, 3)
    assert_like_reference(
        Inputs(lengths, indices, pool, None),
        Spec(rows, max_len, 64, page_size, False, tail, index_kpool=kpool),
        pallas_kernels.BlockConfig(vectors=2),
        capfd,
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("extend, capacity", (([700], 700), ([300, 0, 5], 1000), ([9, 900], 400)))
def test_many_rows_are_shared_by_blocks(extend, capacity, capfd):
    extend = np.array(extend, np.int32)
    options = {"nsa_index_topk": 512, "max_total_tokens": capacity}
    compute = functools.partial(
        pallas_kernels.fill_draft_extend_metadata, interpret=INTERPRETER, **options
    )
    actual = jax.jit(compute)(extend, extend + 200)
    expected = reference.fill_draft_extend_metadata(extend, extend + 200, **options)
    assert_same(actual, expected)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("requests, blocks", ((1, 7), (132, 32), (133, 32), (4225, 1)))
def test_every_block_has_its_place(requests, blocks):
    indices = jnp.arange(requests * blocks, dtype=jnp.int32)
    request, block = pallas_kernels.tuning.place(indices, requests, blocks)
    places = set(zip(request.tolist(), block.tolist(), strict=True))
    assert places == set(itertools.product(range(requests), range(blocks)))


@pytest.mark.parametrize("vectors", (1, 2, 4))
@pytest.mark.parametrize("max_len", (1024, 1100))
def test_the_smallest_pages_that_are_written_with_the_wide_table(vectors, max_len, capfd):
    """As many start in a tile as a block has threads."""
    _, indices, pool = inputs(2, pool_cols=max_len)
    lengths = np.array([max_len, 700], np.int32)
    config = pallas_kernels.BlockConfig(vectors=vectors)
    table = Table.of(2, max_len, 1, "copy", access_width(max_len), config)
    smallest = next(page for page in itertools.count(1) if table.yields_pages(page))
    assert smallest == table.width * (vectors + (max_len % table.vector > 0))
    for page in (smallest - 1, smallest):
        rows = Rows.of(ForwardMode.DECODE, 2)
        spec = Spec(rows, max_len, 64, page, True, "copy")
        assert_like_reference(Inputs(lengths, indices, pool, None), spec, config, capfd)


def test_pages_that_are_not_written_with_the_wide_table():
    config = pallas_kernels.BlockConfig(vectors=1)
    of_pages = Table.of(1, 4096, 4, "copy", 4, config)
    narrow = Table.of(1, 100, 1, "copy", 4, config)
    assert not of_pages.yields_pages(64)
    assert not narrow.yields_pages(64)


def test_copies_of_stacked_arrays_that_no_index_reaches_the_end_of():
    table = jax.ShapeDtypeStruct((3, 2**15, 2**15), jnp.int32)
    lengths = jax.ShapeDtypeStruct((3, 2), jnp.int32)
    src = jaxnsa.NSAMetadata(lengths, lengths, lengths, lengths, lengths, table)
    copy = functools.partial(pallas_kernels.copy, out=None, num_backends=1, interpret=INTERPRETER)
    assert jax.eval_shape(copy, src)[0].page_indices == table


def test_units_of_a_schedule_that_are_too_many():
    arguments = inputs(1, pool_cols=2)
    schedules = jaxnsa.Schedules(paged_mqa=jaxnsa.PagedMqaSchedule(7, "sm90"))
    with (
        force_gpu_interpret_mode(INTERPRETER),
        pytest.raises(NotImplementedError, match="num_draft_tokens: got 513, .* at most 256; take"),
    ):
        jaxnsa.precompute_target_verify_metadata(
            *arguments, num_draft_tokens=513, schedules=schedules, implementation="pallas"
        )


def test_an_array_that_no_block_writes_is_an_error():
    spec = Spec(Rows(2, 2, 1, 0), 8, 64, 64, True, "copy")
    refs = {name: jnp.zeros(shape.shape) for name, shape in spec.shapes().items()}
    destinations = Destinations(spec, [refs])
    for name in spec.shapes():
        if name != "seqlens_expanded":
            destinations.of(name, 0)
    with pytest.raises(NotImplementedError, match=r"does not write \['seqlens_expanded'\]"):
        destinations.check_all_written()


def test_runs_where_jax_interprets_kernels():
    x = np.arange(5, dtype=np.int32)
    with force_gpu_interpret_mode(INTERPRETER):
        assert jaxnsa.prefix_sum(x, implementation="pallas").tolist() == [0, 0, 1, 3, 6, 10]


def test_unavailable_on_the_cpu_says_what_it_needs():
    with pytest.raises(
        jaxnsa.ImplementationUnavailableError,
        match=r"'pallas' cannot run here: needs an NVIDIA GPU of compute capability 9.0 \(Hopper\)",
    ):
        jaxnsa.prefix_sum(np.arange(3, dtype=np.int32), implementation="pallas")
