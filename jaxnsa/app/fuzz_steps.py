"""Steps of a fuzzer's program: each calls the library once and checks what comes of it.

The programs that `jaxnsa verify --fuzz` prints consist of these, and run by themselves.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa import config, operations, reference
from jaxnsa.implementations.choice import ImplementationUnavailableError
from jaxnsa.metadata import ForwardMode
from jaxnsa.spec import Rows
from jaxnsa.value_checks import validate_inputs

BROADCAST = "fused_metadata_precompute_and_broadcast"
COPY, FILL, SUM = "fused_metadata_copy", "fill_draft_extend_metadata", "prefix_sum"
SINGLE = {f"precompute_{mode.value}_metadata": mode for mode in ForwardMode}
"""The functions for one backend."""

HELD = -7
"""What destinations hold before anything is written."""

EXPLANATION = re.compile(r"[\w.\[\]]+: (got|expected) |implementation '\w+' cannot run here: ")
"""How the library's errors begin: with the name of what is wrong."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call but for its values: all that its compilation depends on.

    Attributes:
      function: its name in `jaxnsa` and in `jaxnsa.reference`.
      implementation: what computes it.
      bs: requests, or elements of prefix_sum's vector.
      pool: shape of `req_to_token`.
      options: of the broadcast; the other functions take what they have of them.
      in_place: whether it fills destinations, those of the call before it if there was one.
      transform: "eager", "jit" or "vmap".
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
    def far(self) -> bool:
        """Whether lengths may be anything: some take the reference long, or much memory."""
        options = dict(self.options)
        rows_are_counted = self.function == FILL and options["max_total_tokens"] is None
        return options.get("schedules") is None and not rows_are_counted

    @property
    def title(self) -> str:
        """The function and, of the broadcast, its forward mode."""
        if self.function != BROADCAST:
            return self.function
        return f"{self.function} {dict(self.options)['forward_mode'].value}"


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
    """What a program has made so far: the destinations that its calls fill again."""

    def __init__(self) -> None:
        self._held: dict[Call, tuple[Any, Any]] = {}
        self.lengths: Mapping[str, Sequence[int]] = {}
        """Those of the latest call."""

    def call(
        self,
        call: Call,
        *,
        seed: int = 0,
        more: int = 0,
        wrong: tuple[str, str] | None = None,
        **lengths: Sequence[int],
    ) -> None:
        """Makes a call and compares all that it returns with the reference.

        Args:
          call: which.
          seed: of the pool's slots, and of lengths that are not given.
          more: calls that follow with other lengths.
          wrong: the name of an argument and an expression for it, in which `given` is what it
            should be. The call is to be refused, and its destinations are to live.
          lengths: lists of `seq_lens`, `req_pool_indices`, `extend_seq_lens` and `written_lens`, as
            far as it takes them.

        Raises:
          AssertionError: something is not as it should be. Any other error: likewise.
          Refused: the implementation does not compute this.
        """
        self._call(call, seed, lengths, wrong)
        rng = np.random.default_rng(seed)
        for _ in range(more):
            drawn = {
                name: vector(rng, call.bs, high, call.dtype, name == "req_pool_indices" or call.far)
                for name, high in highest(call.pool).items()
            }
            self._call(call, seed, drawn, None)

    def _call(
        self,
        call: Call,
        seed: int,
        lengths: Mapping[str, Sequence[int]],
        wrong: tuple[str, str] | None,
    ) -> None:
        self.lengths = lengths
        arguments, options = arguments_of(call, seed, lengths)
        out = twin = None
        if call.in_place:
            out, twin = self._destinations(call, arguments, options)
        with SURROUNDINGS[call.surroundings]():
            try:
                actual = _actual(call, arguments, options, out, wrong)
                jax.block_until_ready(actual)
            except (TypeError, ValueError, ImplementationUnavailableError) as error:
                unavailable = isinstance(error, ImplementationUnavailableError)
                if not (wrong or unavailable) or not EXPLANATION.match(str(error)):
                    raise
                assert not any(a.is_deleted() for a in jax.tree.leaves(out))
                if unavailable and not wrong:
                    raise Refused(str(error)) from None
                return
        assert wrong is None, f"{wrong[0]} = {wrong[1]} was taken"
        options.pop("strategy", None)
        expect = functools.partial(getattr(reference, call.function), **options)
        if call.transform == "vmap":
            for k, row in enumerate(_batch(call, arguments)):
                _assert_same(jax.tree.map(lambda a, k=k: a[k], actual), expect(**row))
        elif out is None:
            _assert_same(actual, expect(**arguments))
        else:
            _assert_same(actual, expect(**arguments, out=twin))
            assert all(array.is_deleted() for array in jax.tree.leaves(out))
            self._held[call] = actual, twin

    def validate(self, call: Call, *, seed: int = 0, **lengths: Any) -> None:
        """Validates the inputs of a call, which may be illegal."""
        arguments, options = arguments_of(
            dataclasses.replace(call, function=BROADCAST, written=False), seed, lengths
        )
        names = (
            "forward_mode",
            "num_draft_tokens",
            "max_total_tokens",
            "max_total_keys",
            "max_len",
        )
        try:
            validate_inputs(**arguments, **{n: options[n] for n in names if n in options})
        except ValueError as error:
            assert EXPLANATION.match(str(error)), error

    def _destinations(self, call: Call, arguments: dict, options: dict) -> tuple[Any, Any]:
        if call not in self._held:
            fresh = {n: v for n, v in options.items() if n != "strategy"}
            if "tail" in fresh:
                fresh["tail"] = None
            made = getattr(reference, call.function)(**arguments, **fresh)
            twin = jax.tree.map(lambda a: np.full(a.shape, HELD, np.int32), made)
            self._held[call] = jax.tree.map(jnp.array, twin), twin
        return self._held[call]


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


