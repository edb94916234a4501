"""The C interface of the FFI library: its computations on any memory and stream, without JAX.

The structs mirror `ffi/metadata.h` and `ffi/tensors.h`, which document their fields.
"""

import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from jaxnsa import ffi
from jaxnsa.metadata import NSAMetadata

MAX_BACKENDS = 64
COPIED_ARRAYS = 7
TAILS = ("copy", "zero", "keep")
_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_address = ctypes.c_uint64


class Vector(ctypes.Structure):
    """int32 or int64 values."""

    _fields_ = (("data", _pointer), ("itemsize", _int32))


class Rows(ctypes.Structure):
    """How rows map to requests."""

    _fields_ = (
        ("requests", _int32),
        ("count", _int32),
        ("tokens_per_request", _int32),
        ("added_tokens", _int32),
        ("nsa_index_topk", _int32),
        ("seq_lens", Vector),
        ("extend_seq_lens", Vector),
    )


class Destination(ctypes.Structure):
    """The arrays of one backend; tables may be null."""

    _fields_ = tuple((field.name, _pointer) for field in dataclasses.fields(NSAMetadata))


class Fused(ctypes.Structure):
    """The whole job. Strides are in elements."""

    _fields_ = (
        ("rows", Rows),
        ("req_pool_indices", Vector),
        ("req_to_token", _pointer),
        ("pool_rows", _int64),
        ("pool_stride", _int64),
        ("page_indices_stride", _int64),
        ("real_page_table_stride", _int64),
        ("max_len", _int32),
        ("real_page_size", _int32),
        ("tail", _int32),
        ("num_backends", _int32),
        ("backends", Destination * MAX_BACKENDS),
    )


class CopiedArray(ctypes.Structure):
    """One array of a copy."""

    _fields_ = (
        ("source", _pointer),
        ("rows", _int64),
        ("columns", _int64),
        ("destination_stride", _int64),
        ("tokens", _int64),
    )


class Copy(ctypes.Structure):
    """Copies of arrays to every destination."""

    _fields_ = (
        ("arrays", CopiedArray * COPIED_ARRAYS),
        ("kv_lens", _pointer),
        ("num_backends", _int32),
        ("destinations", (_pointer * COPIED_ARRAYS) * MAX_BACKENDS),
    )


class DraftExtend(ctypes.Structure):
    """The lengths of a draft-extend step."""

    _fields_ = (
        ("rows", Rows),
        ("seqlens_expanded", _pointer),
        ("nsa_cache_seqlens", _pointer),
        ("total_tokens", _pointer),
        ("offsets", _pointer),
        ("tail", _int32),
    )


class ExchangeApi(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1.3: functions of a framework that has tensors."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", _pointer),
        ("allocate", _pointer),
        ("managed_from_object", _pointer),
        ("object_from_managed", _pointer),
        ("describe", _pointer),
        ("current_stream", _pointer),
    )


class Tensor(ctypes.Structure):
    """What a tensor is, of up to two dimensions."""

    _fields_ = (
        ("start", _address),
        ("device_type", _int32),
        ("device_id", _int32),
        ("int_bits", _int32),
        ("dimensions", _int32),
        ("shape", _int64 * 2),
        ("strides", _int64 * 2),
    )


class Span(ctypes.Structure):
    """Memory from one address to before another."""

    _fields_ = (("begin", _address), ("end", _address))


class Step(ctypes.Structure):
    """What is the same in all steps of an engine, and where the arguments of a launch go."""

    _fields_ = (
        ("describe", _pointer),
        ("current_stream", _pointer),
        ("num_tensors", _int64),
        ("objects", _pointer),
        ("expected", _pointer),
        ("num_spans", _int64),
        ("written", _pointer),
        ("min_columns", _int64),
        ("max_len", _int64),
        ("fused", _pointer),
    )

    @classmethod
    def of(
        cls,
        args: Fused,
        described: ctypes.Array[Tensor],
        written: Sequence[tuple[int, int]],
        api: ExchangeApi,
        *,
        unchanged: Sequence[Any] = (),
        min_columns: int = 1,
    ) -> "Step":
        """Prepares a step.

        Args:
          args: its launch, complete but for rows and inputs; `max_len` is the most columns of a
            table.
          described: its destinations.
          written: their memory, as addresses in order and apart.
          api: of the framework whose tensors they are.
          unchanged: the tensors of `described`, if each step is to see that they still are.
          min_columns: of `req_to_token`.
        """
        held = objects(unchanged)
        spans = (Span * len(written))(*itertools.starmap(Span, written))
        step = cls(
            describe=api.describe,
            current_stream=api.current_stream,
            num_tensors=len(unchanged),
            objects=ctypes.addressof(held),
            expected=ctypes.addressof(described),
            num_spans=len(written),
            written=ctypes.addressof(spans),
            min_columns=min_columns,
            max_len=args.max_len,
            fused=ctypes.addressof(args),
        )
        step._alive = (unchanged, held, described, spans, args)
        return step


