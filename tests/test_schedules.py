"""The arrays that DeepGEMM, the fused top-k and FlashMLA read: definitions, values, every mode."""

import interpreted
import jax
import numpy as np
import pytest
from helpers import assert_same, check_broadcast, held, inputs, mode_options, on_device

import jaxnsa
from jaxnsa import (
    FlashMlaSchedule,
    ForwardMode,
    PagedMqaSchedule,
    Schedules,
    TopkPlan,
    reference,
)
from jaxnsa.reference_schedules import paged_mqa_schedule, topk_plan

LAYOUTS = ("sm90", "atoms", "legacy", "sm100")
LENGTHS = ("cache_seqlens", "nsa_cache_seqlens", "topk")
KINDS = ("edges", "zero", "equal", "short", "long", "extreme")
PAIRS = ((100, 1), (200, 3), (900, 2), (5000, 9))


def lengths_of(kind, bs, seed=0):
    """Lengths around the sizes of segments and blocks, and those of serving."""
    rng = np.random.default_rng(seed)
    edges = [257, 0, 1024, 1, 64, 4096, 256, 65, 63, 255, 512, 127, 128, 1023]
    values = {
        "edges": lambda: np.resize(edges, bs),  # those that say most first
        "zero": lambda: np.zeros(bs),
        "equal": lambda: np.full(bs, 1024),
        "short": lambda: rng.integers(100, 1200, bs),
        "long": lambda: rng.integers(4096, 65_536, bs),
        "extreme": lambda: rng.choice([0, 2**31 - 1], bs, p=[0.2, 0.8]),
    }
    return values[kind]().astype(np.int32)


def schedules_of(k):
    """All schedules; k varies layouts and sizes."""
    return Schedules(
        paged_mqa=PagedMqaSchedule((132, 7, 66, 1)[k % 4], LAYOUTS[k % 4], per_row=k % 3 == 1),
        topk_plan=TopkPlan(PAIRS, floor=(0, 150)[k % 2]),
        flash_mla=FlashMlaSchedule(
            (66, 132, 2, 1)[k % 4], LENGTHS[k % 3], (5, 3)[k % 2], ("current", "legacy")[k % 2]
        ),
    )


def cases(implementation, bs, k):
    """How many requests, and which lengths; few of both where an interpreter computes."""
    if implementation in interpreted.NAMES:
        return min(bs, 5), sorted({"edges", KINDS[k % len(KINDS)]})
    return bs, KINDS


def check(lengths, schedules, implementation, *, mode=ForwardMode.DECODE, **options):
    """Compares everything with the reference, or sees that the implementation refuses."""
    slow = implementation in interpreted.NAMES
    _, indices, pool = inputs(len(lengths), pool_cols=4 if slow else 12)
    options = {
        "num_backends": 1,
        "forward_mode": mode,
        "real_page_size": 2,
        "wide_table": not slow,
    } | options
    options |= {"schedules": schedules, "implementation": implementation}
    check_broadcast((lengths, indices, pool), **options)


@pytest.mark.parametrize(
    "k, mode, bs, options",
    [
        (
            0,
            ForwardMode.DECODE,
            3,
            {"in_place": True, "num_backends": 2, "backend_offsets": (0, 70)},
        ),
        (1, ForwardMode.TARGET_VERIFY, 7, {"stacked": True, "num_backends": 2}),
        (2, ForwardMode.DRAFT_EXTEND, 7, {"index_kpool": 3, "tail": "zero"}),
        (3, ForwardMode.DECODE, 1, {}),
        (5, ForwardMode.DECODE, 0, {"index_kpool": 2}),
        (5, ForwardMode.TARGET_VERIFY, 0, {"in_place": True}),
        *(
            pytest.param(*values, marks=pytest.mark.large)
            for values in (
                (0, ForwardMode.DECODE, 33, {}),
                (3, ForwardMode.DECODE, 32, {"num_backends": 2}),
                (0, ForwardMode.EXTEND, 3, {"index_kpool": 2}),
                (1, ForwardMode.DECODE, 2, {"index_kpool": 4, "in_place": True, "tail": "zero"}),
                (2, ForwardMode.TARGET_VERIFY, 33, {"index_kpool": 2, "in_place": True}),
                (3, ForwardMode.TARGET_VERIFY, 2, {"in_place": True, "wide_table": False}),
                (3, ForwardMode.DECODE, 3, {"num_backends": 3, "backend_offsets": (1, 0, 1)}),
                (4, ForwardMode.DRAFT_EXTEND, 7, {"stacked": True, "num_backends": 2}),
            )
        ),
    ],
)
def test_schedules(k, mode, bs, options, implementation):
    bs, kinds = cases(implementation, bs, k)
    extra = mode_options(mode, bs, slack=-1)
    for kind in kinds[: 6 if bs else 1]:
        lengths = lengths_of(kind, bs)
        check(
            lengths,
            schedules_of(k),
            implementation,
            mode=mode,
            nsa_index_topk=600,
            **options,
            **extra,
        )


