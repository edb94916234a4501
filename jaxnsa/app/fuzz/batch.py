"""A batch of requests that come, grow, shrink, move and go, and a pool that changes under them."""

from typing import Any

import numpy as np


class Batch:
    """The requests of a step.

    Attributes:
      pool: int32 [rows, columns], the slots of all requests' tokens; as many rows as requests or
        more.
      ids: int64 [bs], a number for each request that no other ever has.
      rows: int64 [bs], rows of the pool.
      lengths: int64 [bs], tokens.
    """

    def __init__(self, seed: int, pool: tuple[int, int]):
        self._rng = np.random.default_rng(seed)
        self.pool = self._rng.integers(0, 2**30, pool, dtype=np.int32)
        self.ids, self.rows, self.lengths = np.zeros((3, 0), np.int64)
        self._next_id = 0

    def step(self, bs: int) -> np.ndarray:
        """Goes on to the next step, of so many requests; returns ids whose slots have changed."""
        rng, (_, columns) = self._rng, self.pool.shape
        stay = rng.permutation(len(self.ids)) if rng.random() < 0.3 else np.arange(len(self.ids))
        stay = np.sort(stay[:bs]) if rng.random() < 0.5 else stay[:bs]
        stay = stay[rng.random(len(stay)) > rng.choice([0, 0, 0.3])]
        new = bs - len(stay)
        free = rng.permutation(np.setdiff1d(np.arange(len(self.pool)), self.rows[stay]))[:new]
        moved = self.ids[stay][rng.random(len(stay)) < 0.05]
        self.ids = np.append(self.ids[stay], self._next_id + np.arange(new))
        self._next_id += new
        self.rows = np.append(self.rows[stay], free)
        before = np.append(self.lengths[stay], np.zeros(new, np.int64))
        grown = self.lengths[stay] + rng.choice([0, 1, 1, 3, -2], len(stay))
        self.lengths = np.append(grown, rng.integers(0, columns, new)).clip(0, columns + 4)
        # Slots of what is new, and of drafts, which lie past a request's own tokens.
        for k in range(bs):
            first = 0 if self.ids[k] in moved else min(before[k], self.lengths[k], columns)
            self.pool[self.rows[k], first:] = rng.integers(0, 2**30, columns - first)
        return moved

    def arguments(self, extend: bool) -> dict[str, Any]:
        """The arrays of a call; `extend_seq_lens` among them where they are asked for."""
        arguments = {
            "seq_lens": self.lengths.astype(np.int32),
            "req_pool_indices": self.rows.astype(np.int32),
            "req_to_token": self.pool.copy(),
        }
        if extend:
            extended = self._rng.integers(0, 4, len(self.ids), dtype=np.int32)
            arguments["extend_seq_lens"] = extended
        return arguments
