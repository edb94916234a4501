"""What calls and registered tensors a fuzzer draws, and illegal values of their arguments."""

import dataclasses
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jaxnsa
from jaxnsa.app.fuzz.steps import (
    BROADCAST,
    COPY,
    FILL,
    RAGGED,
    SINGLE,
    SUM,
    SURROUNDINGS,
    Call,
    arguments_of,
    highest,
    is_ragged,
)
from jaxnsa.metadata import ForwardMode
from jaxnsa.schedules import FlashMlaSchedule, PagedMqaSchedule, Schedules, TopkPlan
from jaxnsa.spec import INT32_MAX

Options = dict[str, Any]

_MODES: Mapping[str, ForwardMode] = {**SINGLE, FILL: ForwardMode.DRAFT_EXTEND}

OPTIONS: Mapping[str, Callable[[random.Random, Options, Call], Any]] = {
    "forward_mode": lambda r, o, c: _MODES.get(c.function) or r.choice(list(ForwardMode)),
    "num_draft_tokens": lambda r, o, c: (
        r.randint(1, 4) if o["forward_mode"] is ForwardMode.TARGET_VERIFY else None
    ),
    "max_total_tokens": lambda r, o, c: (
        r.randint(0, 3 * c.bs + 4) if is_ragged(o["forward_mode"]) else None
    ),
    "max_total_keys": lambda r, o, c: (
        r.choice([None, r.randint(0, 3 * c.pool[1])])
        if o["forward_mode"] is ForwardMode.EXTEND
        else None
    ),
    "num_backends": lambda r, o, c: r.randint(1, 3),
    "max_len": lambda r, o, c: r.choice([None, r.randint(1, c.pool[1])]),
    "nsa_index_topk": lambda r, o, c: r.choice([1, 17, 64, 2048, INT32_MAX]),
    "real_page_size": lambda r, o, c: r.choice([1, 2, 3, 16, 64, INT32_MAX]),
    "wide_table": lambda r, o, c: o["real_page_size"] == 1 or r.random() < 0.7,
    "index_kpool": lambda r, o, c: (
        r.choice([1, 1, 1, 1, 2, 4, 7]) if o["real_page_size"] < 99 else 1
    ),
    "schedules": lambda r, o, c: _schedules(r) if r.random() < 0.15 else None,
    "stacked": lambda r, o, c: r.random() < 0.3,
    "tail": lambda r, o, c: r.choice(
        [None, "keep"]
        if c.written
        else [None, "copy", "zero"] + (["keep", "keep"] if c.in_place else [])
    ),
    "max_new_tokens": lambda r, o, c: r.choice([None, 1, 40]) if c.written else None,
    "backend_offsets": lambda r, o, c: (
        tuple(r.randint(-3, 3) for _ in range(o["num_backends"]))
        if r.random() < 0.2 and o["forward_mode"] is not ForwardMode.EXTEND
        else None
    ),
    "strategy": lambda r, o, c: r.choice([None, "ultra_fast", "fast", "fallback"]),
    "page_size": lambda r, o, c: o["real_page_size"],
    "max_num_seqs": lambda r, o, c: r.choice([None, c.bs, c.bs + 3]),
    "max_total_pages": lambda r, o, c: r.choice([None, r.randint(0, 2 * c.pool[1])]),
}
"""How the options of all functions are drawn, from what was drawn before them and from the call.
A new one goes here, and its illegal values to `WRONG`."""

_NO_ARRAYS = (
    "None",
    "3",
    "'abc'",
    "[[1], [1, 2]]",
    "[None]",
    "np.ma.array(given)",
    "np.asarray(given, np.float32)",
    "np.asarray(given, np.int16)",
    "jax.ShapeDtypeStruct(np.shape(given), jnp.int32)",
    "jax.random.key(0)",
    "deleted(given)",
    "np.asarray(given)[None]",
    "np.asarray(given).astype('>i4')",
)
_NO_INTEGERS = ("-1", "0.5", "'1'", "True", "2**31", "2**64", "[1]", "np.ones(2, int)", "np.nan")
_NO_FLAGS = ("1", "None", "'yes'", "np.True_", "np.ones(2)")
_NO_NAMES = ("''", "'copies'", "0", "False", "['copy']", "np.array(['copy'])")

