"""Steps of a fuzzer's program that call engines' functions by their names; see `steps`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from jaxnsa import reference
from jaxnsa.app.fuzz.steps import HELD, Session, assert_equal, assert_refused, vectors
from jaxnsa.app.fuzz.tensor_steps import DEVICE, TOPK, Buffers, Engine, drawn, evaluated, tensor_of
from jaxnsa.interop import sgl_kernel, sglang
from jaxnsa.metadata import ForwardMode
from jaxnsa.spec import Rows

LENGTHS = (
    "fill_draft_extend_metadata_cuda",
    "fill_draft_extend_metadata_cuda_adaptive",
    "fill_draft_extend_metadata_cuda_optimized",
    "fill_draft_extend_metadata_fused_simple",
)
"""The names of `sgl_kernel` for the lengths of a draft-extend step."""

WRONG_TENSORS = (
    *("3", "'abc'", "given.float()", "given.to('meta')", "freed(given)", "given[None]"),
    *("given.t()[0]", "given[:0]"),
)
WRONG_NUMBERS = ("-1", "'2'", "10**30", "2.5", "[1]")
"""Illegal values of the arguments of these functions, as expressions of `given`, the legal one."""


class _Call(NamedTuple):
    """A call of a function by another's name.

    Attributes:
      function: which.
      keywords: its arguments: tensors, lists or mappings of them, and numbers, 0 where it ignores
        them.
      expect: makes of the twins of an engine's tensors what they are to be.
    """

    function: Callable[..., Any]
    keywords: dict[str, Any]
    expect: Callable[[], None]


def named(session: Session, of: Buffers, *, name: str, seed: int = 0, more: int = 0) -> None:
    """Calls a function, and looks at all of an engine's tensors.

    Args:
      session: holds the tensors.
      of: which, as far as the function serves such.
      name: in `CALLS`.
      seed: of all values.
      more: calls that follow with other values.
    """
    engine = _engine(session, of, name)
    rng = np.random.default_rng(seed)
    slots = engine.set_pool(seed)
    for _ in range(1 + more):
        session.calls += 1
        call = CALLS[name](engine, rng, slots)
        call.function(**call.keywords)
        call.expect()
        engine.check()


def wrong_named(
    session: Session, of: Buffers, *, name: str, seed: int, argument: int, value: int
) -> None:
    """Calls a function with one wrong argument, which is to be refused.

    Args:
      session, of, name, seed: as of `named`.
      argument: which of those that there are illegal values of.
      value: which of these.
    """
    engine = _engine(session, of, name)
    call = CALLS[name](engine, np.random.default_rng(seed), engine.set_pool(seed))
    session.calls += 1
    keywords = call.keywords
    candidates = [
        key
        for key, given in keywords.items()
        # 0 may be an argument that is ignored.
        if given is not None and (not isinstance(given, int) or given > 0)
    ]
    key = candidates[argument % len(candidates)]
    given = keywords[key]
    table = WRONG_NUMBERS if isinstance(given, int) else WRONG_TENSORS
    expression = table[value % len(table)]
    if key.endswith(("_src", "precomputed")) and expression == "given[:0]":
        return  # a source may be of any size
    # Of several tensors, the last one is wrong.
    several = {0: given} if not isinstance(given, list | dict) else given
    place = max(several) if isinstance(several, dict) else -1
    wrong = evaluated(expression, given=several[place])
    if isinstance(given, list):
        wrong = [*given[:-1], wrong]
    elif isinstance(given, dict):
        wrong = given | {place: wrong}
    assert_refused(f"{key} = {expression}", call.function, keywords | {key: wrong})
    engine.check()


def lengths(session: Session, *, function: str, seed: int = 0, more: int = 0) -> None:
    """One of the names of `sgl_kernel` that fill the lengths of a draft-extend step.

    Args:
      session, seed, more: as of `named`.
      function: one of `LENGTHS`.
    """
    rng = np.random.default_rng(seed)
    simple = function.endswith("simple")
    for _ in range(1 + more):
        session.calls += 1
        bs, capacity = (int(n) for n in rng.integers(0, (7, 21)))
        dtype = ("int32", "int64")[int(rng.integers(2))]
        seed = int(rng.integers(2**31))
        (values,) = vectors(seed, bs, (1, 70), dtype, not simple, 1)
        extend, kv_lens = values["extend_seq_lens"], values["seq_lens"]
        inputs = tensor_of(extend, dtype), tensor_of(kv_lens, dtype)
        call = getattr(sgl_kernel, function)
        want = reference.fill_draft_extend_metadata(
            extend, kv_lens, nsa_index_topk=TOPK, max_total_tokens=None if simple else capacity
        )
        if simple:
            expanded, clamped = call(*inputs, TOPK)
            total = len(expanded)
        else:
            expanded, clamped = (
                torch.full((capacity,), HELD, dtype=torch.int32, device=DEVICE) for _ in range(2)
            )
            total = int(call(*inputs, TOPK, expanded, clamped))
        assert total == want.total_tokens, f"total: got {total}, not {want.total_tokens}"
        rows = sum(min(max(int(n), 0), 2**31 - 1) for n in extend)
        for name, found in (("seqlens_expanded", expanded), ("nsa_cache_seqlens", clamped)):
            twin = np.array(getattr(want, name))
            twin[rows:] = HELD
            assert_equal(name, found.cpu().numpy(), twin)


def _engine(session: Session, of: Buffers, name: str) -> Engine:
    """The session's tensors for a function."""
    of = dataclasses.replace(
        of,
        path="direct",
        implementation=None,
        count={"sglang_fill": 1, "sglang_copy": 3}.get(name, of.count),
        wide=of.wide or name != "sglang_fill",
        prefill=False,
        max_total_keys=None,
        index_kpool=1,
        schedules=None,
        backend_offsets=None,
    )
    if (name, of) not in session.held:
        session.held[name, of] = Engine(of, register=False)
    return session.held[name, of]


