"""What every call checks: shapes, dtypes and keyword combinations, never values.

Each error names the argument, what came, and what was expected.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnsa.metadata import FIELDS, Array, Extent, ForwardMode, NSAMetadata
from jaxnsa.scalar_checks import INT32_MAX, INT32_MIN, described, flag, integer, one_of
from jaxnsa.schedules import NO_SCHEDULES, Schedules
from jaxnsa.spec import MAX_BACKENDS, MAX_LEN, MAX_ROWS, Inputs, Rows, Spec

LENGTHS = (np.dtype(np.int32), np.dtype(np.int64))
POOL = (np.dtype(np.int32),)
INTEGERS = tuple(np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


def array(name: str, value: Any, rank: int, dtypes: tuple[np.dtype, ...] = LENGTHS) -> Array:
    """`value` as an array of the given rank and one of the given dtypes.

    Raises:
      TypeError: not an array, or another dtype.
      ValueError: another rank, a size that is not known, or a deleted array.
    """
    if isinstance(value, jax.Array):
        check_known(name, value)
    elif not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        value = _as_array(name, value)
    if value.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")
    if value.ndim != rank:
        raise ValueError(f"{name}: got shape {value.shape}, expected {rank} dimension(s)")
    return value


def check_known(name: str, value: jax.Array) -> None:
    """Raises ValueError where an array was deleted, or a traced one has no numbers as sizes."""
    if not isinstance(value, jax.core.Tracer):
        if value.is_deleted():
            raise ValueError(f"{name}: got a deleted array, expected one not donated before")
    elif not all(isinstance(size, int) for size in value.shape):
        raise ValueError(
            f"{name}: got shape {value.shape}, expected numbers: a function is exported once for "
            f"each batch size"
        )


def _as_array(name: str, value: Any) -> np.ndarray:
    """What is no array, such as a list of numbers, as one."""
    if type(value).__module__.partition(".")[0] == "torch":
        raise TypeError(f"{name}: got a torch tensor, expected an array; see jaxnsa.interop.torch")
    if isinstance(value, (list, tuple)) and not value:
        return np.zeros(0, np.int32)  # which NumPy takes for floats
    try:
        converted = None if isinstance(value, np.ma.MaskedArray) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged, or of traced or deleted values
        converted = None
    if converted is None or converted.dtype == object:
        raise TypeError(f"{name}: got {described(value)}, expected an array")
    return converted


def vector(
    name: str,
    value: Any,
    length: int | None = None,
    dtypes: tuple[np.dtype, ...] = LENGTHS,
) -> Array:
    """`value` as a vector of one of the given dtypes; `length`, where given, is seq_lens' own."""
    value = array(name, value, 1, dtypes)
    if length is not None and len(value) != length:
        raise ValueError(
            f"{name}: got shape {value.shape}, expected ({length},), the shape of seq_lens"
        )
    if len(value) > MAX_ROWS:
        raise ValueError(f"{name}: got {len(value)} elements, expected at most {MAX_ROWS}")
    return value


def held(vector: Array) -> Array:
    """A vector that the caller's later writes do not reach: what is NumPy's is copied, as int32.

    A computation may read it after the call has returned.
    """
    if not isinstance(vector, np.ndarray):
        return vector
    if vector.dtype == np.int64:
        # Without x64, JAX would take the low 32 bits.
        vector = np.clip(vector, INT32_MIN, INT32_MAX)
    return np.array(vector, np.int32)


def held_inputs(given: Inputs) -> Inputs:
    """The same inputs, their vectors held; the pool, which is large, is not copied."""
    return Inputs._make(
        value if value is None or value is given.req_to_token else held(value) for value in given
    )


class StaticArguments(NamedTuple):
    """The arguments of a computation but for its arrays, as the caller gave them.

    The public functions document them. Those that a forward mode does not take are None.
    """

    forward_mode: Any
    num_draft_tokens: Any = None
    max_total_tokens: Any = None
    max_total_keys: Any = None
    max_len: Any = None
    nsa_index_topk: Any = 1
    real_page_size: Any = 1
    wide_table: Any = True
    index_kpool: Any = 1
    schedules: Any = None
    tail: Any = None
    num_backends: Any = 1
    stacked: Any = False
    backend_offsets: Any = None
    max_new_tokens: Any = None


