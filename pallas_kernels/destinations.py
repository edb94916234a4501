"""The arrays that a kernel writes, by name: each one everywhere it goes, and none forgotten."""

import itertools
from typing import Any

from jaxnsa.spec import Spec
from pallas_kernels.lanes import LANES, Lanes, Scalar
from pallas_kernels.tables import Destination


class Destinations:
    """The refs of all destinations of a computation, inside a kernel.

    Args:
      spec: the computation.
      refs: for each destination its refs by name.
    """

    def __init__(self, spec: Spec, refs: list[dict[str, Any]]):
        self._spec = spec
        self._refs = refs
        self._wanted = set(spec.shapes())
        self._unwritten = set(itertools.product(spec.shapes(), spec.offsets))

    def of(self, name: str, offset: int) -> list[Destination]:
        """One array of every backend of an offset, which the caller writes."""
        self._unwritten.discard((name, offset))
        backends = [k for k, other in enumerate(self._spec.offsets) if other == offset]
        if self._spec.stacked:
            (refs,) = self._refs
            return [(refs[name], (k,)) for k in backends]
        return [(self._refs[k][name], ()) for k in backends]

    def store(self, offset: int, index: Scalar, **values: Scalar) -> None:
        """Stores a value at an index of each named array, if wanted, of an offset's backends."""
        for name, value in self._of_wanted(values):
            for ref, lead in self.of(name, offset):
                ref[(*lead, index)] = value

    def store_first(
        self, offset: int, lanes: Lanes, start: Scalar, count: Scalar, **values: Scalar
    ) -> None:
        """Stores the first `count` of 128 elements, or as often a scalar, likewise from `start`."""
        for name, value in self._of_wanted(values):
            vector = lanes.zeros(LANES) + value
            for ref, lead in self.of(name, offset):
                lanes.store_first(ref.at[lead] if lead else ref, start, vector, count)

    def _of_wanted(self, values: dict[str, Any]) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in values.items() if name in self._wanted]

    def check_all_written(self) -> None:
        """NotImplementedError where the kernel, which has been traced, left out an array."""
        if self._unwritten:
            names = sorted({name for name, _ in self._unwritten})
            raise NotImplementedError(f"the kernel does not write {names}")
