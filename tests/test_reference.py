"""The reference against results worked out by hand from the specification."""

import numpy as np
import pytest
from helpers import TABLE_MODES

from jaxnsa import ForwardMode, reference

POOL = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [80, 81, 82, 83, 84, 85, 86, 87],
        [-1, 161, 162, 163, 164, 165, 166, 167],
    ],
    np.int32,
)


def lists(metadata):
    return {name: array.tolist() for name, array in metadata.arrays().items()}


def test_decode():
    metadata = reference.precompute_decode_metadata(
        [3, 0, 5], [1, 0, 2], POOL, max_len=6, nsa_index_topk=4, real_page_size=4
    )
    assert lists(metadata) == {
        "cache_seqlens": [3, 0, 5],
        "cu_seqlens_k": [0, 3, 3, 8],
        "seqlens_expanded": [3, 0, 5],
        "nsa_cache_seqlens": [3, 0, 4],
        "nsa_cu_seqlens_k": [0, 3, 3, 7],
        "page_indices": [
            [80, 81, 82, 83, 84, 85],
            [0, 1, 2, 3, 4, 5],
            [-1, 161, 162, 163, 164, 165],
        ],
        "real_page_table": [[20, 21], [0, 1], [-1, 41]],
    }


def test_target_verify_with_zero_tails():
    metadata = reference.precompute_target_verify_metadata(
        [2, -9], [1, 7], POOL, num_draft_tokens=2, nsa_index_topk=3, real_page_size=2, tail="zero"
    )
    assert lists(metadata) == {
        "cache_seqlens": [4, 2],
        "cu_seqlens_k": [0, 4, 6],
        "seqlens_expanded": [3, 4, 1, 2],
        "nsa_cache_seqlens": [3, 3, 1, 2],
        "nsa_cu_seqlens_k": [0, 3, 6, 7, 9],
        "page_indices": [
            [80, 81, 82, 0, 0, 0, 0, 0],
            [80, 81, 82, 83, 0, 0, 0, 0],
            [-1, 0, 0, 0, 0, 0, 0, 0],
            [-1, 161, 0, 0, 0, 0, 0, 0],
        ],
        "real_page_table": [[40, 41, 0, 0], [40, 41, 0, 0], [-1, 0, 0, 0], [-1, 0, 0, 0]],
    }


def test_draft_extend_with_spare_capacity():
    metadata = reference.precompute_draft_extend_metadata(
        [5, 1, 3], [2, 3, 0], [0, 1, 2], POOL, max_total_tokens=7, max_len=3, real_page_size=1
    )
    assert lists(metadata) == {
        "cache_seqlens": [5, 1, 3],
        "cu_seqlens_k": [0, 5, 6, 9],
        "seqlens_expanded": [4, 5, 0, 0, 1, 0, 0],
        "nsa_cache_seqlens": [4, 5, 0, 0, 1, 0, 0],
        "nsa_cu_seqlens_k": [0, 4, 9, 9, 9, 10, 10, 10],
        "page_indices": [[0, 1, 2]] * 2 + [[80, 81, 82]] * 3 + [[0, 0, 0]] * 2,
    }


def test_extend():
    metadata = reference.precompute_extend_metadata(
        [5, 1, 3],
        [2, 3, 1],
        [1, 0, 2],
        POOL,
        max_total_tokens=7,
        max_total_keys=11,
        max_len=4,
        real_page_size=2,
        nsa_index_topk=4,
        tail="zero",
    )
    assert lists(metadata) == {
        "cache_seqlens": [5, 1, 3],
        "cu_seqlens_k": [0, 5, 6, 9],
        "seqlens_expanded": [4, 5, 0, 0, 1, 3, 0],
        "nsa_cache_seqlens": [4, 4, 0, 0, 1, 3, 0],
        "nsa_cu_seqlens_k": [0, 4, 8, 8, 8, 9, 12, 12],
        "page_indices": [[80, 81, 82, 83], [0, 0, 0, 0], [-1, 161, 162, 0]],
        "real_page_table": [[40, 41], [0, 0], [-1, 81]],
        "token_to_request": [0, 0, 1, 1, 1, 2, 0],
        "indexer_ks": [0, 0, 5, 5, 5, 6, 0],
        "indexer_ke": [4, 5, 5, 5, 6, 9, 0],
        "topk_indices_offset": [0, 0, 5, 5, 5, 6, 0],
        "flat_page_indices": [80, 81, 82, 83, 0, 0, -1, 161, 162, 0, 0],
    }


def test_draft_extend_beyond_capacity_stops_there():
    lengths = reference.fill_draft_extend_metadata(
        [3, 4], [9, 9], nsa_index_topk=8, max_total_tokens=5
    )
    assert lengths.seqlens_expanded.tolist() == [7, 8, 9, 6, 7]
    assert lengths.nsa_cache_seqlens.tolist() == [7, 8, 8, 6, 7]
    assert lengths.total_tokens == 7


def test_keep_writes_the_live_columns_only():
    held = reference.precompute_decode_metadata([0, 0], [0, 1], POOL, real_page_size=4)
    for array in held.arrays().values():
        array[:] = -7
    reference.precompute_decode_metadata([3, 5], [0, 1], POOL, real_page_size=4, out=held)
    assert held.page_indices.tolist() == [
        [0, 1, 2, -7, -7, -7, -7, -7],
        [80, 81, 82, 83, 84, -7, -7, -7],
    ]
    assert held.real_page_table.tolist() == [[0, -7], [20, 21]]
    assert held.cu_seqlens_k.tolist() == [0, 3, 8]


def test_every_backend_has_its_own_arrays():
    first, second = reference.fused_metadata_precompute_and_broadcast(
        [3], [0], POOL, num_backends=2
    )
    assert first.page_indices is not second.page_indices
    stacked = reference.fused_metadata_precompute_and_broadcast(
        [3], [0], POOL, num_backends=2, stacked=True
    )
    assert stacked.page_indices.shape == (2, 1, 8)


@pytest.mark.parametrize("mode", TABLE_MODES)
def test_empty_batch(mode):
    options = {
        ForwardMode.DECODE: {},
        ForwardMode.TARGET_VERIFY: {"num_draft_tokens": 2},
        ForwardMode.DRAFT_EXTEND: {"extend_seq_lens": [], "max_total_tokens": 0},
    }[mode]
    (metadata,) = reference.fused_metadata_precompute_and_broadcast(
        [], [], POOL, num_backends=1, forward_mode=mode, **options
    )
    assert metadata.cu_seqlens_k.tolist() == [0]
    assert metadata.nsa_cu_seqlens_k.tolist() == [0]
    assert metadata.cache_seqlens.shape == (0,)
    assert metadata.page_indices.shape == (0, 8)


def test_lengths_are_int32_and_wrap():
    assert reference.prefix_sum([2**31 - 1, 1]).tolist() == [0, 2**31 - 1, -(2**31)]
    metadata = reference.precompute_decode_metadata([2**40, -(2**40)], [0, 0], POOL)
    assert metadata.cache_seqlens.tolist() == [2**31 - 1, 0]
