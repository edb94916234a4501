"""The metadata of a step by a function that JAX compiles, with few things to hand over."""

import functools
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import jax

from jaxnsa import strategies
from jaxnsa.compilation import compiled
from jaxnsa.config import Strategy
from jaxnsa.metadata import FIELDS, Array, NSAMetadata
from jaxnsa.spec import Inputs, Spec


class UnlikeError(Exception):
    """Arrays are not those that a computation was made for."""


class Computation:
    """Computes the metadata of a spec for all of its destinations, in place where they are given.

    JAX takes longer to take `NSAMetadata` apart and to put it together than the rest of a call
    takes: it gets one list of arrays, without those that are not wanted.
    """

    def __init__(self, spec: Spec, strategy: Strategy, implementation: str, given: tuple[str, ...]):
        """Compiles nothing yet.

        Args:
          spec: what is computed.
          strategy, implementation: how.
          given: names of the inputs that there are, in the order of `Inputs`.
        """
        shapes = spec.shapes()
        self._names = tuple(shapes)
        self._wanted = attrgetter(*self._names)
        others = [name for name in FIELDS if name not in shapes]
        self._others = attrgetter(*others) if others else lambda metadata: None
        nothing: dict[str, Any] = dict.fromkeys(FIELDS)
        self._no_others = self._others(NSAMetadata(**nothing))
        expected = [shapes[name] for name in self._names]

        # keep_unused: destinations that are only written stay arguments, so that donation reuses
        # them.
        @functools.partial(compiled, donate_argnums=1, keep_unused=True)
        def fused_metadata(read: Sequence[Array], written: list[Array]) -> list[Array]:
            out = self._metadata_of_each(written) or None
            if out and [_shape(array) for array in written] != expected * spec.destinations:
                raise UnlikeError
            inputs = Inputs._make(map(dict(zip(given, read, strict=True)).get, Inputs._fields))
            backends = strategies.fused_metadata(
                inputs, out, spec, strategy=strategy, implementation=implementation
            )
            return self.arrays(backends)

        self._compiled = fused_metadata

    def arrays(self, destinations: Iterable[NSAMetadata] | None) -> list[Array]:
        """Those of all destinations, none for None.

        Raises:
          UnlikeError: a destination has others than are wanted, or there are none.
        """
        arrays: list[Array] = []
        if destinations is None:
            return arrays
        for metadata in destinations:
            if not isinstance(metadata, NSAMetadata):
                raise UnlikeError
            attributes = vars(metadata)
            if (*attributes,) == self._names:  # as a computation returns it
                arrays += attributes.values()
            elif self._others(metadata) == self._no_others:
                arrays += self._wanted(metadata)
            else:
                raise UnlikeError
        if not arrays:
            raise UnlikeError
        return arrays

    def __call__(self, read: Sequence[Array], written: list[Array]) -> tuple[NSAMetadata, ...]:
        """Runs it.

        Args:
          read: the inputs that there are.
          written: of the destinations, donated; none for fresh results.

        Raises:
          UnlikeError: `written` has other shapes than the destinations of the spec.
        """
        return self._metadata_of_each(self._compiled(read, written))

    def _metadata_of_each(self, arrays: Sequence[Array]) -> tuple[NSAMetadata, ...]:
        """The same as the constructor in a third of its time: what is left out is None."""
        names, rest = self._names, iter(arrays)
        backends = []
        for _ in range(len(arrays) // len(names)):
            metadata = object.__new__(NSAMetadata)
            # vars() and an argument of zip() would take as long again.
            metadata.__dict__.update(zip(names, rest))  # noqa: B905
            backends.append(metadata)
        return tuple(backends)


def _shape(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