def _inputs(engine: Engine, rng: np.random.Generator, bs: int) -> dict[str, np.ndarray]:
    dtype = ("int32", "int64")[int(rng.integers(2))]
    (values,) = vectors(int(rng.integers(2**31)), bs, engine.of.pool, dtype, True, 1)
    return dict(values)


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()).to(DEVICE) for name, array in arrays.items()}


def _broadcast(engine: Engine, rng: np.random.Generator, slots: np.ndarray) -> _Call:
    """`sgl_kernel`'s decode step for all backends."""
    of = engine.of
    arrays = _inputs(engine, rng, int(rng.integers(1, min(of.requests, of.rows), endpoint=True)))
    arrays = {name: arrays[name] for name in ("seq_lens", "req_pool_indices")}
    spec = of.spec(Rows.of(ForwardMode.DECODE, len(arrays["seq_lens"])))
    lists = {
        f"{field}_list": [backend[field] for backend in engine.backends]
        for field in engine.backends[0]
        if field != "seqlens_expanded"
    }
    numbers = {"max_len": spec.max_len, "nsa_index_topk": TOPK, "real_page_size": of.page}

    def expect() -> None:
        held = [twin["seqlens_expanded"].copy() for twin in engine.twins]
        engine.expect(spec, arrays | {"req_to_token": slots, "tail": "copy"})
        for twin, unwritten in zip(engine.twins, held, strict=True):
            twin["seqlens_expanded"][:] = unwritten

    function = sgl_kernel.fused_metadata_precompute_and_broadcast_cuda
    given = _tensors(arrays) | {"req_to_token": engine.pool, "real_page_table_list": None}
    return _Call(function, given | lists | numbers, expect)


def _copy(engine: Engine, rng: np.random.Generator, slots: np.ndarray) -> _Call:
    """`sgl_kernel`'s copy to one backend, of some of the arrays."""
    names = [name for name in engine.backends[0] if rng.random() < 0.8] or ["cache_seqlens"]
    arrays = {}
    for name in names:
        rows, *columns = engine.twins[0][name].shape
        shape = (int(rng.integers(1, rows, endpoint=True)), *columns)
        arrays[name] = rng.integers(-9, 2**31, shape, dtype=np.int32)

    def expect() -> None:
        for name, array in arrays.items():
            engine.twins[0][name][: len(array)] = array

    keywords = {
        "precomputed": _tensors(arrays),
        "metadata": {name: engine.backends[0][name] for name in names},
    }
    return _Call(sgl_kernel.fused_metadata_copy_cuda, keywords, expect)


_SGLANG: Mapping[ForwardMode, Callable[..., None]] = {
    ForwardMode.DECODE: sglang.fused_dsa_decode_metadata,
    ForwardMode.TARGET_VERIFY: sglang.fused_dsa_target_verify_metadata,
    ForwardMode.DRAFT_EXTEND: sglang.fused_dsa_draft_extend_metadata,
}

_NAMES = {
    "cache_seqlens": "cache_seqlens",
    "cu_seqlens_k": "cu_seqlens_k",
    "page_indices": "page_table_1",
    "nsa_cache_seqlens": "dsa_cache_seqlens",
    "seqlens_expanded": "seqlens_expanded",
    "nsa_cu_seqlens_k": "dsa_cu_seqlens_k",
    "real_page_table": "real_page_table",
}
"""SGLang's names of what it writes, by field."""


