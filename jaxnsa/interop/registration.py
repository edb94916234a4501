"""The static tensors of N backends, checked when they are registered and lightly ever after."""

import bisect
import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from jaxnsa import checks
from jaxnsa.direct import MAX_BACKENDS
from jaxnsa.interop.tensors import Checked, check_rows, extent, platform_of
from jaxnsa.metadata import ForwardMode, NSAMetadata
from jaxnsa.spec import MAX_LEN, Rows, Spec

FIELDS = tuple(field.name for field in dataclasses.fields(NSAMetadata))
TABLES = ("page_indices", "real_page_table")


class Registered:
    """Checked tensors of N backends.

    Attributes:
      backends: the tensors of each backend by field name, without the tables that there are not.
      device: where they all are.
      spec: the largest computation that they hold, in place with tail "keep".
      spans: their memory, as addresses in order and apart.
    """

    def __init__(self, buffers: Sequence[Any], nsa_index_topk: int, real_page_size: int):
        """Checks everything.

        Args:
          buffers: mappings or objects with NSAMetadata's field names.
          nsa_index_topk: the indexer's top-k, in tokens.
          real_page_size: tokens in a physical page.

        Raises:
          ValueError, TypeError: what is wrong with which tensor.
        """
        if not isinstance(buffers, Sequence) or not 1 <= len(buffers) <= MAX_BACKENDS:
            got = len(buffers) if isinstance(buffers, Sequence) else type(buffers).__name__
            raise ValueError(f"buffers: got {got}, expected a list of 1 to {MAX_BACKENDS} backends")
        self.backends = [
            _tensors(f"buffers[{k}]", b, real_page_size) for k, b in enumerate(buffers)
        ]
        first = self.backends[0]
        self.device = first["cache_seqlens"].device
        platform_of(self.device)
        wide = "page_indices" in first
        max_len = (
            first["page_indices"].shape[1]
            if wide
            else first["real_page_table"].shape[1] * real_page_size
        )
        if not 1 <= max_len <= MAX_LEN:
            raise ValueError(f"buffers[0]: got tables for {max_len} tokens, expected 1 to 2^30")
        self.spec = Spec(
            rows=Rows(len(first["cache_seqlens"]), len(first["seqlens_expanded"]), None, 0),
            max_len=max_len,
            nsa_index_topk=nsa_index_topk,
            real_page_size=real_page_size,
            wide_table=wide,
            tail="keep",
            num_backends=len(self.backends),
        )
        self._tensors = [tensor for backend in self.backends for tensor in backend.values()]
        self._names = [f"buffers[{k}].{field}" for k, b in enumerate(self.backends) for field in b]
        for k, backend in enumerate(self.backends):
            self._check_backend(f"buffers[{k}]", backend)
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._numels = [tensor.numel() for tensor in self._tensors]
        ordered = sorted(zip(map(extent, self._tensors), self._names, self._tensors, strict=True))
        for (_, name, tensor), (_, next_name, next_tensor) in _overlapping(ordered):
            if not _interleaved(tensor, next_tensor):
                raise ValueError(f"{next_name}: got memory that {name} uses too, expected its own")
        self.spans = merged(extent for extent, _, _ in ordered)

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """Every tensor and its name, backend by backend in the order of NSAMetadata's fields."""
        return list(zip(self._names, self._tensors, strict=True))

    def check_unchanged(self) -> None:
        """Raises ValueError where a tensor is no longer what was registered."""
        tensors = self._tensors
        pointers = list(map(torch.Tensor.data_ptr, tensors))
        if pointers == self._pointers and list(map(torch.Tensor.numel, tensors)) == self._numels:
            return
        for name, tensor, pointer, size in zip(
            self._names, tensors, self._pointers, self._numels, strict=True
        ):
            if tensor.data_ptr() != pointer or tensor.numel() != size:
                raise ValueError(
                    f"{name}: got {tensor.numel()} elements at {tensor.data_ptr():#x}, expected "
                    f"{size} at {pointer:#x} as registered: was it freed or resized?"
                )

    def check_apart(self, name: str, value: Checked) -> None:
        """Raises ValueError where an input shares memory with a registered tensor."""
        k = bisect.bisect_right(self.spans, value.start, key=operator.itemgetter(1))
        if value.start < value.end and k < len(self.spans) and self.spans[k][0] < value.end:
            raise ValueError(
                f"{name}: got memory within that of the registered tensors, which an update "
                f"writes; expected its own"
            )

    def rows(
        self,
        bs: int,
        forward_mode: ForwardMode,
        num_draft_tokens: int | None,
        max_total_tokens: int | None,
    ) -> Rows:
        """The rows of a step of `bs` requests; raises where an argument does not fit."""
        most = self.spec.rows
        if bs > most.requests:
            raise ValueError(f"seq_lens: got {bs} requests, expected at most {most.requests}")
        if forward_mode is not ForwardMode.TARGET_VERIFY and num_draft_tokens is not None:
            raise ValueError(
                f"num_draft_tokens: got {num_draft_tokens!r}, expected None in {forward_mode}"
            )
        if forward_mode is not ForwardMode.DRAFT_EXTEND and max_total_tokens is not None:
            raise ValueError(
                f"max_total_tokens: got {max_total_tokens!r}, expected None in {forward_mode}"
            )
        if forward_mode is ForwardMode.TARGET_VERIFY:
            num_draft_tokens = checks.integer("num_draft_tokens", num_draft_tokens, 1)
        elif forward_mode is ForwardMode.DRAFT_EXTEND:
            max_total_tokens = (
                most.count
                if max_total_tokens is None
                else checks.integer("max_total_tokens", max_total_tokens, 0, most.count)
            )
        elif forward_mode is not ForwardMode.DECODE:
            raise TypeError(f"forward_mode: got {forward_mode!r}, expected a ForwardMode")
        rows = Rows.of(forward_mode, bs, num_draft_tokens, max_total_tokens)
        if rows.count > most.count:
            raise ValueError(
                f"seq_lens: got {bs} requests of {rows.tokens_per_request} rows each, expected at "
                f"most {most.count} rows"
            )
        return rows

    def _check_backend(self, name: str, backend: dict[str, torch.Tensor]) -> None:
        shapes = vars(self.spec.shapes())
        first = self.backends[0]
        if backend.keys() != first.keys():
            differing = ", ".join(sorted(backend.keys() ^ first.keys()))
            raise ValueError(
                f"{name}: got {differing} in some backends, expected it in all or none"
            )
        for field, tensor in backend.items():
            if tensor.device != self.device:
                raise ValueError(
                    f"{name}.{field}: got a tensor on {tensor.device}, expected {self.device}"
                )
            if tuple(tensor.shape) != shapes[field].shape:
                raise ValueError(
                    f"{name}.{field}: got shape {tuple(tensor.shape)}, expected "
                    f"{shapes[field].shape}"
                )
            if not tensor.numel() or not tensor.data_ptr():
                raise ValueError(f"{name}.{field}: got a tensor without memory")
            if tensor.dim() == 2 and tensor.stride(0) != first[field].stride(0):
                raise ValueError(
                    f"{name}.{field}: got rows {tensor.stride(0)} elements apart, expected "
                    f"{first[field].stride(0)} as in buffers[0]"
                )


