"""The decode of `sparse_attention.py` in PyTorch, on static tensors that `BackendBuffers` fills.

JAX prefills and hands its cache over. Each draft step, and verification, owns a backend's tensors;
the draft steps are one CUDA graph, before whose replay their metadata is refreshed in place.
"""

from typing import Any, NamedTuple

import torch

from benchmarks.sparse_attention import DRAFTS, PAGE, Cache, Sizes
from jaxnsa import ForwardMode
from jaxnsa.interop.torch import BackendBuffers, DlpackOptions, to_torch


def layer(
    weights: Any,
    cache: Any,
    tokens: torch.Tensor,
    backend: dict[str, torch.Tensor],
    topk: int,
) -> torch.Tensor:
    """Caches a token of each row and returns the most likely next one."""
    lengths, table = backend["seqlens_expanded"], backend["real_page_table"].long()

    def slots(token: torch.Tensor) -> torch.Tensor:
        return table.gather(1, token // PAGE) * PAGE + token % PAGE

    positions = (lengths - 1).long()
    width = weights.embedding.shape[1]
    frequencies = 10_000.0 ** (-torch.arange(width, device=table.device) / width)
    x = weights.embedding[tokens] + torch.sin(positions[:, None] * frequencies)
    own = slots(positions[:, None])[:, 0]
    cache.latents[own] = x @ weights.latent
    cache.index_keys[own] = x @ weights.index_key

    keys = cache.index_keys.view(-1, PAGE, cache.index_keys.shape[1])[table].flatten(1, 2)
    queries = (x @ weights.index_query).unflatten(1, (-1, keys.shape[-1]))
    per_head = torch.relu(torch.einsum("rhd,rnd->rhn", queries, keys))
    scores = torch.einsum("rh,rhn->rn", x @ weights.index_head, per_head)
    is_seen = torch.arange(keys.shape[1], device=table.device) < lengths[:, None]
    scores = scores.masked_fill(~is_seen, -torch.inf)
    best = scores.topk(min(topk, keys.shape[1])).indices
    is_live = (
        torch.arange(best.shape[1], device=table.device) < backend["nsa_cache_seqlens"][:, None]
    )

    latents = cache.latents[slots(best * is_live)]
    queries = (x @ weights.query).unflatten(1, (-1, latents.shape[-1]))
    logits = torch.einsum("rhd,rnd->rhn", queries, latents) * latents.shape[-1] ** -0.5
    probabilities = logits.masked_fill(~is_live[:, None], -torch.inf).softmax(dim=-1)
    read = torch.einsum("rhn,rnd->rhd", probabilities, latents).flatten(1) @ weights.output
    return (read @ weights.embedding.T).argmax(dim=-1).to(torch.int32)


class Step(NamedTuple):
    """What one pass through the layer reads: a backend's tensors, and what fills them."""

    backend: dict[str, torch.Tensor]
    buffers: BackendBuffers
    topk: int

    @classmethod
    def of(cls, bs: int, q: int, topk: int, pool: Any) -> "Step":
        """Of q rows for each of bs requests."""
        shapes = {
            "cache_seqlens": (bs,),
            "cu_seqlens_k": (bs + 1,),
            "seqlens_expanded": (bs * q,),
            "nsa_cache_seqlens": (bs * q,),
            "nsa_cu_seqlens_k": (bs * q + 1,),
            "real_page_table": (bs * q, pool.req_to_token.shape[1] // PAGE),
        }
        device = pool.req_to_token.device
        backend = {
            name: torch.zeros(shape, dtype=torch.int32, device=device)
            for name, shape in shapes.items()
        }
        modes = (ForwardMode.DECODE,) if q == 1 else (ForwardMode.TARGET_VERIFY,)
        portable = DlpackOptions(pool.req_to_token, modes, num_draft_tokens=q)
        buffers = BackendBuffers(
            [backend], nsa_index_topk=topk, real_page_size=PAGE, dlpack=portable
        )
        return cls(backend, buffers, topk)


def generate(
    weights: Any, pool: Any, requests: Any, *, sizes: Sizes, steps: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Takes `steps` speculative steps from where JAX has prefilled.

    Args:
      weights, pool, requests: `Weights`, `Pool` and `Requests` of JAX arrays; they stay the same.
      sizes: of the model.
      steps: how many.

    Returns:
      For each step int32 [bs, DRAFTS + 1] new tokens, and int64 [bs] how many of them are kept.
    """
    weights, pool, requests = to_torch((weights, pool, requests))
    cache = Cache(requests.cache.latents.clone(), requests.cache.index_keys.clone())
    seq_lens, last = requests.seq_lens.clone(), requests.last.clone()
    bs = len(last)
    drafts = [Step.of(bs, 1, sizes.draft_topk, pool) for _ in range(DRAFTS)]
    verify = Step.of(bs, DRAFTS + 1, sizes.topk, pool)
    candidates = last[:, None].repeat(1, DRAFTS + 1)

    def refresh_drafts() -> None:
        for k, step in enumerate(drafts):
            step.buffers.update(seq_lens + k + 1, *pool)

    def draft() -> None:
        for k, step in enumerate(drafts):
            candidates[:, k + 1] = layer(weights, cache, candidates[:, k], step.backend, step.topk)

    refresh_drafts()
    draft()  # what is run for the first time is not to be captured
    replay = draft
    if last.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            draft()
        replay = graph.replay

    results = []
    for _ in range(steps):
        candidates[:, 0] = last
        refresh_drafts()
        replay()
        verify.buffers.update(
            seq_lens, *pool, forward_mode=ForwardMode.TARGET_VERIFY, num_draft_tokens=DRAFTS + 1
        )
        rows = candidates.flatten()
        following = layer(weights, cache, rows, verify.backend, verify.topk).view_as(candidates)
        agrees = candidates[:, 1:] == following[:, :-1]
        kept = 1 + agrees.long().cumprod(dim=1).sum(dim=1)
        last = following.gather(1, kept[:, None] - 1)[:, 0]
        seq_lens = seq_lens + kept
        results.append((following, kept))
    return results
