"""Random histories of a scheduler, as the tables of its batches see them."""

import dataclasses

import numpy as np

from jaxnsa import ForwardMode


@dataclasses.dataclass
class Request:
    id: int
    pool_row: int
    length: int
    steps_left: int = 0  # for which it neither grows nor comes back


class Scheduler:
    """Requests that come, grow, shrink, move, pause and go, and a pool that changes under them."""

    def __init__(self, seed, *, most=6, columns=40):
        self.rng = np.random.default_rng(seed)
        self.most, self.columns = most, columns
        self.pool = self.rng.integers(0, 2**20, (most + 4, columns), dtype=np.int32)
        self.running, self.paused = [], []
        self.changed, self.last_ids = [], set()
        self.mode = ForwardMode.DECODE

    def _new_id(self):
        """Ids that differ in one of their words, and those of requests long gone."""
        living = {r.id for r in self.running + self.paused} | self.last_ids
        words = self.rng.integers(0, 3, 2)
        candidates = [int(w) + (int(h) << 32) for w in words for h in range(12)]
        return next(i for i in candidates if i not in living)

    def _slots(self, request, begin, end):
        """New slots for tokens [begin, end)."""
        size = max(min(end, self.columns) - begin, 0)
        self.pool[request.pool_row, begin : begin + size] = self.rng.integers(0, 2**20, size)

    def _grow(self, request, tokens):
        self._slots(request, request.length, request.length + tokens)
        request.length += tokens

    def _admit(self):
        if len(self.running) + len(self.paused) > self.most + 1 or len(self.running) == self.most:
            return
        if self.paused and not self.paused[0].steps_left and self.rng.random() < 0.5:
            request = self.paused.pop(0)
            self._slots(request, 0, request.length)  # its slots were given away
        else:
            rows = {r.pool_row for r in self.running + self.paused}
            row = next(k for k in range(len(self.pool)) if k not in rows)
            request = Request(self._new_id(), row, 0)
            self._grow(request, int(self.rng.integers(0, self.columns)))
        self.running.insert(int(self.rng.integers(len(self.running) + 1)), request)

    def _event(self):
        running, rng = self.running, self.rng
        kind = rng.choice(["admit", "finish", "compact", "swap", "pause", "shrink", "rewrite"])
        if kind == "admit":
            self._admit()
        elif not running:
            return
        elif kind == "finish":
            running.pop(int(rng.integers(len(running))))
        elif kind == "compact":  # the last one takes the place of one that finished
            running[int(rng.integers(len(running)))] = running[-1]
            running.pop()
        elif kind == "swap":
            a, b = rng.integers(len(running), size=2)
            running[a], running[b] = running[b], running[a]
        elif kind == "pause":
            self.paused.append(running.pop(int(rng.integers(len(running)))))
            self.paused[-1].steps_left = 1  # where it comes back at once, it has to be invalidated
        elif kind == "shrink":
            request = running[int(rng.integers(len(running)))]
            request.length = int(rng.integers(request.length + 1))
            request.steps_left = 1  # so that a step sees it
        else:  # a shared prefix moves
            request = running[int(rng.integers(len(running)))]
            self._slots(request, 0, request.length)
            self.changed.append(request.id)

    def step(self):
        """Mode, options, ids, lengths and pool rows of the next step; `changed` is what moved."""
        self.changed = []
        while self.rng.random() < 0.35:
            self._event()
        running, rng = self.running, self.rng
        for request in running:
            self._grow(request, 0 if request.steps_left else int(rng.integers(0, 3)))
            self._slots(request, request.length, request.length + 3)  # drafts have new slots
        if rng.random() < 0.3:
            self.mode = rng.choice([*ForwardMode][:3], p=(0.6, 0.25, 0.15))
        mode = self.mode
        options = {}
        if mode is ForwardMode.TARGET_VERIFY:
            options["num_draft_tokens"] = 2
        if mode is ForwardMode.DRAFT_EXTEND:
            options["extend_seq_lens"] = rng.integers(0, 4, len(running), dtype=np.int32)
            options["max_total_tokens"] = 2 * self.most
        for request in (*running, *self.paused):
            request.steps_left = 0
        self.last_ids = {r.id for r in running}
        ids = np.array([r.id for r in running], np.int64)
        lengths = np.array([r.length for r in running], np.int32)
        rows = np.array([r.pool_row for r in running], np.int32)
        return mode, options, ids, lengths, rows
