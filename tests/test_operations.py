"""Every function, mode and corner of every implementation against the reference."""

import random

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BATCH_SIZES,
    TABLE_MODES,
    TABLE_MODES_OR_ONE,
    assert_same,
    check_broadcast,
    held,
    inputs,
    mode_options,
    of_blocks,
    on_device,
    pointers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxnsa
from jaxnsa import BatchTracker, ForwardMode, reference
from jaxnsa.app import verify


@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("bs", BATCH_SIZES)
def test_batch_sizes(bs, mode, implementation):
    pool_cols = 6 if bs < 100 else 40
    check_broadcast(
        inputs(bs, pool_cols=pool_cols, seed=bs),
        implementation=implementation,
        num_backends=1,
        forward_mode=mode,
        real_page_size=5,
        nsa_index_topk=3,
        **mode_options(mode, bs, seed=bs),
    )


@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("bs", (0, 1, 3, *of_blocks(33, 256)))
@pytest.mark.parametrize("tail", ("copy", "zero", "keep"))
def test_in_place(bs, mode, tail, implementation):
    check_broadcast(
        inputs(bs, pool_cols=300, seed=bs),
        implementation=implementation,
        in_place=True,
        num_backends=2,
        forward_mode=mode,
        max_len=290,
        tail=tail,
        real_page_size=96,
        **mode_options(mode, bs),
    )


@pytest.mark.parametrize("mode", TABLE_MODES_OR_ONE)
@pytest.mark.parametrize("page", (1, 2, 7, *of_blocks(48, 64, 100, 4096)))
@pytest.mark.parametrize("max_len", (1, 9, *of_blocks(63, 64, 65, 1001)))
def test_page_sizes_and_widths(page, max_len, mode, implementation):
    check_broadcast(
        inputs(2, pool_cols=max_len + max_len % 3),
        implementation=implementation,
        num_backends=1,
        forward_mode=mode,
        max_len=max_len,
        real_page_size=page,
        tail="zero",
        **mode_options(mode, 2, seed=1),
    )


@pytest.mark.parametrize("mode", TABLE_MODES_OR_ONE)
@pytest.mark.parametrize("tail, in_place", (("copy", False), ("zero", True), ("keep", True)))
@pytest.mark.parametrize(
    "pool_cols, max_len, page",
    [
        (17, 17, 1),  # narrower than a vector and than a tile
        (301, 290, 48),  # no access wider than one element, pool rows and tiles of no whole pages
        (640, 600, 2),  # columns that fill no vector, page starts as vectors
        pytest.param(640, 600, 700, marks=pytest.mark.blocks),  # pages wider than the table
        (640, 600, 2**31 - 1),  # pages as long as int32 reaches, more tiles than pages
        (2304, 2100, 256),  # several tiles
    ],
)
@pytest.mark.parametrize("wide_table", (True, False))
def test_tiles_and_tails(
    pool_cols, max_len, page, tail, in_place, wide_table, mode, implementation
):
    check_broadcast(
        inputs(3, pool_cols=pool_cols, seed=page),
        implementation=implementation,
        in_place=in_place,
        tail=tail,
        num_backends=2,
        forward_mode=mode,
        max_len=max_len,
        wide_table=wide_table or page == 1,
        real_page_size=page,
        **mode_options(mode, 3),
    )