def field_of(buffer: Any, field: str) -> Any:
    """A field of a mapping or an object; None where it has none."""
    if isinstance(buffer, Mapping):
        return buffer.get(field)
    return getattr(buffer, field, None)


def merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The memory of extents, which come in the order of their starts, as extents that are apart."""
    apart: list[tuple[int, int]] = []
    for start, end in extents:
        if apart and start <= apart[-1][1]:
            apart[-1] = apart[-1][0], max(apart[-1][1], end)
        else:
            apart.append((start, end))
    return apart


def _tensors(name: str, buffer: Any, real_page_size: int) -> dict[str, torch.Tensor]:
    """The tensors of one backend, of the right type and layout each."""
    found = {}
    for field in FIELDS:
        tensor = field_of(buffer, field)
        if tensor is None and field in TABLES:
            continue
        if field == "real_page_table" and real_page_size == 1:
            raise ValueError(f"{name}.{field}: got a tensor, expected None as real_page_size is 1")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}.{field}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}.{field}: got {tensor.dtype}, expected torch.int32")
        dimensions = 2 if field in TABLES else 1
        if tensor.dim() != dimensions:
            raise ValueError(
                f"{name}.{field}: got shape {tuple(tensor.shape)}, expected {dimensions} "
                f"dimension(s)"
            )
        if dimensions == 2:
            check_rows(f"{name}.{field}", tensor)
        elif not tensor.is_contiguous():
            raise ValueError(
                f"{name}.{field}: got stride {tensor.stride(0)}, expected a contiguous vector"
            )
        found[field] = tensor
    if not found.keys() & set(TABLES):
        raise ValueError(f"{name}: got no tables, expected page_indices, real_page_table or both")
    if real_page_size > 1 and "real_page_table" not in found:
        raise ValueError(
            f"{name}.real_page_table: got None, expected a tensor as real_page_size is "
            f"{real_page_size}"
        )
    return found


def _overlapping(ordered: list) -> list:
    """Pairs whose extents overlap, of items that begin with their extent and are sorted by it."""
    pairs = []
    for k, item in enumerate(ordered):
        for other in ordered[k + 1 :]:
            if other[0][0] >= item[0][1]:
                break
            pairs.append((item, other))
    return pairs


def _interleaved(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two matrices are column ranges of one wider matrix, side by side."""
    if a.dim() != 2 or b.dim() != 2 or a.stride(0) != b.stride(0) or not a.stride(0):
        return False
    pitch = a.stride(0)
    gap = (b.data_ptr() - a.data_ptr()) // a.element_size() % pitch
    return a.shape[1] <= gap and gap + b.shape[1] <= pitch
