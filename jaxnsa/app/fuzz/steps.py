"""Steps of a fuzzer's program: each calls the library and checks all that comes of it.

The programs that `jaxnsa verify --fuzz` prints consist of these, and run by themselves.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import jaxnsa
from jaxnsa import BatchTracker, config, reference
from jaxnsa.app.fuzz.batch import Batch
from jaxnsa.implementations.choice import ImplementationUnavailableError
from jaxnsa.metadata import ForwardMode
from jaxnsa.spec import Rows
from jaxnsa.value_checks import validate_inputs

BROADCAST = "fused_metadata_precompute_and_broadcast"
COPY, FILL, SUM = "fused_metadata_copy", "fill_draft_extend_metadata", "prefix_sum"
RAGGED = "ragged_paged_attention_metadata"
SINGLE = {f"precompute_{mode.value}_metadata": mode for mode in ForwardMode}
"""The functions for one backend."""

HELD = -7
"""What destinations hold before anything is written."""

EXPLANATION = re.compile(r"[\w.\[\]]+: (got|expected) |implementation '\w+' cannot run here: ")
"""How the library's errors begin: with the name of what is wrong."""

Values = Mapping[str, Any]
"""The vectors of a call by name, as lists or arrays of ints."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call but for its values: all that its compilation depends on.

    Attributes:
      function: its name in `jaxnsa` and in `jaxnsa.reference`.
      implementation: what computes it.
      bs: requests, or elements of prefix_sum's vector.
      pool: shape of `req_to_token`.
      options: of all functions, which take what they have of them.
      in_place: whether it fills destinations, those of the call before it if there was one.
      transform: "eager", "jit", "vmap" or "shard_map".
      arrays: "numpy" or "jax", what its inputs are.
      dtype: of its lengths.
      surroundings: a name in `SURROUNDINGS`.
      written: whether `written_lens` is given, among its lengths.
    """

    function: str
    implementation: str
    bs: int
    pool: tuple[int, int]
    options: tuple[tuple[str, Any], ...]
    in_place: bool = False
    transform: str = "eager"
    arrays: str = "numpy"
    dtype: str = "int32"
    surroundings: str = "plain"
    written: bool = False

    @property
    def mode(self) -> ForwardMode:
        """The forward mode, of those functions that have one."""
        return SINGLE.get(self.function, dict(self.options)["forward_mode"])

    @property
    def far(self) -> bool:
        """Whether lengths may be anything: some take the reference long, or much memory."""
        options = dict(self.options)
        rows_are_counted = self.function == FILL and options["max_total_tokens"] is None
        return options.get("schedules") is None and not rows_are_counted

    @property
    def slow(self) -> bool:
        """Whether JAX dispatches its operations one by one."""
        eager = self.function == RAGGED and self.transform == "eager"
        return eager or self.surroundings == "disable_jit"

    @property
    def title(self) -> str:
        """The function and, of the broadcast, its forward mode."""
        return f"{self.function} {self.mode.value}" if self.function == BROADCAST else self.function


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


SURROUNDINGS: Mapping[str, Callable[[], contextlib.AbstractContextManager]] = {
    "plain": contextlib.nullcontext,
    "x64": lambda: jax.enable_x64(True),
    "strict promotion": _strict,
    "disable_jit": jax.disable_jit,
    "fused_broadcast=False": lambda: config.override(fused_broadcast=False),
    "mtp_precompute_metadata=False": lambda: config.override(mtp_precompute_metadata=False),
}
"""What a call may be made under."""


class Refused(Exception):
    """The library refused a call that nothing is wrong with; the message is its own."""


class Session:
    """What a program has made so far.

    Attributes:
      held: destinations and registered tensors, which steps fill again, by what they are.
      values: of the latest call.
      calls: how many there were.
    """

    def __init__(self) -> None:
        self.held: dict[Any, Any] = {}
        self.values: Values = {}
        self.calls = 0


