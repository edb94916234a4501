"""Steps of a fuzzer's program on PyTorch tensors; see `fuzz_steps`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jaxnsa import reference
from jaxnsa.app.fuzz_steps import EXPLANATION, HELD, Session, highest, pool, vector
from jaxnsa.interop import sgl_kernel
from jaxnsa.interop.torch import BackendBuffers, DlpackOptions, from_torch, to_torch
from jaxnsa.metadata import FIELDS, ForwardMode, NSAMetadata
from jaxnsa.spec import Rows, Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

MODES = tuple(mode for mode in ForwardMode if not Rows.of(mode, 1, 1, 1).prefill)
"""Those that the same tensors serve."""

DRAFT_TOKENS = 3
"""In target verify, as the path "dlpack" is compiled for one number of them."""

TOPK = 64

SGL_FILLS = (
    "fill_draft_extend_metadata_cuda",
    "fill_draft_extend_metadata_cuda_adaptive",
    "fill_draft_extend_metadata_cuda_optimized",
    "fill_draft_extend_metadata_fused_simple",
)
"""The names of `sgl_kernel` for the lengths of a draft-extend step."""


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
    gap: int

    def spec(self, rows: Rows) -> Spec:
        """A computation of so many rows, with tables as wide as the pool and the tensors allow."""
        return Spec(
            rows=rows,
            max_len=min(self.max_len, self.pool[1]),
            nsa_index_topk=TOPK,
            real_page_size=self.page,
            wide_table=self.wide,
            tail="keep",
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


class TorchSession(Session):
    """A session that has tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self._engines: dict[Buffers, _Engine] = {}

    def update(
        self,
        of: Buffers,
        mode: ForwardMode,
        *,
        seed: int = 0,
        more: int = 0,
        layout: str = "plain",
        dtype: str = "int32",
        max_total_tokens: int | None = None,
        wrong: tuple[str, str] | None = None,
        **lengths: Sequence[int],
    ) -> None:
        """Updates registered tensors, and looks at all of all of them.

        Args:
          of: which.
          mode: the forward mode.
          seed, more, wrong, lengths: as in `call`.
          layout: a name in `LAYOUTS`.
          dtype: of the lengths.
          max_total_tokens: in draft extend, where the path takes any.
        """
        self._update(of, mode, seed, layout, dtype, max_total_tokens, wrong, lengths)
        rng = np.random.default_rng(seed)
        bs = len(lengths["seq_lens"])
        for _ in range(more):
            drawn = {n: vector(rng, bs, high, dtype, True) for n, high in highest(of.pool).items()}
            self._update(of, mode, seed, layout, dtype, max_total_tokens, None, drawn)

    def _update(
        self,
        of: Buffers,
        mode: ForwardMode,
        seed: int,
        layout: str,
        dtype: str,
        max_total_tokens: int | None,
        wrong: tuple[str, str] | None,
        lengths: Mapping[str, Sequence[int]],
    ) -> None:
        self.lengths = lengths
        engine = self._engine(of)
        bs = len(lengths["seq_lens"])
        ragged = mode is ForwardMode.DRAFT_EXTEND
        slots = engine.set_pool(seed)
        vectors = {
            name: np.array(values, np.int64).astype(dtype)
            for name, values in lengths.items()
            if name != "written_lens" and (ragged or name != "extend_seq_lens")
        }
        arguments: dict[str, Any] = {
            name: LAYOUTS[layout](torch.from_numpy(v).to(DEVICE)) for name, v in vectors.items()
        }
        contiguous = all(tensor.is_contiguous() for tensor in arguments.values())
        vectors = {name: tensor.cpu().numpy() for name, tensor in arguments.items()}
        extra: dict[str, Any] = {}
        if mode is ForwardMode.TARGET_VERIFY:
            extra["num_draft_tokens"] = DRAFT_TOKENS
        if ragged and of.path == "direct":
            extra["max_total_tokens"] = max_total_tokens
        keywords = arguments | extra | {"req_to_token": engine.pool, "forward_mode": mode}
        if wrong is not None:
            name, expression = wrong
            scope = {"given": keywords.get(name), "engine": engine}
            keywords[name] = eval(expression, globals(), scope)
        try:
            engine.buffers.update(**keywords)
        except (TypeError, ValueError) as error:
            if (wrong is None and contiguous) or not EXPLANATION.match(str(error)):
                raise
            engine.check()
            return
        assert wrong is None, f"{wrong[0]} = {wrong[1]} was taken"
        assert contiguous, f"a vector that is {layout} was taken"
        capacity = None
        if ragged:
            capacity = extra.get("max_total_tokens")
            capacity = extra["max_total_tokens"] = of.rows if capacity is None else capacity
        rows = Rows.of(mode, bs, extra.get("num_draft_tokens"), capacity)
        engine.expect(of.spec(rows), vectors, slots, forward_mode=mode, **extra)
        engine.check()

    def spoil(self, of: Buffers, field: int, how: str) -> None:
        """Changes a registered tensor: the next update is refused and writes nothing."""
        engine = self._engines.pop(of, None) or _Engine(of)
        names = list(engine.backends[-1])
        name = names[field % len(names)]
        SPOILS[how](engine.backends[-1][name])
        lengths = torch.ones(1, dtype=torch.int32, device=DEVICE)
        try:
            engine.buffers.update(lengths, lengths, engine.pool)
        except ValueError as error:
            assert EXPLANATION.match(str(error)), error
        else:
            raise AssertionError(f"{name}: a tensor that is {how} was taken")
        del engine.backends[-1][name]
        engine.check()

    def sgl_fill(
        self, function: str, *, capacity: int, seq_lens: Sequence[int], extend: Sequence[int]
    ) -> None:
        """One of the names of `sgl_kernel` that fill the lengths of a draft-extend step."""
        lengths, q = (torch.tensor(v, dtype=torch.int64, device=DEVICE) for v in (seq_lens, extend))
        want = reference.fill_draft_extend_metadata(
            q.cpu().numpy(), lengths.cpu().numpy(), nsa_index_topk=TOPK, max_total_tokens=capacity
        )
        if function.endswith("simple"):
            expanded, clamped = getattr(sgl_kernel, function)(q, lengths, TOPK)
            total = len(expanded)
            want = reference.fill_draft_extend_metadata(
                q.cpu().numpy(), lengths.cpu().numpy(), nsa_index_topk=TOPK
            )
        else:
            expanded, clamped = (
                torch.full((capacity,), HELD, dtype=torch.int32, device=DEVICE) for _ in range(2)
            )
            total = int(getattr(sgl_kernel, function)(q, lengths, TOPK, expanded, clamped))
        assert total == want.total_tokens, f"total: got {total}, not {want.total_tokens}"
        true = sum(min(max(n, 0), 2**31 - 1) for n in extend)
        for name, got in (("seqlens_expanded", expanded), ("nsa_cache_seqlens", clamped)):
            twin = np.array(getattr(want, name))
            twin[true:] = HELD
            _assert_equal(name, got, twin)

    def sgl_broadcast(
        self,
        of: Buffers,
        *,
        seed: int = 0,
        seq_lens: Sequence[int],
        req_pool_indices: Sequence[int],
    ) -> None:
        """`fused_metadata_precompute_and_broadcast_cuda`, and a copy of what it fills."""
        engine = _Engine(dataclasses.replace(of, path="direct", wide=True), register=False)
        slots = engine.set_pool(seed)
        lists: dict[str, Any] = {
            f"{field}_list": [backend.get(field) for backend in engine.backends]
            for field in FIELDS
            if field in engine.backends[0] or field == "real_page_table"
        }
        del lists["seqlens_expanded_list"]
        max_len = min(of.max_len, of.pool[1])
        vectors = {
            "seq_lens": np.array(seq_lens, np.int64),
            "req_pool_indices": np.array(req_pool_indices, np.int64),
        }
        tensors = [torch.from_numpy(vector).to(DEVICE) for vector in vectors.values()]
        sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(
            tensors[0],
            tensors[1],
            engine.pool,
            **lists,
            max_len=max_len,
            nsa_index_topk=TOPK,
            real_page_size=of.page,
        )
        spec = engine.of.spec(Rows.of(ForwardMode.DECODE, len(seq_lens)))
        engine.expect(spec, vectors, slots, tail="copy")
        for twin in engine.twins:
            twin["seqlens_expanded"][:] = HELD
        engine.check()
        if of.gap == 0 and of.count > 1:
            sgl_kernel.fused_metadata_copy_cuda(*engine.backends[:2])
            engine.twins[1] = {name: a.copy() for name, a in engine.twins[0].items()}
            engine.check()

    def _engine(self, of: Buffers) -> "_Engine":
        if of not in self._engines:
            self._engines[of] = _Engine(of)
        return self._engines[of]

    def round_trip(self, values: Sequence[int], dtype: str) -> None:
        """A tensor as an array, and back."""
        tensor = torch.tensor(values, dtype=getattr(torch, dtype), device=DEVICE)
        array = from_torch(tensor)
        saturated = np.clip(np.array(values, np.int64), -(2**31), 2**31 - 1)
        np.testing.assert_array_equal(np.asarray(array), saturated)
        _assert_equal("tensor", to_torch(array), saturated)