def inputs(given: Inputs, static: StaticArguments) -> tuple[Inputs, Rows]:
    """The arrays of a computation and how its rows map to requests."""
    seq_lens = vector("seq_lens", given.seq_lens)
    bs = len(seq_lens)
    req_pool_indices = vector("req_pool_indices", given.req_pool_indices, bs)
    req_to_token = array("req_to_token", given.req_to_token, 2, POOL)
    if 0 in req_to_token.shape:
        raise ValueError(
            f"req_to_token: got shape {req_to_token.shape}, expected at least one row and column"
        )
    mode = static.forward_mode
    mapping = rows(mode, bs, static.num_draft_tokens, static.max_total_tokens)
    extend = extend_seq_lens(given.extend_seq_lens, mode, bs)
    written_lens = given.written_lens
    if written_lens is not None:
        written_lens = vector("written_lens", written_lens, bs)
    return Inputs(seq_lens, req_pool_indices, req_to_token, extend, written_lens), mapping


def forward_mode(value: Any) -> ForwardMode:
    """`value`, which must be a ForwardMode."""
    if not isinstance(value, ForwardMode):
        raise TypeError(f"forward_mode: got {value!r}, expected a jaxnsa.ForwardMode")
    return value


def rows(
    mode: Any, requests: int, num_draft_tokens: Any, max_total_tokens: Any, most: int = MAX_ROWS
) -> Rows:
    """How the rows of a forward mode, `most` of them at most, map to requests."""
    mode = forward_mode(mode)
    _check_given("num_draft_tokens", num_draft_tokens, mode, mode is ForwardMode.TARGET_VERIFY)
    _check_given("max_total_tokens", max_total_tokens, mode, mode.ragged)
    if num_draft_tokens is not None:
        num_draft_tokens = integer("num_draft_tokens", num_draft_tokens, 1)
    if max_total_tokens is not None:
        max_total_tokens = integer("max_total_tokens", max_total_tokens, 0, most)
    result = Rows.of(mode, requests, num_draft_tokens, max_total_tokens)
    if result.count > most:
        raise ValueError(
            f"seq_lens: got {requests} requests of {result.rows_per_request} rows each, expected "
            f"at most {most} rows in all"
        )
    return result


def extend_seq_lens(value: Any, mode: ForwardMode, requests: int) -> Array | None:
    """`value` as the rows of each request, given where a mode does not say them."""
    _check_given("extend_seq_lens", value, mode, mode.ragged)
    return None if value is None else vector("extend_seq_lens", value, requests)


def _check_given(name: str, value: Any, mode: ForwardMode, wanted: bool) -> None:
    """Raises ValueError where a mode wants an argument that is None, or None and it is not."""
    if wanted and value is None:
        raise ValueError(f"{name}: got None, expected a value in {mode}")
    if not wanted and value is not None:
        raise ValueError(f"{name}: got {described(value)}, expected None in {mode}")


