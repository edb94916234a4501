"""Consumers that JAX brings, fed with the metadata: they attend to what dense attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

import jaxnsa

PAGE, BS, MAX_LEN, HEADS, DIM = 4, 3, 32, 2, 16
ROWS = 12  # of queries, padding among them, so that all modes share a compilation
KV_LENS = np.array([9, 30, 4], np.int32)  # new tokens counted
NEW_TOKENS = {
    "decode": [1, 1, 1],
    "target verify": [3, 3, 3],
    "draft extend": [2, 1, 4],
    "prefill": [7, 1, 4],  # a chunk, a decoding request and a prompt
}


class Cache:
    """Keys and values of every token, in order and in physical pages in another order."""

    def __init__(self):
        rng = np.random.default_rng(0)
        pages = MAX_LEN // PAGE
        physical = rng.permutation(2 * BS * pages)[: BS * pages].reshape(BS, pages)
        self.slots = np.array([2, 0, 1], np.int32)  # rows of the pool
        tokens = np.arange(MAX_LEN)
        self.pool = (physical[:, tokens // PAGE] * PAGE + tokens % PAGE).astype(np.int32)
        self.kv = rng.normal(size=(2 * BS * pages, PAGE, 2, DIM)).astype(np.float32)
        self.queries = rng.normal(size=(ROWS, HEADS, DIM)).astype(np.float32)

    def dense(self, new_tokens):
        """Attention of each new token over the tokens up to it, request by request."""
        rows = []
        for i, (kv_len, new) in enumerate(zip(KV_LENS, new_tokens, strict=True)):
            slots = self.pool[self.slots[i]]
            for seen in range(kv_len - new + 1, kv_len + 1):
                keys, values = self.kv.reshape(-1, 2, DIM)[slots[:seen]].swapaxes(0, 1)
                logits = self.queries[len(rows)] @ keys.T
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                rows.append(weights / weights.sum(axis=1, keepdims=True) @ values)
        return np.stack(rows)


@pytest.fixture(scope="module")
def cache():
    return Cache()


def nsa_metadata(mode, cache):
    """The metadata, and a row of `real_page_table` and the tokens that it sees for each query."""
    new, options = np.array(NEW_TOKENS[mode], np.int32), {"real_page_size": PAGE}
    if mode == "decode":
        m = jaxnsa.precompute_decode_metadata(KV_LENS, cache.slots, cache.pool, **options)
        return m.real_page_table, m.cache_seqlens
    if mode == "target verify":
        m = jaxnsa.precompute_target_verify_metadata(
            KV_LENS - 3, cache.slots, cache.pool, num_draft_tokens=3, **options
        )
        return m.real_page_table, m.seqlens_expanded
    extend = (
        jaxnsa.precompute_draft_extend_metadata
        if mode == "draft extend"
        else jaxnsa.precompute_extend_metadata
    )
    m = extend(KV_LENS, new, cache.slots, cache.pool, max_total_tokens=ROWS, **options)
    if mode == "prefill":
        return m.real_page_table[m.token_to_request], m.seqlens_expanded
    return m.real_page_table, m.seqlens_expanded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jax 0.11 means to remove it
@pytest.mark.parametrize("mode", NEW_TOKENS)
def test_paged_attention(mode, cache):
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    table, lengths = nsa_metadata(mode, cache)
    padding = ROWS - len(lengths)
    keys, values = jnp.moveaxis(jnp.asarray(cache.kv), 2, 0)[:, None]
    result = paged_attention(
        jnp.asarray(cache.queries),
        keys,
        values,
        jnp.pad(table, ((0, padding), (0, 0))),
        jnp.pad(lengths, (0, padding), constant_values=1),
        k_splits=1,
        interpret=jax.default_backend() == "cpu",
    )
    expected = cache.dense(NEW_TOKENS[mode])
    np.testing.assert_allclose(result[: len(expected)], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mode", NEW_TOKENS)
def test_ragged_paged_attention(mode, cache):
    new = np.array(NEW_TOKENS[mode], np.int32)
    m = jax.jit(
        lambda *arrays: jaxnsa.ragged_paged_attention_metadata(
            *arrays, page_size=PAGE, max_num_seqs=BS + 2
        )
    )(KV_LENS, new, cache.slots, cache.pool)
    attend = {"kv_lens": m.kv_lens, "page_indices": m.page_indices, "cu_q_lens": m.cu_q_lens}
    result = ref_ragged_paged_attention(
        jnp.asarray(cache.queries), jnp.asarray(cache.kv), num_seqs=m.num_seqs, **attend
    )
    np.testing.assert_allclose(result, cache.dense(new), rtol=1e-4, atol=1e-5)


def test_ragged_paged_attention_metadata(cache):
    m = jax.jit(
        lambda num_seqs: jaxnsa.ragged_paged_attention_metadata(
            np.array([9, -2, 33, 8, 5]),
            np.array([1, 0, 3, 1, 9]),
            np.array([2, 0, 9, 1, 0]),
            cache.pool,
            page_size=PAGE,
            num_seqs=num_seqs,
            max_num_seqs=6,
            max_len=10,
            max_total_pages=13,
        )
    )(4)
    pages = cache.pool[:, ::PAGE] // PAGE
    table = [pages[2, :3], [0] * 3, pages[2, :3], [*pages[1, :2], 0], [0] * 3, [0] * 3]
    assert m.kv_lens.tolist() == [9, 0, 33, 8, 0, 0]
    assert m.cu_q_lens.tolist() == [0, 1, 1, 4, 5, 5, 5]
    assert m.page_indices.tolist() == [list(row) for row in table]
    assert m.cu_kv_lens.tolist() == [0, 12, 12, 48, 56, 56, 56]
    assert m.flat_page_indices.tolist() == [*pages[2, :3], *pages[2, :3], *[0] * 6, pages[1, 0]]
    assert m.distribution.tolist() == [2, 3, 4]
    assert m.num_seqs.tolist() == [4]
    assert {array.dtype for array in jax.tree.leaves(m)} == {jnp.dtype("int32")}


def test_ragged_paged_attention_metadata_of_single_tokens(cache):
    m = jaxnsa.ragged_paged_attention_metadata(KV_LENS, None, cache.slots, cache.pool, page_size=1)
    tokens = [cache.pool[s, :n] for s, n in zip(cache.slots, KV_LENS, strict=True)]
    assert m.flat_page_indices[:43].tolist() == np.concatenate(tokens).tolist()
    assert m.cu_kv_lens.tolist() == [0, 9, 39, 43]
    assert m.distribution.tolist() == [3, 3, 3]


def test_ragged_paged_attention_metadata_lowers_for_tpu(cache):
    step = jax.jit(lambda *arrays: jaxnsa.ragged_paged_attention_metadata(*arrays, page_size=PAGE))
    lowered = step.trace(KV_LENS, KV_LENS, cache.slots, cache.pool).lower(
        lowering_platforms=("tpu",)
    )
    assert "custom_call" not in lowered.as_text()


@pytest.mark.parametrize(
    "change, message",
    (
        ({"page_size": 0}, "page_size: got 0"),
        ({"page_size": 4, "max_num_seqs": 2}, "max_num_seqs: got 2"),
        ({"page_size": 4, "max_total_pages": -1}, "max_total_pages: got -1"),
        ({"page_size": 4, "max_len": 99}, "max_len: got 99"),
    ),
)
def test_ragged_paged_attention_metadata_says_what_is_wrong(change, message, cache):
    with pytest.raises(ValueError, match=message):
        jaxnsa.ragged_paged_attention_metadata(KV_LENS, None, cache.slots, cache.pool, **change)