def call(
    session: Session, call: Call, *, seed: int = 0, more: int = 0, values: Values | None = None
) -> None:
    """Makes a call and compares all that it returns with the reference.

    Args:
      session: holds the destinations.
      call: which.
      seed: of the pool's slots, and of the values where none are given.
      more: calls that follow with other values; fewer of slow ones.
      values: `seq_lens`, `req_pool_indices`, `extend_seq_lens` and `written_lens`.

    Raises:
      AssertionError: something is not as it should be. Any other error: likewise.
      Refused: the implementation does not compute this.
    """
    count = 1 + (min(more, 2) if call.slow else more)
    drawn = vectors(seed, call.bs, call.pool, call.dtype, call.far, count)
    for each in drawn if values is None else [values]:
        session.values = each
        session.calls += 1
        arguments, options = arguments_of(call, seed, each)
        out = twin = None
        if call.in_place:
            out, twin = _destinations(session, call)
        actual = _computed(call, arguments, options, out)
        options.pop("strategy", None)
        expect = functools.partial(getattr(reference, call.function), **options)
        if call.transform in ("vmap", "shard_map"):
            batch = jax.device_get(actual)
            for k, row in enumerate(_batch(call, arguments)):
                assert_same(jax.tree.map(lambda a, k=k: a[k], batch), expect(**row))
        elif out is None:
            assert_same(actual, expect(**arguments))
        else:
            assert_same(actual, expect(**arguments, out=twin))
            assert all(array.is_deleted() for array in jax.tree.leaves(out))
            session.held[call] = actual, twin


def wrong_call(session: Session, call: Call, *, wrong: tuple[str, str], seed: int = 0) -> None:
    """Makes a call with one wrong argument: it is to be refused, and its destinations are to live.

    Args:
      session, call, seed: as of `call`.
      wrong: its name, and an expression of its value, in which `given` is what it should be.
    """
    argument, expression = wrong
    (values,) = vectors(seed, call.bs, call.pool, call.dtype, call.far, 1)
    arguments, options = arguments_of(call, seed, values)
    keywords = _on_device(call, arguments) | options | _implementation(call)
    if call.in_place:
        keywords["out"], _ = _destinations(session, call)
    held = jax.tree.leaves(keywords.get("out"))
    keywords[argument] = eval(expression, globals(), {"given": keywords.get(argument)})
    session.calls += 1
    with SURROUNDINGS[call.surroundings]():
        assert_refused(f"{argument} = {expression}", getattr(jaxnsa, call.function), keywords)
    assert not any(array.is_deleted() for array in held)


def assert_refused(what: str, function: Callable, keywords: Mapping[str, Any]) -> None:
    """A call that is to be refused with an explanation."""
    try:
        function(**keywords)
    except (TypeError, ValueError, ImplementationUnavailableError) as error:
        if not EXPLANATION.match(str(error)):
            raise
    else:
        raise AssertionError(f"{what} was taken")


def validate(session: Session, call: Call, *, seed: int = 0) -> None:
    """Validates the inputs of a call, which may be illegal."""
    (values,) = vectors(seed, call.bs, call.pool, call.dtype, call.far, 1)
    call = dataclasses.replace(call, function=BROADCAST, written=False)
    arguments, options = arguments_of(call, seed, values)
    session.calls += 1
    taken = {n: v for n, v in options.items() if n in parameters(validate_inputs)}
    try:
        validate_inputs(**arguments, **taken)
    except ValueError as error:
        assert EXPLANATION.match(str(error)), error


def track(session: Session, call: Call, *, seed: int = 0, more: int = 0) -> None:
    """Fills destinations for a batch that changes, where a `BatchTracker` says what they hold.

    Args:
      session, seed: as of `call`.
      more: steps that follow; fewer where the tracker is called outside `jit`.
      call: in place, with `written_lens`, eager or jitted.
    """
    batch = Batch(seed, call.pool)
    _, options = arguments_of(call, seed, {})
    table_rows, step, invalidate = _tracking(call)
    tracker = BatchTracker.empty(table_rows)
    out, twin = _destinations(session, call)
    session.held.pop(call)
    for _ in range(1 + (more if call.transform == "jit" else min(more, 3))):
        session.calls += 1
        for k in batch.step(call.bs):
            tracker = invalidate(tracker, k[None])
        arguments = batch.arguments(is_ragged(call.mode))
        values = {n: v for n, v in arguments.items() if n in parameters(BatchTracker.step)}
        written, tracker = step(tracker, batch.ids, **values)
        out = _computed(call, arguments | {"written_lens": np.asarray(written)}, options, out)
        plain = {n: v for n, v in options.items() if n not in ("strategy", "max_new_tokens")}
        assert_same(out, getattr(reference, call.function)(**arguments, **plain, out=twin))


@functools.lru_cache(maxsize=64)
def _tracking(call: Call) -> tuple[int, Callable, Callable]:
    """Table rows of a call, and the methods of the `BatchTracker` of such calls."""
    _, options = arguments_of(call, 0, {})
    counts = (options.get(name) for name in ("num_draft_tokens", "max_total_tokens"))
    rows = Rows.of(call.mode, call.bs, *counts)
    static = {n: v for n, v in options.items() if n in parameters(BatchTracker.step)}
    step = functools.partial(BatchTracker.step, **static | {"forward_mode": call.mode})
    if call.transform == "eager":
        return rows.tables.count, step, BatchTracker.invalidate
    return rows.tables.count, jax.jit(step), jax.jit(BatchTracker.invalidate)


