"""Random cases: every implementation that can run here against the NumPy reference."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxnsa import operations, reference
from jaxnsa.metadata import ForwardMode, NSAMetadata

BROADCAST = "fused_metadata_precompute_and_broadcast"
FUNCTIONS = (BROADCAST, "fused_metadata_copy", "fill_draft_extend_metadata", "prefix_sum")

_SHRINK_STEPS = 200
_HELD = -7  # what destinations hold before they are filled in place


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
      function: name in `jaxnsa` and in `jaxnsa.reference`.
      seq_lens: int32 [bs]; the argument of prefix_sum.
      extend_seq_lens: int32 [bs].
      req_pool_indices: int32 [bs].
      req_to_token: int32 [pool_rows, pool_cols].
      options: keyword arguments of the computation.
      strategy: of the broadcast.
      in_place: whether `out` is given.
    """

    function: str
    seq_lens: np.ndarray
    extend_seq_lens: np.ndarray
    req_pool_indices: np.ndarray
    req_to_token: np.ndarray
    options: dict[str, Any]
    strategy: str = "ultra_fast"
    in_place: bool = False

    @property
    def title(self) -> str:
        """The function, in short where it is the broadcast, and then its forward mode."""
        mode = self.options["forward_mode"].value
        return f"broadcast, {mode}" if self.function == BROADCAST else self.function

    def arguments(self) -> dict[str, Any]:
        """The arguments of the reference; fresh arrays at each call."""
        if self.function == "prefix_sum":
            return {"x": self.seq_lens}
        if self.function == "fill_draft_extend_metadata":
            return {
                "extend_seq_lens": self.extend_seq_lens,
                "seq_lens": self.seq_lens,
                "nsa_index_topk": self.options["nsa_index_topk"],
                "max_total_tokens": self._max_total_tokens,
            }
        arguments: dict[str, Any] = self.options | {
            "seq_lens": self.seq_lens,
            "req_pool_indices": self.req_pool_indices,
            "req_to_token": self.req_to_token,
        }
        if "max_total_tokens" in self.options:
            arguments["extend_seq_lens"] = self.extend_seq_lens
        if self.function == "fused_metadata_copy":
            arguments |= {"num_backends": 1, "stacked": False}
            src = cast(tuple, reference.fused_metadata_precompute_and_broadcast(**arguments))[0]
            copies = self.options["num_backends"]
            arguments = {"src": src, "num_backends": copies}
            if self.in_place:
                arguments["out"] = tuple(_held(src) for _ in range(copies))
        elif self.in_place:
            fresh = arguments | {"tail": None}
            arguments["out"] = _held(reference.fused_metadata_precompute_and_broadcast(**fresh))
        return arguments

    @property
    def _max_total_tokens(self) -> int:
        return self.options.get("max_total_tokens", 2 * len(self.seq_lens) + 1)

    def expected(self) -> Any:
        """What the reference returns."""
        return getattr(reference, self.function)(**self.arguments())

    def actual(self, implementation: str) -> Any:
        """What an implementation returns."""
        arguments = self.arguments() | {"implementation": implementation}
        if "out" in arguments:
            arguments["out"] = jax.tree.map(jnp.array, arguments["out"])
        if self.function == BROADCAST:
            arguments["strategy"] = self.strategy
        return getattr(operations, self.function)(**arguments)

    def failing(self, implementations: Sequence[str]) -> list[str]:
        """Those that differ from the reference in any value, shape or dtype, or raise an error."""
        expected, structure = jax.tree.flatten(self.expected())

        def differs(name: str) -> bool:
            try:
                actual, actual_structure = jax.tree.flatten(jax.device_get(self.actual(name)))
            except Exception:
                return True
            if structure != actual_structure:  # type: ignore[operator]
                return True
            return any(
                a.dtype != e.dtype or not np.array_equal(a, e)
                for a, e in zip(actual, expected, strict=True)
            )

        return [name for name in implementations if differs(name)]

    def fails(self, implementation: str) -> bool:
        """Whether one implementation differs from the reference."""
        return bool(self.failing([implementation]))

    def code(self, implementation: str) -> str:
        """The case as a program that shows both results."""
        arguments = self.arguments()
        if self.function == BROADCAST:
            arguments["strategy"] = self.strategy
        lines = [
            "import jax",
            "import jax.numpy as jnp",
            "import numpy as np",
            "import jaxnsa",
            "from jaxnsa import ForwardMode, NSAMetadata, reference",
            "",
            "arguments = dict(",
            *(f"    {name}={_source(value)}," for name, value in arguments.items()),
            ")",
            "on_device = dict(arguments)",
        ]
        if self.in_place:
            lines.append('on_device["out"] = jax.tree.map(jnp.array, arguments["out"])')
        lines.append(
            f"print(jaxnsa.{self.function}(**on_device, implementation={implementation!r}))"
        )
        if self.function == BROADCAST:
            lines.append('del arguments["strategy"]')
        lines.append(f"print(reference.{self.function}(**arguments))")
        return "\n".join(lines)


def random_cases(count: int, seed: int, cases_per_shape: int = 5) -> Iterator[Case]:
    """Random cases of all functions, modes and strategies.

    Args:
      count: how many.
      seed: the same one gives the same cases.
      cases_per_shape: cases in a row that differ in values only, and so share a compilation.
    """
    rng = np.random.default_rng(seed)
    for number in range(count):
        if number % cases_per_shape == 0:
            shape = _random_shape(rng)
        yield _with_random_values(shape, rng)