WRONG: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(
        ("seq_lens", "req_pool_indices", "extend_seq_lens", "req_to_token"), _NO_ARRAYS
    ),
    "written_lens": [expression for expression in _NO_ARRAYS if expression != "None"],
    "x": [e for e in _NO_ARRAYS if "np.int16" not in e],
    "src": ("None", "3", "deleted(given)", "jax.tree.map(lambda a: a.astype(np.float32), given)"),
    "out": ("3", "(None,)", "()", "deleted(given)", "jax.tree.map(np.asarray, given)"),
    "forward_mode": ("None", "'decode'", "0"),
    **dict.fromkeys(
        (
            "num_draft_tokens",
            "max_total_tokens",
            "max_total_keys",
            "max_len",
            "nsa_index_topk",
            "real_page_size",
        ),
        _NO_INTEGERS,
    ),
    "page_size": (*_NO_INTEGERS, "0", "None"),
    "max_num_seqs": _NO_INTEGERS,
    "max_total_pages": _NO_INTEGERS,
    "num_seqs": ("-1", "0.5", "'1'", "True", "10**6", "[1]", "np.ones(2, int)"),
    "index_kpool": (*_NO_INTEGERS, "0"),
    "num_backends": (*_NO_INTEGERS, "0", "10**6"),
    "schedules": ("1", "'sm90'", "()"),
    "max_new_tokens": _NO_INTEGERS,
    "backend_offsets": ("1", "'ab'", "()", "(0.5,) * 9", "{0}"),
    "wide_table": _NO_FLAGS,
    "stacked": _NO_FLAGS,
    "tail": _NO_NAMES,
    "strategy": _NO_NAMES,
    "implementation": ("'cuda'", "''", "()", "3", "('xla', 3)", "['cuda']"),
}
"""Illegal values of every argument, as expressions of `given`, the legal one."""

_NO_VECTORS = (
    "3",
    "given.cpu().numpy()",
    "given.float()",
    "given[None]",
    "given.to('meta')",
    "given.to_sparse()",
    "freed(given)",
    "freed(given, given.nbytes - 1)",
    "given.repeat(2)",
)
_NO_NUMBERS = ("-1", "'2'", "10**30", "2.5", "[1]")

WRONG_TENSORS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(
        ("seq_lens", "req_pool_indices"),
        (*_NO_VECTORS, "None", "engine.backends[0]['cu_seqlens_k'][: len(given)]"),
    ),
    "req_to_token": (
        *("None", "given[0]", "given.long()", "given[:, :0]", "given[:0]", "given.t()"),
        *("freed(given)", "freed(given, given.nbytes - 1)", "given.to('meta')"),
    ),
    "forward_mode": ("None", "'decode'", "0"),
    "num_draft_tokens": (*_NO_NUMBERS, "0", "2**31"),
    "max_total_tokens": _NO_NUMBERS,
    "extend_seq_lens": ("3", "torch.ones(99)"),
    "written_lens": _NO_VECTORS,
    "request_ids": _NO_VECTORS,
    "max_new_tokens": _NO_NUMBERS,
}
"""Illegal values of the arguments of `BackendBuffers.update`, as expressions of `given` and of the
`engine` whose tensors it fills."""


def calls(rng: random.Random, implementations: Sequence[str], count: int) -> list[Call]:
    """So many kinds of calls or more, of which a batch's tracker can serve one or more."""
    drawn = [call(rng, rng.choice(implementations)) for _ in range(count)]
    while not any(is_tracked(drawn_call) for drawn_call in drawn):
        drawn.append(call(rng, rng.choice(implementations)))
    return drawn


def is_tracked(call: Call) -> bool:
    """Whether the steps of a batch that changes can be such calls."""
    return call.written and call.bs > 0


def call(rng: random.Random, implementation: str) -> Call:
    """A kind of call."""
    function = rng.choice([BROADCAST] * 6 + list(SINGLE) + [COPY] * 2 + [FILL, SUM, RAGGED])
    bs = rng.choice([0, 1, 2, 3, 5, 5, 8, 33])
    in_place = function not in (FILL, SUM, RAGGED) and rng.random() < 0.5
    written = in_place and function != COPY and rng.random() < 0.4
    pool = (rng.randint(max(bs, 1) if written else 1, bs + 3), rng.choice([1, 7, 63, 64, 70, 200]))
    # Eagerly, these are many operations that are compiled one by one.
    transforms = ["eager"] * 3 + ["jit"] * (9 if function == RAGGED or written else 3)
    if bs and not in_place and function != COPY:
        transforms += ["vmap", "shard_map"]
    kind = Call(
        function,
        "xla" if function == RAGGED else implementation,
        bs,
        pool,
        (),
        in_place,
        rng.choice(transforms),
        rng.choice(["numpy", "jax"]),
        surroundings=rng.choice(["plain"] * 9 + list(SURROUNDINGS)),
        written=written,
    )
    if kind.surroundings == "x64" or (kind.transform, kind.arrays) == ("eager", "numpy"):
        kind = dataclasses.replace(kind, dtype=rng.choice(["int32", "int64"]))
    if (kind.transform, kind.surroundings) == ("shard_map", "disable_jit"):
        # JAX cannot bring empty results of it to the host.
        kind = dataclasses.replace(kind, transform="vmap")
    options: Options = {}
    for name, draw in OPTIONS.items():
        options[name] = draw(rng, options, kind)
    if function == FILL and kind.transform == "eager" and rng.random() < 0.3:
        options["max_total_tokens"] = None
    return dataclasses.replace(kind, options=tuple(options.items()))