_STRUCTS = {
    "fused": Fused,
    "copy": Copy,
    "draft_extend": DraftExtend,
    "tensor": Tensor,
    "step": Step,
}


class Library:
    """The functions of one library; they raise RuntimeError where a launch fails."""

    def __init__(self, library: ctypes.CDLL):
        for name, struct in _STRUCTS.items():
            size = getattr(library, f"jaxnsa_size_of_{name}", int)()
            if size != ctypes.sizeof(struct):
                raise RuntimeError(
                    f"{library._name} was built from other sources: its {struct.__name__} has "
                    f"{size} bytes, expected {ctypes.sizeof(struct)}; reinstall jaxnsa"
                )
        # These call into Python's C API: they keep the GIL and raise what is raised there.
        holding_gil = ctypes.PyDLL(library._name, handle=library._handle)
        self._describe_tensors = holding_gil.jaxnsa_describe_tensors
        self._describe_tensors.restype = ctypes.c_bool
        self._describe_tensors.argtypes = (_pointer, _int64, _pointer, _pointer)
        self._step = holding_gil.jaxnsa_direct_step
        self._step.restype = ctypes.c_char_p
        self._step.argtypes = (ctypes.POINTER(Step), ctypes.POINTER(Rows), *[_pointer] * 4)
        self._load = library.jaxnsa_direct_load
        self._fused_metadata = library.jaxnsa_direct_fused_metadata
        self._copy_metadata = library.jaxnsa_direct_copy_metadata
        self._fill_draft_extend = library.jaxnsa_direct_fill_draft_extend
        self._fused_metadata.argtypes = (_pointer, ctypes.POINTER(Fused))
        self._copy_metadata.argtypes = (_pointer, ctypes.POINTER(Copy))
        self._fill_draft_extend.argtypes = (_pointer, _int32, ctypes.POINTER(DraftExtend))
        for function in (
            self._load,
            self._fused_metadata,
            self._copy_metadata,
            self._fill_draft_extend,
        ):
            function.restype = ctypes.c_char_p

    def describe_tensors(
        self, api: ExchangeApi, tensors: Sequence[Any]
    ) -> ctypes.Array[Tensor] | None:
        """What the tensors are; None where one has more than two dimensions, or is no tensor."""
        described = (Tensor * len(tensors))()
        try:
            known = self._describe_tensors(api.describe, len(tensors), objects(tensors), described)
        except Exception:  # of the framework, about what it cannot describe
            return None
        return described if known else None

    def launch_step(
        self,
        step: Step,
        rows: Rows,
        seq_lens: Any,
        req_pool_indices: Any,
        req_to_token: Any,
        extend_seq_lens: Any | None,
    ) -> bool:
        """Takes tensors, and queues a step on their producer's current stream; at once on the CPU.

        Returns:
          Whether it did; False, with nothing done, where something is not as it should be.
        """
        try:
            error = self._step(
                step,
                rows,
                id(seq_lens),
                id(req_pool_indices),
                id(req_to_token),
                None if extend_seq_lens is None else id(extend_seq_lens),
            )
        except Exception:  # of the framework, about what it cannot describe
            return False
        if error == b"":  # kDeclined
            return False
        _raise(error)
        return True

    def load(self) -> None:
        """Loads every kernel on the current CUDA device, so that no later call does."""
        _raise(self._load())

    def fused_metadata(self, stream: int, args: Fused) -> None:
        """The whole job, queued on a CUDA stream; at once on the CPU."""
        _raise(self._fused_metadata(stream, args))

    def copy_metadata(self, stream: int, args: Copy) -> None:
        """Copies, queued on a CUDA stream; at once on the CPU."""
        _raise(self._copy_metadata(stream, args))

    def fill_draft_extend(self, stream: int, variant: str, args: DraftExtend) -> None:
        """The lengths of a draft-extend step, queued on a CUDA stream; at once on the CPU."""
        number = list(ffi.VARIANTS["fill_draft_extend_metadata"]).index(variant)
        _raise(self._fill_draft_extend(stream, number, args))


def objects(values: Sequence[Any]) -> ctypes.Array:
    """Python objects as C functions take them; somebody else keeps them alive."""
    return (_pointer * len(values))(*map(id, values))


def unavailable(platform: str) -> str | None:
    """Why there is no library for "cpu" or "gpu"; None where there is one."""
    try:
        library(platform)
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def library(platform: str) -> Library:
    """The library for "cpu" or "gpu".

    Raises:
      RuntimeError: it was not built, or cannot be loaded; the message says what to do.
    """
    loaded = ffi.load(platform)
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return Library(loaded)


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
