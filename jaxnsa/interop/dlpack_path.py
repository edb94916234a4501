"""Registered tensors filled through JAX, which sees them by DLPack: the portable path."""

import dataclasses
import functools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from jaxnsa import argument_checks
from jaxnsa.batch_tracker import BatchTracker
from jaxnsa.compilation import compiled
from jaxnsa.config import settings
from jaxnsa.constant_schedules import with_constants
from jaxnsa.implementations import IMPLEMENTATIONS
from jaxnsa.implementations.choice import choose
from jaxnsa.implementations.measurements import Call
from jaxnsa.interop.held_rows import HeldRows
from jaxnsa.interop.registration import Registered
from jaxnsa.interop.tensor_checks import Checked, check_for_jax, checked_pool, platform_of
from jaxnsa.metadata import FIELDS, Extent, Field, ForwardMode, NSAMetadata
from jaxnsa.schedules import NO_SCHEDULES
from jaxnsa.spec import INT32_MAX, INT32_MIN, Inputs, Rows, Spec

_Known = Literal["written_lens", "request_ids"] | None
"""What says which columns are written."""


@dataclasses.dataclass(frozen=True)
class DlpackOptions:
    """What the path "dlpack" is compiled for.

    Attributes:
      req_to_token: int32 [pool_rows, pool_cols], contiguous: the pool that every update is given.
      forward_modes: those that updates use.
      num_draft_tokens: in target verify.
      implementation: a name, or names to try in order; None: the fastest that can run here.
    """

    req_to_token: torch.Tensor
    forward_modes: Sequence[ForwardMode] = (ForwardMode.DECODE,)
    num_draft_tokens: int | None = None
    implementation: str | Sequence[str] | None = None


class DlpackPath:
    """Fills registered tensors by a jitted function of fixed shapes.

    The batch is padded to the registered number of requests with requests of length 0, so that one
    compilation serves every batch. Schedules are those of the batch itself: with them there is a
    compilation for each size of a batch, when it first comes.
    """

    def __init__(self, registered: Registered, held_rows: HeldRows, options: DlpackOptions):
        device = registered.device
        modes = _checked_modes(options)
        self._pool = checked_pool(options.req_to_token, device)
        for name, tensor in (("req_to_token", self._pool.tensor), *registered.named()):
            check_for_jax(name, tensor)
        platform = platform_of(device)
        requests = registered.spec.rows.requests
        implementation = choose(
            options.implementation,
            settings(),
            platform,
            Call(requests=requests, num_backends=registered.spec.num_backends, even=False),
        )
        self._device = device
        self._lock = threading.Lock()  # on the batch and what JAX holds
        # The batch, padded, in memory of this object's own.
        self._batch = torch.zeros((6, requests), dtype=torch.int32, device=device)
        self._wide = torch.zeros((5, requests), dtype=torch.int64, device=device)
        self._done = torch.cuda.Event() if platform == "gpu" else None
        self._pool_array = jax.dlpack.from_dlpack(self._pool.tensor)
        self._pads = registered.spec.schedules == NO_SCHEDULES
        self._plan_for = functools.cache(
            functools.partial(
                _Plan, registered, held_rows, options.req_to_token.shape[1], implementation
            )
        )
        largest = [_largest_rows(registered, mode, options.num_draft_tokens) for mode in modes]
        self._largest = {(rows.rows_per_request, rows.added_tokens): rows for rows in largest}
        for plan in map(self._plan_for, largest):
            if self._pads:
                plan.run(self._batch_array(), self._pool_array, -1, 0)

    def run(
        self,
        rows: Rows,
        seq_lens: Checked,
        req_pool_indices: Checked,
        req_to_token: Checked,
        extend_seq_lens: Checked | None,
        written_lens: Checked | None,
        max_new_tokens: int,
        request_ids: Checked | None,
    ) -> None:
        """Queues the computation between what is on PyTorch's current stream and what follows."""
        del max_new_tokens  # each number would be compiled for
        if req_to_token[2:] != self._pool[2:]:
            raise ValueError(
                f"req_to_token: got shape {tuple(req_to_token.tensor.shape)} at "
                f"{req_to_token.start:#x}, expected the pool of DlpackOptions, "
                f"{tuple(self._pool.tensor.shape)} at {self._pool.start:#x}"
            )
        largest = self._largest.get((rows.rows_per_request, rows.added_tokens))
        if largest is None:
            known = " or ".join(map(_mode_of, self._largest.values()))
            raise ValueError(
                f"forward_mode: got {_mode_of(rows)}, expected {known} as DlpackOptions says"
            )
        if rows.requests > largest.requests:
            raise ValueError(
                f"seq_lens: got {rows.requests} requests, expected at most {largest.requests}"
            )
        if self._pads and rows.rows_per_request is None and rows.count < largest.count:
            raise ValueError(
                f"max_total_tokens: got {rows.count}, expected None or {largest.count}, all "
                f'registered rows, as path is "dlpack"'
            )
        with self._lock:
            plan = self._plan_for(largest if self._pads else rows)
            lengths = (seq_lens, req_pool_indices, extend_seq_lens, written_lens)
            self._run(plan, rows, lengths, request_ids)

    def _run(
        self,
        plan: "_Plan",
        rows: Rows,
        lengths: Sequence[Checked | None],
        request_ids: Checked | None,
    ) -> None:
        if self._done is not None:
            # The computation before this one has read the batch that is overwritten here.
            torch.cuda.current_stream(self._device).wait_event(self._done)
        batch, wide = self._batch[:, : rows.requests], self._wide[:, : rows.requests]
        for k, values in enumerate(lengths):
            if values is None:
                continue
            source = values.tensor
            if source.dtype == torch.int64:
                source = torch.clamp(source, INT32_MIN, INT32_MAX, out=wide[k])
            batch[k].copy_(source)
        if request_ids is not None:
            wide[4].copy_(request_ids.tensor)
            batch[4:].copy_(wide[4].view(torch.int32).view(-1, 2).T)
        if self._pool_array.unsafe_buffer_pointer() != self._pool.start:
            # JAX copies what is not aligned as it likes, on a CPU.
            self._pool_array = jax.dlpack.from_dlpack(self._pool.tensor)
        known: _Known = None
        if request_ids is not None:
            known = "request_ids"
        elif lengths[-1] is not None:
            known = "written_lens"
        plan.run(self._batch_array(), self._pool_array, rows.requests, rows.count, known)
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._device))

    def _batch_array(self) -> Array:
        """The padded batch. What JAX computes from it waits for all that PyTorch has queued."""
        return jax.dlpack.from_dlpack(self._batch)