def wrong(call: Call) -> list[tuple[str, str]]:
    """The arguments of a call, each with each of its illegal values."""
    given, options = arguments_of(call, 0, dict.fromkeys(highest(call.pool), [0] * call.bs))
    names = {name for name, value in given.items() if value is not None} | options.keys()
    names |= {"out"} if call.in_place else set()
    names |= {"implementation"} if call.function != RAGGED else set()
    pairs = [(name, value) for name in sorted(names & WRONG.keys()) for value in WRONG[name]]
    legal = ("extend_seq_lens", "None")  # one token of each request
    return [pair for pair in pairs if call.function != RAGGED or pair != legal]


def plain_values() -> Options:
    """The plainest value of everything that a `Call` is drawn with."""
    plain: Options = {
        field.name: field.default
        for field in dataclasses.fields(Call)
        if field.default is not dataclasses.MISSING
    }
    parameters = inspect.signature(getattr(jaxnsa, BROADCAST)).parameters
    for name in OPTIONS:
        default = parameters[name].default if name in parameters else None
        plain[name] = 1 if default is inspect.Parameter.empty else default
    return plain | {"page_size": 1}


def buffers(rng: random.Random, implementations: Sequence[str]) -> list[Any]:
    """Kinds of registered tensors, of either path where it runs."""
    from jaxnsa.app.fuzz.tensor_steps import DEVICE
    from jaxnsa.implementations.native_library import unavailable
    from jaxnsa.interop.tensor_checks import platform_of

    kinds = [_buffers(rng, "dlpack", rng.choice(implementations))]
    if "ffi" in implementations and unavailable(platform_of(DEVICE)) is None:
        kinds += [_buffers(rng, "direct", None) for _ in range(5)]
    return kinds


def _buffers(rng: random.Random, path: str, implementation: str | None) -> Any:
    """Registered tensors of a path; the path "dlpack" serves fewer kinds of them."""
    from jaxnsa.app.fuzz.tensor_steps import Buffers

    direct = path == "direct"
    page = rng.choice([1, 3, 16, INT32_MAX])
    max_len = rng.choice([7, 64, 130])
    pages_fit = direct and page < INT32_MAX
    columns = max_len + (rng.choice([-5, 0, 9]) if pages_fit else rng.choice([0, 9]))
    requests, count, prefill = rng.choice([2, 5, 8]), rng.choice([1, 2, 3]), rng.random() < 0.3
    offsets = tuple(rng.randint(-3, 3) for _ in range(count))
    return Buffers(
        path=path,
        implementation=implementation,
        requests=requests,
        rows=rng.choice([9, 24]),
        pool=(rng.randint(requests, 9), columns),
        max_len=max_len,
        page=page,
        count=count,
        wide=page in (1, INT32_MAX) or rng.random() < 0.7,
        gap=rng.choice([0, 0, 4]) if direct else 0,
        prefill=prefill,
        max_total_keys=rng.choice([None, 1, 150]) if prefill else None,
        index_kpool=rng.choice([1, 1, 2, 5]) if page < INT32_MAX else 1,
        schedules=_schedules(rng) if rng.random() < 0.3 else None,
        backend_offsets=offsets if not prefill and rng.random() < 0.3 else None,
    )


def _schedules(rng: random.Random) -> Schedules:
    return Schedules(
        paged_mqa=rng.choice(
            [
                None,
                PagedMqaSchedule(
                    rng.choice([1, 4, 132]),
                    rng.choice(["legacy", "atoms", "sm90", "sm100"]),
                    rng.random() < 0.5,
                ),
            ]
        ),
        topk_plan=rng.choice([None, TopkPlan(((8, 2), (64, 3)), rng.choice([0, 16]))]),
        flash_mla=rng.choice(
            [
                None,
                FlashMlaSchedule(
                    rng.choice([1, 3, 66]),
                    rng.choice(["topk", "nsa_cache_seqlens", "cache_seqlens"]),
                    rng.choice([3, 5]),
                    rng.choice(["current", "legacy"]),
                ),
            ]
        ),
    )
