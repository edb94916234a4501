"""Broadcasts to lists of tensors: those that were checked are launched again without it."""

import ctypes
import itertools
import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch

from jaxnsa import direct
from jaxnsa.interop.direct_path import launch_fused
from jaxnsa.interop.registration import merged
from jaxnsa.interop.step import Step
from jaxnsa.interop.tensors import describe_function, platform_of

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
        self._known: dict[Hashable, tuple[Step, direct.Fused, torch.device]] = {}

    def key(
        self,
        seq_lens: torch.Tensor,
        lists: Iterable[Sequence[torch.Tensor | None]],
        numbers: tuple[int, ...],
    ) -> Key | None:
        """The key of a broadcast; None where it takes checks to tell."""
        describe = describe_function()
        if describe is None:
            return None
        try:
            library = direct.library(platform_of(seq_lens.device))
            destinations = library.describe_tensors(describe, [*itertools.chain(*lists)])
            return Key(bytes(destinations), tuple(map(len, lists)), seq_lens.shape[0], numbers)
        except Exception:
            return None

    def launch(
        self, key: Key | None, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> bool:
        """Launches a broadcast that is known; False if it is not, or its inputs want checks."""
        with self._lock:
            known = self._known.get(key)
            if known is None:
                return False
            step, args, device = known
            try:
                taken = step.takes(args.rows, *inputs)
            except Exception:
                return False
            if taken:
                launch_fused(direct.library(platform_of(device)), device, args)
            return taken

    def add(
        self,
        key: Key,
        args: direct.Fused,
        device: torch.device,
        written: Iterable[tuple[int, int]],
    ) -> None:
        """Remembers a broadcast that was checked and launched.

        Args:
          key: its key.
          args: its launch, whose tables have `max_len` columns whatever the pool has.
          device: where it runs.
          written: the memory that it writes, as addresses.
        """
        describe = describe_function()
        assert describe is not None  # as there is a key
        size = len(key.destinations) // ctypes.sizeof(direct.Tensor)
        described = (direct.Tensor * size).from_buffer_copy(key.destinations)
        step = Step(
            direct.library(platform_of(device)),
            describe,
            args,
            described,
            merged(sorted(written)),
            min_columns=args.max_len,
        )
        with self._lock:
            if len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = step, args, device