def _sglang_fill(engine: Engine, rng: np.random.Generator, slots: np.ndarray) -> _Call:
    """SGLang's step of any mode."""
    (of, (backend,), (twin,)) = engine.of, engine.backends, engine.twins
    values = drawn(rng, of)
    while not len(values["seq_lens"]) or values.get("max_total_tokens") == 0:
        values = drawn(rng, of)
    names = {"seq_lens", "req_pool_indices", "extend_seq_lens"} & values.keys()
    mode, arrays = values["forward_mode"], {name: values[name] for name in names}
    bs, tokens = len(arrays["seq_lens"]), values.get("num_draft_tokens")
    total = values.get("max_total_tokens", of.rows) if "extend_seq_lens" in arrays else None
    spec = of.spec(Rows.of(mode, bs, tokens, total))
    numbers: dict[str, Any] = {
        "bs": bs,
        "dsa_index_topk": TOPK,
        "physical_page_size": of.page,
        "max_len" if mode is ForwardMode.DECODE else "max_seqlen_k": spec.max_len,
    }
    outputs = {name: backend.get(name) for name in ("page_indices", "real_page_table")} | backend
    context: torch.Tensor | None = None
    if mode is ForwardMode.DECODE:
        del outputs["seqlens_expanded"]
    elif tokens is not None:
        numbers["next_n"] = tokens
        if rng.random() < 0.5:
            context = torch.full((bs, tokens), HELD, dtype=torch.int32, device=DEVICE)
            outputs["paged_mqa_ctx_lens_2d"] = context
    else:
        numbers |= {"total_len": total, "max_extend_len": 99, "max_total_len": of.rows}

    def expect() -> None:
        held = twin["seqlens_expanded"].copy()
        options = {"forward_mode": mode, "num_draft_tokens": tokens, "max_total_tokens": total}
        engine.expect(spec, {**arrays, **options, "req_to_token": slots})
        if mode is ForwardMode.DECODE:
            twin["seqlens_expanded"][:] = held
        # All rows of a request have the live columns of its last one.
        kv_lens = twin["cache_seqlens"]
        owners = [i for i in range(bs) for _ in range(tokens or 1)]
        if total is not None:
            extend = [min(max(int(n), 0), total) for n in arrays["extend_seq_lens"]]
            owners = [i for i, n in enumerate(extend) for _ in range(n)][:total]
        for row, i in enumerate(owners):
            slot_row = min(max(int(arrays["req_pool_indices"][i]), 0), len(slots) - 1)
            live = slots[slot_row, : min(kv_lens[i], spec.max_len)]
            if of.wide:
                twin["page_indices"][row, : len(live)] = live
            if of.page > 1:
                pages = live[:: of.page] // of.page
                twin["real_page_table"][row, : len(pages)] = pages
        if context is not None:
            tiled = np.tile(kv_lens[:bs, None], context.shape[1])
            assert_equal("paged_mqa_ctx_lens_2d", context.cpu().numpy(), tiled)

    given = {_NAMES.get(name, name): tensor for name, tensor in outputs.items()}
    given |= _tensors(arrays) | {"req_to_token": engine.pool}
    return _Call(_SGLANG[mode], given | numbers, expect)


def _sglang_copy(engine: Engine, rng: np.random.Generator, slots: np.ndarray) -> _Call:
    """SGLang's copies, to one backend or three."""
    of = engine.of
    multi = bool(rng.random() < 0.5)
    mode = 0 if multi else int(rng.integers(3))
    bs = int(rng.integers(1, min(of.requests, of.rows), endpoint=True))
    rows = size = bs if mode == 0 else int(rng.integers(1, of.rows, endpoint=True))
    columns = int(rng.integers(1, of.max_len, endpoint=True))
    sizes = {"cache_seqlens": bs, "cu_seqlens_k": bs + 1, "nsa_cu_seqlens_k": size + 1}
    keywords: dict[str, Any] = {"bs": bs, "max_len": 0, "seqlens_expanded_size": 0}
    if multi:
        keywords["max_len"] = columns
    else:
        keywords |= {"forward_mode": mode, "max_seqlen_k": 0}
        keywords["max_len" if mode == 0 else "max_seqlen_k"] = columns
        keywords["seqlens_expanded_size"] = 0 if mode == 0 else size
    arrays = {}
    ends = [f"dst{k}" for k in range(3)] if multi else ["dst"]
    for name, written in _NAMES.items():
        if multi and name == "seqlens_expanded":
            continue
        wanted = name in engine.backends[0] and not (name == "seqlens_expanded" and mode == 0)
        source = "page_indices" if name == "page_indices" else written
        if wanted:
            whole = engine.twins[0][name].shape
            shape: tuple[int, ...] = (sizes.get(name, size),)
            if len(whole) == 2:
                shape = (rows, columns if name == "page_indices" else whole[1])
            arrays[name] = rng.integers(-9, 2**31, shape, dtype=np.int32)
        keywords[f"{source}_src"] = _tensors(arrays)[name] if wanted else None
        for end, backend in zip(ends, engine.backends, strict=False):
            keywords[f"{written}_{end}"] = backend[name] if wanted else None
    for name in ("flashmla_num_splits", "flashmla_metadata"):
        keywords |= dict.fromkeys([f"{name}_src", *(f"{name}_{end}" for end in ends)])

    def expect() -> None:
        for twin in engine.twins[: len(ends)]:
            for name, array in arrays.items():
                first = 1 if name.endswith("cu_seqlens_k") else 0
                part = tuple(slice(n) for n in array.shape)
                twin[name][part][first:] = array[first:]

    function = sglang.fused_metadata_copy_multi_cuda if multi else sglang.fused_metadata_copy_cuda
    return _Call(function, keywords, expect)


CALLS: Mapping[str, Callable[[Engine, np.random.Generator, np.ndarray], _Call]] = {
    "sgl_kernel_broadcast": _broadcast,
    "sgl_kernel_copy": _copy,
    "sglang_fill": _sglang_fill,
    "sglang_copy": _sglang_copy,
}
