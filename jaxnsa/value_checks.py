"""Checks of values, made only on request: they cost a sync, and under `jit` values are unknown.

Concrete inputs are checked on the host. Traced ones become `jax.experimental.checkify` checks with
the same conditions.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxnsa import argument_checks as checks
from jaxnsa import row_owners
from jaxnsa.argument_checks import StaticArguments
from jaxnsa.metadata import Array, ForwardMode
from jaxnsa.spec import INT32_MAX, Inputs, Rows, Spec, saturated

_logger = logging.getLogger("jaxnsa")

_SHOWN = 5  # offending rows that an error names


def validate_inputs(
    seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    *,
    forward_mode: ForwardMode = ForwardMode.DECODE,
    num_draft_tokens: int | None = None,
    extend_seq_lens: Array | None = None,
    max_total_tokens: int | None = None,
    max_total_keys: int | None = None,
    max_len: int | None = None,
    nsa_index_topk: int = 2048,
    index_kpool: int = 1,
    backend_offsets: Sequence[int] | None = None,
) -> None:
    """Checks the values of a computation's inputs.

    Legal are lengths of 0 and more, `seq_lens` of at most `max_len`, pool indices inside the pool,
    `extend_seq_lens` of at most `seq_lens` whose sum is at most `max_total_tokens`, and sums of
    lengths inside int32 and of at most `max_total_keys`. The computations themselves accept
    anything, as their docstrings say; this finds what a scheduler did not mean. With
    `backend_offsets` the longer lengths of every backend must be legal too.

    Concrete inputs are brought to the host. Inside `jit` the same conditions become
    `checkify.check`, so the function must be transformed by `checkify.checkify`.

    Args:
      seq_lens: int32 or int64 [bs], KV length of each request.
      req_pool_indices: int32 or int64 [bs], each request's row in the pool.
      req_to_token: int32 [pool_rows, pool_cols].
      forward_mode: which of the following arguments count.
      num_draft_tokens: in target verify, tokens that the step appends to each request.
      extend_seq_lens: int32 or int64 [bs], in draft extend and prefill, rows of each request.
      max_total_tokens: in draft extend and prefill, the capacity in rows.
      max_total_keys: in prefill, the capacity in keys.
      max_len: columns of the page table, in tokens; None: all columns of the pool.
      nsa_index_topk: the indexer's top-k, in tokens.
      index_kpool: tokens that the indexer pools into one key.
      backend_offsets: of each backend, the tokens by which its `seq_lens` are longer; None: all 0.

    Raises:
      ValueError: a value is not legal; names the argument and the first offending rows. Also a
        wrong shape or a wrong combination of arguments.
      TypeError: a wrong dtype.
    """
    offsets = checks.backend_offsets(backend_offsets, None)
    static = StaticArguments(
        forward_mode,
        num_draft_tokens=num_draft_tokens,
        max_total_tokens=max_total_tokens,
        max_total_keys=max_total_keys,
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        index_kpool=index_kpool,
        num_backends=1 if offsets is None else len(offsets),
        backend_offsets=offsets,
    )
    given = Inputs(seq_lens, req_pool_indices, req_to_token, extend_seq_lens)
    inputs, rows = checks.inputs(given, static)
    spec = checks.spec(static, inputs, rows, fresh=True)
    check_inputs(inputs, spec, debug=False)


def check_inputs(inputs: Inputs, spec: Spec, *, debug: bool) -> None:
    """`check_values` of all inputs of a computation."""
    check_values(
        spec.rows,
        inputs.seq_lens,
        inputs.req_pool_indices,
        inputs.extend_seq_lens,
        pool_rows=len(inputs.req_to_token),
        max_len=spec.max_len,
        max_total_keys=spec.max_total_keys,
        nsa_index_topk=spec.nsa_index_topk,
        index_kpool=spec.index_kpool,
        offsets=spec.offsets,
        debug=debug,
    )


def check_values(
    rows: Rows,
    seq_lens: Array,
    req_pool_indices: Array | None = None,
    extend_seq_lens: Array | None = None,
    *,
    pool_rows: int | None = None,
    max_len: int | None = None,
    max_total_keys: int | None = None,
    nsa_index_topk: int,
    index_kpool: int = 1,
    offsets: Sequence[int] = (0,),
    debug: bool,
) -> None:
    """Checks the values of inputs whose static facts are checked.

    Args:
      rows: how rows map to requests.
      seq_lens, req_pool_indices, extend_seq_lens: the inputs, None where there are none.
      pool_rows: rows of the pool, if there is one.
      max_len: columns of the page table, if there is one.
      max_total_keys: capacity of the flat table, if there is one.
      nsa_index_topk: the indexer's top-k.
      index_kpool: tokens that the indexer pools into one key.
      offsets: tokens by which `seq_lens` are longer in each backend.
      debug: where inputs are traced, emit checks that are dropped unless checkify asks for them.
    """
    vectors = (seq_lens, req_pool_indices, extend_seq_lens)
    traced = any(isinstance(v, jax.core.Tracer) for v in vectors)
    xp = jnp if traced else np
    values = _Values(*(None if v is None else xp.asarray(v) for v in vectors))
    emit = checkify.debug_check if debug else checkify.check
    if traced and debug:
        _say_what_jit_needs()
    selection = nsa_index_topk, index_kpool
    for rule in _rules(
        xp, values, pool_rows, rows, max_len, max_total_keys, selection, sorted({*offsets})
    ):
        if rule.values.size == 0:
            continue
        if traced:
            message = f"{rule.argument}: got {{value}} at row {{row}}, expected {rule.expected}"
            row = jnp.argmax(rule.offends)
            emit(~jnp.any(rule.offends), message, row=row, value=rule.values[row])
        elif rule.offends.any():
            offending = np.flatnonzero(rule.offends)
            shown = offending[:_SHOWN]
            more = f" and {len(offending) - _SHOWN} more" if len(offending) > _SHOWN else ""
            raise ValueError(
                f"{rule.argument}: got {', '.join(map(str, rule.values[shown]))} at row(s) "
                f"{', '.join(map(str, shown))}{more}, expected {rule.expected}"
            )


@functools.cache  # once
def _say_what_jit_needs() -> None:
    _logger.warning(
        "validate: values are not known inside jit; they are checked where the function is "
        "transformed by jax.experimental.checkify.checkify, and nowhere else"
    )


class _Values(NamedTuple):
    """The inputs of `check_values`, on the host or traced."""

    seq_lens: Any
    req_pool_indices: Any
    extend_seq_lens: Any


class _Rule(NamedTuple):
    argument: str
    expected: str
    offends: Array  # bool [bs]
    values: Array  # int [bs]


def _rules(
    xp: ModuleType,
    values: _Values,
    pool_rows: int | None,
    rows: Rows,
    max_len: int | None,
    max_total_keys: int | None,
    selection: tuple[int, int],
    offsets: Sequence[int],
) -> Iterator[_Rule]:
    seq_lens, req_pool_indices, extend_seq_lens = values
    yield _Rule("seq_lens", "lengths >= 0", seq_lens < 0, seq_lens)
    if max_len is not None:
        longer = max(0, offsets[-1])
        most = max_len - longer
        expected = f"at most max_len{f' - {longer}' if longer else ''} = {most}"
        yield _Rule("seq_lens", expected, seq_lens > most, seq_lens)
    if pool_rows is not None:
        outside = (req_pool_indices < 0) | (req_pool_indices >= pool_rows)
        yield _Rule("req_pool_indices", f"rows in [0, {pool_rows})", outside, req_pool_indices)
    if extend_seq_lens is not None:
        yield _Rule("extend_seq_lens", "lengths >= 0", extend_seq_lens < 0, extend_seq_lens)
        longer = extend_seq_lens > seq_lens
        yield _Rule("extend_seq_lens", "at most seq_lens", longer, extend_seq_lens)
        expected = f"a running total of at most max_total_tokens = {rows.count}"
        yield _running_total(xp, "extend_seq_lens", expected, extend_seq_lens, rows.count)
    # What follows is of int32 lengths.
    narrow = checks.held if xp is np else saturated
    seq_lens = narrow(seq_lens)
    extend_seq_lens = None if extend_seq_lens is None else narrow(extend_seq_lens)
    for offset in offsets:
        of_offset = dataclasses.replace(rows, offset=offset)
        yield from _rules_of_sums(
            xp, seq_lens, extend_seq_lens, of_offset, max_total_keys, *selection
        )


def _rules_of_sums(
    xp: ModuleType,
    seq_lens: Array,
    extend_seq_lens: Array | None,
    rows: Rows,
    max_total_keys: int | None,
    nsa_index_topk: int,
    index_kpool: int,
) -> Iterator[_Rule]:
    """What holds for the rows of the backends of an offset."""
    longer = f" with {rows.offset} tokens more" if rows.offset else ""
    cache_seqlens = xp.asarray(row_owners.cache_seqlens(rows, jnp.asarray(seq_lens)))
    if max_total_keys is not None:
        expected = f"a running total of at most max_total_keys = {max_total_keys}{longer}"
        yield _running_total(xp, "seq_lens", expected, cache_seqlens, max_total_keys)
    expected = f"a prefix sum of cache_seqlens inside int32{longer}"
    yield _running_total(xp, "seq_lens", expected, cache_seqlens)
    kv_len = xp.asarray(row_owners.row_owners(rows, jnp.asarray(seq_lens), extend_seq_lens).kv_len)
    pooled = kv_len // index_kpool * index_kpool
    nsa_cache_seqlens = xp.minimum(pooled, nsa_index_topk) + (kv_len - pooled)
    expected = f"a prefix sum of nsa_cache_seqlens inside int32{longer}"
    yield _running_total(xp, "seq_lens", expected, nsa_cache_seqlens)


def _running_total(
    xp: ModuleType, argument: str, expected: str, lengths: Any, most: int = INT32_MAX
) -> _Rule:
    # Traced int32 sums turn negative where they first leave int32; sums on the host are int64.
    total = xp.cumsum(lengths, dtype=np.int64 if xp is np else None)
    return _Rule(argument, expected, (total > most) | (total < 0), total)