@pytest.mark.large
def test_sums_past_int32_of_lengths_that_pooling_selects_from(implementation):
    # A key more and the pool is full: one key is selected instead of a million.
    bs, num_draft_tokens = 2048, 66
    check(
        np.full(bs, 2**20 - 1 - num_draft_tokens, np.int32),
        Schedules(flash_mla=FlashMlaSchedule(3, "nsa_cache_seqlens", 0)),
        implementation,
        mode=ForwardMode.TARGET_VERIFY,
        num_draft_tokens=num_draft_tokens,
        index_kpool=2**20,
        nsa_index_topk=1,
        max_len=1,
        wide_table=False,
    )


@pytest.mark.parametrize(
    "layout, next_n",
    [
        ("legacy", 3),
        ("atoms", 5),
        ("sm90", 7),
        *(pytest.param(*v, marks=pytest.mark.large) for v in (("atoms", 1), ("sm90", 2))),
        pytest.param("sm100", 8, marks=pytest.mark.large),
    ],
)
def test_layouts_of_several_rows(layout, next_n, implementation):
    schedules = Schedules(paged_mqa=PagedMqaSchedule(13, layout))
    mode = ForwardMode.TARGET_VERIFY
    bs, kinds = cases(implementation, 5, next_n)
    for kind in kinds:
        check(lengths_of(kind, bs), schedules, implementation, mode=mode, num_draft_tokens=next_n)


@pytest.mark.large
@pytest.mark.parametrize("layout", ("atoms", "sm100"))
def test_units_of_an_item_past_int32(layout, implementation):
    if implementation == "pallas":
        pytest.skip("Pallas refuses so many, as test_pallas.py sees on any machine")
    check(
        np.full(1, 2**31 - 1, np.int32),
        Schedules(paged_mqa=PagedMqaSchedule(7, layout)),
        implementation,
        mode=ForwardMode.TARGET_VERIFY,
        num_draft_tokens=600,
        wide_table=False,
    )


@pytest.mark.parametrize(
    "strategy, tail",
    (
        ("fast", "keep"),
        pytest.param("fast", "copy", marks=pytest.mark.large),
        pytest.param("fallback", "zero", marks=pytest.mark.large),
    ),
)
def test_strategies_leave_what_follows_the_plan(strategy, tail, implementation):
    options = {"strategy": strategy, "tail": tail, "in_place": True, "num_backends": 2}
    schedules = Schedules(topk_plan=TopkPlan(PAIRS, floor=70))
    check(lengths_of("edges", 7), schedules, implementation, **options)


def test_copies_of_schedules(implementation):
    schedules = Schedules(PagedMqaSchedule(3, "sm90"), TopkPlan(PAIRS), FlashMlaSchedule(2))
    src = reference.precompute_decode_metadata(*inputs(2), schedules=schedules, wide_table=False)
    (copy,) = jaxnsa.fused_metadata_copy(
        on_device(src), out=(on_device(held(src)),), implementation=implementation
    )
    assert_same(copy, src)


