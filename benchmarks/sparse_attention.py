"""A DeepSeek sparse-attention decode, small and complete: `python -m benchmarks sparse-attention`.

One layer of a language model with greedy decoding. A paged cache holds, for each token, a latent
that is both key and value of its attention, and a key of the indexer, which scores all tokens that
a query sees and leaves the best `topk` of them to the attention (DeepSeek-V3.2, section 2.1). All
of it reads where tokens are, and how many, from jaxnsa's metadata. Prompts are prefilled in one
step; then each step drafts DRAFTS tokens, verifies them together, and keeps those that decoding
without drafts would have produced.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnsa

DRAFTS = 3
PAGE = 64
PAGES: Any = {"real_page_size": PAGE, "wide_table": False}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model and of its cache; the defaults of the attention are those of DeepSeek-V3.2.

    Attributes:
      vocabulary, width: tokens, and the size of what stands for one in the model.
      heads, latent: attention heads, and the size of a cached latent.
      index_heads, index_key: heads of the indexer, and the size of a cached key.
      topk: tokens that a query attends to; DRAFTS are made with `draft_topk`, which is cheaper.
      max_len: tokens that a request may have.
    """

    vocabulary: int = 4096
    width: int = 512
    heads: int = 64
    latent: int = 576
    index_heads: int = 64
    index_key: int = 128
    topk: int = 2048
    draft_topk: int = 256
    max_len: int = 8192


class Weights(NamedTuple):
    """The model: float32 matrices, of [tokens, width] and [width, ...]."""

    embedding: jax.Array
    latent: jax.Array
    query: jax.Array
    index_key: jax.Array
    index_query: jax.Array
    index_head: jax.Array
    output: jax.Array

    @classmethod
    def random(cls, sizes: Sizes, seed: int = 0) -> "Weights":
        """A model that nobody trained."""
        s = sizes
        shapes = [
            (s.vocabulary, s.width),
            (s.width, s.latent),
            (s.width, s.heads * s.latent),
            (s.width, s.index_key),
            (s.width, s.index_heads * s.index_key),
            (s.width, s.index_heads),
            (s.heads * s.latent, s.width),
        ]
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        scales = [1.0, *(shape[0] ** -0.5 for shape in shapes[1:])]
        drawn = zip(keys, shapes, scales, strict=True)
        return cls(*(scale * jax.random.normal(key, shape) for key, shape, scale in drawn))


class Cache(NamedTuple):
    """What is kept of each token, by its KV slot: float32 [slots, latent], [slots, index_key]."""

    latents: jax.Array
    index_keys: jax.Array


