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
        self._destinations = range(spec.destinations)
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
            out = None
            if written:
                if [_shape(array) for array in written] != expected * spec.destinations:
                    raise UnlikeError
                starts = range(0, len(written), len(shapes))
                each = [written[start : start + len(shapes)] for start in starts]
                out = tuple(
                    NSAMetadata(**dict(zip(shapes, arrays, strict=True))) for arrays in each
                )
            inputs = Inputs._make(map(dict(zip(given, read, strict=True)).get, Inputs._fields))
            backends = strategies.fused_metadata(
                inputs, out, spec, strategy=strategy, implementation=implementation
            )
            return [array for metadata in backends for array in self._wanted(metadata)]

        self._compiled = fused_metadata

    def __call__(
        self,
        read: Sequence[Array],
        out: Iterable[NSAMetadata] | None,
        kind: frozenset[type] | None = None,
    ) -> tuple[NSAMetadata, ...]:
        """Runs it. Each call pays for every line here, and for no other function of Python's.

        Args:
          read: the inputs that there are.
          out: the destinations, donated; None for fresh results.
          kind: types that arrays have; None: any.

        Raises:
          UnlikeError: `out` has no destinations, or one with other arrays than are wanted; arrays
            have other types, or shapes that are not those of the destinations of the spec.
        """
        names = self._names
        written: list[Array] = []
        for metadata in () if out is None else out:
            if not isinstance(metadata, NSAMetadata):
                raise UnlikeError
            attributes = metadata.__dict__
            if (*attributes,) == names:  # as a computation returns it
                written += attributes.values()
            elif self._others(metadata) == self._no_others:
                written += self._wanted(metadata)
            else:
                raise UnlikeError
        if not written and out is not None:
            raise UnlikeError
        if kind and not kind.issuperset(map(type, (*read, *written))):
            raise UnlikeError
        rest = iter(self._compiled(read, written))
        backends = []
        for _ in self._destinations:
            # As the constructor, in a fifth of its time: what is left out is None.
            metadata = object.__new__(NSAMetadata)
            metadata.__dict__.update(zip(names, rest))  # noqa: B905
            backends.append(metadata)
        return tuple(backends)


def _shape(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
