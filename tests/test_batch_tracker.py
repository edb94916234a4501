"""What a tracker says is written: tables over histories of a scheduler equal a full refresh's."""

import functools

import jax
import numpy as np
import pytest
from histories import Scheduler

import jaxnsa
from jaxnsa import BatchTracker, ForwardMode, reference

MOST, COLUMNS = 3, {"page_indices": 40, "real_page_table": 10}
ROWS = 2 * MOST


def refresh(step, pool, tables, written=None):
    """A step by the reference, into the first rows of tables."""
    mode, options, _, lengths, rows = step
    compute = functools.partial(
        reference.fused_metadata_precompute_and_broadcast,
        *(lengths, rows, pool),
        num_backends=1,
        forward_mode=mode,
        real_page_size=4,
        **options,
    )
    (fresh,) = compute()
    views = {name: table[: len(fresh.page_indices)] for name, table in tables.items()}
    compute(out=(jaxnsa.NSAMetadata(**vars(fresh) | views),), written_lens=written)


def narrow(ids):
    """int32, as jit takes them without x64: as different as the scheduler's 64 bits."""
    return np.array([(int(i) >> 32) * 16 + (int(i) & 15) for i in ids], np.int32)


def test_histories():
    scheduler, tracker = Scheduler(0, most=MOST), BatchTracker.empty(ROWS)
    step = jax.jit(
        BatchTracker.step, static_argnames=("forward_mode", "num_draft_tokens", "max_total_tokens")
    )
    full, kept = ({n: np.zeros((ROWS, c), np.int32) for n, c in COLUMNS.items()} for _ in range(2))
    left_alone = 0
    for _ in range(200):
        mode, options, ids, lengths, _ = now = scheduler.step()
        if scheduler.changed:
            tracker = tracker.invalidate(narrow(scheduler.changed))
        written, tracker = step(tracker, narrow(ids), lengths, forward_mode=mode, **options)
        refresh(now, scheduler.pool, full)
        refresh(now, scheduler.pool, kept, np.asarray(written))
        for name in COLUMNS:
            np.testing.assert_array_equal(kept[name], full[name], name)
        left_alone += np.minimum(written, lengths).sum()
    assert left_alone > 1000


def written(tracker, ids, lengths, **options):
    result, tracker = tracker.step(ids, np.array(lengths, np.int32), **options)
    return result.tolist(), tracker


def test_ids_of_any_width():
    ids = np.array([2**40 + 1, 2**41 + 1, -1, 1])
    _, tracker = written(BatchTracker.empty(4), ids, [5, 6, 7, 8])
    assert written(tracker, ids, [6, 7, 8, 9])[0] == [5, 6, 7, 8]
    assert written(tracker, ids[[1, 0, 2, 3]], [6, 7, 8, 9])[0] == [0, 0, 7, 8]
    assert written(tracker, [0, 1, -1, 1], [6, 7, 8, 9])[0] == [0, 0, 7, 8]
    assert written(tracker, np.array([0, 0, -1, 1], np.int8), [6, 7, 8, 9])[0] == [0, 0, 7, 8]
    assert written(tracker, ids.view(np.uint64), [6, 7, 8, 9])[0] == [5, 6, 7, 8]
    invalid = tracker.invalidate(ids[1:3])
    assert written(invalid, ids, [6, 7, 8, 9])[0] == [5, 0, 0, 8]
    assert written(tracker.invalidate(), ids, [6, 7, 8, 9])[0] == [0, 0, 0, 0]


def test_drafts_and_shorter_lengths_are_not_written():
    verify = {"forward_mode": ForwardMode.TARGET_VERIFY, "num_draft_tokens": 2}
    ids = np.array([1, 2])
    _, tracker = written(BatchTracker.empty(4), ids, [10, 20], **verify)
    assert written(tracker, ids, [12, 15], **verify)[0] == [10, 15]
    # Rows 0 and 1 belong to request 1, rows 2 and 3 to request 2.
    assert written(tracker, ids, [12, 20])[0] == [10, 0]
    # Backends that see less hold less.
    _, shorter = written(tracker, ids, [12, 20], **verify, backend_offsets=(1, -3))
    assert written(shorter, ids, [13, 19], **verify)[0] == [10, 18]
    _, tracker = written(tracker, ids[:1], [12])
    assert written(tracker, ids, [13, 20])[0] == [12, 0]  # row 1 was in no batch


def test_errors():
    tracker = BatchTracker.empty(1)
    with pytest.raises(
        ValueError, match="seq_lens: got a step of 2 table rows, expected at most 1"
    ):
        tracker.step([1, 2], np.array([3, 4], np.int32))
    with pytest.raises(ValueError, match=r"request_ids: got shape \(2,\), expected \(1,\)"):
        tracker.step([1, 2], np.array([3], np.int32))
    with pytest.raises(TypeError, match="request_ids: got dtype float64"):
        tracker.step([1.5], np.array([3], np.int32))
