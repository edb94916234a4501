"""The tensors of a step, taken as arguments of a launch by the FFI library itself."""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from jaxnsa import direct


class Step:
    """A launch for the same destinations again and again: a look at its inputs takes no Python."""

    def __init__(
        self,
        library: direct.Library,
        describe: int,
        args: direct.Fused,
        described: ctypes.Array[direct.Tensor],
        written: Sequence[tuple[int, int]],
        *,
        unchanged: Sequence[torch.Tensor] = (),
        min_columns: int = 1,
    ):
        """Prepares the launch.

        Args:
          library: what launches.
          describe: what `describe_function` returns.
          args: what is launched, complete but for its rows and inputs; its `max_len` is the most
            columns of a table.
          described: the destinations; the first one tells the device.
          written: the memory of the destinations, as addresses in order and apart.
          unchanged: the tensors of `described`, where each step is to see that they still are.
          min_columns: of `req_to_token`.
        """
        self._take = library.take_step
        self._struct = direct.Step(
            describe=describe,
            num_tensors=len(unchanged),
            objects=_address(objects := direct.objects(unchanged)),
            expected=_address(described),
            num_spans=len(written),
            written=_address(
                spans := (direct.Span * len(written))(*itertools.starmap(direct.Span, written))
            ),
            min_columns=min_columns,
            max_len=args.max_len,
            fused=_address(args),
        )
        self._held = (unchanged, objects, described, spans, args)

    def takes(
        self,
        rows: direct.Rows,
        seq_lens: Any,
        req_pool_indices: Any,
        req_to_token: Any,
        extend_seq_lens: Any | None = None,
    ) -> bool:
        """Whether everything is as it should be, and is in the arguments of the launch now.

        Raises:
          Exception: what PyTorch raises for an object that is no tensor, or has no memory.
        """
        return self._take(
            self._struct,
            rows,
            id(seq_lens),
            id(req_pool_indices),
            id(req_to_token),
            None if extend_seq_lens is None else id(extend_seq_lens),
        )


def _address(memory: Any) -> int:
    return ctypes.addressof(memory)
