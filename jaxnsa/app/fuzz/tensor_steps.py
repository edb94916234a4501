"""Steps of a fuzzer's program on an engine's static PyTorch tensors; see `steps`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from jaxnsa import reference
from jaxnsa.app.fuzz.batch import Batch
from jaxnsa.app.fuzz.steps import (
    HELD,
    Session,
    Values,
    assert_equal,
    assert_refused,
    is_ragged,
    pool,
    vectors,
)
from jaxnsa.interop.torch import BackendBuffers, DlpackOptions, from_torch, to_torch
from jaxnsa.metadata import FIELDS, Extent, ForwardMode, NSAMetadata
from jaxnsa.schedules import NO_SCHEDULES, Schedules
from jaxnsa.spec import Rows, Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DRAFT_TOKENS = 3
"""What the path "dlpack" is compiled for."""

TOPK = 64


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Registered tensors but for their values.

    Attributes:
      path: "direct" or "dlpack".
      implementation: of the path "dlpack", otherwise None.
      requests: that there is room for.
      rows: that there is room for.
      pool: shape of `req_to_token`.
      max_len: columns of the tables, in tokens.
      page: tokens in a page.
      count: backends.
      wide: whether there is a wide table.
      gap: elements between the rows of a table.
      prefill: whether they are tensors of prefill.
      max_total_keys, index_kpool, schedules, backend_offsets: as of the broadcast.
    """

    path: str
    implementation: str | None
    requests: int
    rows: int
    pool: tuple[int, int]
    max_len: int
    page: int
    count: int
    wide: bool
    gap: int = 0
    prefill: bool = False
    max_total_keys: int | None = None
    index_kpool: int = 1
    schedules: Schedules | None = None
    backend_offsets: tuple[int, ...] | None = None

    @property
    def modes(self) -> list[ForwardMode]:
        """The forward modes that they serve."""
        return [mode for mode in ForwardMode if Rows.of(mode, 1, 1, 1).prefill == self.prefill]

    def spec(self, rows: Rows) -> Spec:
        """A computation of so many rows, with tables as wide as the pool and the tensors allow."""
        pages = -(-self.max_len // self.page)
        return Spec(
            rows=rows,
            max_len=min(self.max_len if self.wide else pages * self.page, self.pool[1]),
            nsa_index_topk=TOPK,
            real_page_size=self.page,
            wide_table=self.wide,
            tail="keep",
            max_total_keys=self.max_total_keys,
            index_kpool=self.index_kpool,
            schedules=self.schedules or NO_SCHEDULES,
        )


LAYOUTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda t: t,
    "offset": lambda t: torch.cat([t[:1].repeat(3), t])[3:] if len(t) else t,
    "strided": lambda t: torch.stack([t, t], 1)[:, 0],
    "expanded": lambda t: t[:1].expand(len(t)),
}
"""How the vector of an input lies in memory; where it is not contiguous it is to be refused."""

SPOILS: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "freed": lambda t: t.untyped_storage().resize_(0),
    "shorter": lambda t: t.resize_(t.numel() - 1),
    "another shape": lambda t: t.resize_(1, t.numel()) if t.dim() == 1 else t.resize_(t.numel()),
    "other memory": lambda t: setattr(t, "data", t.detach().clone()),
    "other strides": lambda t: t.as_strided_((t.numel(),), (0,)),
    "transposed": lambda t: t.t_() if t.dim() == 2 and min(t.shape) > 1 else t.resize_(0),
}
"""What an engine may do to a registered tensor, after which no update may write anything."""


def update(
    session: Session, of: Buffers, *, seed: int = 0, more: int = 0, values: Values | None = None
) -> None:
    """Updates registered tensors, and looks at all of all of them.

    Args:
      session: holds them.
      of: which.
      seed: of the pool's slots, and of the values where none are given.
      more: updates that follow with other values.
      values: the arguments of `BackendBuffers.update`, vectors as lists or arrays; besides `dtype`
        and `layout`, a name in `LAYOUTS`, of the vectors.
    """
    engine = engine_of(session, of)
    slots = engine.set_pool(seed)
    rng = np.random.default_rng(seed)
    for _ in range(1 + more):
        session.values = dict(drawn(rng, of) if values is None else values)
        session.calls += 1
        keywords = dict(session.values)
        layout, dtype = LAYOUTS[keywords.pop("layout")], keywords.pop("dtype")
        tensors = {
            name: layout(tensor_of(keywords.pop(name), dtype)) for name in _vectors(keywords)
        }
        given = tensors | keywords | {"req_to_token": engine.pool}
        if all(tensor.is_contiguous() for tensor in tensors.values()):
            engine.buffers.update(**given)
            arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            engine.expect_step(arrays, slots, **keywords)
        else:
            assert_refused("vectors that are not contiguous", engine.buffers.update, given)
        engine.check()


