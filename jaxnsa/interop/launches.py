"""Launches of the native library for PyTorch: its current stream, and tensors as arguments."""

import collections
import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from jaxnsa.implementations.native_library import (
    NativeLibrary,
    NativeRows,
    PreparedLaunch,
    library,
    schedule_arguments,
)
from jaxnsa.interop.tensor_checks import Checked, platform_of
from jaxnsa.metadata import FIELDS, Extent
from jaxnsa.spec import MAX_LEN, Rows, Spec

declined: collections.Counter[str] = collections.Counter()
"""How often the library declined to launch for tensors that Python finds nothing wrong with: each
time costs Python's checks. By reason; `report_declined` counts."""

_logger = logging.getLogger("jaxnsa")


def report_declined(reason: str) -> None:
    """Counts a launch that was declined for no good reason, and logs the first of each reason."""
    declined[reason] += 1
    if declined[reason] == 1:
        _logger.warning(
            "updates take some microseconds more, as Python checks the tensors: %s", reason
        )


def library_for(device: torch.device) -> NativeLibrary:
    """The native library for a device; RuntimeError where there is none."""
    return library(platform_of(device))


def native_rows(native: NativeLibrary, rows: Rows) -> NativeRows:
    """Rows as the library takes them."""
    return native.Rows(
        rows.requests, rows.count, rows.rows_per_request or 0, rows.added_tokens, rows.prefill
    )


def prepared(
    native: NativeLibrary,
    spec: Spec,
    backends: Sequence[Mapping[str, torch.Tensor]],
    *,
    requests_are_items: bool = False,
) -> PreparedLaunch:
    """A launch of `spec` that fills these tensors, whose tables have equal strides.

    Fields that a backend has no tensor for are left out. With `requests_are_items`, consumers
    read a request's rows as one: all have the live columns, and the context length, of the last.
    """
    tables = [field for field in spec.fields(Extent.TABLE) if field.name in backends[0]]
    return native.PreparedLaunch(
        [
            {name: tensor.data_ptr() for name, tensor in backend.items() if name in FIELDS}
            for backend in backends
        ],
        strides={field.name: backends[0][field.name].stride(0) for field in tables},
        tokens_per_column={field.name: spec.tokens_per_column(field) for field in tables},
        slots_per_page={field.name: spec.slots_per_page(field) for field in tables},
        max_len=spec.max_len,
        max_total_keys=spec.max_total_keys or 0,
        nsa_index_topk=spec.nsa_index_topk,
        index_kpool=spec.index_kpool,
        **schedule_arguments(spec.schedules),
        tail=spec.tail,
        requests_are_items=requests_are_items,
        backend_offsets=spec.backend_offsets or (0,) * len(backends),
    )


def launch_checked(
    launch: PreparedLaunch,
    rows: NativeRows,
    seq_lens: Checked,
    req_pool_indices: Checked,
    req_to_token: Checked,
    extend_seq_lens: Checked | None,
    written_lens: Checked | None = None,
    max_new_tokens: int = MAX_LEN,
    request_ids: Checked | None = None,
) -> None:
    """Launches with inputs that were checked, on PyTorch's current stream."""
    device = seq_lens.tensor.device
    on_device(
        device,
        lambda: launch.launch(
            stream_of(device),
            rows,
            seq_lens.vector,
            req_pool_indices.vector,
            req_to_token.pool,
            None if extend_seq_lens is None else extend_seq_lens.vector,
            None if written_lens is None else written_lens.vector,
            max_new_tokens,
            None if request_ids is None else request_ids.vector,
        ),
    )


def on_device(device: torch.device, call: Callable[[], None]) -> None:
    """Calls with `device` as the current CUDA device, which a launch on its streams needs."""
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        call()
    else:
        with torch.cuda.device(device):
            call()


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
