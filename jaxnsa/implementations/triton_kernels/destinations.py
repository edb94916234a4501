"""The arrays that a kernel writes: each value goes everywhere it is wanted, and none is forgotten.

The kernels hold the arrays of one extent, and the values that go there, in the same NamedTuple, one
member for each array: the pointers to it in all destinations, none where it is not wanted; and its
value.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl

Group = TypeVar("Group", bound=NamedTuple)


def grouped(
    group: type[Group], names: Iterable[str], destinations: Sequence[Mapping[str, Any]]
) -> Group:
    """The named arrays of all destinations, as a kernel writes them.

    Args:
      group: the NamedTuple with a member for each array that the kernel has a value for.
      names: of the arrays that are wanted.
      destinations: for each destination its arrays by name.

    Raises:
      NotImplementedError: where an array is wanted that the kernel has no value for.
    """
    arrays = {name: tuple(destination[name] for destination in destinations) for name in names}
    if unwritten := sorted(arrays.keys() - set(group._fields)):
        raise NotImplementedError(f"the kernel does not write {unwritten}")
    return group._make(arrays.get(name, ()) for name in group._fields)


def by_name(groups: Iterable[Any]) -> list[dict[str, Any]]:
    """For each destination its arrays by name; the inverse of `grouped`."""
    arrays = {
        name: pointers for group in groups for name, pointers in group._asdict().items() if pointers
    }
    return [dict(zip(arrays, values, strict=True)) for values in zip(*arrays.values(), strict=True)]


@triton.jit
def of_backends(group, size, BACKENDS: tl.constexpr, COUNT: tl.constexpr):
    """The arrays of a group in some backends.

    Args:
      group: pointers to the arrays, as `grouped` returns them.
      size: elements from one backend's array to the next, where an array holds those of several.
      BACKENDS: of each backend, its destination and its place in there.
      COUNT: of these backends.
    """
    size = tl.cast(size, tl.int64)
    arrays = ()
    for k in tl.static_range(len(group)):
        backends = ()
        if len(group[k]) > 0:
            for b in tl.static_range(COUNT):
                pointer = group[k][BACKENDS[b][0]] + BACKENDS[b][1] * size
                backends += (pointer,)  # type: ignore[assignment]
        arrays += (backends,)  # type: ignore[assignment]
    return arrays


@triton.jit
def store(pointers, index, value, mask=None):
    """Stores a value, a scalar or a vector, at an index of an array in all destinations."""
    for k in tl.static_range(len(pointers)):
        # Nothing that a launch writes is read by it: those lines can leave the caches first.
        tl.store(pointers[k] + index, value, mask, cache_modifier=".cs")


@triton.jit
def store_values(group, index, values, mask=None):
    """Stores the values of a group at an index of its arrays."""
    tl.static_assert(len(group) == len(values))
    for k in tl.static_range(len(group)):
        store(group[k], index, values[k], mask)
