"""Registered tensors filled by one kernel of the native library on PyTorch's current stream."""

import dataclasses
import functools
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
from jaxnsa.interop.tensor_checks import Checked, exchange_api, handles_of
from jaxnsa.metadata import ForwardMode
from jaxnsa.spec import Rows


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
        self._launch = prepared(native, registered.spec, registered.backends)
        self._constants = _Constants(registered)
        self._hold_constants(registered.spec.rows.count)
        self._launch.track(held.rows.data_ptr(), len(held.rows))
        self._looks_at_tensors = False
        if api := exchange_api():
            self._looks_at_tensors = True
            self._launch.watch(
                api,
                registered.memory.tensors[0],
                registered=[tensor for _, tensor in registered.named()],
                handles_of=handles_of(),
                written=registered.memory.spans,
                min_columns=1,
            )
        self._launch.ask_for_rows(
            functools.partial(_rows_of_step, native, registered, self._constants)
        )
        self.try_step: Callable[..., bool] = self._launch.try_step
        """Queues the kernel if the library itself finds a step's arguments as they should be, which
        it takes in the order of `BackendBuffers.update`'s; whether it did. If not, checks in Python
        are to find what is wrong, and say so."""

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

    def report_declined(self) -> None:
        """Reports why `try_step` did not queue a step in which nothing was wrong."""
        if self._looks_at_tensors:
            report_declined(self._launch.declined)

    def _hold_constants(self, count: int) -> None:
        """Lets launches of so many rows copy FlashMLA's arrays, where those are constants."""
        if address := self._constants.address(count):
            self._launch.hold_flash_mla(count, address)


class _Constants:
    """FlashMLA's arrays for numbers of rows, where its schedule is constant.

    None are computed while a CUDA graph is captured, which could not hold them: launches of numbers
    of rows that come first then compute the arrays by themselves.
    """

    def __init__(self, registered: Registered):
        flash_mla = registered.spec.schedules.flash_mla
        self.there_are = flash_mla is not None and flash_mla.is_constant
        self._registered = registered
        self._tensors: dict[int, torch.Tensor] = {}

    def address(self, count: int) -> int:
        """Of both arrays, one behind the other; 0 where they cannot be had."""
        if not self.there_are:
            return 0
        if count not in self._tensors:
            if _is_capturing(self._registered.device):
                return 0
            rows = dataclasses.replace(self._registered.spec.rows, count=count)
            constants = flash_mla_constants(dataclasses.replace(self._registered.spec, rows=rows))
            assert constants is not None
            self._tensors[count] = torch.from_numpy(constants).to(self._registered.device)
        return self._tensors[count].data_ptr()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _rows_of_step(
    native: NativeLibrary,
    registered: Registered,
    constants: _Constants,
    bs: int,
    mode: ForwardMode,
    num_draft_tokens: int | None,
    max_total_tokens: int | None,
) -> tuple[NativeRows, int, bool]:
    """What `PreparedLaunch.ask_for_rows` takes."""
    rows = registered.rows(bs, mode, num_draft_tokens, max_total_tokens)
    address = constants.address(rows.count)
    return native_rows(native, rows), address, bool(address) or not constants.there_are
