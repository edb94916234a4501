"""The main job in small: continuous batching, with metadata for N backends at every step."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa import operations, reference
from jaxnsa.app.launch_count import count_launches
from jaxnsa.app.request_traces import Request
from jaxnsa.compilation import compiled
from jaxnsa.metadata import NSAMetadata

CONTEXT_LENGTH = 131_072
"""Columns of the pool and of the page table, in tokens: the context of DeepSeek V3.2."""
PAGE_SIZE = 64
"""Tokens in a physical KV page."""


class Batch:
    """A continuously full batch: a request that finishes makes room for the next one.

    Requests arrive in order, cut to the context; the first ones are already part of the way
    through their output, as in a server that has been running. `req_to_token` exists twice, on
    the host and on the device, and changes only where a request gets a new page.

    Attributes:
      seq_lens: int32 [bs], KV length of each request.
      req_pool_indices: int32 [bs], each request's row in the pool, a shuffle of all rows.
      req_to_token: int32 [bs, CONTEXT_LENGTH] on the device.
      req_to_token_host: the same on the host.
    """

    def __init__(
        self, requests: Iterator[Request], batch_size: int, drafts: int, rng: np.random.Generator
    ):
        self._requests = requests
        self._drafts = drafts
        pages = batch_size * (CONTEXT_LENGTH // PAGE_SIZE)
        self._free_pages = rng.permutation(pages).astype(np.int32).tolist()
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._last_lens = np.zeros(batch_size, np.int32)
        self.seq_lens = np.zeros(batch_size, np.int32)
        self.req_pool_indices = rng.permutation(batch_size).astype(np.int32)
        self.req_to_token_host = np.zeros((batch_size, CONTEXT_LENGTH), np.int32)
        self.req_to_token = jnp.asarray(self.req_to_token_host)
        for i in range(batch_size):
            self._admit(i)
            self.seq_lens[i] = rng.integers(self.seq_lens[i], self._last_lens[i], endpoint=True)
            self._allocate(i)

    def step(self) -> None:
        """Decodes one token of every request and makes room for its draft tokens."""
        for i in range(len(self.seq_lens)):
            if self.seq_lens[i] >= self._last_lens[i]:
                self._free_pages += self._pages[i]
                self._pages[i] = []
                self._admit(i)
            else:
                self.seq_lens[i] += 1
            self._allocate(i)

    def _admit(self, i: int) -> None:
        request = next(self._requests)
        longest = CONTEXT_LENGTH - self._drafts
        self.seq_lens[i] = min(request.prompt_tokens, longest)
        self._last_lens[i] = min(request.prompt_tokens + request.output_tokens, longest)

    def _allocate(self, i: int) -> None:
        """Pages for all tokens of request i and for its drafts."""
        held = self._pages[i]
        missing = -(-int(self.seq_lens[i] + self._drafts) // PAGE_SIZE) - len(held)
        if missing <= 0:
            return
        held += [self._free_pages.pop() for _ in range(missing)]
        row = self.req_pool_indices[i]
        tokens = np.asarray(held, np.int32)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
        self.req_to_token_host[row, : tokens.size] = tokens.ravel()
        self.req_to_token = _set_row(self.req_to_token, row, self.req_to_token_host[row])


def bytes_needed(batch_size: int, num_backends: int) -> int:
    """Memory that the simulation takes: pools, page tables, and those of the loop and the check."""
    table = batch_size * CONTEXT_LENGTH * 4
    return 2 * table + (2 * num_backends + 1) * (table + table // PAGE_SIZE)


@functools.partial(compiled, donate_argnums=0)
def _set_row(pool: jax.Array, row: int, values: jax.Array) -> jax.Array:
    return pool.at[row].set(values)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a demo did.

    Attributes:
      tokens: tokens decoded.
      latencies: seconds of each step's metadata, from the call to the finished arrays.
      loop_latencies: seconds of each step's NumPy loop, which moves the same live bytes.
      live_bytes: bytes of live table columns that each step wrote, on average.
      launches: launches per step.
      mismatches: steps whose metadata was not the reference's.
    """

    tokens: int
    latencies: list[float]
    loop_latencies: list[float]
    live_bytes: float
    launches: int
    mismatches: int


