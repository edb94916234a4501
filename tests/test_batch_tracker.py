"""What a tracker says is written: tables over histories of a scheduler equal a full refresh's."""

import functools

import jax
import numpy as np
import pytest
from histories import Scheduler

import jaxnsa
from jaxnsa import BatchTracker, ForwardMode, reference

ROWS, PAGE = 12, 4


def refresh(step, pool, tables, written=None):
    """A step by the reference into the first rows of tables."""
    mode, options, _, lengths, rows = step
    compute = functools.partial(
        reference.fused_metadata_precompute_and_broadcast,
        *(lengths, rows, pool),
        num_backends=1,
        forward_mode=mode,
        real_page_size=PAGE,
        **options,
    )
    (fresh,) = compute()
    count = len(fresh.page_indices)
    views = {name: table[:count] for name, table in tables.items()}
    compute(out=(jaxnsa.NSAMetadata(**vars(fresh) | views),), written_lens=written)


@pytest.mark.parametrize("seed", range(3))
def test_histories(seed):
    scheduler, tracker = Scheduler(seed), BatchTracker.empty(ROWS)
    run = jax.jit(
        BatchTracker.step, static_argnames=("forward_mode", "num_draft_tokens", "max_total_tokens")
    )
    columns = {"page_indices": 40, "real_page_table": 10}
    full, kept = ({n: np.zeros((ROWS, c), np.int32) for n, c in columns.items()} for _ in range(2))
    held = 0
    for _ in range(60):
        step = mode, options, ids, lengths, _ = scheduler.step()
        if scheduler.changed:
            tracker = tracker.invalidate(np.array(scheduler.changed))
        low = ids.astype(np.int32) if seed == 1 else ids  # ids of any width are the same ids
        words = low if seed == 0 else list(map(int, low))
        written, tracker = (tracker.step if seed else run_with_words(run, tracker))(
            words, lengths, forward_mode=mode, **options
        )
        written = np.asarray(written)
        refresh(step, scheduler.pool, full)
        refresh(step, scheduler.pool, kept, written)
        for name in columns:
            np.testing.assert_array_equal(kept[name], full[name], name)
        held += np.minimum(written, lengths).sum()
    assert held > 0