def track_updates(session: Session, of: Buffers, *, seed: int = 0, more: int = 0) -> None:
    """Updates registered tensors for a batch that changes, whose requests have ids.

    Args:
      session, of, seed, more: as of `update`.
    """
    batch, rng = Batch(seed, of.pool), np.random.default_rng(seed)
    engine = engine_of(session, of)
    engine.buffers.invalidate()
    for _ in range(1 + more):
        session.calls += 1
        keywords = drawn(rng, of)
        del keywords["layout"]
        keywords.pop("written_lens", None)
        dtype = keywords.pop("dtype")
        moved = batch.step(len(keywords["seq_lens"]))
        keywords |= {"seq_lens": batch.lengths, "req_pool_indices": batch.rows}
        arrays = {name: np.asarray(keywords.pop(name), dtype) for name in _vectors(keywords)}
        if len(moved):
            engine.buffers.invalidate(tensor_of(moved, dtype))
        engine.pool.copy_(torch.from_numpy(batch.pool))
        given = {name: tensor_of(array, dtype) for name, array in arrays.items()} | keywords
        given |= {"request_ids": tensor_of(batch.ids, dtype), "req_to_token": engine.pool}
        engine.buffers.update(**given)
        keywords.pop("max_new_tokens", None)
        engine.expect_step(arrays, batch.pool, **keywords)
        engine.check()


def _vectors(keywords: Mapping[str, Any]) -> list[str]:
    """The names of those arguments of an update that are vectors."""
    return [name for name in keywords if name.endswith(("lens", "indices"))]


def wrong_update(session: Session, of: Buffers, *, wrong: tuple[str, str], seed: int = 0) -> None:
    """Updates registered tensors with one wrong argument, which is to be refused.

    Args:
      session, of, seed: as of `update`.
      wrong: its name, and an expression of its value, in which `given` is what it should be, and
        `engine` holds the tensors.
    """
    argument, expression = wrong
    engine = engine_of(session, of)
    engine.set_pool(seed)
    session.calls += 1
    keywords: dict[str, Any] = {
        name: tensor_of([1, 1], "int64")
        for name in ("seq_lens", "req_pool_indices", "extend_seq_lens", "written_lens")
    }
    if argument == "request_ids":
        keywords["request_ids"] = keywords.pop("written_lens")
    keywords |= {"forward_mode": of.modes[seed % len(of.modes)], "req_to_token": engine.pool}
    keywords["num_draft_tokens"] = 3
    for name, mode in (("extend_seq_lens", is_ragged), ("num_draft_tokens", _is_verify)):
        if not mode(keywords["forward_mode"]):
            del keywords[name]
    keywords[argument] = evaluated(expression, given=keywords.get(argument), engine=engine)
    assert_refused(f"{argument} = {expression}", engine.buffers.update, keywords)
    engine.check()


def spoil(session: Session, of: Buffers, *, field: int, how: str) -> None:
    """Changes a registered tensor: the next update is refused and writes nothing."""
    engine = engine_of(session, of)
    del session.held[of]
    session.calls += 1
    names = list(engine.backends[-1])
    name = names[field % len(names)]
    SPOILS[how](engine.backends[-1][name])
    ones = tensor_of([1], "int32")
    keywords: dict[str, Any] = {"seq_lens": ones, "req_pool_indices": ones}
    keywords |= {"forward_mode": of.modes[0], "req_to_token": engine.pool}
    if is_ragged(of.modes[0]):
        keywords["extend_seq_lens"] = ones
    assert_refused(f"{name} that is {how}", engine.buffers.update, keywords)
    del engine.backends[-1][name]
    engine.check()


def round_trip(session: Session, *, seed: int = 0) -> None:
    """Tensors as arrays, and back."""
    session.calls += 1
    for dtype in ("int32", "int64"):
        (values,) = vectors(seed, 1 + seed % 5, (1, 9), dtype, True, 1)
        tensor = tensor_of(values["seq_lens"], dtype)
        array = from_torch(tensor)
        saturated = np.clip(values["seq_lens"].astype(np.int64), -(2**31), 2**31 - 1)
        assert_equal("array", np.asarray(array), saturated)
        assert_equal("tensor", to_torch(array).cpu().numpy(), saturated)


