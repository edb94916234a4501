"""What was checked for the tensors of a call, remembered for calls with the same tensors."""

import threading
from collections.abc import Hashable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from jaxnsa.implementations.native_library import library
from jaxnsa.interop.tensor_checks import exchange_api

_MOST = 256
"""Calls that a cache remembers."""


class Key(NamedTuple):
    """All that the checks of a call depend on.

    Attributes:
      tensors: what its tensors are, without those that the library looks at in each call.
      facts: the other arguments, and which tensors there are.
      types: those of the facts: 64.0 is 64, and yet another argument.
    """

    tensors: bytes
    facts: tuple[Hashable, ...]
    types: tuple[type, ...]


def key_of(first: Any, tensors: Iterable[Any], facts: tuple[Hashable, ...]) -> Key | None:
    """The key of a call whose first tensor is `first`; None where it takes checks to tell."""
    api = exchange_api()
    if api is None or not isinstance(first, torch.Tensor):
        return None
    described = library("gpu" if first.is_cuda else "cpu").describe_tensors(api, [*tensors])
    return None if described is None else Key(described, facts, tuple(map(type, facts)))


Prepared = TypeVar("Prepared")


class LaunchCache(Generic[Prepared]):
    """What calls prepared once they were checked; keeps no tensor alive, serves several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # on additions; a look-up holds the GIL
        self._known: dict[Key, Prepared] = {}

    def get(self, key: Key | None) -> Prepared | None:
        """What is known for a key."""
        try:
            return None if key is None else self._known.get(key)
        except TypeError:  # a list for a number, say, which the checks are to find
            return None

    def add(self, key: Key, prepared: Prepared) -> None:
        """Remembers what was checked, instead of the oldest if there are too many."""
        with self._lock:
            if len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = prepared
