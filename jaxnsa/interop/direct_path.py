"""One kernel of the FFI library on PyTorch's current stream, without JAX."""

from collections.abc import Sequence

import torch

from jaxnsa import direct
from jaxnsa.interop.registration import Registered
from jaxnsa.interop.tensors import Checked, platform_of
from jaxnsa.spec import Rows


class DirectPath:
    """Fills registered tensors; everything but the step's own arguments is prepared once."""

    def __init__(self, registered: Registered):
        spec = registered.spec
        self._device = registered.device
        self._library = direct.library(platform_of(self._device))
        self._max_len = spec.max_len
        on_device(self._device, self._library.load)
        args = direct.Fused()
        args.rows.nsa_index_topk = spec.nsa_index_topk
        args.real_page_size = spec.real_page_size
        args.tail = direct.TAILS.index(spec.tail)
        set_backends(args, registered.backends)
        self._args = args
        self._rows = args.rows
        self._seq_lens = args.rows.seq_lens
        self._extend_seq_lens = args.rows.extend_seq_lens
        self._req_pool_indices = args.req_pool_indices

    def run(
        self,
        rows: Rows,
        seq_lens: Checked,
        req_pool_indices: Checked,
        req_to_token: Checked,
        extend_seq_lens: Checked | None,
    ) -> None:
        """Queues the kernel."""
        args, fields = self._args, self._rows
        fields.requests = rows.requests
        fields.count = rows.count
        fields.tokens_per_request = rows.tokens_per_request or 0
        fields.added_tokens = rows.added_tokens
        set_vector(self._seq_lens, seq_lens)
        set_vector(self._req_pool_indices, req_pool_indices)
        if extend_seq_lens is not None:
            set_vector(self._extend_seq_lens, extend_seq_lens)
        args.req_to_token = req_to_token.start
        args.pool_rows, pool_cols = req_to_token.tensor.shape
        args.pool_stride = req_to_token.tensor.stride(0)
        args.max_len = min(self._max_len, pool_cols)
        on_device(self._device, self._launch)

    def _launch(self) -> None:
        self._library.fused_metadata(stream_of(self._device), self._args)


def set_backends(args: direct.Fused, backends: Sequence[dict[str, torch.Tensor]]) -> None:
    """Lets a launch fill these tensors, whose tables have rows equally far apart."""
    args.num_backends = len(backends)
    for destination, backend in zip(args.backends, backends, strict=False):
        for field, tensor in backend.items():
            setattr(destination, field, tensor.data_ptr())
            if tensor.dim() == 2:
                setattr(args, f"{field}_stride", tensor.stride(0))


def set_vector(field: direct.Vector, value: Checked) -> None:
    """Lets a field of a struct be a vector of lengths or indices."""
    field.data = value.start
    field.is_wide = value.tensor.dtype is torch.int64


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    # torch.cuda.current_stream(device).cuda_stream, without an object in between
    return torch._C._cuda_getCurrentRawStream(device.index)


def on_device(device: torch.device, call) -> None:
    """Calls with `device` as the current CUDA device, which a launch on its streams needs."""
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        call()
    else:
        with torch.cuda.device(device):
            call()
