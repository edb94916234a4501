"""Eager calls like one that was checked before, which are not checked again.

Alike are calls of a function with the same settings, platform and options and arrays of the same
shapes and dtypes. That is what checks look at, and what an implementation is chosen by, but for two
things that differ from call to call: an array may be deleted, and it may be given twice. The
runtime refuses these, and checks then find out which it was. A call with anything but arrays of
JAX, tracers among them, is like no other.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any, NamedTuple

import jax

from jaxnsa.computation import Computation, UnlikeError
from jaxnsa.config import sources
from jaxnsa.spec import Inputs

_INPUTS = frozenset(Inputs._fields)
_MOST = 1024
"""Kinds of calls of a function that are remembered."""


class _Known(NamedTuple):
    """What calls alike run.

    Attributes:
      computation: that of one that was checked.
      inputs: of a call's arrays, those that it reads in its own order.
      kind: the type of them all.
      several: whether the caller gets, and gives as `out`, a tuple.
    """

    computation: Computation
    inputs: Callable[[Sequence[Any]], tuple[Any, ...]]
    kind: frozenset[type]
    several: bool


class CheckedCalls:
    """The calls of a public function that were checked."""

    def __init__(self, function: Callable):
        self._parameters = tuple(inspect.signature(function).parameters)
        self._known: dict[tuple[Any, ...], _Known] = {}

    def compute_as_before(self, arrays: Sequence[Any], out: Any, options: Mapping[str, Any]) -> Any:
        """The result of a call that is like one before; None where it has to be checked.

        Args:
          arrays: its positional arguments.
          out: its destinations.
          options: its other keyword arguments.
        """
        try:
            facts, read, _ = _facts(arrays, out, options)
            computation, inputs, kind, several = self._known[facts]
            if out is not None and not several:
                out = (out,)
            elif not isinstance(out, (tuple, list, NoneType)):
                return None
            backends = computation(inputs(read), out, kind)
        except jax.errors.JaxRuntimeError as error:
            if not any(word in str(error) for word in ("INVALID_ARGUMENT", "donate")):
                raise  # it failed, and its destinations may be gone
            return None
        # Unknown or not hashable; no array, deleted, or given twice; of another shape.
        except (LookupError, AttributeError, TypeError, UnlikeError, RuntimeError, ValueError):
            return None
        return backends if several else backends[0]

    def remember(
        self,
        arrays: Sequence[Any],
        out: Any,
        options: Mapping[str, Any],
        computation: Computation,
        several: bool,
    ) -> None:
        """Keeps the computation of a call that was checked."""
        if len(self._known) >= _MOST:
            self._known.clear()
        try:
            facts, read, named = _facts(arrays, out, options)
            names = [*self._parameters[: len(arrays)], *named]
            inputs = itemgetter(*(names.index(name) for name in Inputs._fields if name in names))
            if all(isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer) for a in read):
                kind = frozenset(map(type, read))
                self._known[facts] = _Known(computation, inputs, kind, several)
        except (LookupError, AttributeError, TypeError, UnlikeError):
            return


def _facts(
    arrays: Sequence[Any], out: Any, options: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Sequence[Any], list[str]]:
    """What calls alike have in common.

    Returns:
      It; the arrays that a call reads, which begin with the positional ones; and the names of those
      that it reads by name.
    """
    given: list[str] = []
    named: list[str] = []
    if not _INPUTS.isdisjoint(options):
        given = [name for name in options if name in _INPUTS]
        named = [name for name in given if options[name] is not None]
        arrays = (*arrays, *map(options.get, named))
        options = {name: value for name, value in options.items() if name not in _INPUTS}
    first = arrays[0]
    if first.is_deleted():
        # JAX ends the process where it is asked for the platform of a deleted array.
        raise UnlikeError
    values = options.values()
    facts = (
        sources(),
        first.platform(),
        out is None,
        *given,
        *named,
        *options,
        *values,
        *map(type, values),  # True is 1, and yet another option
        *map(_abstract, arrays),
    )
    offsets = options.get("backend_offsets")
    if isinstance(offsets, tuple):
        facts += tuple(map(type, offsets))
    return facts, arrays, named


_abstract = attrgetter("aval")
