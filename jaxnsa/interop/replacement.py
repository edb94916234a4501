"""Functions of an installed package replaced by others with the same signatures."""

import importlib
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_logger = logging.getLogger("jaxnsa")


class Replacement:
    """Puts functions in place of those of the same names in a package, and takes them back."""

    def __init__(
        self, package: str, version: str, functions: Mapping[str, Iterable[Callable[..., Any]]]
    ):
        """Replaces nothing yet.

        Args:
          package: the package that is installed, maybe.
          version: the one whose signatures the functions have.
          functions: what replaces the functions of the same names, by the module that defines them.
        """
        self._package = package
        self._version = version
        self._functions = functions
        self._originals: dict[Callable[..., Any], Any] = {}  # by what replaces them

    def install(self) -> tuple[str, ...]:
        """Replaces the functions wherever a module of the package holds them.

        Returns:
          Where the functions are now, as "module.attribute".

        Raises:
          RuntimeError: the package or one of its functions is missing, or a signature differs.
            Nothing is replaced then.
        """
        originals = dict(self._originals)
        for name, functions in self._functions.items():
            try:
                module = importlib.import_module(name)
            except Exception as error:
                raise RuntimeError(f"{name} could not be imported: {error}") from error
            for function in functions:
                found = getattr(module, function.__name__, None)
                if found is not function:
                    self._check_signature(name, function, found)
                    originals[function] = found
        self._replace({original: function for function, original in originals.items()})
        self._originals = originals
        places = self._described(originals)
        _logger.info("functions of %s replaced by jaxnsa's: %s", self._package, ", ".join(places))
        return places

    def uninstall(self) -> tuple[str, ...]:
        """Undoes `install`.

        Returns:
          Where the package's own functions are again, as "module.attribute".
        """
        places = self._described(self._originals)
        self._replace(self._originals)
        self._originals = {}
        return places

    def _check_signature(self, module: str, function: Callable[..., Any], found: Any) -> None:
        """Raises RuntimeError unless `found` is called as `function` is."""
        name = f"{module}.{function.__name__}"
        if not callable(found):
            raise RuntimeError(
                f"{name}: got {type(found).__name__}, expected a function as in {self._package} "
                f"{self._version}"
            )
        pairs = itertools.zip_longest(_parameters(found), _parameters(function))
        for k, (got, expected) in enumerate(pairs):
            if got != expected:
                raise RuntimeError(
                    f"{name}: got {got or 'no'} as parameter {k}, expected {expected or 'none'} as "
                    f"in {self._package} {self._version}"
                )

    def _replace(self, replacements: Mapping[Any, Any]) -> None:
        """Sets every attribute that holds a key to its value; all or, where one fails, none."""
        done: list[tuple[Any, str, Any]] = []
        try:
            for _, module, attribute, held in self._holders(replacements):
                setattr(module, attribute, replacements[held])
                done.append((module, attribute, held))
        except BaseException:
            for module, attribute, held in done:
                setattr(module, attribute, held)
            raise

    def _described(self, functions: Iterable[Any]) -> tuple[str, ...]:
        return tuple(f"{name}.{attribute}" for name, _, attribute, _ in self._holders(functions))

    def _holders(self, functions: Iterable[Any]) -> list[tuple[str, Any, str, Any]]:
        """Which modules of the package hold some functions: name, module, attribute, function."""
        wanted = {id(function) for function in functions}
        return [
            (name, module, attribute, held)
            for name, module in sorted(sys.modules.items())
            if name.split(".")[0] == self._package
            for attribute, held in sorted(getattr(module, "__dict__", {}).items())
            if id(held) in wanted
        ]


def _parameters(function: Callable[..., Any]) -> list[str]:
    """What a call has to know of a function's parameters: kind, name and default of each."""
    return [
        f"{parameter.kind.description} parameter {parameter.replace(annotation=parameter.empty)}"
        for parameter in inspect.signature(function).parameters.values()
    ]