class _Engine:
    """N backends' static tensors and NumPy twins of them."""

    def __init__(self, of: Buffers, register: bool = True):
        self.of = of
        rows = Rows(of.requests, of.rows, None, 0)
        largest = dataclasses.replace(of.spec(rows), max_len=of.max_len)
        shapes = {name: array.shape for name, array in largest.shapes().items()}
        self.twins = [
            {name: np.full(shape, HELD, np.int32) for name, shape in shapes.items()}
            for _ in range(of.count)
        ]
        self.backends = [
            {name: self._tensor(shape) for name, shape in shapes.items()} for _ in range(of.count)
        ]
        gap = of.gap if of.path == "direct" else 0
        self.pool = torch.zeros((of.pool[0], of.pool[1] + gap), dtype=torch.int32, device=DEVICE)
        self.pool = self.pool[:, : of.pool[1]]
        if register:
            self.buffers = BackendBuffers(
                self.backends,
                nsa_index_topk=TOPK,
                real_page_size=of.page,
                path="direct" if of.path == "direct" else "dlpack",
                dlpack=DlpackOptions(
                    self.pool, MODES, DRAFT_TOKENS, implementation=of.implementation
                ),
            )

    def _tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        whole = (*shape[:-1], shape[-1] + (self.of.gap if len(shape) == 2 else 0))
        return torch.full(whole, HELD, dtype=torch.int32, device=DEVICE)[..., : shape[-1]]

    def set_pool(self, seed: int) -> np.ndarray:
        """Fills the pool, and returns what it holds."""
        slots = pool(self.of.pool, seed)
        self.pool.copy_(torch.from_numpy(slots))
        return slots

    def expect(self, spec: Spec, vectors: dict, slots: np.ndarray, **options: Any) -> None:
        """What a step writes to the twins."""
        shapes = spec.shapes()
        views = [
            NSAMetadata(
                **{
                    name: twin[name][tuple(slice(n) for n in array.shape)]
                    for name, array in shapes.items()
                }
            )
            for twin in self.twins
        ]
        reference.fused_metadata_precompute_and_broadcast(
            **vectors,
            req_to_token=slots,
            num_backends=len(views),
            max_len=spec.max_len,
            nsa_index_topk=TOPK,
            real_page_size=spec.real_page_size,
            wide_table=spec.wide_table,
            out=tuple(views),
            **options,
        )

    def check(self) -> None:
        """Raises AssertionError where a tensor is not what it should be."""
        for k, (backend, twin) in enumerate(zip(self.backends, self.twins, strict=True)):
            for name, tensor in backend.items():
                _assert_equal(f"[{k}].{name}", tensor, twin[name])


def _assert_equal(name: str, tensor: torch.Tensor, wanted: np.ndarray) -> None:
    found = tensor.cpu().clone().numpy()  # a tensor that NumPy has seen cannot be resized
    assert found.shape == wanted.shape, f"{name}: got shape {found.shape}, not {wanted.shape}"
    if not np.array_equal(found, wanted):
        where = tuple(int(k) for k in np.argwhere(found != wanted)[0])
        raise AssertionError(f"{name}{list(where)}: got {found[where]}, not {wanted[where]}")