def spec(given: StaticArguments, inputs: Inputs, rows: Rows, *, fresh: bool) -> Spec:
    """The static description of a computation, whose results are fresh or in place."""
    if given.max_total_keys is not None and not rows.prefill:
        got = described(given.max_total_keys)
        raise ValueError(f"max_total_keys: got {got}, expected None in {given.forward_mode}")
    num_backends = integer("num_backends", given.num_backends, 1, MAX_BACKENDS)
    page_size = integer("real_page_size", given.real_page_size, 1)
    tail = ("copy" if fresh else "keep") if given.tail is None else given.tail
    result = Spec(
        rows=rows,
        max_len=max_len(given.max_len, inputs.req_to_token.shape[1]),
        nsa_index_topk=integer("nsa_index_topk", given.nsa_index_topk, 1),
        real_page_size=page_size,
        wide_table=flag("wide_table", given.wide_table),
        # A column of the pooled table stands for so many pages, in tokens that fit int32.
        index_kpool=integer("index_kpool", given.index_kpool, 1, INT32_MAX // page_size),
        schedules=schedules(given.schedules),
        tail=one_of("tail", tail, ("copy", "zero", "keep")),
        num_backends=num_backends,
        stacked=flag("stacked", given.stacked),
        backend_offsets=backend_offsets(given.backend_offsets, num_backends),
        max_new_tokens=max_new_tokens(given.max_new_tokens, inputs.written_lens),
        max_total_keys=(
            None
            if given.max_total_keys is None
            else integer("max_total_keys", given.max_total_keys, 0, MAX_LEN)
        ),
    )
    if result.tail == "keep" and fresh:
        raise ValueError("tail: got 'keep', expected 'copy' or 'zero' as there is no out= to keep")
    if result.tail != "keep" and inputs.written_lens is not None:
        raise ValueError(
            f"written_lens: got {described(inputs.written_lens)}, expected None as there is "
            + ("no out= that holds anything" if fresh else f"tail {result.tail!r}, not 'keep'")
        )
    if result.backend_offsets is not None and rows.prefill:
        raise ValueError(
            f"backend_offsets: got {result.backend_offsets}, expected None in "
            f"{ForwardMode.EXTEND}, where all backends see the same tokens"
        )
    if not result.wide_table and not result.real_table:
        raise ValueError(
            "wide_table: got False, expected True as real_page_size is 1: no table would be left"
        )
    return result


def schedules(value: Any) -> Schedules:
    """`value` as Schedules; None asks for none."""
    if value is None:
        return NO_SCHEDULES
    if not isinstance(value, Schedules):
        raise TypeError(f"schedules: got {described(value)}, expected a jaxnsa.Schedules or None")
    return value


def max_len(value: Any, pool_cols: int) -> int:
    """`value` as the number of columns of a page table; None takes all of the pool."""
    return integer("max_len", pool_cols if value is None else value, 1, min(pool_cols, MAX_LEN))


def backend_offsets(value: Any, num_backends: int | None) -> tuple[int, ...] | None:
    """`value` as the offset of each backend, of any number if that is None; None if all are 0."""
    if value is None:
        return None
    given = len(value) if isinstance(value, (tuple, list)) else None
    if not (given if num_backends is None else given == num_backends):
        got = described(value) if given is None else f"{given} of them"
        number = "" if num_backends is None else f"{num_backends} "
        raise ValueError(f"backend_offsets: got {got}, expected a tuple of {number}ints")
    offsets = tuple(
        integer(f"backend_offsets[{k}]", offset, -MAX_LEN, MAX_LEN)
        for k, offset in enumerate(value)
    )
    return offsets if any(offsets) else None


def max_new_tokens(value: Any, written_lens: Any, name: str = "written_lens") -> int:
    """`value` as the tokens that a launch is sized for; None takes any number."""
    if value is None:
        return MAX_LEN
    if written_lens is None:
        raise ValueError(f"max_new_tokens: got {described(value)}, expected None without {name}")
    return min(integer("max_new_tokens", value, 0), MAX_LEN)


def source(src: Any) -> NSAMetadata:
    """`src` as NSAMetadata of int32 arrays whose vectors are held; stacked ones lead with [N]."""
    if not isinstance(src, NSAMetadata):
        raise TypeError(f"src: got {described(src)}, expected an NSAMetadata")
    stacked = getattr(src.cache_seqlens, "ndim", 1) == 2
    arrays = {}
    for name, field in FIELDS.items():
        value = getattr(src, name)
        if value is None and field.wanted is not None:
            continue
        rank = field.extent.dimensions + stacked
        value = array(f"src.{name}", value, rank, (np.dtype(np.int32),))
        arrays[name] = value if field.extent is Extent.TABLE else held(value)
    return NSAMetadata(**arrays)


def destinations(
    out: Any,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    count: int | None,
    read: Mapping[str, Array | None],
) -> tuple[NSAMetadata, ...]:
    """`out` as a tuple of NSAMetadata whose arrays can be donated.

    Args:
      out: what the caller gave.
      expected: the shape and dtype of every array of one destination, by name.
      count: how many destinations `out` must hold; None where it must be one, by itself.
      read: the arrays that the computation reads, by name: none of them may be written.
    """
    if count is None:
        named = {"out": out}
    elif isinstance(out, (tuple, list)) and len(out) == count:
        named = {f"out[{k}]": destination for k, destination in enumerate(out)}
    else:
        got = f"{len(out)} of them" if isinstance(out, (tuple, list)) else described(out)
        raise ValueError(f"out: got {got}, expected a tuple of {count} NSAMetadata")
    seen: dict[int, tuple[str, ...]] = {id(array): (name,) for name, array in read.items()}
    for argument, destination in named.items():
        if not isinstance(destination, NSAMetadata):
            raise TypeError(f"{argument}: got {described(destination)}, expected an NSAMetadata")
        for field in FIELDS:
            value, shape = getattr(destination, field), expected.get(field)
            if shape is None and value is None:
                continue
            if problem := _destination_problem(value, shape):
                raise type(problem)(f"{argument}.{field}: {problem}")
            check_known(f"{argument}.{field}", value)
            if id(value) in seen:
                other = ".".join(seen[id(value)])
                raise ValueError(f"{argument}.{field}: got the array of {other}, expected its own")
            seen[id(value)] = (argument, field)
    return tuple(named.values())


def _destination_problem(
    value: Any, expected: jax.ShapeDtypeStruct | None
) -> TypeError | ValueError | None:
    """What keeps `value` from being a destination."""
    if expected is None or value is None:
        wanted = "None" if expected is None else f"int32 {expected.shape}"
        return ValueError(f"got {described(value)}, expected {wanted}")
    if not isinstance(value, jax.Array):
        return TypeError(f"got {described(value)}, expected a jax.Array to donate")
    if value.dtype != expected.dtype:
        return TypeError(f"got dtype {value.dtype}, expected {expected.dtype}")
    if value.shape != expected.shape:
        return ValueError(f"got shape {value.shape}, expected {expected.shape}")
    return None
