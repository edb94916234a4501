"""What the interop functions ask of tensors: the one check of each, with a message of its own.

Each error names the tensor, what came, and what was expected.
"""

import bisect
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

LENGTHS = (torch.int32, torch.int64)
INT32 = (torch.int32,)


class Checked(NamedTuple):
    """A checked tensor and the memory that it is used for.

    Attributes:
      name: what the caller calls it.
      tensor: itself.
      shape: as much of it as is used.
      start: the address of its first byte.
      end: the address past the last one that is used.
    """

    name: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def vector(self) -> tuple[int, int]:
        """A vector as the native library takes it."""
        return self.start, self.tensor.itemsize

    @property
    def pool(self) -> tuple[int, int, int, int]:
        """`req_to_token` as the native library takes it."""
        rows, columns = self.tensor.shape
        return self.start, rows, self.tensor.stride(0), columns


def checked(
    name: str,
    value: Any,
    *,
    device: torch.device | None,
    dtypes: tuple[torch.dtype, ...] = INT32,
    dimensions: int = 1,
    shape: tuple[int, ...] | None = None,
    at_least: tuple[int, ...] | None = None,
) -> Checked:
    """`value`, a vector that is contiguous or a matrix whose rows are and lie apart.

    Args:
      name: what the caller calls it.
      value: what came.
      device: where it must be; None: anywhere that the interop functions work.
      dtypes: those that it may have.
      dimensions: 1 or 2.
      shape: what it must have, if that is known.
      at_least: the smallest shape that it may have, and as much of it as is used.

    Raises:
      TypeError: it is no tensor, or of another dtype or layout.
      ValueError: it is elsewhere, of another shape or stride, or its memory was freed.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if device is None:
        if value.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"{name}: got a tensor on {value.device}, expected a CUDA device or the CPU"
            )
    elif value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {value.layout}, expected torch.strided")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got {value.dtype}, expected {' or '.join(map(str, dtypes))}")
    got = tuple(value.shape)
    if len(got) != dimensions:
        wanted = "one dimension" if dimensions == 1 else "two dimensions"
        raise ValueError(f"{name}: got shape {got}, expected {shape or at_least or wanted}")
    if shape is not None and got != shape:
        raise ValueError(f"{name}: got shape {got}, expected {shape}")
    if at_least is not None and any(map(operator.lt, got, at_least)):
        raise ValueError(f"{name}: got shape {got}, expected at least {at_least}")
    used = got if at_least is None else at_least
    span = used[-1] if 0 not in used else 0
    if dimensions == 2:
        (rows, columns), (stride, step) = got, value.stride()
        # NumPy's strides are 0 where there is no element.
        if 0 not in got and ((step != 1 and columns > 1) or (stride < columns and rows > 1)):
            raise ValueError(
                f"{name}: got strides {value.stride()}, expected rows that are contiguous and do "
                f"not overlap"
            )
        span += (used[0] - 1) * stride if span else 0
    elif not value.is_contiguous():
        raise ValueError(f"{name}: got stride {value.stride(0)}, expected a contiguous vector")
    start = value.data_ptr()
    size = span * value.itemsize
    held = value.untyped_storage().nbytes() - value.storage_offset() * value.itemsize
    if size and (not start or held < size):
        raise ValueError(
            f"{name}: got a tensor whose memory was freed, expected one that has its memory"
        )
    return Checked(name, value, used, start, start + size)


def checked_vector(name: str, value: Any, device: torch.device | None, bs: int | None) -> Checked:
    """`value`, which must be an int32 or int64 vector, of `bs` elements if that is given."""
    shape = None if bs is None else (bs,)
    return checked(name, value, device=device, dtypes=LENGTHS, shape=shape)


def checked_pool(value: Any, device: torch.device) -> Checked:
    """`req_to_token`, which must be an int32 matrix that is not empty; its rows may be apart."""
    pool = checked("req_to_token", value, device=device, dimensions=2)
    if 0 in pool.shape:
        raise ValueError(
            f"req_to_token: got shape {pool.shape}, expected at least one row and column"
        )
    return pool


class WrittenMemory:
    """The memory that a launch writes, which no two of its tensors share and no input touches.

    Attributes:
      tensors: those that are written.
      spans: addresses, in order and apart.
    """

    def __init__(self, tensors: Iterable[Checked]):
        """Raises ValueError where two of the tensors share memory."""
        self._ordered = sorted(tensors, key=lambda checked: (checked.start, checked.end))
        for k, one in enumerate(self._ordered):
            for other in self._ordered[k + 1 :]:
                if other.start >= one.end:
                    break
                if not _interleaved(one, other):
                    raise ValueError(
                        f"{other.name}: got memory that {one.name} uses too, expected its own"
                    )
        self.tensors = [checked.tensor for checked in self._ordered]
        self.spans: list[tuple[int, int]] = []
        for checked in self._ordered:
            if self.spans and checked.start <= self.spans[-1][1]:
                start, end = self.spans.pop()
                self.spans.append((start, max(end, checked.end)))
            else:
                self.spans.append((checked.start, checked.end))

    def check_apart(self, read: Sequence[Checked]) -> None:
        """Raises ValueError where an input touches the memory."""
        for value in read:
            k = bisect.bisect_right(self.spans, value.start, key=operator.itemgetter(1))
            if value.start < value.end and k < len(self.spans) and self.spans[k][0] < value.end:
                writer = next(
                    o for o in self._ordered if o.start < value.end and value.start < o.end
                )
                raise ValueError(
                    f"{value.name}: got memory within that of {writer.name}, which is written; "
                    f"expected its own"
                )


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError where a tensor, of any strides, lies outside its storage."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    if tensor.untyped_storage().nbytes() < (last + 1) * tensor.itemsize:
        raise ValueError(
            f"{name}: got a tensor whose memory was freed, expected one that has its memory"
        )


def check_for_jax(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError where JAX does not take a tensor by DLPack."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, expected a contiguous tensor: JAX takes no "
            f"other by DLPack"
        )
    if tensor.device.type == "cuda" and tensor.data_ptr() % 16:
        raise ValueError(
            f"{name}: got memory at {tensor.data_ptr():#x}, expected a multiple of 16: JAX takes "
            f"no other on a GPU"
        )


def platform_of(device: torch.device) -> str:
    """The native library that tensors on a device take: "cpu" or "gpu"."""
    return "gpu" if device.type == "cuda" else "cpu"


@functools.cache
def exchange_api() -> Any | None:
    """DLPack's C exchange API of PyTorch, a capsule; None before PyTorch 2.10."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def handles_of() -> Callable[[list[torch.Tensor]], list[Any]] | None:
    """Makes AtenTensorHandles of LibTorch's C ABI, in capsules; who asks for them deletes them.

    None where this PyTorch has none: the ABI is documented, how Python gets at it is not.
    """
    interface = getattr(torch._C, "_aoti", None)
    return getattr(interface, "unsafe_alloc_void_ptrs_from_tensors", None)


def _interleaved(a: Checked, b: Checked) -> bool:
    """Whether two matrices are column ranges of one wider matrix, side by side."""
    if len(a.shape) != 2 or len(b.shape) != 2:
        return False
    stride = a.tensor.stride(0)
    if not stride or b.tensor.stride(0) != stride:
        return False
    gap = (b.start - a.start) // a.tensor.itemsize % stride
    return a.shape[1] <= gap and gap + b.shape[1] <= stride
