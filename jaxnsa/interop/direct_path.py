"""One kernel of the FFI library on PyTorch's current stream, without JAX."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from jaxnsa import direct
from jaxnsa.interop.registration import Registered
from jaxnsa.interop.tensors import Checked, exchange_api, platform_of
from jaxnsa.spec import Rows


class DirectPath:
    """Fills registered tensors; everything but the step's own arguments is prepared once."""

    def __init__(self, registered: Registered):
        spec = registered.spec
        self._device = registered.device
        self._library = direct.library(platform_of(self._device))
        self._max_len = spec.max_len
        self._topk = spec.nsa_index_topk
        on_device(self._device, self._library.load)
        self._args = args = direct.Fused()
        args.max_len = spec.max_len
        args.real_page_size = spec.real_page_size
        args.tail = direct.TAILS.index(spec.tail)
        set_backends(args, registered.backends)

        self._step = None
        if api := exchange_api():
            tensors = [tensor for _, tensor in registered.named()]
            if described := self._library.describe_tensors(api, tensors):
                self._step = direct.Step.of(
                    args, described, registered.spans, api, unchanged=tensors
                )

        # The same few batches come again and again.
        @functools.lru_cache(maxsize=4096, typed=True)
        def rows_of(bs: int, *mode: Any) -> direct.Rows:
            return rows_struct(registered.rows(bs, *mode), self._topk)

        self._rows_of = rows_of

    def refresh(
        self,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        extend_seq_lens: torch.Tensor | None,
        *mode: Any,
    ) -> bool:
        """Queues the kernel if the library itself finds a step's arguments as they should be.

        If not, nothing is queued: checks in Python then find what is wrong, and say so.

        Args:
          seq_lens, req_pool_indices, req_to_token, extend_seq_lens: unchecked.
          *mode: the other arguments of `Registered.rows`, unchecked.
        """
        if self._step is None:
            return False
        try:
            rows = self._rows_of(seq_lens.shape[0], *mode)
        except Exception:
            return False
        return self._library.launch_step(
            self._step, rows, seq_lens, req_pool_indices, req_to_token, extend_seq_lens
        )

    def run(
        self,
        rows: Rows,
        seq_lens: Checked,
        req_pool_indices: Checked,
        req_to_token: Checked,
        extend_seq_lens: Checked | None,
    ) -> None:
        """Takes a step's arguments and queues the kernel."""
        args = self._args
        args.rows = rows_struct(rows, self._topk)
        set_inputs(args, seq_lens, req_pool_indices, req_to_token)
        args.max_len = min(self._max_len, req_to_token.tensor.shape[1])
        if extend_seq_lens is not None:
            set_vector(args.rows.extend_seq_lens, extend_seq_lens)
        on_device(self._device, self._launch)

    def _launch(self) -> None:
        self._library.fused_metadata(stream_of(self._device), self._args)


def rows_struct(rows: Rows, nsa_index_topk: int) -> direct.Rows:
    """Rows as the library takes them, without lengths."""
    return direct.Rows(
        rows.requests, rows.count, rows.tokens_per_request or 0, rows.added_tokens, nsa_index_topk
    )


def set_backends(args: direct.Fused, backends: Sequence[dict[str, torch.Tensor]]) -> None:
    """Lets a launch fill these tensors, whose tables have rows equally far apart."""
    args.num_backends = len(backends)
    for destination, backend in zip(args.backends, backends, strict=False):
        for field, tensor in backend.items():
            setattr(destination, field, tensor.data_ptr())
            if tensor.dim() == 2:
                setattr(args, f"{field}_stride", tensor.stride(0))


def set_inputs(
    args: direct.Fused, seq_lens: Checked, req_pool_indices: Checked, req_to_token: Checked
) -> None:
    """Lets a launch read these tensors."""
    set_vector(args.rows.seq_lens, seq_lens)
    set_vector(args.req_pool_indices, req_pool_indices)
    args.req_to_token = req_to_token.start
    args.pool_rows = req_to_token.tensor.shape[0]
    args.pool_stride = req_to_token.tensor.stride(0)


def set_vector(field: direct.Vector, value: Checked) -> None:
    """Lets a field of a struct be a vector of lengths or indices."""
    field.data = value.start
    field.itemsize = value.tensor.itemsize


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(device: torch.device, call) -> None:
    """Calls with `device` as the current CUDA device, which a launch on its streams needs."""
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        call()
    else:
        with torch.cuda.device(device):
            call()
