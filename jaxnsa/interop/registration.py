"""The static tensors of N backends, checked when they are registered and lightly ever after."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jaxnsa import argument_checks
from jaxnsa.interop.tensor_checks import Checked, WrittenMemory, checked
from jaxnsa.metadata import FIELDS, Extent, ForwardMode
from jaxnsa.schedules import Schedules
from jaxnsa.spec import MAX_LEN, Rows, Spec


class Registered:
    """Checked tensors of N backends.

    Attributes:
      backends: the tensors of each backend by field name, without those that are not wanted.
      device: where they all are.
      spec: the largest computation that they hold, in place with tail "keep".
      memory: theirs.
    """

    def __init__(
        self,
        buffers: Sequence[Any],
        nsa_index_topk: int,
        real_page_size: int,
        index_kpool: int,
        schedules: Schedules,
        backend_offsets: Sequence[int] | None = None,
    ):
        """Checks everything.

        Args:
          buffers: mappings or objects with NSAMetadata's field names.
          nsa_index_topk: the indexer's top-k, in tokens.
          real_page_size: tokens in a physical page.
          index_kpool: tokens that the indexer pools into one key.
          schedules: what the consumers want beside the metadata.
          backend_offsets: of each backend, the tokens by which its `seq_lens` are longer.

        Raises:
          ValueError, TypeError: what is wrong with which tensor.
        """
        if not isinstance(buffers, Sequence) or not buffers:
            got = "none" if isinstance(buffers, Sequence) else type(buffers).__name__
            raise ValueError(f"buffers: got {got}, expected a list of at least one backend")
        found: list[dict[str, Checked]] = []
        for k, buffer in enumerate(buffers):
            device = found[0]["cache_seqlens"].tensor.device if found else None
            found.append(_checked_backend(f"buffers[{k}]", buffer, device))
        self.backends = [{name: c.tensor for name, c in backend.items()} for backend in found]
        first = self.backends[0]
        self.device = first["cache_seqlens"].device
        offsets = argument_checks.backend_offsets(backend_offsets, len(found))
        self.spec = dataclasses.replace(
            _largest_spec(first, len(found), nsa_index_topk, real_page_size),
            index_kpool=index_kpool,
            schedules=schedules,
            backend_offsets=offsets,
        )
        if offsets is not None and self.spec.rows.prefill:
            raise ValueError(
                f"backend_offsets: got {offsets}, expected None with tensors of prefill"
            )
        for k, backend in enumerate(self.backends):
            self._check_backend(f"buffers[{k}]", backend)
        tensors = [checked for backend in found for checked in backend.values()]
        self.memory = WrittenMemory(tensors)
        self._named = [(checked.name, checked.tensor) for checked in tensors]
        self._states = [_state(tensor) for _, tensor in self._named]

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """Every tensor and its name, backend by backend in the order of NSAMetadata's fields."""
        return self._named

    def check_unchanged(self) -> None:
        """Raises ValueError where a tensor is no longer what was registered."""
        for (name, tensor), state in zip(self._named, self._states, strict=True):
            if (now := _state(tensor)) != state:
                raise ValueError(
                    f"{name}: got {_described(now)}, expected {_described(state)} as registered: "
                    f"was it freed or resized?"
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
        self.check_mode(forward_mode)
        if max_total_tokens is None and forward_mode.ragged:
            max_total_tokens = most.count
        return argument_checks.rows(
            forward_mode, bs, num_draft_tokens, max_total_tokens, most=most.count
        )

    def check_mode(self, forward_mode: Any) -> None:
        """Raises where the tensors are not those of a forward mode."""
        if (argument_checks.forward_mode(forward_mode) is ForwardMode.EXTEND) != self.spec.prefill:
            registered = "registered" if self.spec.prefill else "not registered"
            expected = ForwardMode.EXTEND if self.spec.prefill else "another mode"
            raise ValueError(
                f"forward_mode: got {forward_mode}, expected {expected} as token_to_request is "
                f"{registered}"
            )

    def _check_backend(self, name: str, backend: dict[str, torch.Tensor]) -> None:
        shapes, first = self.spec.shapes(), self.backends[0]
        if backend.keys() != first.keys():
            differing = ", ".join(sorted(backend.keys() ^ first.keys()))
            raise ValueError(
                f"{name}: got {differing} in some backends, expected it in all or none"
            )
        if backend.keys() != shapes.keys():
            raise ValueError(
                f"{name}: got {', '.join(backend)}, expected {', '.join(shapes)}: all arrays of "
                f"prefill or none, and those that index_kpool and schedules ask for"
            )
        for field, tensor in backend.items():
            extent, expected = FIELDS[field].extent, shapes[field].shape
            # The rows of items one behind the other, however many each mode's items have.
            free = extent is Extent.PAGED_MQA_ITEMS and tensor.numel() == math.prod(expected)
            if tuple(tensor.shape) != expected and not free:
                raise ValueError(
                    f"{name}.{field}: got shape {tuple(tensor.shape)}, expected {expected}"
                )
            if extent is not Extent.TABLE and not tensor.is_contiguous():
                raise ValueError(
                    f"{name}.{field}: got strides {tensor.stride()}, expected a contiguous tensor"
                )
            if not tensor.numel():
                raise ValueError(
                    f"{name}.{field}: got shape {tuple(tensor.shape)}, expected at least one "
                    f"element"
                )
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


def _checked_backend(name: str, buffer: Any, device: torch.device | None) -> dict[str, Checked]:
    """The tensors of one backend by field name, all on one device, which may be given."""
    found: dict[str, Checked] = {}
    for field in FIELDS.values():
        tensor = field_of(buffer, field.name)
        if tensor is None and field.wanted is not None:
            continue
        dimensions = field.extent.dimensions
        one = checked(f"{name}.{field.name}", tensor, device=device, dimensions=dimensions)
        device = one.tensor.device
        found[field.name] = one
    return found


def _largest_spec(
    first: Mapping[str, torch.Tensor], num_backends: int, nsa_index_topk: int, real_page_size: int
) -> Spec:
    """What the tensors of the first backend, and of all like it, have room for."""
    name = "buffers[0]"
    tables = [field for field in first if FIELDS[field].extent is Extent.TABLE]
    if not tables:
        raise ValueError(f"{name}: got no tables, expected page_indices, real_page_table or both")
    has_real_table = "real_page_table" in first
    if has_real_table != (real_page_size > 1):
        got, expected = ("a tensor", "None") if has_real_table else ("None", "a tensor")
        raise ValueError(
            f"{name}.real_page_table: got {got}, expected {expected} as real_page_size is "
            f"{real_page_size}"
        )
    wide = "page_indices" in first
    max_len = (
        first["page_indices"].shape[1]
        if wide
        else first["real_page_table"].shape[1] * real_page_size
    )
    if not 1 <= max_len <= MAX_LEN:
        raise ValueError(f"{name}: got tables for {max_len} tokens, expected 1 to 2^30")
    requests, rows = len(first["cache_seqlens"]), len(first["seqlens_expanded"])
    keys = len(first["flat_page_indices"]) if "flat_page_indices" in first else None
    if keys is not None and keys > MAX_LEN:
        raise ValueError(f"{name}.flat_page_indices: got {keys} keys, expected at most 2^30")
    return Spec(
        rows=Rows(requests, rows, None, 0, prefill="token_to_request" in first),
        max_len=max_len,
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        wide_table=wide,
        tail="keep",
        num_backends=num_backends,
        max_total_keys=keys,
    )


_State = tuple[int, torch.Size, tuple[int, ...], torch.dtype, torch.device, int]


def _state(tensor: torch.Tensor) -> _State:
    """All that a launch depends on."""
    storage = tensor.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, end


def _described(state: _State) -> str:
    address, shape, strides, dtype, device, end = state
    return (
        f"{dtype} {tuple(shape)} of strides {strides} at {address:#x} on {device}, whose storage "
        f"ends at {end:#x}"
    )
