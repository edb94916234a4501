"""What the table rows of registered tensors hold: `jaxnsa.BatchTracker` in PyTorch's memory."""

import torch

from jaxnsa.interop.tensor_checks import Checked


class HeldRows:
    """The state that launches read and write, at the same addresses for as long as this lives.

    Attributes:
      rows: int32 [rows, steps, 4], of the last steps that gave each table row to a request, in any
        order: the request in two words, leading tokens that the row held of it, and, of two, the
        step's number.
    """

    def __init__(self, rows: int, steps: int, device: torch.device):
        # Copied, which is done on return: any stream may use them next.
        self.rows = torch.zeros((rows, steps, 4), dtype=torch.int32).to(device)

    def invalidate(self, request_ids: Checked | None) -> None:
        """Forgets the rows of some requests, or of all, on PyTorch's current stream."""
        ids, tokens = self.rows.view(torch.int64)[..., 0], self.rows[..., 2]
        if request_ids is None:
            tokens.zero_()
        else:
            tokens.masked_fill_((ids[..., None] == request_ids.tensor).any(dim=-1), 0)
