"""What the demo compares: ways to compute the metadata of a speculative step.

A step has the metadata of N draft backends, all for the same lengths, that of the verification of N
drafts of each request, and that of the extension by those that were accepted.
"""

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa import operations, reference
from jaxnsa.app.launch_count import count_launches
from jaxnsa.app.serving import PAGE_SIZE, Inputs
from jaxnsa.batch_tracker import BatchTracker
from jaxnsa.metadata import FIELDS, Extent, ForwardMode, NSAMetadata

TOPK = 2048
"""The indexer's top-k of DeepSeek V3.2, in tokens."""
_LENGTHS = ("seq_lens", "num_draft_tokens", "extend_seq_lens", "max_total_tokens")
"""What a tracker is told of a step."""


class Contender(Protocol):
    """A way to compute a step, which writes nothing but its own memory."""

    name: str
    in_place: bool
    """Whether it writes live columns only, over what was there."""
    incremental: bool
    """Whether it leaves live columns alone that are there from the step before."""

    def given(self, inputs: Inputs) -> Any:
        """A step's inputs as it takes them, of the same device."""

    def run(self, given: Any) -> Any:
        """Computes a step and returns what `wait` waits for."""

    def wait(self, result: Any) -> None:
        """Waits until a step is done."""

    def metadata(self) -> list[NSAMetadata]:
        """What the last step wrote: N backends', the verification's, the extension's."""

    def launches(self, given: Any) -> int | None:
        """Launches of a step, where they can be told without running it."""


def expected(inputs: Inputs, num_backends: int, out: tuple | None) -> tuple[NSAMetadata, ...]:
    """The metadata of a backend, of the verification and of the extension, by the reference.

    Args:
      inputs: of the step.
      num_backends: N.
      out: what the destinations held; None: a fresh result with tails of 0.
    """
    broadcast: Any = reference.fused_metadata_precompute_and_broadcast
    results = []
    for k, (mode, arguments) in enumerate(modes(inputs, num_backends)):
        options = arguments | {"out": None if out is None else (out[k],)}
        options |= {"tail": "zero"} if out is None else {}
        (metadata,) = broadcast(num_backends=1, forward_mode=mode, nsa_index_topk=TOPK, **options)
        results.append(metadata)
    return tuple(results)


def modes(inputs: Inputs, num_backends: int) -> Iterator[tuple[ForwardMode, dict[str, Any]]]:
    """The forward modes of a step, with what the broadcast takes in them."""
    seq_lens, accepted, indices, pool, _ = inputs
    shared = {"req_pool_indices": indices, "req_to_token": pool, "real_page_size": PAGE_SIZE}
    yield ForwardMode.DECODE, {"seq_lens": seq_lens} | shared
    drafts = {"seq_lens": seq_lens, "num_draft_tokens": num_backends}
    yield ForwardMode.TARGET_VERIFY, drafts | shared
    yield (
        ForwardMode.DRAFT_EXTEND,
        {
            "seq_lens": seq_lens + accepted,
            "extend_seq_lens": accepted,
            "max_total_tokens": len(seq_lens) * num_backends,
        }
        | shared,
    )


def contenders(
    implementation: str | None, chosen: str, num_backends: int, inputs: Inputs
) -> list[Contender]:
    """All that can run here: with PyTorch, on the same device, also its ways.

    Args:
      implementation: that the library is told to take; None: the fastest.
      chosen: that it takes.
      num_backends: N.
      inputs: of a step.
    """
    found: list[Contender] = [
        *(
            Library(implementation, chosen, num_backends, inputs, incremental=incremental)
            for incremental in (False, True)
        ),
        PlainJax(num_backends),
    ]
    if importlib.util.find_spec("torch") is not None:
        from jaxnsa.app import torch_contenders

        found += torch_contenders.contenders(num_backends, inputs)
    return found


class _Jitted:
    """A jitted step.

    Attributes:
      held: what the last step computed, by its forward modes.
    """

    held: list[Any]

    def given(self, inputs: Inputs) -> Inputs:
        """The inputs as they are."""
        return inputs

    def wait(self, result: jax.Array) -> None:
        """Waits for what the step returns."""
        jax.block_until_ready((self.held, result))

    def metadata(self) -> list[NSAMetadata]:
        """All that was computed."""
        return [metadata for backends in self.held for metadata in backends]


