"""Checks of static arguments: integers, flags and names.

Each error names the argument, what came, and what was expected.
"""

import operator
from typing import Any

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def integer(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    """`value` as an int in [low, high]."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an int") from None
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected an int in [{low}, {high}]")
    return value


def flag(name: str, value: Any) -> bool:
    """`value`, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return value


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """`value`, which must be one of the choices."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: got {described(value)}, expected one of {expected}")
    return value


def described(value: Any) -> str:
    """`value` as an error message shows what came."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {type(value).__name__} of shape {value.shape}"
    return repr(value) if isinstance(value, (int, float, str, bool)) else type(value).__name__
