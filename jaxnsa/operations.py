"""The public operations: check the arguments, choose an implementation, call it."""

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa import argument_checks as checks
from jaxnsa.argument_checks import StaticArguments
from jaxnsa.checked_calls import CheckedCalls
from jaxnsa.compilation import compiled
from jaxnsa.computation import Computation
from jaxnsa.config import Settings, Strategy, settings
from jaxnsa.implementations import FUSED, PORTABLE, computations
from jaxnsa.implementations.choice import choose, is_named
from jaxnsa.implementations.lowering import computed_by
from jaxnsa.implementations.measurements import Call
from jaxnsa.metadata import Array, DraftExtendSeqlens, ForwardMode, NSAMetadata
from jaxnsa.schedules import NO_SCHEDULES, Schedules
from jaxnsa.spec import (
    INT32_MAX,
    MAX_BACKENDS,
    MAX_ROWS,
    Inputs,
    Rows,
    Tail,
    saturated,
)
from jaxnsa.value_checks import check_inputs, check_values

_logger = logging.getLogger("jaxnsa")

Parameters = ParamSpec("Parameters")
Results = TypeVar("Results")


class Request(NamedTuple, Generic[Results]):
    """The arguments of a call that is to give `Results`: one NSAMetadata or a tuple of several.

    Attributes:
      read, static: what the caller gave.
      out, implementation, strategy: as the public functions document them.
      several: whether the results, and `out`, are a tuple.
    """

    read: Inputs
    static: StaticArguments
    out: Any
    implementation: str | Sequence[str] | None
    strategy: Strategy | None = "ultra_fast"
    several: bool = False


def _computes(
    request: Callable[Parameters, Request[Results]],
) -> Callable[Parameters, Results]:
    """The public function whose arguments `request` collects."""
    calls = CheckedCalls(request)

    @functools.wraps(request)
    def compute(*arrays: Any, out: Any = None, **options: Any) -> Results:
        results = calls.compute_as_before(arrays, out, options)
        if results is None:
            asked = request(*arrays, out=out, **options)
            backends, computation = _fused_metadata(asked)
            if computation is not None:
                calls.remember(arrays, out, options, computation, asked.several)
            results = backends if asked.several else backends[0]
        return results

    signature = inspect.signature(request)
    (given,) = get_args(signature.return_annotation)
    compute.__signature__ = signature.replace(return_annotation=given)  # type: ignore[attr-defined]
    return compute


