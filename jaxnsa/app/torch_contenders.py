"""The contenders of the demo that PyTorch runs, on the device of JAX."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from jaxnsa.app.contenders import TOPK, Contender, expected, modes
from jaxnsa.app.serving import PAGE_SIZE, Inputs
from jaxnsa.implementations import native_library
from jaxnsa.interop.torch import BackendBuffers
from jaxnsa.metadata import ForwardMode, NSAMetadata


def contenders(num_backends: int, inputs: Inputs) -> list[Contender]:
    """PyTorch's, where it has the device of JAX."""
    platform = jax.default_backend()
    if platform == "gpu" and not torch.cuda.is_available():
        return []
    device = "cuda" if platform == "gpu" else "cpu"
    fills: list[tuple[str, bool, Callable]] = [("PyTorch eager x N", False, _eager)]
    is_built = native_library.unavailable(platform) is None
    if is_built and num_backends <= native_library.library(platform).max_backends:
        fills.insert(0, ("jaxnsa in PyTorch", True, _direct))
    return [
        _Tensors(name, in_place, make, num_backends, inputs, device)
        for name, in_place, make in fills
    ]


class _Tensors:
    """A contender that fills tensors."""

    incremental = False

    def __init__(
        self,
        name: str,
        in_place: bool,
        make: Callable,
        num_backends: int,
        inputs: Inputs,
        device: str,
    ):
        self.name = name
        self.in_place = in_place
        self._device = device
        self._num_backends = num_backends
        wanted = expected(inputs, num_backends, None)
        times = (num_backends, 1, 1)
        self._backends = [
            [
                {
                    field: torch.zeros(array.shape, dtype=torch.int32, device=device)
                    for field, array in metadata.arrays().items()
                }
                for _ in range(count)
            ]
            for metadata, count in zip(wanted, times, strict=True)
        ]
        self._fills = [make(backends) for backends in self._backends]

    def given(self, inputs: Inputs) -> list[tuple[ForwardMode, dict[str, Any]]]:
        """The arguments of each mode, on PyTorch's device."""
        tensors: Any = [torch.tensor(np.asarray(a), device=self._device) for a in inputs]
        return list(modes(Inputs(*tensors), self._num_backends))

    def run(self, given: list[tuple[ForwardMode, dict[str, Any]]]) -> None:
        """Fills the tensors of all modes."""
        for fill, (mode, arguments) in zip(self._fills, given, strict=True):
            fill(mode, **arguments)

    def wait(self, result: None) -> None:
        """Waits for the device."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def metadata(self) -> list[NSAMetadata]:
        """The tensors on the host."""
        return [
            NSAMetadata(**{field: tensor.cpu().numpy() for field, tensor in backend.items()})
            for backends in self._backends
            for backend in backends
        ]

    def launches(self, given: Any) -> None:
        """Only the profiler can tell."""
        return None


def _direct(backends: list[dict[str, torch.Tensor]]) -> Callable:
    buffers = BackendBuffers(backends, nsa_index_topk=TOPK, real_page_size=PAGE_SIZE)

    def fill(mode: ForwardMode, real_page_size: int, **arguments: Any) -> None:
        buffers.update(forward_mode=mode, **arguments)

    return fill


def _eager(backends: list[dict[str, torch.Tensor]]) -> Callable:
    def fill(
        mode: ForwardMode,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        real_page_size: int,
        num_draft_tokens: int = 0,
        extend_seq_lens: torch.Tensor | None = None,
        max_total_tokens: int = 0,
    ) -> None:
        for backend in backends:
            lengths = seq_lens + num_draft_tokens
            repeats = extend_seq_lens
            if repeats is None:
                repeats = torch.full_like(seq_lens, max(num_draft_tokens, 1))
            owner = torch.repeat_interleave(repeats)
            rows = len(owner)
            before = torch.cumsum(repeats, 0) - repeats
            row = torch.arange(rows, device=owner.device)
            kv_lens = (lengths - repeats + 1)[owner] + row - before[owner]
            clamped = kv_lens.clamp(max=TOPK)
            pages = req_to_token[req_pool_indices[owner].long()]
            backend["cache_seqlens"].copy_(lengths)
            backend["cu_seqlens_k"][1:].copy_(torch.cumsum(lengths, 0))
            backend["seqlens_expanded"].zero_()[:rows].copy_(kv_lens)
            backend["nsa_cache_seqlens"].zero_()[:rows].copy_(clamped)
            sums = backend["nsa_cu_seqlens_k"]
            sums[1 : rows + 1].copy_(torch.cumsum(clamped, 0))
            sums[rows + 1 :] = sums[rows]
            backend["page_indices"][:rows].copy_(pages)
            backend["real_page_table"][:rows].copy_(
                torch.div(pages[:, ::real_page_size], real_page_size, rounding_mode="floor")
            )

    return fill
