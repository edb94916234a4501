"""What the table rows of registered tensors hold: `jaxnsa.BatchTracker` in PyTorch's memory."""

import torch

from jaxnsa.interop.tensor_checks import Checked


class HeldRows:
    """The state that launches read and write, at the same addresses for as long as this lives.

    Attributes:
      rows: int64 [rows, 2], the request of each table row in the last step, and leading tokens that
        the row holds of it.
      readers: int32 [requests], blocks of a launch that have read a request's rows; 0 outside.
    """

    def __init__(self, rows: int, requests: int, device: torch.device):
        # Copied, which is done on return: any stream may use them next.
        self.rows = torch.zeros((rows, 2), dtype=torch.int64).to(device)
        self.readers = torch.zeros(requests, dtype=torch.int32).to(device)

    def invalidate(self, request_ids: Checked | None) -> None:
        """Forgets the rows of some requests, or of all, on PyTorch's current stream."""
        ids, tokens = self.rows[:, 0], self.rows[:, 1]
        if request_ids is None:
            tokens.zero_()
        else:
            named = (ids[:, None] == request_ids.tensor).any(dim=1)
            tokens.masked_fill_(named, 0)
