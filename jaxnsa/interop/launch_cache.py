"""Broadcasts to lists of tensors: those that were checked are launched again without it."""

import ctypes
import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from jaxnsa import direct
from jaxnsa.interop.registration import merged
from jaxnsa.interop.tensors import exchange_api, platform_of

_MOST = 256
"""Broadcasts that are remembered."""


class Key(NamedTuple):
    """All that the checks of a broadcast depend on, but for its inputs.

    Attributes:
      destinations: what their tensors are, bytes of direct.Tensor.
      counts: how many there are in each list.
      bs: requests.
      numbers: the integers that the caller gave.
    """

    destinations: bytes
    counts: tuple[int, ...]
    bs: int
    numbers: tuple[int, ...]


class Broadcasts:
    """Checked broadcasts; it holds no tensor and serves several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # on the arguments of the launches
        self._known: dict[Key | None, tuple[direct.Library, direct.Step, direct.Fused]] = {}

    def key(
        self,
        seq_lens: torch.Tensor,
        lists: Iterable[Sequence[torch.Tensor | None]],
        numbers: tuple[int, ...],
    ) -> Key | None:
        """The key of a broadcast; None where it takes checks to tell."""
        if not (api := exchange_api()) or not isinstance(seq_lens, torch.Tensor):
            return None
        library = direct.library(platform_of(seq_lens.device))
        destinations = library.describe_tensors(api, [*itertools.chain(*lists)])
        if destinations is None or seq_lens.dim() != 1:
            return None
        return Key(bytes(destinations), tuple(map(len, lists)), seq_lens.shape[0], numbers)

    def launch(
        self, key: Key | None, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> bool:
        """Launches a broadcast that is known; False if it is not, or its inputs want checks."""
        with self._lock:
            known = self._known.get(key)
            if known is None:
                return False
            library, step, args = known
            return library.launch_step(step, args.rows, *inputs, None)

    def add(
        self,
        key: Key,
        device: torch.device,
        args: direct.Fused,
        written: Iterable[tuple[int, int]],
    ) -> None:
        """Remembers a broadcast that was checked and launched.

        Args:
          key: its key.
          device: where it runs.
          args: its launch; `max_len` is what the tables have whatever the pool has.
          written: the memory that it writes, as addresses.
        """
        api = exchange_api()
        assert api  # as there is a key
        size = len(key.destinations) // ctypes.sizeof(direct.Tensor)
        described = (direct.Tensor * size).from_buffer_copy(key.destinations)
        step = direct.Step.of(
            args, described, merged(sorted(written)), api, min_columns=args.max_len
        )
        library = direct.library(platform_of(device))
        with self._lock:
            if len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = library, step, args