@pytest.mark.parametrize(
    "tail_width_page",  # one parameter, so that interpreters take all of its values
    [
        "zero 11 4",
        "keep 11 4",
        *(f"{tail} 1100 220" for tail in ("copy", "zero", "keep")),
        *of_blocks("copy 11 4", f"keep 600 {2**31 - 1}"),
    ],
)
def test_padding_rows_and_dead_columns(tail_width_page, implementation):
    """More padding rows than requests, rows that end in every tile or before any."""
    tail, *numbers = tail_width_page.split()
    max_len, page = map(int, numbers)
    _, indices, pool = inputs(4, pool_cols=max_len + 4)
    lengths = np.array([3, 0, max_len + 9, max_len // 5 * 2], np.int32)
    extend = np.array([2, 1, 1, 2], np.int32)
    check_broadcast(
        (lengths, indices, pool),
        implementation=implementation,
        in_place=True,
        tail=tail,
        num_backends=1,
        forward_mode=ForwardMode.DRAFT_EXTEND,
        extend_seq_lens=extend,
        max_total_tokens=6 + 5,
        max_len=max_len,
        nsa_index_topk=max_len // 3,
        real_page_size=page,
    )


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("mode", TABLE_MODES_OR_ONE)
def test_no_wide_table(mode, stacked, in_place, implementation):
    check_broadcast(
        inputs(3, pool_cols=70),
        implementation=implementation,
        in_place=in_place,
        num_backends=2,
        forward_mode=mode,
        wide_table=False,
        real_page_size=32,
        stacked=stacked,
        **mode_options(mode, 3),
    )


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("mode", TABLE_MODES_OR_ONE)
def test_stacked(mode, in_place, implementation):
    check_broadcast(
        inputs(3, pool_cols=130),
        implementation=implementation,
        in_place=in_place,
        num_backends=2,
        forward_mode=mode,
        stacked=True,
        **mode_options(mode, 3),
    )


@pytest.mark.large
def test_many_backends(implementation):
    backends = check_broadcast(inputs(3), implementation=implementation, num_backends=32)
    assert len(set(pointers(backends))) == 32 * 7


@pytest.mark.large
def test_long_context_in_place(implementation):
    _, indices, pool = inputs(4, pool_cols=70_001, seed=3)
    lengths = np.array([70_001, 69_990, 4097, 35_000], np.int32)
    check_broadcast(
        (lengths, indices, pool),
        implementation=implementation,
        in_place=True,
        num_backends=2,
    )


@pytest.mark.blocks
@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("tail", ("copy", "keep"))
@pytest.mark.parametrize("bs, max_len", ((11, 131_072), (130, 66_000), (66, 33_003)))
def test_tables_of_many_tiles(bs, max_len, tail, mode, implementation):
    """A few large tables: more tiles than there are blocks, and those of the larger size."""
    check_broadcast(
        inputs(bs, pool_cols=max_len, pool_rows=7, seed=bs),
        implementation=implementation,
        in_place=True,
        num_backends=1,
        forward_mode=mode,
        tail=tail,
        **mode_options(mode, bs),
    )


@pytest.mark.parametrize("slack", (-3, 0, 40, *of_blocks(-1000, -1)))
@pytest.mark.parametrize("bs", (5, 0, 1, *of_blocks(31, 300)))
@pytest.mark.parametrize("in_place", (False, True))
def test_draft_extend_capacity(bs, slack, in_place, implementation):
    mode = ForwardMode.DRAFT_EXTEND
    check_broadcast(
        inputs(bs, pool_cols=9),
        implementation=implementation,
        in_place=in_place,
        num_backends=1,
        forward_mode=mode,
        real_page_size=4,
        **mode_options(mode, bs, slack=slack),
    )


def test_draft_extend_totals_past_int32_fill_the_capacity(implementation):
    extend = np.array([2, 2**31 - 1, 2**31 - 1, 5, 2**31 - 1], np.int32)
    check_broadcast(
        inputs(5, pool_cols=5),
        implementation=implementation,
        num_backends=1,
        forward_mode=ForwardMode.DRAFT_EXTEND,
        extend_seq_lens=extend,
        max_total_tokens=11,
    )


@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("tail", ("copy", "zero", "keep"))
@pytest.mark.parametrize("pool_cols", (4, *of_blocks(700)))
def test_extreme_values(pool_cols, tail, mode, implementation):
    low, high = -(2**31), 2**31 - 1
    # The first ones: n * (n + 1) leaves int32, and uint32, among the rows of a request.
    lengths = np.array([46_340, 65_535, low, high, 0, -1, 1, high - 2], np.int32)
    pool = np.resize(np.array([low, high, -1, 0, 1, -64, 63], np.int32), (2, pool_cols))
    options = mode_options(mode, 8)
    if mode is ForwardMode.DRAFT_EXTEND:
        options["extend_seq_lens"] = np.array([1, 2, 3, 2, low, 1, 4, 1], np.int32)
    check_broadcast(
        (lengths, lengths[::-1], pool),
        implementation=implementation,
        in_place=True,
        tail=tail,
        num_backends=1,
        forward_mode=mode,
        real_page_size=3,
        nsa_index_topk=100_000,
        **options,
    )


@pytest.mark.parametrize("seed", (0, *of_blocks(1, 2, 3)))
def test_random_cases(seed, implementation):
    """All functions, modes, strategies and options together, of small tables."""
    most = 60 if implementation in interpreted.NAMES else 300
    for case in verify.random_cases(30, seed=seed, cases_per_shape=1):
        cells = len(case.seq_lens) * case.options["max_len"] * case.options["num_backends"]
        if len(case.seq_lens) < 8 and cells < most:
            assert not case.fails(implementation), case.code(implementation)


@pytest.mark.large
@given(data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("mode", TABLE_MODES)
def test_any_shape_and_value(mode, implementation, data):
    """A few random computations, because each is compiled, and any values."""
    seed = data.draw(st.integers(0, 3 if implementation == "xla" else 20), "seed")
    rng = random.Random(f"{mode} {seed}")
    bs, pool_rows, pool_cols = rng.randint(0, 9), rng.randint(1, 4), rng.randint(1, 70)
    int32 = st.integers(-(2**31), 2**31 - 1)

    def vector(values, label):
        return np.array(data.draw(st.lists(values, min_size=bs, max_size=bs), label), np.int32)

    options = {}
    if mode is ForwardMode.TARGET_VERIFY:
        options["num_draft_tokens"] = rng.randint(1, 5)
    if mode is ForwardMode.DRAFT_EXTEND:
        options["extend_seq_lens"] = vector(st.integers(-2, 5) | int32, "extend_seq_lens")
        options["max_total_tokens"] = rng.randint(0, 20)
    page = rng.randint(1, 80)
    in_place = rng.random() < 0.5
    pool = np.random.default_rng(bs).integers(
        -(2**31), 2**31, (pool_rows, pool_cols), dtype=np.int64
    )
    check_broadcast(
        (
            vector(st.integers(-2, pool_cols + 2) | int32, "seq_lens"),
            vector(st.integers(-2, pool_rows + 1) | int32, "req_pool_indices"),
            pool.astype(np.int32),
        ),
        implementation=implementation,
        in_place=in_place,
        num_backends=rng.randint(1, 3),
        forward_mode=mode,
        max_len=rng.randint(1, pool_cols),
        nsa_index_topk=rng.randint(1, 100),
        real_page_size=page,
        wide_table=page == 1 or rng.random() < 0.5,
        stacked=rng.random() < 0.5,
        tail=rng.choice(("copy", "zero", "keep")[: 2 + in_place]),
        strategy=rng.choice(("ultra_fast", "fast", "fallback")),
        **options,
    )


@pytest.mark.large
def test_single_backend_functions(implementation):
    seq_lens, indices, pool = inputs(3, pool_cols=25)
    shared = {"max_len": 22, "nsa_index_topk": 5, "real_page_size": 10}
    calls = {
        "precompute_decode_metadata": ((seq_lens, indices, pool), {}),
        "precompute_target_verify_metadata": ((seq_lens, indices, pool), {"num_draft_tokens": 4}),
        "precompute_draft_extend_metadata": (
            (seq_lens, seq_lens % 4, indices, pool),
            {"max_total_tokens": 9},
        ),
    }
    for name, (arguments, options) in calls.items():
        compute, specify = getattr(jaxnsa, name), getattr(reference, name)
        expected = specify(*arguments, **options, **shared)
        options |= shared | {"implementation": implementation}
        assert_same(compute(*arguments, **options), expected)
        kept = held(expected)
        before = on_device(kept)
        where = pointers(before)
        result = compute(*arguments, out=before, **options)
        del options["implementation"]
        assert_same(result, specify(*arguments, out=kept, **options))
        assert pointers(result) == where


@pytest.mark.parametrize("slack", (None, 5, -2, -(10**6)))
@pytest.mark.parametrize("bs", BATCH_SIZES)
def test_fill_draft_extend_metadata(bs, slack, implementation):
    seq_lens, _, _ = inputs(bs, seed=bs)
    options = mode_options(ForwardMode.DRAFT_EXTEND, bs, seed=bs, slack=slack or 0)
    arguments = {
        "nsa_index_topk": 64,
        "max_total_tokens": None if slack is None else options["max_total_tokens"],
    }
    extend = options["extend_seq_lens"]
    assert_same(
        jaxnsa.fill_draft_extend_metadata(
            extend, seq_lens, implementation=implementation, **arguments
        ),
        reference.fill_draft_extend_metadata(extend, seq_lens, **arguments),
    )


@pytest.mark.parametrize("n", (*BATCH_SIZES, 1024, 1025, *of_blocks(4096, 65_536)))
def test_prefix_sum(n, implementation):
    x = np.random.default_rng(n).integers(-(2**31), 2**31, n).astype(np.int32)
    actual = jaxnsa.prefix_sum(x, implementation=implementation)
    assert_same(actual, reference.prefix_sum(x))


def test_prefix_sum_of_other_integers(implementation):
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32", "int64"):
        x = np.arange(100, dtype=dtype)
        assert_same(jaxnsa.prefix_sum(x, implementation=implementation), reference.prefix_sum(x))


@pytest.mark.parametrize("wide_table, page", ((True, 64), (True, 1), (False, 48)))
@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("pool_cols", (200, *of_blocks(33_003)))
def test_fused_metadata_copy(pool_cols, wide_table, page, in_place, implementation):
    src = reference.precompute_decode_metadata(
        *inputs(3, pool_cols=pool_cols), wide_table=wide_table, real_page_size=page
    )
    out = tuple(on_device(held(src)) for _ in range(3)) if in_place else None
    before = pointers(out)
    device_src = on_device(src)
    copies = jaxnsa.fused_metadata_copy(
        device_src, num_backends=None if in_place else 3, out=out, implementation=implementation
    )
    assert len(copies) == 3
    for copy in copies:
        assert_same(copy, src)
    if in_place:
        assert pointers(copies) == before
    assert len(set(pointers((copies, device_src)))) == 4 * len(jax.tree.leaves(src))


@pytest.mark.large
def test_int64_inputs_are_narrowed(implementation):
    _, _, pool = inputs(9, pool_cols=12)
    wide = np.array([2**40, -(2**40), 5, 2**33 + 1, 0, 7, 8, 9, 10])
    with jax.enable_x64(True):
        for lengths in (jnp.asarray(wide), wide):
            for mode in TABLE_MODES:
                options = mode_options(mode, 9)
                if "extend_seq_lens" in options:
                    options["extend_seq_lens"] = options["extend_seq_lens"].astype(np.int64)
                check_broadcast(
                    (lengths, wide, pool),
                    implementation=implementation,
                    num_backends=1,
                    forward_mode=mode,
                    **options,
                )
        x = jnp.asarray(wide)
        assert_same(jaxnsa.prefix_sum(x, implementation=implementation), reference.prefix_sum(wide))
    check_broadcast((wide, wide, pool), implementation=implementation, num_backends=1)


def test_int64_arrays_that_outlive_x64():
    wide = np.array([2**40, -(2**40), 5])
    with jax.enable_x64(True):
        lengths = jnp.asarray(wide)
    arguments = (lengths, np.arange(3), inputs(3, pool_cols=12)[2])
    check_broadcast(arguments, implementation="xla", num_backends=1)
    ids = BatchTracker.empty(3).step(lengths, lengths)[1].request_ids
    assert ids.tolist() == wide.view(np.int32).reshape(-1, 2).tolist()


def test_results_are_the_same_under_x64(implementation):
    with jax.enable_x64(True):
        for mode in TABLE_MODES[2:] if implementation in interpreted.NAMES else TABLE_MODES:
            check_broadcast(
                inputs(3, pool_cols=9),
                implementation=implementation,
                in_place=True,
                num_backends=1,
                forward_mode=mode,
                **mode_options(mode, 3),
            )
