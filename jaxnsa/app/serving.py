"""A speculative server in small: continuous batching, with a pool and lengths on the device."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa.app.request_traces import Request
from jaxnsa.compilation import compiled

CONTEXT_LENGTH = 65_536
"""Columns of the pool and of the page tables, in tokens."""
PAGE_SIZE = 64
"""Tokens in a physical KV page."""


class Inputs(NamedTuple):
    """What a step's metadata is computed from, on the device or on the host.

    Attributes:
      seq_lens: int32 [bs], KV length of each request before the step.
      accepted: int32 [bs], the drafts of each request that the step accepts, 1 and more.
      req_pool_indices: int32 [bs], each request's row in the pool, a shuffle of all rows.
      req_to_token: int32 [bs, CONTEXT_LENGTH].
      request_ids: int32 [bs], a number for each request that no other ever has.
    """

    seq_lens: np.ndarray | jax.Array
    accepted: np.ndarray | jax.Array
    req_pool_indices: np.ndarray | jax.Array
    req_to_token: np.ndarray | jax.Array
    request_ids: np.ndarray | jax.Array


class Batch:
    """A continuously full batch: a request that finishes makes room for the next one.

    Requests arrive in order, cut to the context; the first ones are already part of the way
    through their output, as in a server that has been running. What the scheduler does is done
    twice, on the host and on the device: a step moves only what a new request or page changes.

    Attributes:
      host: the inputs of the next step on the host.
      device: the same on the device.
    """

    def __init__(
        self, requests: Iterator[Request], batch_size: int, drafts: int, rng: np.random.Generator
    ):
        self._requests = requests
        self._drafts = drafts
        self._rng = rng
        pages = batch_size * (CONTEXT_LENGTH // PAGE_SIZE)
        self._free_pages = rng.permutation(pages).astype(np.int32).tolist()
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._last_lens = np.zeros(batch_size, np.int32)
        self.host = Inputs(
            np.zeros(batch_size, np.int32),
            self._accepted(batch_size),
            rng.permutation(batch_size).astype(np.int32),
            np.zeros((batch_size, CONTEXT_LENGTH), np.int32),
            np.zeros(batch_size, np.int32),
        )
        self._admitted = 0
        for i in range(batch_size):
            self._admit(i)
            first, last = self.host.seq_lens[i], self._last_lens[i]
            self.host.seq_lens[i] = rng.integers(first, last, endpoint=True)
            self._allocate(i)
        self.device = jax.tree.map(jnp.array, self.host)

    def step(self) -> int:
        """Appends the accepted tokens, replaces requests that are done; returns those tokens."""
        seq_lens, accepted, indices, pool, ids = self.host
        tokens = int(accepted.sum())
        seq_lens += accepted
        new = np.flatnonzero(seq_lens >= self._last_lens).tolist()
        for i in new:
            self._free_pages += self._pages[i]
            self._pages[i] = []
            self._admit(i)
        rows = [int(indices[i]) for i in range(len(seq_lens)) if self._allocate(i)]
        next_accepted = self._accepted(len(seq_lens))
        device = self.device
        lengths = _appended(device.seq_lens, device.accepted)
        table, device_ids = device.req_to_token, device.request_ids
        for i in new:
            lengths = _set_element(lengths, i, seq_lens[i])
            device_ids = _set_element(device_ids, i, ids[i])
        for row in rows:
            table = _set_row(table, row, pool[row])
        self.host = self.host._replace(accepted=next_accepted)
        self.device = device._replace(
            seq_lens=lengths,
            accepted=jnp.array(next_accepted),
            req_to_token=table,
            request_ids=device_ids,
        )
        return tokens

    def _accepted(self, batch_size: int) -> np.ndarray:
        return self._rng.integers(1, self._drafts, batch_size, np.int32, endpoint=True)

    def _admit(self, i: int) -> None:
        request = next(self._requests)
        self._admitted += 1
        self.host.request_ids[i] = self._admitted
        longest = CONTEXT_LENGTH - 2 * self._drafts
        self.host.seq_lens[i] = min(request.prompt_tokens, longest)
        self._last_lens[i] = min(request.prompt_tokens + request.output_tokens, longest)

    def _allocate(self, i: int) -> bool:
        """Pages for all tokens of request i and for its drafts; whether any was missing."""
        held = self._pages[i]
        missing = -(-int(self.host.seq_lens[i] + self._drafts) // PAGE_SIZE) - len(held)
        if missing <= 0:
            return False
        held += [self._free_pages.pop() for _ in range(missing)]
        tokens = np.asarray(held, np.int32)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
        self.host.req_to_token[self.host.req_pool_indices[i], : tokens.size] = tokens.ravel()
        return True


@compiled
def _appended(seq_lens: jax.Array, accepted: jax.Array) -> jax.Array:
    return seq_lens + accepted


@compiled
def _set_element(array: jax.Array, i: int, value: int) -> jax.Array:
    return array.at[i].set(value)


_set_row = compiled(lambda pool, row, values: pool.at[row].set(values), donate_argnums=0)