def shrink(case: Case, implementation: str) -> Case:
    """A smaller case that fails too: fewer requests, columns and backends, plainer values."""
    for _ in range(_SHRINK_STEPS):
        smaller = next((c for c in _smaller(case) if c.fails(implementation)), None)
        if smaller is None:
            break
        case = smaller
    return case


def _random_shape(rng: np.random.Generator) -> Case:
    """A case of zeros: everything that a compilation depends on."""
    bs = int(rng.choice([0, 1, 2, 3, 6, 7, 31, 32, 33, 64, 100, 129]))
    mode = ForwardMode(rng.choice([m.value for m in ForwardMode]))
    pool_cols = int(rng.integers(1, 1500))
    page = int(rng.choice([1, 2, 3, 16, 48, 64, 100]))
    options: dict[str, Any] = {
        "num_backends": int(rng.integers(1, 5)),
        "forward_mode": mode,
        "max_len": int(rng.integers(1, pool_cols, endpoint=True)),
        "nsa_index_topk": int(rng.choice([1, 17, 64, 2048])),
        "real_page_size": page,
        "wide_table": page == 1 or bool(rng.random() < 0.7),
        "stacked": bool(rng.random() < 0.3),
    }
    if mode is ForwardMode.TARGET_VERIFY:
        options["num_draft_tokens"] = int(rng.integers(1, 6))
    if mode.ragged:
        options["max_total_tokens"] = int(rng.integers(0, 3 * bs + 4))
    if mode is ForwardMode.EXTEND and rng.random() < 0.8:
        options["max_total_keys"] = int(rng.integers(0, bs * pool_cols + 2))
    in_place = bool(rng.random() < 0.5)
    options["tail"] = str(rng.choice(["copy", "zero", "keep"] if in_place else ["copy", "zero"]))
    return Case(
        # The broadcast has four modes, all options and all strategies: half of the cases.
        function=str(rng.choice(FUNCTIONS, p=[0.55, 0.15, 0.15, 0.15])),
        seq_lens=np.zeros(bs, np.int32),
        extend_seq_lens=np.zeros(bs, np.int32),
        req_pool_indices=np.zeros(bs, np.int32),
        req_to_token=np.zeros((int(rng.integers(1, bs + 4)), pool_cols), np.int32),
        options=options,
        strategy=str(rng.choice(["ultra_fast", "fast", "fallback"])),
        in_place=in_place,
    )


def _with_random_values(shape: Case, rng: np.random.Generator) -> Case:
    bs, (pool_rows, _) = len(shape.seq_lens), shape.req_to_token.shape
    longest = shape.options["max_len"] + 3
    return dataclasses.replace(
        shape,
        seq_lens=_ints(rng, -3, longest, bs),
        extend_seq_lens=_ints(rng, -2, 6, bs),
        req_pool_indices=_ints(rng, -2, pool_rows + 2, bs),
        req_to_token=_ints(rng, -100, 2**31 - 1, shape.req_to_token.shape),
    )


def _smaller(case: Case) -> Iterator[Case]:
    def subset(keep: slice) -> Case:
        return dataclasses.replace(
            case,
            seq_lens=case.seq_lens[keep],
            extend_seq_lens=case.extend_seq_lens[keep],
            req_pool_indices=case.req_pool_indices[keep],
        )

    bs, (pool_rows, pool_cols) = len(case.seq_lens), case.req_to_token.shape
    if bs:
        yield subset(slice(bs // 2))
        yield subset(slice(bs // 2, bs))
        yield subset(slice(1, bs))
        yield subset(slice(bs - 1))
    for columns in {max(1, pool_cols // 2), max(1, pool_cols - 1)} - {pool_cols}:
        options = case.options | {"max_len": min(columns, case.options["max_len"])}
        pool = case.req_to_token[:, :columns]
        yield dataclasses.replace(case, req_to_token=pool, options=options)
    for rows in {max(1, pool_rows // 2)} - {pool_rows}:
        yield dataclasses.replace(case, req_to_token=case.req_to_token[:rows])
    if case.options.get("max_total_tokens", 0) > 0:
        capacity = case.options["max_total_tokens"] // 2
        yield dataclasses.replace(case, options=case.options | {"max_total_tokens": capacity})
    if case.options.get("max_total_keys") is not None:
        yield dataclasses.replace(case, options=case.options | {"max_total_keys": None})
    if case.options["num_backends"] > 1:
        yield dataclasses.replace(case, options=case.options | {"num_backends": 1})
    if case.options["stacked"]:
        yield dataclasses.replace(case, options=case.options | {"stacked": False})
    if case.strategy != "ultra_fast":
        yield dataclasses.replace(case, strategy="ultra_fast")
    for name in ("seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token"):
        plain = np.abs(getattr(case, name)) % 100
        if not np.array_equal(plain, getattr(case, name)):
            yield dataclasses.replace(case, **{name: plain.astype(np.int32)})


def _ints(rng: np.random.Generator, low: int, high: int, shape) -> np.ndarray:
    return rng.integers(low, high, shape, dtype=np.int32)


def _held(metadata: Any) -> Any:
    return jax.tree.map(lambda array: np.full_like(array, _HELD), metadata)


def _source(value: Any) -> str:
    if isinstance(value, np.ndarray):
        text = np.array2string(value, separator=", ", threshold=sys.maxsize)
        return f"np.array({text}, np.int32).reshape({value.shape})"
    if isinstance(value, NSAMetadata):
        fields = ", ".join(f"{name}={_source(array)}" for name, array in value.arrays().items())
        return f"NSAMetadata({fields})"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_source(item)}, " for item in value) + ")"
    return str(value) if isinstance(value, ForwardMode) else repr(value)
