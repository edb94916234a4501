"""The Triton kernels under Triton's interpreter.

It is chosen when Triton is imported, so `test_triton.py` runs this file in a process of its own.
"""

import jax
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

import jaxnsa
from jaxnsa import ForwardMode, reference
from jaxnsa.app import verify
from jaxnsa.implementations import triton_kernels
from jaxnsa.implementations.triton_kernels.launch import INTERPRET
from jaxnsa.spec import Inputs, Rows, Spec

assert INTERPRET, "set TRITON_INTERPRET=1"

EXTEND = ForwardMode.DRAFT_EXTEND


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("bs", (0, 1, 2, 3, 6, 7, 33, 129))
def test_batch_sizes(bs, mode):
    check_broadcast(
        inputs(bs, pool_cols=6, seed=bs),
        implementation="triton",
        num_backends=1,
        forward_mode=mode,
        real_page_size=5,
        nsa_index_topk=30,
        **mode_options(mode, bs, seed=bs),
    )


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("tail, in_place", (("copy", False), ("zero", True), ("keep", True)))
@pytest.mark.parametrize(
    "pool_cols, max_len, page",
    [
        (37, 37, 1),  # narrower than a tile
        (301, 290, 48),  # no access wider than one element, tiles that are not whole pages
        (640, 600, 700),  # pages wider than the table
        (2304, 2100, 64),  # several tiles
    ],
)
def test_shapes_and_tails(pool_cols, max_len, page, tail, in_place, stacked, mode):
    check_broadcast(
        inputs(3, pool_cols=pool_cols, seed=page),
        implementation="triton",
        in_place=in_place,
        tail=tail,
        num_backends=2,
        stacked=stacked,
        forward_mode=mode,
        max_len=max_len,
        real_page_size=page,
        **mode_options(mode, 3),
    )


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("tail", ("copy", "zero", "keep"))
@pytest.mark.parametrize("page", (2, 64, 2**31 - 1))
def test_without_the_wide_table(page, tail, mode):
    check_broadcast(
        inputs(3, pool_cols=1100),
        implementation="triton",
        in_place=True,
        tail=tail,
        num_backends=2,
        wide_table=False,
        forward_mode=mode,
        real_page_size=page,
        **mode_options(mode, 3, slack=-2),
    )


@pytest.mark.parametrize("programs", (1, 4, 100))
def test_programs_stride_over_tiles(programs):
    """More tiles than programs: the same with any block sizes."""
    lengths, indices, pool = inputs(2, pool_cols=700)
    out = held(reference.precompute_decode_metadata(lengths, indices, pool))
    expected = reference.precompute_decode_metadata(
        lengths, indices, pool, nsa_index_topk=64, tail="keep", out=held(out)
    )
    (result,) = triton_kernels.fused_metadata(
        Inputs(*on_device((lengths, indices, pool)), None),
        (on_device(out),),
        Spec(Rows.of(ForwardMode.DECODE, 2), 700, 64, 64, True, "keep"),
        config=triton_kernels.BlockConfig(tile=64, programs=programs),
    )
    assert_same(result, expected)


@pytest.mark.parametrize("tail", ("copy", "zero", "keep"))
def test_extreme_values(tail):
    low, high = -(2**31), 2**31 - 1
    lengths = np.array([low, high, 0, high - 2], np.int32)
    pool = np.array([[low, high, -1, 0], [1, -64, 63, 64]], np.int32)
    for mode in ForwardMode:
        check_broadcast(
            (lengths, lengths[::-1], pool),
            implementation="triton",
            in_place=True,
            tail=tail,
            num_backends=1,
            forward_mode=mode,
            real_page_size=3,
            **mode_options(mode, 4),
        )
    extend = np.array([2, high, high, 5], np.int32)
    check_broadcast(
        inputs(4, pool_cols=8),
        implementation="triton",
        num_backends=1,
        forward_mode=EXTEND,
        extend_seq_lens=extend,
        max_total_tokens=9,
    )


@pytest.mark.parametrize("n", (0, 1, 2, 7, 100, 1024, 1025, 5000))
def test_prefix_sum(n):
    x = np.random.default_rng(n).integers(-(2**31), 2**31, n).astype(np.int32)
    assert_same(jaxnsa.prefix_sum(x, implementation="triton"), reference.prefix_sum(x))


def test_random_cases():
    """All functions, modes, strategies and options; the largest batches take too long."""
    cases = verify.random_cases(250, seed=11, cases_per_shape=1)
    failing = [case for case in cases if len(case.seq_lens) < 32 and case.fails("triton")]
    assert not failing, failing[0].code("triton")


def test_vmap():
    seq_lens, indices, pool = inputs(3, pool_cols=200)
    batches = np.stack([seq_lens, seq_lens[::-1]])
    result = jax.vmap(
        lambda lens: jaxnsa.precompute_decode_metadata(lens, indices, pool, implementation="triton")
    )(batches)
    for k, lens in enumerate(batches):
        expected = reference.precompute_decode_metadata(lens, indices, pool)
        assert_same(jax.tree.map(lambda array, k=k: array[k], result), expected)