def run(
    requests: Iterator[Request],
    *,
    batch_size: int,
    num_backends: int,
    steps: int,
    implementation: str,
    seed: int,
    progress: Callable[[int], object],
) -> Report:
    """Runs the simulation, checking every step against the reference.

    Args:
      requests: endless.
      batch_size: requests in the batch.
      num_backends: draft steps, each with its own metadata buffers.
      steps: decode steps to run.
      implementation: name of the implementation that computes the metadata.
      seed: of everything random.
      progress: called with the number of finished steps.
    """
    batch = Batch(requests, batch_size, num_backends, np.random.default_rng(seed))
    compute = functools.partial(
        operations.fused_metadata_precompute_and_broadcast,
        num_backends=num_backends,
        real_page_size=PAGE_SIZE,
        implementation=implementation,
    )
    initial: Any = compute(batch.seq_lens, batch.req_pool_indices, batch.req_to_token)
    expected = jax.tree.map(np.array, initial[0])
    looped = jax.tree.map(np.array, initial)
    step = (
        jax.jit(lambda out, *inputs: compute(*inputs, out=out), donate_argnums=0)
        .lower(initial, batch.seq_lens, batch.req_pool_indices, batch.req_to_token)
        .compile()
    )
    buffers = compute(batch.seq_lens, batch.req_pool_indices, batch.req_to_token, out=initial)

    latencies, loop_latencies, live_bytes, mismatches = [], [], 0, 0
    for done in range(1, steps + 1):
        batch.step()
        inputs = (batch.seq_lens.copy(), batch.req_pool_indices, batch.req_to_token)
        jax.block_until_ready((inputs, buffers))
        start = time.perf_counter()
        buffers = jax.block_until_ready(compute(*inputs, out=buffers))
        latencies.append(time.perf_counter() - start)

        host_inputs = (batch.seq_lens, batch.req_pool_indices, batch.req_to_token_host)
        start = time.perf_counter()
        live_bytes += numpy_loop(*host_inputs, looped)
        loop_latencies.append(time.perf_counter() - start)

        reference.precompute_decode_metadata(*host_inputs, real_page_size=PAGE_SIZE, out=expected)
        mismatches += not all(same(buffer, expected) for buffer in buffers)
        progress(done)
    return Report(
        tokens=steps * batch_size,
        latencies=latencies,
        loop_latencies=loop_latencies,
        live_bytes=live_bytes / steps,
        launches=count_launches(step),
        mismatches=mismatches,
    )


def same(actual: NSAMetadata, expected: NSAMetadata) -> bool:
    """Whether all arrays are equal."""

    def equal(array: jax.Array, wanted: np.ndarray) -> bool:
        # A view on the CPU, gone before the array is donated again; a copy elsewhere.
        view = np.from_dlpack(array) if array.platform() == "cpu" else np.array(array)  # type: ignore[arg-type]
        return np.array_equal(view, wanted)

    return all(jax.tree.leaves(jax.tree.map(equal, actual, expected)))


def numpy_loop(
    seq_lens: np.ndarray,
    req_pool_indices: np.ndarray,
    req_to_token: np.ndarray,
    backends: tuple[NSAMetadata, ...],
) -> int:
    """The live table columns of all backends, row by row; returns the bytes written."""
    written = 0
    for backend in backends:
        wide: Any = backend.page_indices
        real: Any = backend.real_page_table
        for i, (length, row) in enumerate(zip(seq_lens, req_pool_indices, strict=True)):
            tokens = req_to_token[row, :length]
            wide[i, :length] = tokens
            pages = tokens[::PAGE_SIZE] // PAGE_SIZE
            real[i, : len(pages)] = pages
            written += tokens.nbytes + pages.nbytes
    return written