def is_ragged(mode: ForwardMode) -> bool:
    """Whether `extend_seq_lens` says how many rows a request has."""
    return Rows.of(mode, 1, 1, 1).rows_per_request is None


def pool(shape: tuple[int, int], seed: int) -> np.ndarray:
    """`req_to_token` of random slots, some of them negative."""
    return np.random.default_rng(seed).integers(-50, 2**31 - 1, shape, dtype=np.int32)


def highest(pool: tuple[int, int]) -> dict[str, int]:
    """Of each vector, the highest value that is not far."""
    return {
        "seq_lens": pool[1] + 5,
        "req_pool_indices": pool[0] + 2,
        "extend_seq_lens": 5,
        "written_lens": pool[1] + 5,
    }


def extremes(dtype: str) -> tuple[int, ...]:
    """Values of a vector that are far, or at an edge."""
    int32 = (0, 1, -1, 63, 64, 65, 2**31 - 2, 2**31 - 1, -(2**31))
    return int32 + ((2**31, 2**32 + 5, 2**62, 2**63 - 1, -(2**63)) if dtype == "int64" else ())


def vectors(
    seed: int, size: int, pool: tuple[int, int], dtype: str, far: bool, count: int
) -> list[Values]:
    """Random vectors for so many calls, with extremes in some places where they may be far."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, high in highest(pool).items():
        values = rng.integers(-3, high, (count, size), endpoint=True)
        if far or name == "req_pool_indices":
            # None, some or most of a call's.
            is_far = rng.random((count, size)) < rng.choice([0, 0.1, 0.7], (count, 1))
            values = np.where(is_far, rng.choice(extremes(dtype), (count, size)), values)
        drawn[name] = values.astype(dtype)
    return [{name: values[k] for name, values in drawn.items()} for k in range(count)]


@functools.cache
def parameters(function: Callable) -> frozenset[str]:
    """The names of a function's arguments."""
    return frozenset(inspect.signature(function).parameters)


def deleted(tree: Any) -> Any:
    """Deleted arrays like the given ones."""
    copies = jax.tree.map(jnp.array, tree)
    jax.tree.map(lambda array: array.delete(), copies)
    return copies


def arguments_of(call: Call, seed: int, values: Values) -> tuple[dict, dict]:
    """The arrays and the other keyword arguments of a call, as the reference takes them."""
    options = dict(call.options)
    arguments: dict[str, Any] = {
        name: np.asarray(value, np.int64).astype(call.dtype) for name, value in values.items()
    }
    if call.function == SUM:
        return {"x": arguments.get("seq_lens")}, {}
    if call.function == COPY:
        rng = np.random.default_rng(seed)
        source = shapes_of(dataclasses.replace(call, in_place=False))[0]
        arrays = jax.tree.map(
            lambda a: rng.integers(-(2**31), 2**31, a.shape, dtype=np.int32), source
        )
        return {"src": arrays}, {"num_backends": options["num_backends"]}
    if not call.written:
        arguments.pop("written_lens", None)
    if call.function == FILL:
        arguments.pop("req_pool_indices", None)
    else:
        arguments["req_to_token"] = pool(call.pool, seed)
        if not is_ragged(call.mode):
            arguments.pop("extend_seq_lens", None)
    if call.function == RAGGED:
        arguments.setdefault("extend_seq_lens", None)
        arguments["num_seqs"] = np.asarray(seed % (call.bs + 3) - 1, np.int32)
    taken = parameters(getattr(jaxnsa, call.function))
    return arguments, {name: value for name, value in options.items() if name in taken}


@functools.lru_cache(maxsize=256)
def shapes_of(call: Call) -> Any:
    """What a call returns, as arrays of `HELD`."""
    if call.function == COPY:
        call = dataclasses.replace(call, function=BROADCAST, in_place=False)
        options = {"stacked": False, "tail": None, "backend_offsets": None, "max_new_tokens": None}
        call = dataclasses.replace(
            call, options=tuple((dict(call.options) | options).items()), written=False
        )
    zeros = {name: [0] * call.bs for name in highest(call.pool)}
    arguments, options = arguments_of(call, 0, zeros)
    options.pop("strategy", None)
    if "tail" in options:
        options["tail"] = None
    made = getattr(reference, call.function)(**arguments, **options)
    return jax.tree.map(lambda a: np.full(a.shape, HELD, np.int32), made)