class Queries(NamedTuple):
    """The tokens of a step, a row each, and what the metadata says about them.

    Attributes:
      tokens: int32 [rows].
      page_table: int32 [rows, pages], the physical pages of the row's request.
      lengths: int32 [rows], tokens that the row sees, itself the last; 0 for padding.
      selected: int32 [rows], how many of them the attention reads.
    """

    tokens: jax.Array
    page_table: Any
    lengths: Any
    selected: Any

    @classmethod
    def of(cls, tokens: jax.Array, metadata: jaxnsa.NSAMetadata) -> "Queries":
        """Of a step of any kind; in prefill, the tokens of a request share its table row."""
        table: Any = metadata.real_page_table
        if metadata.token_to_request is not None:
            table = table[metadata.token_to_request]
        return cls(tokens, table, metadata.seqlens_expanded, metadata.nsa_cache_seqlens)

    def slots(self, token: jax.Array) -> jax.Array:
        """The KV slots of tokens [rows, n] of each row's request."""
        pages = jnp.take_along_axis(self.page_table, token // PAGE, axis=1)
        return pages * PAGE + token % PAGE


def embed(weights: Weights, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """[rows, width], of tokens at positions."""
    width = weights.embedding.shape[1]
    angles = positions[:, None] * 10_000.0 ** (-jnp.arange(width) / width)
    return weights.embedding[tokens] + jnp.sin(angles)


def index_scores(weights: Weights, x: jax.Array, keys: jax.Array) -> jax.Array:
    """[rows, n], what the indexer thinks of keys [rows, n, index_key] for queries [rows, width]."""
    queries = (x @ weights.index_query).reshape(len(x), -1, keys.shape[-1])
    per_head = jax.nn.relu(jnp.einsum("rhd,rnd->rhn", queries, keys))
    return jnp.einsum("rh,rhn->rn", x @ weights.index_head, per_head)


def attend(weights: Weights, x: jax.Array, latents: jax.Array, live: jax.Array) -> jax.Array:
    """[rows, width], of queries over the live ones of latents [rows, n, latent]."""
    queries = (x @ weights.query).reshape(len(x), -1, latents.shape[-1])
    logits = jnp.einsum("rhd,rnd->rhn", queries, latents) * latents.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(jnp.where(live[:, None], logits, -jnp.inf), axis=-1)
    read = jnp.einsum("rhn,rnd->rhd", jnp.where(live[:, None], probabilities, 0), latents)
    return read.reshape(len(x), -1) @ weights.output


def layer(weights: Weights, cache: Cache, queries: Queries, topk: int) -> tuple[Cache, jax.Array]:
    """Caches the tokens of a step and returns, for each, the most likely next one."""
    x = embed(weights, queries.tokens, queries.lengths - 1)
    exists = queries.lengths > 0
    own = queries.slots(jnp.maximum(queries.lengths - 1, 0)[:, None])[:, 0]
    own = jnp.where(exists, own, len(cache.latents))  # past the cache: padding is dropped
    cache = Cache(
        cache.latents.at[own].set(x @ weights.latent, mode="drop"),
        cache.index_keys.at[own].set(x @ weights.index_key, mode="drop"),
    )
    pages = cache.index_keys.reshape(-1, PAGE, cache.index_keys.shape[1])[queries.page_table]
    keys = pages.reshape(len(x), -1, pages.shape[-1])
    is_seen = jnp.arange(keys.shape[1]) < queries.lengths[:, None]
    scores = jnp.where(is_seen, index_scores(weights, x, keys), -jnp.inf)
    _, best = jax.lax.top_k(scores, min(topk, keys.shape[1]))
    live = jnp.arange(best.shape[1]) < queries.selected[:, None]
    latents = cache.latents[queries.slots(jnp.where(live, best, 0))]
    read = attend(weights, x, latents, live)
    return cache, jnp.argmax(read @ weights.embedding.T, axis=-1).astype(jnp.int32)


class Requests(NamedTuple):
    """The requests of a step and what has become of them.

    Attributes:
      cache: of all tokens but the last one of each request.
      seq_lens: int32 [bs], how many these are.
      last: int32 [bs], the last token of each request.
    """

    cache: Cache
    seq_lens: jax.Array
    last: jax.Array


class Pool(NamedTuple):
    """Where tokens are: int32 [bs] rows of int32 [pool_rows, pool_cols] KV slots."""

    req_pool_indices: jax.Array
    req_to_token: jax.Array


def prefill(
    weights: Weights, sizes: Sizes, pool: Pool, prompts: jax.Array, prompt_lens: jax.Array
) -> Requests:
    """All prompts in one step: int32 [total] tokens, one prompt behind the other."""
    metadata = jaxnsa.precompute_extend_metadata(
        prompt_lens,
        prompt_lens,
        *pool,
        max_total_tokens=len(prompts),
        nsa_index_topk=sizes.topk,
        **PAGES,
    )
    slots = pool.req_to_token.size
    empty = Cache(jnp.zeros((slots, sizes.latent)), jnp.zeros((slots, sizes.index_key)))
    cache, following = layer(weights, empty, Queries.of(prompts, metadata), sizes.topk)
    return Requests(cache, prompt_lens, following[jnp.cumsum(prompt_lens) - 1])


def decode(weights: Weights, pool: Pool, requests: Requests, topk: int) -> Requests:
    """One token for each request."""
    metadata = jaxnsa.precompute_decode_metadata(
        requests.seq_lens + 1, *pool, nsa_index_topk=topk, **PAGES
    )
    cache, last = layer(weights, requests.cache, Queries.of(requests.last, metadata), topk)
    return Requests(cache, requests.seq_lens + 1, last)


def speculate(
    weights: Weights, sizes: Sizes, pool: Pool, requests: Requests
) -> tuple[Requests, tuple[jax.Array, jax.Array]]:
    """DRAFTS cheap tokens for each request, of which those are kept that `decode` would produce.

    Returns:
      The requests, int32 [bs, DRAFTS + 1] new tokens, and int32 [bs] how many of them are kept.
    """
    drafted, tokens = requests, [requests.last]
    for _ in range(DRAFTS):
        drafted = decode(weights, pool, drafted, sizes.draft_topk)
        tokens.append(drafted.last)
    candidates = jnp.stack(tokens, axis=1)
    metadata = jaxnsa.precompute_target_verify_metadata(
        requests.seq_lens,
        *pool,
        num_draft_tokens=DRAFTS + 1,
        nsa_index_topk=sizes.topk,
        **PAGES,
    )
    queries = Queries.of(candidates.reshape(-1), metadata)
    cache, following = layer(weights, drafted.cache, queries, sizes.topk)
    following = following.reshape(candidates.shape)
    agrees = candidates[:, 1:] == following[:, :-1]
    kept = 1 + jnp.cumprod(agrees, axis=1).sum(axis=1, dtype=jnp.int32)
    last = jnp.take_along_axis(following, kept[:, None] - 1, axis=1)[:, 0]
    return Requests(cache, requests.seq_lens + kept, last), (following, kept)


@functools.partial(jax.jit, static_argnames=("sizes", "steps", "drafts"))
def generate(
    weights: Weights,
    pool: Pool,
    prompts: jax.Array,
    prompt_lens: jax.Array,
    *,
    sizes: Sizes,
    steps: int,
    drafts: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prefills, then takes `steps` steps, with or without drafts, all of it on the device.

    Returns:
      int32 [bs] first tokens, int32 [steps, bs, n] new tokens and int32 [steps, bs] how many count.
    """
    first = prefill(weights, sizes, pool, prompts, prompt_lens)

    def step(requests: Requests, _: None) -> tuple[Requests, tuple[jax.Array, jax.Array]]:
        if drafts:
            return speculate(weights, sizes, pool, requests)
        requests = decode(weights, pool, requests, sizes.topk)
        return requests, (requests.last[:, None], jnp.ones_like(requests.last))

    _, (tokens, kept) = jax.lax.scan(step, first, None, length=steps)
    return first.last, tokens, kept


def scattered_pool(bs: int, max_len: int) -> Pool:
    """Requests whose pages lie anywhere in the cache."""
    pages = np.random.default_rng(0).permutation(bs * max_len // PAGE).reshape(bs, -1)
    tokens = np.arange(max_len)
    req_to_token = pages[:, tokens // PAGE] * PAGE + tokens % PAGE
    return Pool(jnp.arange(bs)[::-1], jnp.asarray(req_to_token, jnp.int32))
