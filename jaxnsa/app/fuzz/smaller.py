"""A fuzzer's program that fails, made smaller: fewer steps, plainer calls, plainer values."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxnsa.app.fuzz.kinds import plain_values
from jaxnsa.app.fuzz.program import Step, error_of, function_of
from jaxnsa.app.fuzz.steps import Call


def without_steps(steps: Sequence[Any], fails: Callable[[list[Any]], bool]) -> list[Any]:
    """The steps without those before the last that it fails without."""
    kept = list(steps)
    for step in steps[:-1]:
        fewer = [other for other in kept if other is not step]
        if fails(fewer):
            kept = fewer
    return kept


def plainer(steps: list[Step]) -> list[Step]:
    """The program with fewer steps, plainer calls and plainer values, as long as it fails alike."""
    failed = error_of(steps)
    if failed is None:
        return steps
    kind = _kind(failed[0])

    def fails(candidate: list[Step]) -> bool:
        now = error_of(candidate)
        return now is not None and _kind(now[0]) == kind

    name, keywords = steps[-1]
    if "values" in inspect.signature(function_of(name)).parameters:
        # Of the calls that the last step makes, the one that fails.
        values = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in failed[1].values.items()}
        alone = [*steps[:-1], (name, keywords | {"values": values, "more": 0})]
        steps = alone if fails(alone) else steps
    steps = without_steps(steps, fails)
    edits = [_calls_with(name, value) for name, value in plain_values().items()]
    for name, values in steps[-1][1].get("values", {}).items():
        if isinstance(values, list):
            edits += [_values_with_zero(name, k) for k in range(len(values))]
    for edit in edits:
        edited = [(name, edit(keywords)) for name, keywords in steps]
        if edited != steps and fails(edited):
            steps = edited
    return steps


def _kind(error: Exception) -> tuple[str, str]:
    """The error and what its message begins with."""
    return type(error).__name__, re.split(r"[:\d]", str(error))[0]


_Edit = Callable[[dict[str, Any]], dict[str, Any]]
"""Of the keyword arguments of a step."""


def _calls_with(name: str, value: Any) -> _Edit:
    """Gives calls and registered tensors an option."""

    def edited(described: Any) -> Any:
        if not dataclasses.is_dataclass(described) or isinstance(described, type):
            return described
        if isinstance(described, Call) and name in (options := dict(described.options)):
            return dataclasses.replace(described, options=tuple((options | {name: value}).items()))
        has = any(field.name == name for field in dataclasses.fields(described))
        return dataclasses.replace(described, **{name: value}) if has else described

    return lambda keywords: {key: edited(given) for key, given in keywords.items()}


def _values_with_zero(name: str, k: int) -> _Edit:
    """Makes an element of a vector 0."""

    def edit(keywords: dict[str, Any]) -> dict[str, Any]:
        vector = keywords.get("values", {}).get(name)
        if vector is None or k >= len(vector):
            return keywords
        plain = [*vector[:k], 0, *vector[k + 1 :]]
        return keywords | {"values": keywords["values"] | {name: plain}}

    return edit
