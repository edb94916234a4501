"""Tensors copied that are given with each call: checked where they are new, then launched alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from jaxnsa.implementations.native_library import NativeLibrary
from jaxnsa.interop.launch_cache import Key, LaunchCache
from jaxnsa.interop.launches import library_for, on_device, stream_of
from jaxnsa.interop.tensor_checks import Checked, WrittenMemory


class _Copies(NamedTuple):
    """Launches that were checked.

    Attributes:
      device: where the tensors are.
      native: its library.
      launches: arrays and their destinations, as the library takes them.
    """

    device: torch.device
    native: NativeLibrary
    launches: list[tuple[list[tuple[int, int, int, int]], list[list[int]]]]

    def run(self) -> None:
        """Launches on PyTorch's current stream."""

        def launch() -> None:
            stream = stream_of(self.device)
            for arrays, destinations in self.launches:
                self.native.copy(stream, arrays, destinations)

        on_device(self.device, launch)


class CopyCache(LaunchCache[_Copies]):
    """Copies of arrays to one or several destinations."""

    def try_copy(self, key: Key | None) -> bool:
        """Copies what is known; False if it is not."""
        known = self.get(key)
        if known is None:
            return False
        known.run()
        return True

    def copy(
        self, key: Key | None, sources: Sequence[Checked], destinations: Sequence[Sequence[Checked]]
    ) -> None:
        """Copies what `try_copy` did not, and remembers it.

        Args:
          key: of the call; None where a source is not the call's own tensor.
          sources: contiguous arrays.
          destinations: for each, as many as there are sources, of the same shapes.

        Raises:
          ValueError: tensors that are written share memory, with each other or with a source.
        """
        memory = WrittenMemory([target for targets in destinations for target in targets])
        memory.check_apart(sources)
        alike: dict[tuple[int, ...], list[list[int]]] = {}
        for targets in destinations:
            strides = tuple(
                target.tensor.stride(0) if len(target.shape) == 2 else target.shape[0]
                for target in targets
            )
            alike.setdefault(strides, []).append([target.start for target in targets])
        launches = []
        for strides, starts in alike.items():
            arrays = []
            for source, stride in zip(sources, strides, strict=True):
                rows, columns = source.shape if len(source.shape) == 2 else (1, *source.shape)
                arrays.append((source.start, rows, columns, stride))
            launches.append((arrays, starts))
        device = sources[0].tensor.device
        copies = _Copies(device, library_for(device), launches)
        copies.run()
        if key is not None:
            self.add(key, copies)
