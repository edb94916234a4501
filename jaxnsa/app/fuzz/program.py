"""A fuzzer's program: its steps, running them, and its source."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from jaxnsa.app.fuzz import steps as jax_steps
from jaxnsa.app.fuzz.steps import Refused, Session
from jaxnsa.metadata import ForwardMode

Step = tuple[str, dict[str, Any]]
"""The name of a step, a function of one of the modules, and its keyword arguments."""


CPU_DEVICES = 2
"""What `shard_map` shares a call between."""


def modules() -> list[ModuleType]:
    """Those whose functions are steps here."""
    if not importlib.util.find_spec("torch"):
        return [jax_steps]
    names = ("tensor_steps", "sgl_steps")
    return [jax_steps, *(importlib.import_module(f"jaxnsa.app.fuzz.{name}") for name in names)]


def function_of(name: str) -> Callable[..., None]:
    """The step of a name."""
    return next(vars(module)[name] for module in modules() if name in vars(module))


def run_step(session: Session, step: Step) -> None:
    """Runs a step; Refused where the library does not compute what it asks for."""
    name, keywords = step
    function_of(name)(session, **keywords)


def error_of(steps: Iterable[Step]) -> tuple[Exception, Session] | None:
    """What a program ends with, and what it had then; None where nothing is wrong."""
    session = Session()
    for step in steps:
        try:
            run_step(session, step)
        except Refused:
            pass
        except Exception as error:
            return error, session
    return None


def source_of(lines: Iterable[str]) -> str:
    """The lines of a program as one that runs by itself."""
    lines = list(lines)
    header = [
        "from jaxnsa import *",
        *(f"from {module.__name__} import *" for module in modules()),
        "",
        "session = Session()",
    ]
    if any("shard_map" in line for line in lines):
        header.insert(-1, f'jax.config.update("jax_num_cpu_devices", {CPU_DEVICES})')
    return "\n".join(header + lines) + "\n"


def line_of(step: Step) -> str:
    """A step as a line of a program."""
    name, keywords = step
    given = ", ".join(f"{key}={_literal(value)}" for key, value in keywords.items())
    return f"{name}(session, {given})"


def _literal(value: Any) -> str:
    if isinstance(value, ForwardMode):
        return str(value)
    if hasattr(value, "tolist"):
        return repr(value.tolist())
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {_literal(v)}' for name, v in value.items())}}}"
    if isinstance(value, tuple):
        return f"({''.join(_literal(item) + ', ' for item in value)})"
    if dataclasses.is_dataclass(value):
        fields = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
        given = ", ".join(f"{n}={_literal(v)}" for n, v, default in fields if v != default)
        return f"{type(value).__name__}({given})"
    return repr(value)