def _checked_modes(options: DlpackOptions) -> tuple[ForwardMode, ...]:
    """The forward modes of options, which are what they should be."""
    modes = options.forward_modes
    if (
        not isinstance(modes, Sequence)
        or not modes
        or not all(isinstance(mode, ForwardMode) for mode in modes)
    ):
        raise TypeError(f"dlpack.forward_modes: got {modes!r}, expected several ForwardMode")
    return tuple(modes)


def _largest_rows(registered: Registered, mode: ForwardMode, num_draft_tokens: Any) -> Rows:
    """The most rows of a forward mode that the tensors have room for."""
    registered.check_mode(mode)
    tokens = None
    if mode is ForwardMode.TARGET_VERIFY:
        tokens = argument_checks.integer("num_draft_tokens", num_draft_tokens, 1)
    most = registered.spec.rows
    requests = most.requests
    if not mode.ragged:
        requests = min(requests, most.count // (tokens or 1))
    return Rows.of(mode, requests, tokens, most.count)


def _mode_of(rows: Rows) -> str:
    """The forward mode of rows, as a message tells it."""
    if rows.rows_per_request is None:
        return str(ForwardMode.EXTEND if rows.prefill else ForwardMode.DRAFT_EXTEND)
    if not rows.added_tokens:
        return str(ForwardMode.DECODE)
    return f"{ForwardMode.TARGET_VERIFY} of {rows.rows_per_request} draft tokens"


class _Plan:
    """Rows of a forward mode: the tensors that they fill, as JAX sees them."""

    def __init__(
        self,
        registered: Registered,
        held_rows: HeldRows,
        pool_columns: int,
        implementation: str,
        rows: Rows,
    ):
        largest = registered.spec
        self._spec = dataclasses.replace(
            largest, rows=rows, max_len=min(largest.max_len, pool_columns)
        )
        # A kernel is never launched for nothing.
        self._implementation = "xla" if self._spec.is_empty else implementation
        shapes: Mapping[str, Any] = self._spec.shapes()
        destinations = (self._spec.metadata(shapes),) * len(registered.backends)
        sizes = jax.tree.leaves(destinations)
        self._tensors = []
        for (name, tensor), size in zip(registered.named(), sizes, strict=True):
            if FIELDS[name.rpartition(".")[2]].extent is Extent.PAGED_MQA_ITEMS:
                tensor = tensor.flatten()[: math.prod(size.shape)].view(size.shape)
            if tensor.shape[1:] != size.shape[1:]:
                raise ValueError(
                    f"req_to_token: got {self._spec.max_len} columns, expected at least those of "
                    f'{name}, {tensor.shape[1]}, as path is "dlpack"'
                )
            self._tensors.append(tensor[: size.shape[0]])
        self._tensors.append(held_rows.rows.flatten(1))
        self._structure = jax.tree.structure((destinations, 0))
        self._held: list[Array] | None = None

    def run(
        self, batch: Array, pool: Array, requests: int, count: int, known: _Known = None
    ) -> None:
        """Fills the tensors for so many requests and rows; -1 requests change nothing."""
        held = self._held or [jax.dlpack.from_dlpack(tensor) for tensor in self._tensors]
        out = _refresh(
            batch,
            pool,
            np.array([requests, count], np.int32),
            *jax.tree.unflatten(self._structure, held),
            known=known,
            spec=self._spec,
            implementation=self._implementation,
        )
        results = jax.tree.leaves(out)
        if self._tensors[0].device.type == "cuda":
            torch.from_dlpack(results[0])  # PyTorch's current stream waits for the computation
        else:
            jax.block_until_ready(results)
        # JAX writes donated memory of others in place on a GPU; on a CPU it writes its own.
        self._held = results
        for tensor, result in zip(self._tensors, results, strict=True):
            if result.unsafe_buffer_pointer() != tensor.data_ptr():
                tensor.copy_(torch.from_dlpack(result))
                self._held = None


@functools.partial(
    compiled,
    static_argnames=("known", "spec", "implementation"),
    donate_argnames=("out", "held_rows"),
    keep_unused=True,
)
def _refresh(
    batch: Array,
    pool: Array,
    sizes: Array,
    out: tuple[NSAMetadata, ...],
    held_rows: Array,
    *,
    known: _Known,
    spec: Spec,
    implementation: str,
) -> tuple[tuple[NSAMetadata, ...], Array]:
    requests, count = sizes
    exists = jnp.arange(spec.rows.requests) < requests
    seq_lens, indices, extend, written, *id_words = batch[:, : spec.rows.requests]
    seq_lens = jnp.where(exists, seq_lens, 0)
    ragged = spec.rows.rows_per_request is None
    extend_seq_lens = jnp.where(exists, extend, 0) if ragged else None
    tracker = BatchTracker.empty(len(held_rows))
    if known == "request_ids":
        tracker = BatchTracker(held_rows[:, :2], held_rows[:, 2])
        ids, shortest = jnp.stack(id_words, axis=1), spec.rows_of(min(spec.offsets))
        written, tracker = tracker.advanced(ids, seq_lens, extend_seq_lens, shortest)
    inputs = Inputs(seq_lens, indices, pool, extend_seq_lens, written if known else None)
    inputs = jax.tree.map(jnp.asarray, with_constants(inputs, spec))
    filled = IMPLEMENTATIONS[implementation].fused_metadata(inputs, out, spec)
    if spec.schedules == NO_SCHEDULES:  # with them the batch is not padded
        filled = tuple(
            _without_padding(new, old, requests, jnp.where(requests < 0, -1, count), spec)
            for new, old in zip(filled, out, strict=True)
        )
    held = jnp.pad(tracker.held[:, None], ((0, 0), (0, 1)))
    return filled, jnp.concatenate([tracker.request_ids, held], axis=1)


def _without_padding(
    new: NSAMetadata, old: NSAMetadata, requests: Array, rows: Array, spec: Spec
) -> NSAMetadata:
    """`new` as far as requests and rows go; past them, `old`."""
    ends = {
        Extent.REQUESTS: requests,
        Extent.REQUESTS_PLUS_1: requests + 1,
        Extent.ROWS: rows,
        Extent.ROWS_PLUS_1: rows + 1,
        Extent.TABLE: requests if spec.prefill else rows,
    }

    def without_padding(field: Field) -> Array:
        new_array, old_array = getattr(new, field.name), getattr(old, field.name)
        if field.extent is Extent.KEYS:  # a padded request has none
            return new_array
        is_padding = jnp.arange(len(new_array)) >= ends[field.extent]
        if field.extent is not Extent.TABLE:
            return jnp.where(is_padding, old_array, new_array)
        # Nothing is live in a padded row but the tokens that are added to every request.
        tokens = spec.rows.added_tokens + max(0, *spec.offsets)
        columns = -(-min(tokens, spec.max_len) // spec.tokens_per_column(field))
        if not columns:
            return new_array
        first = jnp.where(is_padding[:, None], old_array[:, :columns], new_array[:, :columns])
        return new_array.at[:, :columns].set(first)

    return spec.metadata({field.name: without_padding(field) for field in spec.fields()})