def _destinations(session: Session, call: Call) -> tuple[Any, Any]:
    """The destinations of a call and NumPy twins of them."""
    if call not in session.held:
        twin = jax.tree.map(np.copy, shapes_of(call))
        session.held[call] = jax.tree.map(jnp.array, twin), twin
    return session.held[call]


def _batch(call: Call, arguments: dict) -> list[dict]:
    """What a call is mapped over: its arguments, and those with their lengths reversed."""
    name = _mapped_argument(call)
    count = min(2, jax.device_count()) if call.transform == "shard_map" else 2
    return [arguments, arguments | {name: arguments[name][::-1].copy()}][:count]


def _mapped_argument(call: Call) -> str:
    return "x" if call.function == SUM else "seq_lens"


def _on_device(call: Call, arguments: dict) -> dict:
    return jax.device_put(arguments) if call.arrays == "jax" else arguments


def _implementation(call: Call) -> dict[str, str]:
    """The argument of those functions that have it."""
    taken = parameters(getattr(jaxnsa, call.function))
    return {"implementation": call.implementation} if "implementation" in taken else {}


def _computed(call: Call, arguments: dict, options: dict, out: Any) -> Any:
    """What the library returns, when it is there."""
    try:
        return _returned(call, arguments, options, out)
    except ImplementationUnavailableError as error:
        assert EXPLANATION.match(str(error)), error
        assert not any(array.is_deleted() for array in jax.tree.leaves(out))
        raise Refused(str(error)) from None


def _returned(call: Call, arguments: dict, options: dict, out: Any) -> Any:
    with SURROUNDINGS[call.surroundings]():
        if call.transform == "eager":
            keywords = _on_device(call, arguments) | options | _implementation(call)
            keywords |= {} if out is None else {"out": out}
            actual = getattr(jaxnsa, call.function)(**keywords)
        else:
            if call.transform in ("vmap", "shard_map"):
                name = _mapped_argument(call)
                rows = [row[name] for row in _batch(call, arguments)]
                arguments = arguments | {name: np.stack(rows)}
            arguments = _on_device(call, arguments)
            actual = _compiled(call, tuple(options.items()))(out, arguments)
        return jax.block_until_ready(actual)


@functools.cache
def _compiled(call: Call, options: tuple) -> Callable:
    function, keywords = getattr(jaxnsa, call.function), dict(options) | _implementation(call)

    def run(out: Any, arguments: dict) -> Any:
        return function(**arguments, **keywords, **({} if out is None else {"out": out}))

    def mapped(_: None, arguments: dict) -> Any:
        name, others = _mapped_argument(call), dict(arguments)
        rows = others.pop(name)
        if call.transform == "vmap":
            return jax.vmap(lambda row: run(None, others | {name: row}))(rows)

        def shard(rows: jax.Array, others: dict) -> Any:
            return jax.tree.map(lambda a: a[None], run(None, others | {name: rows[0]}))

        split, whole = PartitionSpec("x"), PartitionSpec()
        devices = jax.devices()[: len(rows)]
        mesh = jax.make_mesh((len(rows),), ("x",), (AxisType.Auto,), devices=devices)
        return jax.shard_map(
            shard, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False
        )(rows, others)

    if call.transform == "jit":
        return jax.jit(run, donate_argnums=0, keep_unused=True)
    return jax.jit(mapped)


def assert_same(actual: Any, expected: Any) -> None:
    """Raises AssertionError where a result is not the reference's."""
    found, wanted = (jax.tree.leaves_with_path(jax.device_get(t)) for t in (actual, expected))
    names, expected_names = ([path for path, _ in leaves] for leaves in (found, wanted))
    assert names == expected_names, f"got {names}, not {expected_names}"
    for (path, a), (_, e) in zip(found, wanted, strict=True):
        assert_equal(jax.tree_util.keystr(path), a, e)


def assert_equal(name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    """Raises AssertionError that names the first element that differs."""
    assert found.dtype == np.int32, f"{name}: got {found.dtype}"
    assert found.shape == wanted.shape, f"{name}: got shape {found.shape}, not {wanted.shape}"
    if not np.array_equal(found, wanted):
        where = tuple(int(k) for k in np.argwhere(found != wanted)[0])
        raise AssertionError(f"{name}{list(where)}: got {found[where]}, not {wanted[where]}")
