"""What a decode batch sees while requests come and go: continuous batching, every step counted."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxnsa.app.request_traces import Request

SPARE_POOL_ROWS = 8
"""A row of the pool that was given back is not taken again before so many others."""


class Steps(NamedTuple):
    """Consecutive steps in which no request comes or goes.

    Attributes:
      number: of steps.
      request_ids: int64 [bs].
      pool_rows: int32 [bs].
      seq_lens: int64 [bs], KV lengths in the first of the steps, each one more in every next.
      held: int64 [bs], leading tokens of each row that it held before the first.
    """

    number: int
    request_ids: np.ndarray
    pool_rows: np.ndarray
    seq_lens: np.ndarray
    held: np.ndarray

    def step(self, k: int) -> "Steps":
        """The k-th of the steps alone."""
        lens = self.seq_lens + k
        return self._replace(number=1, seq_lens=lens, held=lens - 1 if k else self.held)


class Totals(NamedTuple):
    """Of all steps together.

    Attributes:
      steps: how many.
      live: live columns of the wide table.
      changed: those that the row did not hold in the step before.
    """

    steps: int
    live: int
    changed: int


def replay(requests: Sequence[Request], bs: int, max_len: int, compacts: bool) -> Iterator[Steps]:
    """A batch that is full from the first step to that before which requests run out.

    Args:
      requests: in the order in which they are admitted; each stays for a step for each output
        token, cut to the table.
      bs: requests in the batch.
      max_len: columns of the table, in tokens.
      compacts: whether those behind a request that finishes move up, and the next one joins at the
        end; otherwise it takes the slot.
    """
    free = deque(range(bs + SPARE_POOL_ROWS))
    ids, lens, left = np.full(bs, -1), np.zeros(bs, np.int64), np.zeros(bs, np.int64)
    rows = np.zeros(bs, np.int32)
    held, waiting = np.zeros(bs, np.int64), enumerate(requests)
    while True:
        (finished,) = np.nonzero(left == 0)
        free.extend(rows[finished][ids[finished] >= 0].tolist())
        admitted = list(itertools.islice(waiting, len(finished)))
        if len(admitted) < len(finished):
            return
        before = ids.copy()
        if compacts:
            order = np.concatenate([np.nonzero(left)[0], finished])
            ids, lens, left, rows = ids[order], lens[order], left[order], rows[order]
            finished = np.arange(bs - len(finished), bs)
        for slot, (number, request) in zip(finished, admitted, strict=True):
            output = min(max(request.output_tokens, 1), max_len - 1)
            ids[slot], left[slot], rows[slot] = number, output, free.popleft()
            lens[slot] = min(request.prompt_tokens, max_len - output)
        held = np.where(ids == before, lens, 0)
        steps = int(left.min())
        yield Steps(steps, ids.copy(), rows.copy(), lens + 1, held)
        lens, left = lens + steps, left - steps


def totals(history: Iterator[Steps]) -> Totals:
    """What a history comes to."""
    steps = live = changed = 0
    for some in history:
        n, bs = some.number, len(some.seq_lens)
        steps += n
        live += n * int(some.seq_lens.sum()) + bs * n * (n - 1) // 2
        changed += int((some.seq_lens - some.held).sum()) + bs * (n - 1)
    return Totals(steps, live, changed)


def windows(history: Iterator[Steps], steps: int, count: int, length: int) -> list[list[Steps]]:
    """Several runs of consecutive steps, spread evenly over a history of so many steps."""
    length = min(length, steps)
    starts = np.linspace(0, steps - length, count).astype(int).tolist()
    wanted = {n for start in starts for n in range(start, start + length)}
    found: dict[int, Steps] = {}
    first = 0
    for some in history:
        for n in range(first, first + some.number):
            if n in wanted:
                found[n] = some.step(n - first)
        first += some.number
    return [[found[n] for n in range(start, start + length)] for start in starts]
