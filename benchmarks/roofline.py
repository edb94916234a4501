"""The whole job on a GPU against the roof: live bytes read once and written N times."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnsa
from benchmarks.measure import device_time
from jaxnsa import ForwardMode, reference
from jaxnsa.demo import same

PAGE_SIZE = 64
TOPK = 2048
DRAFT_TOKENS = 4  # of each request in target verify; up to that many in draft extend


class Problem(NamedTuple):
    """One row of the table.

    Attributes:
      mode: forward mode.
      bs: requests.
      max_len: columns of the page table, in tokens.
      num_backends: copies, N.
      live: lengths are uniform between half of it and all of it.
      target: microseconds to reach; None where there is none.
    """

    mode: ForwardMode
    bs: int
    max_len: int
    num_backends: int
    live: int
    target: float | None


PROBLEMS = (
    Problem(ForwardMode.DECODE, 32, 2048, 3, 2048, 2.0),
    Problem(ForwardMode.DECODE, 32, 65_536, 3, 8192, 3.0),
    Problem(ForwardMode.DECODE, 32, 65_536, 3, 65_536, 7.0),
    Problem(ForwardMode.DECODE, 6, 131_072, 1, 131_072, 2.5),
    Problem(ForwardMode.DECODE, 256, 32_768, 8, 16_384, 31.0),
    Problem(ForwardMode.DECODE, 128, 131_072, 3, 131_072, 53.0),
    Problem(ForwardMode.DECODE, 1024, 32_768, 3, 4096, 16.0),
    Problem(ForwardMode.TARGET_VERIFY, 64, 65_536, 3, 65_536, None),
    Problem(ForwardMode.DRAFT_EXTEND, 64, 65_536, 3, 65_536, None),
)


class Row(NamedTuple):
    """A measured row.

    Attributes:
      problem: what was computed.
      bytes_moved: bytes that have to move: each live element read once, and written to each row of
        each backend.
      microseconds: device time of one call by implementation.
    """

    problem: Problem
    bytes_moved: int
    microseconds: dict[str, float]


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = jnp.zeros(2**30, jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * source.nbytes / (device_time(lambda: copy(source), calls=10) * 1e-6)


def measure(problem: Problem, names: list[str]) -> Row:
    """Checks and measures a problem with each implementation, in place, tail "keep"."""
    arguments, options, bytes_moved = _inputs(problem)
    times = {name: _time(arguments, options, name) for name in names}
    return Row(problem, bytes_moved, times)


def _inputs(problem: Problem) -> tuple[tuple, dict[str, Any], int]:
    rng = np.random.default_rng(0)
    bs, columns = problem.bs, problem.max_len
    seq_lens = rng.integers(problem.live // 2, problem.live, bs, endpoint=True, dtype=np.int32)
    indices = rng.permutation(bs).astype(np.int32)
    pool = rng.integers(0, 2**22, (bs, columns), dtype=np.int32)
    options: dict[str, Any] = {
        "num_backends": problem.num_backends,
        "forward_mode": problem.mode,
        "nsa_index_topk": TOPK,
        "real_page_size": PAGE_SIZE,
    }
    rows_of_each = np.ones(bs, np.int64)
    if problem.mode is ForwardMode.TARGET_VERIFY:
        # The drafts are live too.
        seq_lens = np.minimum(seq_lens, columns - DRAFT_TOKENS)
        options["num_draft_tokens"] = DRAFT_TOKENS
        rows_of_each[:] = DRAFT_TOKENS
    if problem.mode is ForwardMode.DRAFT_EXTEND:
        rows_of_each = rng.integers(1, DRAFT_TOKENS, bs, endpoint=True)
        options["extend_seq_lens"] = rows_of_each.astype(np.int32)
        options["max_total_tokens"] = bs * DRAFT_TOKENS
    lengths = seq_lens.astype(np.int64)
    pages = -(-lengths // PAGE_SIZE)
    written = ((lengths + pages) * rows_of_each).sum() * problem.num_backends
    return (seq_lens, indices, pool), options, int(lengths.sum() + written) * 4


def _time(arguments: tuple, options: dict[str, Any], name: str) -> float:
    on_device = [jnp.asarray(a) for a in arguments]
    extend = options.get("extend_seq_lens")
    static = {k: v for k, v in options.items() if k != "extend_seq_lens"}
    if extend is not None:
        extend = jnp.asarray(extend)

    def compute(out: Any) -> Any:
        return jaxnsa.fused_metadata_precompute_and_broadcast(
            *on_device, extend_seq_lens=extend, out=out, implementation=name, **static
        )

    state = [compute(None)]
    _check(state[0], arguments, options)

    def step() -> Any:
        state[0] = compute(state[0])
        return state[0]

    time = device_time(step)
    _check(state[0], arguments, options)
    return time


def _check(backends: Any, arguments: tuple, options: dict[str, Any]) -> None:
    expected: Any = reference.fused_metadata_precompute_and_broadcast
    (wanted,) = expected(*arguments, **(options | {"num_backends": 1}))
    if not all(same(backend, wanted) for backend in backends):
        raise AssertionError(f"wrong result for {options}")
