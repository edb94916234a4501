"""Tensors copied that are given with each call: checked where they are new, then launched alone."""

from collections.abc import Sequence

import torch

from jaxnsa.interop.launch_cache import Key, LaunchCache
from jaxnsa.interop.launches import library_for, on_device, stream_of
from jaxnsa.interop.tensor_checks import Checked, WrittenMemory

_Launch = tuple[list[tuple[int, int, int, int]], list[list[int]]]
"""Arrays and their destinations, as the native library takes them."""


class CopyCache(LaunchCache[list[_Launch]]):
    """Copies of arrays to one or several destinations."""

    def try_copy(self, key: Key | None, device: torch.device) -> bool:
        """Copies what is known; False if it is not."""
        known = self.get(key)
        if known is None:
            return False
        _launch(known, device)
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
        _launch(launches, sources[0].tensor.device)
        if key is not None:
            self.add(key, launches)


def _launch(launches: Sequence[_Launch], device: torch.device) -> None:
    native = library_for(device)

    def run() -> None:
        stream = stream_of(device)
        for arrays, destinations in launches:
            native.copy(stream, arrays, destinations)

    on_device(device, run)