def drawn(rng: np.random.Generator, of: Buffers) -> dict[str, Any]:
    """The values of an update."""
    mode = of.modes[int(rng.integers(len(of.modes)))]
    values: dict[str, Any] = {"forward_mode": mode}
    most = of.requests
    if _is_verify(mode):
        tokens = DRAFT_TOKENS if of.path == "dlpack" else int(rng.integers(1, 5))
        values["num_draft_tokens"] = tokens
        most = min(most, of.rows // tokens)
    bs = int(rng.integers(0, min(most, of.rows), endpoint=True))
    values["dtype"] = ("int32", "int64")[int(rng.integers(2))]
    seed = int(rng.integers(2**31))
    (lengths,) = vectors(seed, bs, of.pool, values["dtype"], of.schedules is None, 1)
    values |= lengths
    if not is_ragged(mode):
        del values["extend_seq_lens"]
    elif of.path == "direct" and rng.random() < 0.7:
        values["max_total_tokens"] = int(rng.integers(0, of.rows, endpoint=True))
    if rng.random() < 0.6:
        del values["written_lens"]
    elif rng.random() < 0.5:
        values["max_new_tokens"] = int(rng.choice([0, 1, 40]))
    layouts = ["plain"] * 7 + list(LAYOUTS)
    values["layout"] = layouts[int(rng.integers(len(layouts)))]
    return values


def _is_verify(mode: ForwardMode) -> bool:
    return Rows.of(mode, 1, 1, 1).added_tokens > 0


def freed(tensor: torch.Tensor, size: int = 0) -> torch.Tensor:
    """A tensor like the given one, whose storage has only so many bytes."""
    copy = torch.cat([tensor.reshape(-1), tensor.new_ones(1)])[: tensor.numel()].view(tensor.shape)
    copy.untyped_storage().resize_(size)
    return copy


def evaluated(expression: str, **names: Any) -> Any:
    """An expression's value."""
    return eval(expression, globals(), names)


def tensor_of(values: Any, dtype: str) -> torch.Tensor:
    """A vector on the device."""
    return torch.from_numpy(np.asarray(values, np.int64).astype(dtype)).to(DEVICE)


def engine_of(session: Session, of: Buffers) -> "Engine":
    """The session's tensors of a kind, registered."""
    if of not in session.held:
        session.held[of] = Engine(of)
    return session.held[of]


class Engine:
    """N backends' static tensors and NumPy twins of them."""

    def __init__(self, of: Buffers, register: bool = True):
        self.of = of
        rows = Rows(of.requests, of.rows, None, 0, prefill=of.prefill)
        largest = dataclasses.replace(of.spec(rows), max_len=of.max_len)
        shapes = {name: array.shape for name, array in largest.shapes().items()}
        self.twins = [
            {name: np.full(shape, HELD, np.int32) for name, shape in shapes.items()}
            for _ in range(of.count)
        ]
        self.backends = [
            {name: self._tensor(name, shape) for name, shape in shapes.items()}
            for _ in range(of.count)
        ]
        gap = of.gap if of.path == "direct" else 0
        self.pool = torch.zeros((of.pool[0], of.pool[1] + gap), dtype=torch.int32, device=DEVICE)
        self.pool = self.pool[:, : of.pool[1]]
        if register:
            self.buffers = BackendBuffers(
                self.backends,
                nsa_index_topk=TOPK,
                real_page_size=of.page,
                index_kpool=of.index_kpool,
                schedules=of.schedules,
                backend_offsets=of.backend_offsets,
                path="direct" if of.path == "direct" else "dlpack",
                dlpack=DlpackOptions(
                    self.pool, of.modes, DRAFT_TOKENS, implementation=of.implementation
                ),
            )

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        gap = self.of.gap if FIELDS[name].extent is Extent.TABLE else 0
        whole = (*shape[:-1], shape[-1] + gap)
        return torch.full(whole, HELD, dtype=torch.int32, device=DEVICE)[..., : shape[-1]]

    def set_pool(self, seed: int) -> np.ndarray:
        """Fills the pool, and returns what it holds."""
        slots = pool(self.of.pool, seed)
        self.pool.copy_(torch.from_numpy(slots))
        return slots

    def expect_step(
        self,
        arrays: Mapping[str, np.ndarray],
        slots: np.ndarray,
        *,
        forward_mode: ForwardMode,
        num_draft_tokens: int | None = None,
        max_total_tokens: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """What an update with these arguments writes to the twins."""
        if max_total_tokens is None and is_ragged(forward_mode):
            max_total_tokens = self.of.rows
        options = {"num_draft_tokens": num_draft_tokens, "max_total_tokens": max_total_tokens}
        rows = Rows.of(forward_mode, len(arrays["seq_lens"]), **options)
        mode = {"forward_mode": forward_mode, **options}
        self.expect(self.of.spec(rows), {**arrays, **mode, "req_to_token": slots})

    def expect(self, spec: Spec, given: Mapping[str, Any]) -> None:
        """What a computation writes to the twins."""
        shapes = spec.shapes()
        reference.fused_metadata_precompute_and_broadcast(
            **given,
            num_backends=len(self.twins),
            max_total_keys=spec.max_total_keys,
            max_len=spec.max_len,
            nsa_index_topk=TOPK,
            real_page_size=spec.real_page_size,
            wide_table=spec.wide_table,
            index_kpool=spec.index_kpool,
            schedules=spec.schedules,
            backend_offsets=self.of.backend_offsets,
            out=tuple(
                NSAMetadata(
                    **{name: _first(name, twin[name], shapes[name].shape) for name in shapes}
                )
                for twin in self.twins
            ),
        )

    def check(self) -> None:
        """Raises AssertionError where a tensor is not what it should be."""
        for k, (backend, twin) in enumerate(zip(self.backends, self.twins, strict=True)):
            for name, tensor in backend.items():
                # A tensor that NumPy has seen cannot be resized.
                assert_equal(f"[{k}].{name}", tensor.cpu().clone().numpy(), twin[name])


def _first(name: str, twin: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The part of a twin that a step of these shapes writes."""
    if FIELDS[name].extent is Extent.PAGED_MQA_ITEMS:  # rows of items one behind the other
        return twin.reshape(-1)[: math.prod(shape)].reshape(shape)
    return twin[tuple(slice(n) for n in shape)]
