"""Tables that are kept over a scheduler's history, beside tables that are refreshed in full."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from histories import Scheduler

import jaxnsa
from jaxnsa import BatchTracker, ForwardMode, NSAMetadata, reference
from jaxnsa.metadata import Extent
from jaxnsa.spec import INT32_MAX, Rows, Spec

PAGE, TOPK, HELD = 4, 16, -7


class Histories:
    """A history, step by step.

    `run` of a subclass that has `step` makes steps, which return whether the tables are equal.
    """

    def __init__(self, seed, most, columns, backend_offsets):
        self.scheduler = Scheduler(seed, most=most, columns=columns)
        self.backend_offsets = backend_offsets
        rows = Rows(most, 2 * most, None, 0)
        self.spec = Spec(rows, columns, TOPK, PAGE, True, "keep", len(backend_offsets))
        self.shapes = {name: array.shape for name, array in self.spec.shapes().items()}
        self.known = {}  # by row: the request of the last step, and what the row holds of it
        self.left_alone = 0  # tokens of requests

    def run(self, steps):
        for number in range(steps):
            now = self.scheduler.step()
            for row, (known, _) in list(self.known.items()):
                if known in self.scheduler.changed:
                    del self.known[row]
            self._advance(*now)
            assert self.step(*now), f"step {number}: {now}, changed {self.scheduler.changed}"

    def _advance(self, mode, options, ids, lengths, _):
        before, self.known = self.known, {}
        added = options.get("num_draft_tokens", 0)
        counts = options.get("extend_seq_lens", [added or 1] * len(ids))
        row = 0
        for request, length, q in zip(ids.tolist(), lengths.tolist(), counts, strict=True):
            shortest = max(length + min(self.backend_offsets), 0) + added
            held = []
            for j in range(min(q, 2 * self.scheduler.most - row)):
                known, tokens = before.get(row, (None, 0))
                held.append(min(tokens, length) if known == request else 0)
                self.known[row] = request, min(max(shortest - q + 1 + j, 0), length)
                row += 1
            self.left_alone += min(held, default=0)


class TorchTables(Histories):
    """Tensors that `BackendBuffers.update(request_ids=)` keeps.

    In full they are refreshed without `request_ids`, or by the reference.
    """

    def __init__(
        self,
        path,
        device="cpu",
        *,
        seed=0,
        most=6,
        columns=40,
        backend_offsets=(0, 2, -3),
        by_reference=False,
    ):
        import torch

        from jaxnsa.interop.torch import BackendBuffers, DlpackOptions

        super().__init__(seed, most, columns, backend_offsets)
        self.tensor = lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device)
        self.pool = self.tensor(self.scheduler.pool)
        self.by_reference = by_reference

        def buffers():
            tensors = [
                {n: torch.full(s, HELD, dtype=torch.int32, device=device) for n, s in shapes}
                for shapes in [self.shapes.items()] * len(backend_offsets)
            ]
            modes = tuple(ForwardMode)[:3]
            return tensors, BackendBuffers(
                tensors,
                nsa_index_topk=TOPK,
                real_page_size=PAGE,
                backend_offsets=backend_offsets,
                path=path,
                dlpack=DlpackOptions(self.pool, modes, num_draft_tokens=2),
            )

        self.kept, self.buffers = buffers()
        if by_reference:
            self.full = [{n: t.clone() for n, t in backend.items()} for backend in self.kept]
        else:
            self.full, self.full_buffers = buffers()

    def step(self, mode, options, ids, lengths, rows):
        self.pool.copy_(self.tensor(self.scheduler.pool))
        if self.scheduler.changed:
            self.buffers.invalidate(self.tensor(np.array(self.scheduler.changed)))
        given = [self.tensor(lengths), self.tensor(rows), self.pool]
        extend = options.get("extend_seq_lens")
        arguments = options | ({} if extend is None else {"extend_seq_lens": self.tensor(extend)})
        self.update(mode, given, self.tensor(ids), arguments)
        if self.by_reference:
            self.refresh_by_reference(mode, options, lengths, rows)
        else:
            self.full_buffers.update(*given, forward_mode=mode, **arguments)
        # By the path "direct" no more than there are columns.
        most = self.spec.max_len if self.buffers.path == "direct" else INT32_MAX
        known = {row: (request, min(n, most)) for row, (request, n) in self.known.items()}
        return self._equal() and all(
            (tokens == 0 and known.get(row, (0, 0))[1] == 0) or known.get(row) == (request, tokens)
            for row, (request, tokens) in enumerate(self._held())
        )

    def _held(self):
        """What rows hold after the last step, as the buffers know it."""
        for steps in self.buffers._held_rows.rows.cpu().numpy():
            last = steps[-1] if steps[-1, 3] - steps[0, 3] > 0 else steps[0]
            yield int(last[:2].view(np.int64)[0]), int(last[2])

    def update(self, mode, given, ids, arguments):
        self.buffers.update(*given, forward_mode=mode, request_ids=ids, **arguments)

    def refresh_by_reference(self, mode, options, lengths, rows):
        requests, count = len(lengths), len(lengths) * options.get("num_draft_tokens", 1)
        count = options.get("max_total_tokens", count)
        sizes = {
            Extent.REQUESTS: requests,
            Extent.REQUESTS_PLUS_1: requests + 1,
            Extent.ROWS: count,
            Extent.ROWS_PLUS_1: count + 1,
            Extent.TABLE: count,
        }
        extents = {field.name: field.extent for field in self.spec.fields()}
        out = [
            NSAMetadata(**{n: t.cpu().numpy()[: sizes[extents[n]]] for n, t in backend.items()})
            for backend in self.full
        ]
        reference.fused_metadata_precompute_and_broadcast(
            *(lengths, rows, self.scheduler.pool),
            num_backends=len(out),
            forward_mode=mode,
            nsa_index_topk=TOPK,
            real_page_size=PAGE,
            backend_offsets=self.backend_offsets,
            out=tuple(out),
            **options,
        )
        for backend, filled in zip(self.full, out, strict=True):
            for name, tensor in backend.items():
                array = getattr(filled, name)
                tensor[: len(array)] = self.tensor(array)

    def _equal(self):
        pairs = zip(self.kept, self.full, strict=True)
        return all((a[name] == b[name]).all() for a, b in pairs for name in a)


class JaxTables(Histories):
    """Arrays that a jitted function keeps, which asks a `BatchTracker`.

    In full they are refreshed by the implementation "xla".
    """

    def __init__(self, implementation, *, seed=0, most=3, columns=40, backend_offsets=(0, 2, -3)):
        super().__init__(seed, most, columns, backend_offsets)
        tables = [
            {
                name: jnp.full(self.shapes[name], HELD)
                for name in ("page_indices", "real_page_table")
            }
            for _ in backend_offsets
        ]
        self.state = BatchTracker.empty(2 * most), tables, jax.tree.map(jnp.copy, tables)
        self.implementation = implementation

    def step(self, mode, options, ids, lengths, rows):
        # int32, as jit takes them without x64: as different as the scheduler's 64 bits.
        narrow = [
            np.array([(i >> 32) * 16 + (i & 15) for i in map(int, some)], np.int32)
            for some in (ids, self.scheduler.changed)
        ]
        changed = np.full(8, -1, np.int32)
        changed[: len(narrow[1])] = narrow[1][:8]
        self.state, same = _refresh(
            *(self.state, self.scheduler.pool, narrow[0], lengths, rows, changed),
            implementation=self.implementation,
            forward_mode=mode,
            backend_offsets=self.backend_offsets,
            **options,
        )
        return bool(same)


@functools.partial(
    jax.jit,
    static_argnames=(
        *("implementation", "forward_mode", "num_draft_tokens"),
        *("max_total_tokens", "backend_offsets"),
    ),
)
def _refresh(state, pool, ids, lengths, rows, changed, *, implementation, **options):
    tracker, kept, full = state
    written, tracker = tracker.invalidate(changed).step(ids, lengths, **options)

    def filled(tables, implementation, written_lens):
        broadcast = functools.partial(
            jaxnsa.fused_metadata_precompute_and_broadcast,
            *(lengths, rows, pool),
            num_backends=len(tables),
            nsa_index_topk=TOPK,
            real_page_size=PAGE,
            **options,
        )
        first_rows = [
            dataclasses.replace(
                fresh, **{name: t[: len(fresh.page_indices)] for name, t in table.items()}
            )
            for fresh, table in zip(broadcast(implementation="xla"), tables, strict=True)
        ]
        out = broadcast(
            out=tuple(first_rows), written_lens=written_lens, implementation=implementation
        )
        return [
            {n: t.at[: len(m.page_indices)].set(getattr(m, n)) for n, t in table.items()}
            for m, table in zip(out, tables, strict=True)
        ]

    kept, full = filled(kept, implementation, written), filled(full, "xla", None)
    same = jax.tree.leaves(jax.tree.map(jnp.array_equal, kept, full))
    return (tracker, kept, full), jnp.all(jnp.array(same))