def vector(rng: np.random.Generator, size: int, high: int, dtype: str, far: bool) -> list[int]:
    """A random vector, with extremes in a third of its places if it may be far."""
    values = rng.integers(-3, high, size, endpoint=True)
    if far:
        values = np.where(rng.random(size) < 0.3, rng.choice(extremes(dtype), size), values)
    return values.tolist()


def deleted(tree: Any) -> Any:
    """Deleted arrays like the given ones."""
    copies = jax.tree.map(jnp.array, tree)
    jax.tree.map(lambda array: array.delete(), copies)
    return copies


def arguments_of(call: Call, seed: int, lengths: Mapping[str, Sequence[int]]) -> tuple[dict, dict]:
    """The arrays and the other keyword arguments of a call, as the reference takes them."""
    options = dict(call.options)
    vectors = {
        name: np.array(values, np.int64).astype(call.dtype) for name, values in lengths.items()
    }
    if not call.written:
        vectors.pop("written_lens", None)
    if call.function == SUM:
        return {"x": vectors["seq_lens"]}, {}
    if call.function == FILL:
        del vectors["req_pool_indices"]
        return vectors, {n: options[n] for n in ("nsa_index_topk", "max_total_tokens")}
    mode = SINGLE.get(call.function, options["forward_mode"])
    if not is_ragged(mode):
        vectors.pop("extend_seq_lens", None)
    arguments: dict[str, Any] = vectors | {"req_to_token": pool(call.pool, seed)}
    if call.function == COPY:
        options.pop("strategy")
        count = options.pop("num_backends")
        made = options | {
            "num_backends": 1,
            "stacked": False,
            "tail": "zero",
            "backend_offsets": None,
            "max_new_tokens": None,
        }
        src: Any = reference.fused_metadata_precompute_and_broadcast(**arguments, **made)
        return {"src": src[0]}, {"num_backends": count}
    taken = inspect.signature(getattr(operations, call.function)).parameters
    return arguments, {name: value for name, value in options.items() if name in taken}


def _batch(call: Call, arguments: dict) -> list[dict]:
    """What a call is mapped over: its arguments, and those with their lengths reversed."""
    name = "x" if call.function == SUM else "seq_lens"
    return [arguments, arguments | {name: arguments[name][::-1].copy()}]


def _actual(
    call: Call, arguments: dict, options: dict, out: Any, wrong: tuple[str, str] | None
) -> Any:
    function = getattr(operations, call.function)
    if call.arrays == "jax":
        arguments = jax.tree.map(jnp.asarray, arguments)
    if wrong is None and call.transform == "jit":
        return _jitted(call, tuple(options.items()))(out, arguments)
    if wrong is None and call.transform == "vmap":
        rows = _batch(call, arguments)
        name = next(n for n in rows[0] if rows[0][n] is not rows[1][n])
        mapped = np.stack([np.asarray(row[name]) for row in rows])
        return _mapped(call, tuple(options.items()), name)(mapped, arguments)
    keywords = arguments | options | {"implementation": call.implementation}
    if out is not None:
        keywords["out"] = out
    if wrong is not None:
        name, expression = wrong
        keywords[name] = eval(expression, globals(), {"given": keywords.get(name)})
    return function(**keywords)


@functools.cache
def _jitted(call: Call, options: tuple) -> Callable:
    function = getattr(operations, call.function)
    keywords = dict(options) | {"implementation": call.implementation}

    def run(out: Any, arguments: dict) -> Any:
        return function(**arguments, **keywords, **({} if out is None else {"out": out}))

    return jax.jit(run, donate_argnums=0, keep_unused=True)


@functools.cache
def _mapped(call: Call, options: tuple, name: str) -> Callable:
    function = getattr(operations, call.function)
    keywords = dict(options) | {"implementation": call.implementation}

    def run(mapped: Any, arguments: dict) -> Any:
        return jax.vmap(lambda row: function(**(arguments | {name: row}), **keywords))(mapped)

    return jax.jit(run)


def _assert_same(actual: Any, expected: Any) -> None:
    structures = [jax.tree.structure(tree) for tree in (actual, expected)]
    assert len(set(structures)) == 1, f"got {structures[0]}, not {structures[1]}"
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        name = jax.tree_util.keystr(path)
        assert a.dtype == np.int32 and a.shape == e.shape, f"{name}: {a.dtype} {a.shape}"
        found, wanted = np.asarray(a), np.asarray(e)
        if not np.array_equal(found, wanted):
            where = tuple(int(k) for k in np.argwhere(found != wanted)[0])
            raise AssertionError(f"{name}{list(where)}: got {found[where]}, not {wanted[where]}")