def test_schedules_under_vmap():
    _, indices, pool = inputs(5, pool_cols=4)
    lengths = np.stack([lengths_of(kind, 5) for kind in KINDS])

    def compute(lengths):
        return jaxnsa.precompute_target_verify_metadata(
            lengths,
            indices,
            pool,
            num_draft_tokens=2,
            schedules=schedules_of(0),
            implementation="xla",
        )

    batched = jax.vmap(compute)(lengths)
    for k, row in enumerate(lengths):
        expected = reference.precompute_target_verify_metadata(
            row, indices, pool, num_draft_tokens=2, schedules=schedules_of(0)
        )
        assert_same(jax.tree.map(lambda array, k=k: array[k], batched), expected)


def test_a_constant_schedule_is_computed_while_tracing():
    schedules = Schedules(flash_mla=FlashMlaSchedule(132, "topk"))
    _, indices, pool = inputs(33, pool_cols=4)

    def compute(lengths):
        metadata = jaxnsa.precompute_decode_metadata(
            lengths, indices, pool, schedules=schedules, implementation="xla"
        )
        return metadata.flash_mla_schedule

    jaxpr = jax.make_jaxpr(compute)(lengths_of("long", 33))
    assert "while" not in str(jaxpr)


def test_h200_and_b200_plans():
    lengths = [70_000] * 30 + [100_000] * 45 + [30_000, 40_000]
    assert topk_plan(lengths, TopkPlan.h200())[0] == (98_304, 45)
    assert topk_plan([40_000] * 49, TopkPlan.b200())[0] == (131_072, 0)
    assert topk_plan([40_000] * 48, TopkPlan.b200())[0] == (32_768, 48)
    assert topk_plan([400_000] * 200, TopkPlan.h200())[0] == (393_216, 200)


def test_all_lengths_zero_is_no_work_in_bounds():
    for layout in LAYOUTS:
        schedule = paged_mqa_schedule([0] * 3, 2, PagedMqaSchedule(5, layout))
        a = PagedMqaSchedule(5, layout).units_per_segment(2)
        assert (schedule == [3 * a, 0]).all()


@pytest.mark.parametrize(
    "construct, message",
    [
        (lambda: PagedMqaSchedule(0, "sm90"), "num_sms: got 0, expected an int in"),
        (lambda: PagedMqaSchedule(132, "hopper"), "layout: got 'hopper', expected one of 'legacy'"),
        (lambda: PagedMqaSchedule(132, "sm90", 1), "per_row: got 1, expected True or False"),
        (lambda: TopkPlan(()), "pairs: got 0 of them, expected 1 to 32"),
        (lambda: TopkPlan(3), "pairs: got 3, expected pairs of ints"),
        (lambda: TopkPlan(((5, 1), (5, 2))), r"pairs\[1\]\[0\]: got 5, expected more than 5"),
        (lambda: TopkPlan(((5, -1),)), r"pairs\[0\]\[1\]: got -1, expected an int in"),
        (lambda: FlashMlaSchedule(0), "num_sm_parts: got 0, expected an int in"),
        (lambda: FlashMlaSchedule(8, "dense"), "lengths: got 'dense', expected one of 'topk'"),
        (lambda: FlashMlaSchedule(8, layout="new"), "layout: got 'new', expected one of"),
        (lambda: Schedules(topk_plan=3), "topk_plan: got 3, expected a jaxnsa.TopkPlan or None"),
    ],
)
def test_descriptions_are_checked(construct, message):
    with pytest.raises((ValueError, TypeError), match=message):
        construct()


def test_descriptions_are_static():
    assert TopkPlan([[1, 2], [np.int32(3), 4]]) == TopkPlan(((1, 2), (3, 4)))
    assert len({hash(schedules_of(k)) for k in range(12)} | {hash(schedules_of(0))}) == 12


def test_arguments_are_checked():
    arguments = inputs(3)
    with pytest.raises(TypeError, match="schedules: got TopkPlan, expected a jaxnsa.Schedules"):
        jaxnsa.precompute_decode_metadata(*arguments, schedules=TopkPlan.h200())
    with pytest.raises(ValueError, match="index_kpool: got 0, expected an int in"):
        jaxnsa.precompute_decode_metadata(*arguments, index_kpool=0)
