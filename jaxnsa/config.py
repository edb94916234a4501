"""Settings: explicit arguments beat `override`, which beats the environment."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

Strategy = Literal["ultra_fast", "fast", "fallback"]

ENVIRONMENT = {
    "implementation": ("JAXNSA_IMPLEMENTATION",),
    "fused_broadcast": ("JAXNSA_ENABLE_FUSED_BROADCAST", "SGLANG_NSA_ENABLE_FUSED_BROADCAST"),
    "mtp_precompute_metadata": (
        "JAXNSA_ENABLE_MTP_PRECOMPUTE_METADATA",
        "SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA",
    ),
    "triton_metadata": ("JAXNSA_USE_TRITON_METADATA", "SGLANG_NSA_USE_TRITON_METADATA"),
    "validate": ("JAXNSA_VALIDATE",),
}
"""The environment variables of each setting; the first one that is set counts."""

_VARIABLES = tuple(variable for variables in ENVIRONMENT.values() for variable in variables)
# The dict beneath os.environ: each eager call asks, and os.environ itself takes ten times as long.
_environment = os.environ._data  # type: ignore[attr-defined]
_present = _environment.keys()  # a view: names that are set now
_keys = tuple(map(os.environ.encodekey, _VARIABLES))  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a call does where its arguments leave it open.

    Attributes:
      implementation: names to try in order; None picks by measurement.
      fused_broadcast: whether a broadcast is one fused launch.
      mtp_precompute_metadata: whether backends share one precomputation at all.
      triton_metadata: whether Triton may be picked when no implementation is named.
      validate: whether the values of concrete inputs are checked.
    """

    implementation: tuple[str, ...] | None = None
    fused_broadcast: bool = True
    mtp_precompute_metadata: bool = True
    triton_metadata: bool = True
    validate: bool = False

    @property
    def strategy(self) -> Strategy:
        """The broadcast strategy that the switches select."""
        if not self.mtp_precompute_metadata:
            return "fallback"
        return "ultra_fast" if self.fused_broadcast else "fast"


# Part of the cache key of every jit, the caller's included: a function that was traced under other
# overrides is traced again.
_overrides = jax.make_user_context(default_value=())


def settings() -> Settings:
    """The settings in force here: overrides over environment over defaults."""
    return _parsed(*sources())


def sources() -> tuple[tuple[bytes | None, ...], tuple[tuple[str, Any], ...]]:
    """What settings come from: the values of the environment's variables, if any, and overrides."""
    texts = () if _present.isdisjoint(_keys) else tuple(map(_environment.get, _keys))
    return texts, _overrides.value


def overridden() -> bool:
    """Whether any `override` is in force here."""
    return bool(_overrides.value)


def origin(setting: str) -> str:
    """What decides a setting here: its name, an argument of `override`, or a variable."""
    if setting in dict(_overrides.value):
        return setting
    return next((v for v in ENVIRONMENT[setting] if os.environ.get(v)), setting)


@functools.lru_cache(maxsize=64)
def _parsed(texts: tuple[bytes | None, ...], overrides: tuple[tuple[str, Any], ...]) -> Settings:
    environment = {v: os.fsdecode(t) for v, t in zip(_VARIABLES, texts, strict=False) if t}
    values: dict[str, Any] = {}
    for name, variables in ENVIRONMENT.items():
        variable = next((v for v in variables if v in environment), None)
        if variable is not None:
            text = environment[variable].strip()
            values[name] = (
                names(text.split(","), variable)
                if name == "implementation"
                else _switch(text, variable)
            )
    return Settings(**(values | dict(overrides)))


@contextlib.contextmanager
def override(
    *,
    implementation: str | Sequence[str] | None = None,
    fused_broadcast: bool | None = None,
    mtp_precompute_metadata: bool | None = None,
    triton_metadata: bool | None = None,
    validate: bool | None = None,
) -> Iterator[None]:
    """Settings for the calls made, and the functions traced, inside the `with` block.

    It holds for the current thread and nests; None leaves a setting as it is. A function that the
    caller has jitted is traced again under new overrides. The environment is read whenever a
    public function runs: once per trace where the caller has jitted it.

    Args:
      implementation: a name, or names to try in order.
      fused_broadcast: False selects strategy "fast".
      mtp_precompute_metadata: False selects strategy "fallback".
      triton_metadata: False keeps Triton from being picked when no implementation is named.
      validate: whether to check the values of inputs, as `validate_inputs` does.

    Raises:
      TypeError: a switch is not a bool, or `implementation` is neither a name nor names.
      ValueError: `implementation` names nothing.
    """
    given: dict[str, object] = {
        "fused_broadcast": fused_broadcast,
        "mtp_precompute_metadata": mtp_precompute_metadata,
        "triton_metadata": triton_metadata,
        "validate": validate,
    }
    for name, value in given.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, expected True, False or None")
    if implementation is not None:
        given["implementation"] = names(implementation, "implementation")
    changed = {name: value for name, value in given.items() if value is not None}
    with _overrides(tuple(sorted((dict(_overrides.value) | changed).items()))):
        yield


def names(value: str | Sequence[str], argument: str) -> tuple[str, ...]:
    """A name or a sequence of names as a tuple of names."""
    sequence = (value,) if isinstance(value, str) else value
    if not isinstance(sequence, (tuple, list)) or not all(isinstance(n, str) for n in sequence):
        raise TypeError(f"{argument}: got {value!r}, expected a name or a sequence of names")
    if not sequence:
        raise ValueError(f"{argument}: got an empty sequence, expected at least one name")
    return tuple(name.strip() for name in sequence)


def _switch(text: str, variable: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{variable}: got {text!r}, expected 1, true, yes, on, 0, false, no or off")
