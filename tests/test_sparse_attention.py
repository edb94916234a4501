"""The worked decode against an oracle in NumPy that knows neither pages nor metadata."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import sparse_attention as worked

PROMPT_LENS = np.array([30, 5, 80], np.int32)
TOKENS = 12  # of each request that are compared
SIZES = worked.Sizes(
    vocabulary=256,
    width=64,
    heads=4,
    latent=32,
    index_heads=4,
    index_key=16,
    topk=20,
    draft_topk=12,
    max_len=128,
)


@pytest.fixture(scope="module")
def problem():
    prompts = np.random.default_rng(0).integers(0, SIZES.vocabulary, PROMPT_LENS.sum())
    pool = worked.scattered_pool(len(PROMPT_LENS), SIZES.max_len)
    return worked.Weights.random(SIZES), pool, prompts.astype(np.int32), PROMPT_LENS


@pytest.fixture(autouse=True)
def _as_precise_as_float32():
    with jax.default_matmul_precision("highest"):
        yield


def generated(problem, sizes, *, steps, drafts):
    """The tokens of each request after its prompt, and how many each step kept."""
    first, tokens, kept = worked.generate(*problem, sizes=sizes, steps=steps, drafts=drafts)
    of_requests = [
        np.concatenate([[first[i]], *(t[i, : k[i]] for t, k in zip(tokens, kept, strict=True))])
        for i in range(len(PROMPT_LENS))
    ]
    return of_requests, np.asarray(kept)


def oracle(problem, topk):
    """The first TOKENS tokens of each request, by attention over the tokens in order."""
    weights, _, prompts, lens = problem
    w = worked.Weights(*(np.asarray(matrix, np.float64) for matrix in weights))
    results = []
    for prompt in np.split(prompts, np.cumsum(lens)[:-1]):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + TOKENS:
            width = w.embedding.shape[1]
            angles = np.arange(len(tokens))[:, None] * 10_000.0 ** (-np.arange(width) / width)
            x = w.embedding[tokens] + np.sin(angles)
            query, latents, keys = x[-1], x @ w.latent, x @ w.index_key
            if topk is not None:
                heads = (query @ w.index_query).reshape(-1, keys.shape[1])
                scores = query @ w.index_head @ np.maximum(heads @ keys.T, 0)
                latents = latents[np.argsort(-scores)[:topk]]
            queries = (query @ w.query).reshape(-1, latents.shape[1])
            logits = queries @ latents.T * latents.shape[1] ** -0.5
            weight = np.exp(logits - logits.max(axis=1, keepdims=True))
            read = weight / weight.sum(axis=1, keepdims=True) @ latents
            tokens.append(int(np.argmax(w.embedding @ (read.reshape(-1) @ w.output))))
        results.append(tokens[len(prompt) :])
    return results


def assert_starts(actual, expected):
    for tokens, wanted in zip(actual, expected, strict=True):
        compared = min(len(tokens), len(wanted))
        assert tokens[:compared].tolist() == wanted[:compared]


def test_a_small_topk_is_that_of_an_oracle_and_drafts_change_no_token(problem):
    expected = oracle(problem, SIZES.topk)
    plain, _ = generated(problem, SIZES, steps=TOKENS - 1, drafts=False)
    assert_starts(plain, expected)
    drafted, kept = generated(problem, SIZES, steps=4, drafts=True)
    assert_starts(drafted, [tokens.tolist() for tokens in plain])
    # Some drafts are kept and some are not, or this would show little.
    assert kept.min() < worked.DRAFTS + 1 and kept.max() > 1


def test_a_topk_above_the_length_is_dense_attention(problem):
    sizes = dataclasses.replace(SIZES, topk=SIZES.max_len)
    drafted, _ = generated(problem, sizes, steps=4, drafts=True)
    assert_starts(drafted, oracle(problem, None))


def test_pytorch_generates_the_same_tokens(problem):
    torch = pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
    from benchmarks import sparse_attention_torch

    steps = 4
    _, expected, expected_kept = worked.generate(*problem, sizes=SIZES, steps=steps, drafts=True)
    weights, pool, prompts, lens = problem
    requests = jax.jit(worked.prefill, static_argnums=1)(weights, SIZES, pool, prompts, lens)
    with torch.no_grad():
        results = sparse_attention_torch.generate(weights, pool, requests, sizes=SIZES, steps=steps)
    for (tokens, kept), wanted, wanted_kept in zip(results, expected, expected_kept, strict=True):
        assert kept.tolist() == wanted_kept.tolist()
        for row, wanted_row, count in zip(tokens.tolist(), wanted, wanted_kept, strict=True):
            assert row[:count] == wanted_row[:count].tolist()
