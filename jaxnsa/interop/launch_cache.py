"""Launches for lists of tensors: those that were checked are launched again without it."""

import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from jaxnsa.implementations.native_library import NativeRows, PreparedLaunch
from jaxnsa.interop.launches import library_for, report_declined
from jaxnsa.interop.tensor_checks import WrittenMemory, exchange_api

_MOST = 256
"""Launches that are remembered."""


class Key(NamedTuple):
    """All that the checks of a launch depend on, but for its inputs.

    Attributes:
      destinations: what the tensors of its lists are.
      counts: how many there are in each list.
      bs: requests.
      numbers: the integers that the caller gave.
    """

    destinations: bytes
    counts: tuple[int, ...]
    bs: int
    numbers: tuple[int, ...]


class LaunchCache:
    """Checked launches; it keeps no tensor alive and serves several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # on additions; a launch holds the GIL
        self._known: dict[Key, tuple[PreparedLaunch, NativeRows]] = {}

    def key(
        self,
        seq_lens: torch.Tensor,
        lists: Iterable[Sequence[torch.Tensor | None]],
        numbers: tuple[int, ...],
    ) -> Key | None:
        """The key of a launch; None where it takes checks to tell."""
        api = exchange_api()
        if api is None or not isinstance(seq_lens, torch.Tensor) or seq_lens.dim() != 1:
            return None
        lists = list(lists)
        native = library_for(seq_lens.device)
        destinations = native.describe_tensors(api, [*itertools.chain(*lists)])
        if destinations is None:
            return None
        return Key(destinations, tuple(map(len, lists)), seq_lens.shape[0], numbers)

    def try_launch(
        self, key: Key | None, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> bool:
        """Launches what is known; False if it is not, or its inputs want checks."""
        known = None if key is None else self._known.get(key)
        if known is None:
            return False
        launch, rows = known
        return launch.try_launch(rows, *inputs, None)

    def add(
        self,
        key: Key,
        launch: PreparedLaunch,
        rows: NativeRows,
        max_len: int,
        memory: WrittenMemory,
    ) -> None:
        """Remembers a launch that was checked; one that is known already was declined.

        Args:
          key: its key.
          launch: itself.
          rows: its rows.
          max_len: the columns of its tables, which it writes whatever the pool has.
          memory: what it writes.
        """
        if key in self._known:
            report_declined(self._known[key][0].declined)
            return
        launch.watch(
            exchange_api(),
            memory.tensors[:1],
            unchanged=False,
            written=memory.spans,
            min_columns=max_len,
        )
        with self._lock:
            if len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = launch, rows