@_computes
def precompute_decode_metadata(
    seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    *,
    max_len: int | None = None,
    nsa_index_topk: int = 2048,
    real_page_size: int = 64,
    wide_table: bool = True,
    index_kpool: int = 1,
    schedules: Schedules | None = None,
    tail: Tail | None = None,
    out: NSAMetadata | None = None,
    written_lens: Array | None = None,
    max_new_tokens: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Request[NSAMetadata]:
    """The metadata of a decode step: one row per request.

    Args:
      seq_lens: int32 or int64 [bs], KV length of each request; negative counts as 0.
      req_pool_indices: int32 or int64 [bs], each request's row in the pool; clamped into it.
      req_to_token: int32 [pool_rows, pool_cols], KV slot of each token of each request. NumPy's is
        not copied: it must not change before the result is ready, as other arrays may.
      max_len: columns of `page_indices`, in tokens, at most pool_cols; None: pool_cols.
      nsa_index_topk: the indexer's top-k, in tokens.
      real_page_size: tokens in a physical page; 1 means no `real_page_table`.
      wide_table: False leaves out `page_indices`.
      index_kpool: tokens that the indexer pools into one key, which changes `nsa_cache_seqlens` and
        adds the pooled arrays; 1: none.
      schedules: what DeepGEMM, the fused top-k and FlashMLA are to read beside the metadata; None:
        nothing.
      tail: what tables hold past a row's live columns, those that its `seqlens_expanded` covers:
        "copy" the pool's columns, up to max_len; "zero"; "keep" what the destination held, which
        needs `out` and makes the cost follow the live lengths. None: "keep" with `out`, otherwise
        "copy".
      out: destination, donated and filled in place: the result has its device memory.
      written_lens: int32 or int64 [bs], with `out` and tail "keep": how many leading tokens of
        request i the tables of each of its rows in `out` hold already, at most those that are live.
        Their columns are neither read nor written, so that the cost follows what is new; a page is
        held if its first token is. It is safe where a row belonged to the same request in the call
        that wrote those tokens, and the pool's entries for them are the same. A wrong claim leaves
        old columns in place and touches nothing else. `BatchTracker` makes claims that are right.
      max_new_tokens: with `written_lens`, tokens of any row that are live and not written, at most;
        no blocks are launched for more. A row that has more is written all the same, by few blocks.
      implementation: a name, or names to try in order; None: the fastest that can run here.

    Returns:
      NSAMetadata; its docstring gives the shapes.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    read = Inputs(seq_lens, req_pool_indices, req_to_token, None, written_lens)
    static = StaticArguments(
        forward_mode=ForwardMode.DECODE,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        wide_table=wide_table,
        index_kpool=index_kpool,
        schedules=schedules,
        tail=tail,
        max_new_tokens=max_new_tokens,
    )
    return Request(read, static, out, implementation)


@_computes
def precompute_target_verify_metadata(
    seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    *,
    num_draft_tokens: int,
    max_len: int | None = None,
    nsa_index_topk: int = 2048,
    real_page_size: int = 64,
    wide_table: bool = True,
    index_kpool: int = 1,
    schedules: Schedules | None = None,
    tail: Tail | None = None,
    out: NSAMetadata | None = None,
    written_lens: Array | None = None,
    max_new_tokens: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Request[NSAMetadata]:
    """The metadata of a target-verify step: num_draft_tokens rows per request.

    The step appends the draft tokens, so `cache_seqlens` is `seq_lens + num_draft_tokens` and row
    j of a request sees `seq_lens + j + 1` tokens.

    Args:
      seq_lens: int32 or int64 [bs], KV length of each request before the step.
      req_pool_indices: int32 or int64 [bs], each request's row in the pool; clamped into it.
      req_to_token: int32 [pool_rows, pool_cols], KV slot of each token of each request.
      num_draft_tokens: tokens to verify for each request, >= 1.
      max_len, nsa_index_topk, real_page_size, wide_table, index_kpool, schedules, tail, out,
        written_lens, max_new_tokens, implementation: as in `precompute_decode_metadata`.

    Returns:
      NSAMetadata; its docstring gives the shapes.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    read = Inputs(seq_lens, req_pool_indices, req_to_token, None, written_lens)
    static = StaticArguments(
        forward_mode=ForwardMode.TARGET_VERIFY,
        num_draft_tokens=num_draft_tokens,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        wide_table=wide_table,
        index_kpool=index_kpool,
        schedules=schedules,
        tail=tail,
        max_new_tokens=max_new_tokens,
    )
    return Request(read, static, out, implementation)


@_computes
def precompute_draft_extend_metadata(
    seq_lens: Array,
    extend_seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    *,
    max_total_tokens: int,
    max_len: int | None = None,
    nsa_index_topk: int = 2048,
    real_page_size: int = 64,
    wide_table: bool = True,
    index_kpool: int = 1,
    schedules: Schedules | None = None,
    tail: Tail | None = None,
    out: NSAMetadata | None = None,
    written_lens: Array | None = None,
    max_new_tokens: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Request[NSAMetadata]:
    """The metadata of a draft-extend step: extend_seq_lens[i] rows for request i.

    Rows past the total hold lengths of 0, the last prefix sum and, unless tail is "keep", tables
    of 0. Where the total exceeds max_total_tokens, the rows stop there.

    Args:
      seq_lens: int32 or int64 [bs], KV length of each request, its extend tokens counted.
      extend_seq_lens: int32 or int64 [bs], rows of each request; negative counts as 0.
      req_pool_indices: int32 or int64 [bs], each request's row in the pool; clamped into it.
      req_to_token: int32 [pool_rows, pool_cols], KV slot of each token of each request.
      max_total_tokens: capacity, the rows of the result.
      max_len, nsa_index_topk, real_page_size, wide_table, index_kpool, schedules, tail, out,
        written_lens, max_new_tokens, implementation: as in `precompute_decode_metadata`.

    Returns:
      NSAMetadata; its docstring gives the shapes.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    read = Inputs(seq_lens, req_pool_indices, req_to_token, extend_seq_lens, written_lens)
    static = StaticArguments(
        forward_mode=ForwardMode.DRAFT_EXTEND,
        max_total_tokens=max_total_tokens,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        wide_table=wide_table,
        index_kpool=index_kpool,
        schedules=schedules,
        tail=tail,
        max_new_tokens=max_new_tokens,
    )
    return Request(read, static, out, implementation)


@_computes
def precompute_extend_metadata(
    seq_lens: Array,
    extend_seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    *,
    max_total_tokens: int,
    max_total_keys: int | None = None,
    max_len: int | None = None,
    nsa_index_topk: int = 2048,
    real_page_size: int = 64,
    wide_table: bool = True,
    tail: Tail | None = None,
    out: NSAMetadata | None = None,
    written_lens: Array | None = None,
    max_new_tokens: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Request[NSAMetadata]:
    """The metadata of a prefill step: a row for each new token, a table row for each request.

    A prompt may come in chunks, and requests that decode, with one new token, among others. Rows
    past the total hold 0 and the last prefix sum; where the total exceeds max_total_tokens, the
    rows stop there. `jaxnsa.spec.Rows` says which row holds what.

    Args:
      seq_lens: int32 or int64 [bs], KV length of each request, its new tokens counted.
      extend_seq_lens: int32 or int64 [bs], new tokens of each request; negative counts as 0.
      req_pool_indices: int32 or int64 [bs], each request's row in the pool; clamped into it.
      req_to_token: int32 [pool_rows, pool_cols], KV slot of each token of each request.
      max_total_tokens: capacity, the rows of the result.
      max_total_keys: capacity of `flat_page_indices`, the slots of all requests' tokens one request
        behind the other; what lies past the last one is 0, or with tail "keep" left alone. None
        leaves the array out.
      max_len, nsa_index_topk, real_page_size, wide_table, tail, out, written_lens, max_new_tokens,
        implementation: as in `precompute_decode_metadata`. A request's table row sees its
        `cache_seqlens`.

    Returns:
      NSAMetadata; its docstring gives the shapes.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    read = Inputs(seq_lens, req_pool_indices, req_to_token, extend_seq_lens, written_lens)
    static = StaticArguments(
        forward_mode=ForwardMode.EXTEND,
        max_total_tokens=max_total_tokens,
        max_total_keys=max_total_keys,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        wide_table=wide_table,
        tail=tail,
        max_new_tokens=max_new_tokens,
    )
    return Request(read, static, out, implementation)


@_computes
def fused_metadata_precompute_and_broadcast(
    seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    *,
    num_backends: int,
    forward_mode: ForwardMode = ForwardMode.DECODE,
    num_draft_tokens: int | None = None,
    extend_seq_lens: Array | None = None,
    max_total_tokens: int | None = None,
    max_total_keys: int | None = None,
    max_len: int | None = None,
    nsa_index_topk: int = 2048,
    real_page_size: int = 64,
    wide_table: bool = True,
    index_kpool: int = 1,
    schedules: Schedules | None = None,
    tail: Tail | None = None,
    out: Sequence[NSAMetadata] | NSAMetadata | None = None,
    written_lens: Array | None = None,
    max_new_tokens: int | None = None,
    stacked: bool = False,
    backend_offsets: Sequence[int] | None = None,
    strategy: Strategy | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Request[tuple[NSAMetadata, ...] | NSAMetadata]:
    """The metadata of a step for N backends, each in its own arrays, in one launch.

    For consumers that own N mutable buffers. Where arrays are immutable, as in JAX, N steps can
    share the one result of `precompute_decode_metadata` and its relatives.

    Args:
      seq_lens: int32 or int64 [bs], KV length of each request; negative counts as 0.
      req_pool_indices: int32 or int64 [bs], each request's row in the pool; clamped into it.
      req_to_token: int32 [pool_rows, pool_cols], KV slot of each token of each request. NumPy's is
        not copied, as in `precompute_decode_metadata`.
      num_backends: N, >= 1.
      forward_mode: decides the rows, and which of the next four arguments are given.
      num_draft_tokens: in target verify, see `precompute_target_verify_metadata`.
      extend_seq_lens, max_total_tokens: in draft extend and prefill, see
        `precompute_draft_extend_metadata` and `precompute_extend_metadata`.
      max_total_keys: in prefill, see `precompute_extend_metadata`.
      max_len, nsa_index_topk, real_page_size, wide_table, index_kpool, schedules, tail,
        written_lens, max_new_tokens, implementation: as in `precompute_decode_metadata`.
      out: destinations, donated and filled in place: N NSAMetadata, or one with `stacked`.
      stacked: one NSAMetadata whose arrays lead with [N], which costs fewer arrays to hand over.
      backend_offsets: N ints: backend k is computed for `seq_lens + backend_offsets[k]`, so that
        drafts may each see one token more; of 2^30 at most, and None is all 0.
      strategy: "ultra_fast" one launch, of "ffi" one for each 64 backends, or each 8 with schedules
        or pooled pages; "fast" one computation and N copies; "fallback" N computations, which
        "fast" stands for too with `written_lens` or `backend_offsets`, and in place with
        `max_total_keys` or a top-k plan; None: what the settings say, by default "ultra_fast". All
        give the same bits.

    Returns:
      N NSAMetadata, or one with `stacked`; its docstring gives the shapes.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    read = Inputs(seq_lens, req_pool_indices, req_to_token, extend_seq_lens, written_lens)
    static = StaticArguments(
        forward_mode=forward_mode,
        num_draft_tokens=num_draft_tokens,
        max_total_tokens=max_total_tokens,
        max_total_keys=max_total_keys,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        wide_table=wide_table,
        index_kpool=index_kpool,
        schedules=schedules,
        tail=tail,
        num_backends=num_backends,
        stacked=stacked,
        backend_offsets=backend_offsets,
        max_new_tokens=max_new_tokens,
    )
    return Request(read, static, out, implementation, strategy, several=stacked is False)


def fused_metadata_copy(
    src: NSAMetadata,
    *,
    num_backends: int | None = None,
    out: Sequence[NSAMetadata] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies of all arrays of `src`, in one launch.

    Args:
      src: the metadata to copy, in shapes of any computation. NumPy's tables must not change before
        the copies are ready.
      num_backends: number of copies; None: as many as `out` holds.
      out: destinations of the shapes of `src`, donated and filled in place.
      implementation: a name, or names to try in order; None: the fastest that can run here.

    Returns:
      `num_backends` NSAMetadata, none of which shares memory with `src`.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    src = checks.source(src)
    if num_backends is None:
        if out is None:
            raise ValueError("num_backends: got None, expected an int >= 1 as there is no out=")
        if not isinstance(out, (tuple, list)) or not out:
            got = checks.described(out)
            raise ValueError(f"out: got {got}, expected a tuple of at least one NSAMetadata")
        num_backends = len(out)
    num_backends = checks.integer("num_backends", num_backends, 1, MAX_BACKENDS)
    if out is not None:
        read = {f"src.{name}": array for name, array in src.arrays().items()}
        out = checks.destinations(out, _shapes(src), num_backends, read)
    here, bs = settings(), len(src.cache_seqlens)
    name = choose(implementation, here, _platform(src), Call("fused_metadata_copy", bs))
    something = all(array.size for array in src.arrays().values())
    name = _computing(name, implementation, here, something)
    return _run_copy(src, out, num_backends=num_backends, implementation=name)


def fill_draft_extend_metadata(
    extend_seq_lens: Array,
    seq_lens: Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> DraftExtendSeqlens:
    """The lengths of a draft-extend step: extend_seq_lens[i] rows for request i.

    Row j of request i sees `max(seq_lens[i] - extend_seq_lens[i] + 1 + j, 0)` tokens.

    Args:
      extend_seq_lens: int32 or int64 [bs], rows of each request; negative counts as 0.
      seq_lens: int32 or int64 [bs], KV length of each request, its extend tokens counted.
      nsa_index_topk: the indexer's top-k, in tokens.
      max_total_tokens: capacity, the length of the result's arrays, so that nothing syncs; None:
        exactly the total, which takes one host sync and concrete inputs.
      implementation: a name, or names to try in order; None: the fastest that can run here.

    Returns:
      DraftExtendSeqlens; its docstring gives the shapes.

    Raises:
      ValueError, TypeError: an argument has the wrong shape, dtype or value.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    seq_lens = checks.vector("seq_lens", seq_lens)
    extend_seq_lens = checks.vector("extend_seq_lens", extend_seq_lens, len(seq_lens))
    topk = checks.integer("nsa_index_topk", nsa_index_topk, 1)
    if max_total_tokens is None:
        if isinstance(extend_seq_lens, jax.core.Tracer):
            raise ValueError(
                "max_total_tokens: got None, expected an int as extend_seq_lens is traced: "
                "its sum is not known inside jit"
            )
        lengths = np.asarray(extend_seq_lens, np.int64)
        max_total_tokens = int(np.clip(lengths, 0, INT32_MAX).sum())
        if max_total_tokens > MAX_ROWS:
            raise ValueError(
                f"extend_seq_lens: got {max_total_tokens} rows in all, expected at most {MAX_ROWS}"
            )
    capacity = checks.integer("max_total_tokens", max_total_tokens, 0, MAX_ROWS)
    here = settings()
    if here.validate:
        rows = Rows.of(ForwardMode.DRAFT_EXTEND, len(seq_lens), max_total_tokens=capacity)
        check_values(
            rows, seq_lens, extend_seq_lens=extend_seq_lens, nsa_index_topk=topk, debug=True
        )
    inputs = extend_seq_lens, seq_lens = checks.held(extend_seq_lens), checks.held(seq_lens)
    call = Call("fill_draft_extend_metadata", len(seq_lens))
    name = choose(implementation, here, _platform(inputs), call)
    return _run_fill_draft_extend_metadata(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk=topk,
        max_total_tokens=capacity,
        implementation=_computing(name, implementation, here, len(seq_lens) > 0 and capacity > 0),
    )


def prefix_sum(x: Array, *, implementation: str | Sequence[str] | None = None) -> Array:
    """0, then the inclusive prefix sum: the cumulative-length form of attention kernels.

    Args:
      x: any integer dtype [n].
      implementation: a name, or names to try in order; None: the fastest that can run here.

    Returns:
      int32 [n + 1]; sums past int32 wrap.

    Raises:
      ValueError, TypeError: `x` is not an integer vector.
      ImplementationUnavailableError: no implementation that was asked for can run here.
    """
    x = checks.vector("x", x, dtypes=checks.INTEGERS)
    if isinstance(x, np.ndarray):
        x = x.astype(np.int32)  # a copy, as `checks.held` says, whose sums wrap alike
    here = settings()
    name = choose(implementation, here, _platform(x), Call("prefix_sum", len(x)))
    return _run_prefix_sum(x, implementation=_computing(name, implementation, here, len(x) > 0))


def _fused_metadata(
    request: Request[Any],
) -> tuple[tuple[NSAMetadata, ...], Computation | None]:
    """Checks a request and runs it.

    Returns:
      The metadata of each destination, and what has computed it, if calls alike may run that
      unchecked.
    """
    read, static, out, implementation, strategy, several = request
    inputs, rows = checks.inputs(read, static)
    spec = checks.spec(static, inputs, rows, fresh=out is None)
    if out is not None:
        count = spec.num_backends if several else None
        out = checks.destinations(out, spec.shapes(), count, inputs._asdict())
    here = settings()
    strategy = here.strategy if strategy is None else strategy
    strategy = checks.one_of("strategy", strategy, ("ultra_fast", "fast", "fallback"))
    if here.validate:
        check_inputs(inputs, spec, debug=True)
    given = {n: a for n, a in checks.held_inputs(inputs)._asdict().items() if a is not None}
    call = Call(
        requests=rows.requests,
        num_backends=spec.num_backends,
        even=not (static.forward_mode.ragged or spec.pooled or spec.schedules != NO_SCHEDULES),
    )
    name = choose(implementation, here, _platform(inputs), call)
    if not spec.is_empty:
        _log_path(name, strategy, spec.num_backends)
    name = _computing(name, implementation, here, not spec.is_empty)
    computation = _computation(spec, strategy, name, tuple(given))
    try:
        backends = computation(tuple(given.values()), out)
    except jax.errors.JaxRuntimeError as error:
        if "donate" not in str(error):
            raise
        raise ValueError(
            "out: got arrays that share memory, with each other or with an input, expected each to "
            "have its own"
        ) from error
    return backends, None if here.validate else computation


_computation = functools.lru_cache(maxsize=1024)(Computation)


def _shapes(metadata: NSAMetadata) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = metadata.arrays()
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


def _computing(
    chosen: str, requested: str | Sequence[str] | None, here: Settings, something: bool
) -> str:
    """What computes: XLA where there is nothing to launch a kernel for."""
    if not something:
        return "xla"
    return PORTABLE if chosen == "ffi" and not is_named(requested, here) else chosen


@functools.cache  # once for each path, not for each call
def _log_path(implementation: str, strategy: Strategy, num_backends: int) -> None:
    path = {
        "ultra_fast": "fused precompute + broadcast",
        "fast": "one precompute and a copy for each backend, where copies will do",
        "fallback": "a computation for each backend",
    }[strategy]
    _logger.info("implementation %s, strategy %s: %s", implementation, strategy, path)
    # ffi may take a launch for each eight backends.
    if strategy == "ultra_fast" and 1 < num_backends <= 8 and implementation in FUSED:
        _logger.info("kernel launches reduced from 1 + N to 1 (N = %d backends)", num_backends)


def _platform(arrays: Any) -> str | None:
    """Where the arrays are; None while tracing."""
    leaves = jax.tree.leaves(arrays)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            return leaf.platform()
    return jax.default_backend()


@functools.partial(
    compiled,
    static_argnames=("num_backends", "implementation"),
    donate_argnames=("out",),
    keep_unused=True,
)
def _run_copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    implementation: str,
) -> tuple[NSAMetadata, ...]:
    src = computed_by(implementation, src)
    return computations(implementation).copy(src, out, num_backends=num_backends, live=None)


@functools.partial(
    compiled, static_argnames=("nsa_index_topk", "max_total_tokens", "implementation")
)
def _run_fill_draft_extend_metadata(
    extend_seq_lens: Array,
    seq_lens: Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int,
    implementation: str,
) -> DraftExtendSeqlens:
    return computations(implementation).fill_draft_extend_metadata(
        *computed_by(implementation, (saturated(extend_seq_lens), saturated(seq_lens))),
        nsa_index_topk=nsa_index_topk,
        max_total_tokens=max_total_tokens,
    )


@functools.partial(compiled, static_argnames=("implementation",))
def _run_prefix_sum(x: Array, *, implementation: str) -> Array:
    x = computed_by(implementation, jnp.asarray(x, jnp.int32))
    return computations(implementation).prefix_sum(x)