class Library(_Jitted):
    """This library in a jitted step, in place.

    If it is incremental, a `BatchTracker` for each mode tells what the step before has written.
    """

    in_place = True

    def __init__(
        self,
        implementation: str | None,
        chosen: str,
        num_backends: int,
        inputs: Inputs,
        *,
        incremental: bool,
    ):
        self.name = "  incremental" if incremental else f"jaxnsa: {chosen}"
        self.incremental = incremental
        compute: Any = functools.partial(
            operations.fused_metadata_precompute_and_broadcast,
            nsa_index_topk=TOPK,
            implementation=implementation,
        )

        def step(held: list[Any], trackers: list[BatchTracker | None], inputs: Inputs) -> Any:
            filled, after = [], []
            each = zip(held, trackers, modes(inputs, num_backends), strict=True)
            for out, tracker, (mode, arguments) in each:
                if tracker is not None:
                    lengths = {k: v for k, v in arguments.items() if k in _LENGTHS}
                    ids = inputs.request_ids
                    written, tracker = tracker.step(ids, forward_mode=mode, **lengths)
                    arguments["written_lens"] = written
                filled.append(
                    compute(num_backends=len(out), forward_mode=mode, out=out, **arguments)
                )
                after.append(tracker)
            return filled, after, _read(filled)

        self._step = jax.jit(step, donate_argnums=0)
        zeros = jax.tree.map(jnp.zeros_like, expected(inputs, num_backends, None))
        decode, *others = (tuple([one]) for one in zeros)
        copies = tuple(jax.tree.map(jnp.copy, decode[0]) for _ in range(num_backends))
        self.held = [copies, *others]
        self._trackers: list[BatchTracker | None] = [
            BatchTracker.empty(len(out[0].seqlens_expanded)) if incremental else None
            for out in self.held
        ]
        self._next_trackers = self._trackers

    def given(self, inputs: Inputs) -> Inputs:
        """The inputs as they are, of a next step, which may run several times."""
        self._trackers = self._next_trackers
        return inputs

    def run(self, given: Inputs) -> jax.Array:
        """The step, jitted."""
        self.held, self._next_trackers, read = self._step(self.held, self._trackers, given)
        return read

    def launches(self, given: Inputs) -> int:
        """Of the compiled step."""
        return count_launches(self._step.lower(self.held, self._trackers, given).compile())


class PlainJax(_Jitted):
    """Plain `jax.numpy` under `jax.jit`, each of N backends computed for itself."""

    name = "plain jnp x N"
    in_place = False
    incremental = False

    def __init__(self, num_backends: int):
        self._num_backends = num_backends

        def step(inputs: Inputs) -> tuple[list[Any], jax.Array]:
            results = []
            for mode, arguments in modes(inputs, num_backends):
                times = num_backends if mode is ForwardMode.DECODE else 1
                each = []
                for _ in range(times):
                    # Without it XLA would merge equal computations into one.
                    inputs = jax.lax.optimization_barrier(inputs)
                    each.append(_plain(mode, **arguments))
                results.append(each)
            return results, _read(results)

        self._step = jax.jit(step)
        self.held = []

    def run(self, given: Inputs) -> jax.Array:
        """The step, jitted."""
        self.held, read = self._step(given)
        return read

    def launches(self, given: Inputs) -> int:
        """Of the compiled step."""
        return count_launches(self._step.lower(given).compile())


def _plain(
    mode: ForwardMode,
    seq_lens: jax.Array,
    req_pool_indices: jax.Array,
    req_to_token: jax.Array,
    real_page_size: int,
    num_draft_tokens: int = 0,
    extend_seq_lens: jax.Array | None = None,
    max_total_tokens: int = 0,
) -> NSAMetadata:
    """What somebody would write who had no library for it."""
    lengths = seq_lens + num_draft_tokens
    bs = len(seq_lens)
    if mode is ForwardMode.DRAFT_EXTEND:
        assert extend_seq_lens is not None
        owner = jnp.repeat(jnp.arange(bs), extend_seq_lens, total_repeat_length=max_total_tokens)
        before = jnp.cumsum(extend_seq_lens) - extend_seq_lens
        row = jnp.arange(max_total_tokens)
        kv_lens = lengths[owner] - extend_seq_lens[owner] + 1 + row - before[owner]
        kv_lens = jnp.where(row < extend_seq_lens.sum(), kv_lens, 0)
    else:
        drafts = max(num_draft_tokens, 1)
        owner = jnp.repeat(jnp.arange(bs), drafts, total_repeat_length=bs * drafts)
        kv_lens = lengths[owner] - drafts + 1 + jnp.tile(jnp.arange(drafts), bs)
    clamped = jnp.minimum(kv_lens, TOPK)
    pages = req_to_token[req_pool_indices[owner]]
    return NSAMetadata(
        cache_seqlens=lengths,
        cu_seqlens_k=jnp.pad(jnp.cumsum(lengths), (1, 0)),
        seqlens_expanded=kv_lens,
        nsa_cache_seqlens=clamped,
        nsa_cu_seqlens_k=jnp.pad(jnp.cumsum(clamped), (1, 0)),
        page_indices=pages,
        real_page_table=pages[:, ::real_page_size] // real_page_size,
    )


def _read(results: list[Any]) -> jax.Array:
    """Something of every array, as attention kernels would read all of it."""
    return sum((array.ravel()[-1] for array in jax.tree.leaves(results)), jnp.int32(0))


def same(actual: NSAMetadata, expected: NSAMetadata, *, whole: bool) -> bool:
    """Whether all arrays are equal: tables as a whole, or as far as they are live."""
    lengths = np.asarray(expected.seqlens_expanded)
    for name, wanted in expected.arrays().items():
        array = getattr(actual, name)
        # A view on the CPU, gone before the array is donated again; a copy elsewhere.
        on_cpu = isinstance(array, jax.Array) and array.platform() == "cpu"
        got = np.from_dlpack(array) if on_cpu else np.asarray(array)
        if not whole and FIELDS[name].extent is Extent.TABLE:
            tokens = PAGE_SIZE if name == "real_page_table" else 1
            live = np.arange(wanted.shape[1]) * tokens < lengths[:, None]
            got, wanted = np.where(live, got, 0), np.where(live, wanted, 0)
        if not np.array_equal(got, wanted):
            return False
    return True
