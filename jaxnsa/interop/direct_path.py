"""Registered tensors filled by one kernel of the native library on PyTorch's current stream."""

import dataclasses
import functools
import types
from collections.abc import Callable

import torch

from jaxnsa.constant_schedules import flash_mla_constants
from jaxnsa.implementations.native_library import NativeLibrary, NativeRows
from jaxnsa.interop.held_rows import HeldRows
from jaxnsa.interop.launches import (
    launch_checked,
    library_for,
    native_rows,
    on_device,
    prepared,
    report_declined,
)
from jaxnsa.interop.registration import Registered
from jaxnsa.interop.tensor_checks import Checked, exchange_api
from jaxnsa.metadata import ForwardMode
from jaxnsa.spec import INT32_MAX, MAX_LEN, Rows

_REMEMBERED = frozenset((int, types.NoneType))
"""Types of arguments whose values cannot change from step to step."""


class DirectPath:
    """Fills registered tensors; everything but the step's own arguments is prepared once."""

    def __init__(self, registered: Registered, held: HeldRows):
        native = library_for(registered.device)
        if len(registered.backends) > native.max_backends:
            raise ValueError(
                f"buffers: got {len(registered.backends)} backends, expected at most "
                f'{native.max_backends} as the path is "direct"'
            )
        on_device(registered.device, native.load_kernels)
        self._native = native
        self._registered = registered
        self._launch = prepared(native, registered.spec, registered.backends)
        self._constants: dict[int, torch.Tensor] = {}
        flash_mla = registered.spec.schedules.flash_mla
        self._has_constants = flash_mla is not None and flash_mla.is_constant
        if self._has_constants:
            self._hold_constants(registered.spec.rows.count)
        self._launch.track(held.rows.data_ptr(), len(held.rows))
        self._looks_at_tensors = False
        if api := exchange_api():
            self._looks_at_tensors = True
            self._launch.watch(
                api,
                [tensor for _, tensor in registered.named()],
                unchanged=True,
                written=registered.memory.spans,
                min_columns=1,
            )

        self._rows_of = functools.partial(_rows_of, native, registered)
        # The same few batches come again and again.
        self._remembered_rows = functools.lru_cache(4096)(self._rows_of)

    def _hold_constants(self, count: int) -> None:
        """Lets launches of so many rows copy FlashMLA's arrays, where those are constants.

        Nothing is computed while a CUDA graph is captured, which could not hold it: launches of
        numbers of rows that come first then compute the arrays by themselves.
        """
        if count in self._constants or self._is_capturing():
            return
        rows = dataclasses.replace(self._registered.spec.rows, count=count)
        constants = flash_mla_constants(dataclasses.replace(self._registered.spec, rows=rows))
        assert constants is not None
        held = torch.from_numpy(constants).to(self._registered.device)
        self._constants[count] = held
        self._launch.hold_flash_mla(count, held.data_ptr())

    def _is_capturing(self) -> bool:
        on_cuda = self._registered.device.type == "cuda"
        return on_cuda and torch.cuda.is_current_stream_capturing()

    def try_run(
        self,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        extend_seq_lens: torch.Tensor | None,
        mode: ForwardMode,
        num_draft_tokens: int | None,
        max_total_tokens: int | None,
        written_lens: torch.Tensor | None,
        max_new_tokens: int | None,
        request_ids: torch.Tensor | None,
    ) -> bool:
        """Queues the kernel if the library itself finds a step's arguments as they should be.

        Returns:
          Whether it did; if not, checks in Python are to find what is wrong, and say so.
        """
        if (
            not self._looks_at_tensors
            or not isinstance(seq_lens, torch.Tensor)
            or not isinstance(mode, ForwardMode)
            or seq_lens.dim() != 1
            or (request_ids is not None and written_lens is not None)
        ):
            return False
        most = MAX_LEN
        if max_new_tokens is not None:
            if type(max_new_tokens) is not int or not 0 <= max_new_tokens <= INT32_MAX:
                return False
            if written_lens is None and request_ids is None:
                return False
            most = min(max_new_tokens, MAX_LEN)
        rows_of: Callable[..., tuple[NativeRows, int]] = self._remembered_rows
        if type(num_draft_tokens) not in _REMEMBERED or type(max_total_tokens) not in _REMEMBERED:
            rows_of = self._rows_of
        rows, count = rows_of(seq_lens.shape[0], mode, num_draft_tokens, max_total_tokens)
        if self._has_constants:
            self._hold_constants(count)
        inputs = (seq_lens, req_pool_indices, req_to_token, extend_seq_lens)
        return self._launch.try_launch(rows, *inputs, written_lens, most, request_ids)

    def run(
        self,
        rows: Rows,
        seq_lens: Checked,
        req_pool_indices: Checked,
        req_to_token: Checked,
        extend_seq_lens: Checked | None,
        written_lens: Checked | None,
        max_new_tokens: int,
        request_ids: Checked | None,
    ) -> None:
        """Queues the kernel with a step's arguments, which were checked."""
        if self._has_constants:
            self._hold_constants(rows.count)
        inputs = (seq_lens, req_pool_indices, req_to_token, extend_seq_lens)
        launch_checked(
            self._launch,
            native_rows(self._native, rows),
            *inputs,
            written_lens,
            max_new_tokens,
            request_ids,
        )
        if self._looks_at_tensors:
            report_declined(self._launch.declined)


def _rows_of(
    native: NativeLibrary,
    registered: Registered,
    bs: int,
    mode: ForwardMode,
    num_draft_tokens: int | None,
    max_total_tokens: int | None,
) -> tuple[NativeRows, int]:
    """A step's rows as the library takes them, and how many they are."""
    rows = registered.rows(bs, mode, num_draft_tokens, max_total_tokens)
    return native_rows(native, rows), rows.count
