"""What the interop functions ask of tensors."""

import ctypes
import functools
from typing import NamedTuple

import torch

from jaxnsa import direct


def platform_of(device: torch.device) -> str:
    """The FFI library that a device takes: "cpu" or "gpu".

    Raises:
      ValueError: there is none.
    """
    if device.type == "cuda":
        return "gpu"
    if device.type == "cpu":
        return "cpu"
    raise ValueError(f"got tensors on {device}, expected a CUDA device or the CPU")


class Checked(NamedTuple):
    """A checked tensor and the memory that it spans, as addresses."""

    tensor: torch.Tensor
    start: int
    end: int


def checked_vector(
    name: str, value: torch.Tensor, device: torch.device, length: int | None
) -> Checked:
    """`value`, which must be a contiguous int32 or int64 vector on a device."""
    _check_tensor(name, value, device)
    dtype = value.dtype
    if dtype is not torch.int32 and dtype is not torch.int64:
        raise TypeError(f"{name}: got {dtype}, expected torch.int32 or torch.int64")
    shape = value.shape
    if len(shape) != 1 or (length is not None and shape[0] != length):
        expected = "one dimension" if length is None else f"({length},)"
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected {expected}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: got stride {value.stride(0)}, expected a contiguous vector")
    start = value.data_ptr()
    if shape[0] and not start:
        raise ValueError(f"{name}: got a tensor whose memory was freed")
    return Checked(value, start, start + shape[0] * (4 if dtype is torch.int32 else 8))


def checked_pool(value: torch.Tensor, device: torch.device) -> Checked:
    """`req_to_token`, which must be an int32 matrix on a device; its rows may be apart."""
    name = "req_to_token"
    _check_tensor(name, value, device)
    if value.dtype is not torch.int32:
        raise TypeError(f"{name}: got {value.dtype}, expected torch.int32")
    shape = value.shape
    if len(shape) != 2 or not shape[0] or not shape[1]:
        raise ValueError(
            f"{name}: got shape {tuple(shape)}, expected [pool_rows, pool_cols], not empty"
        )
    pitch = check_rows(name, value)
    start = value.data_ptr()
    if not start:
        raise ValueError(f"{name}: got a tensor whose memory was freed")
    return Checked(value, start, start + 4 * ((shape[0] - 1) * pitch + shape[1]))


def check_rows(name: str, value: torch.Tensor) -> int:
    """The elements from row to row of a matrix, whose rows must be contiguous and apart."""
    rows, columns = value.shape
    pitch, step = value.stride()
    if (step != 1 and columns > 1) or (pitch < columns and rows > 1):
        raise ValueError(
            f"{name}: got strides {value.stride()}, expected rows that are contiguous and do not "
            f"overlap"
        )
    return pitch


def extent(value: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one past its last element."""
    if not value.numel():
        return value.data_ptr(), value.data_ptr()
    strides = zip(value.shape, value.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def _check_tensor(name: str, value: torch.Tensor, device: torch.device) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}")


@functools.cache
def exchange_api() -> direct.ExchangeApi | None:
    """Functions of PyTorch for callers in C; None before PyTorch 2.10."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    api = direct.ExchangeApi.from_address(get_pointer(capsule, b"dlpack_exchange_api"))
    return api if api.major == 1 else None
