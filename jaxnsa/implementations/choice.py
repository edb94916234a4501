"""The choice of what computes a call, and what `get_kernel_info` tells about it."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax

from jaxnsa.config import Settings, names, origin, settings
from jaxnsa.implementations import FUSED, IMPLEMENTATIONS, VARIANTS, computations
from jaxnsa.implementations.measurements import Call, rule


class ImplementationUnavailableError(RuntimeError):
    """No implementation that was asked for can run here; the message says why, one by one."""


def candidates(
    requested: str | Sequence[str] | None,
    settings: Settings,
    platform: str,
    call: Call,
) -> tuple[str, ...]:
    """The names that a call would try, in order; ValueError where one is unknown."""
    named = settings.implementation if requested is None else names(requested, "implementation")
    for name in named or ():
        if name not in IMPLEMENTATIONS:
            known = ", ".join(repr(n) for n in IMPLEMENTATIONS)
            argument = origin("implementation") if requested is None else "implementation"
            raise ValueError(f"{argument}: got {name!r}, expected one of {known}")
    if named is not None:
        return named
    order = rule(platform, call).order
    return tuple(n for n in order if n != "triton" or settings.triton_metadata)


def is_named(requested: str | Sequence[str] | None, settings: Settings) -> bool:
    """Whether a call or the settings name implementations."""
    return requested is not None or settings.implementation is not None


def choose(
    requested: str | Sequence[str] | None,
    settings: Settings,
    platform: str | None,
    call: Call,
) -> str:
    """The name of the implementation that a call takes.

    Args:
      requested: the call's `implementation` argument.
      settings: decides where `requested` is None.
      platform: where the arrays are; None while tracing. A single named implementation is then
        taken at its word, because the function may be lowered for another platform than this
        machine's.
      call: what else decides where nothing is named.

    Raises:
      ValueError: a name is unknown.
      ImplementationUnavailableError: none that was asked for can run.
    """
    here = platform or jax.default_backend()
    tried = candidates(requested, settings, here, call)
    if not is_named(requested, settings) or len(tried) > 1:
        platform = here
    reasons = []
    for name in tried:
        reason = IMPLEMENTATIONS[name].unavailable(platform)
        if reason is None:
            return name
        reasons.append(_cannot_run(name, reason))
    raise ImplementationUnavailableError("; ".join(reasons))


def check_runs(name: str, platform: str) -> None:
    """Raises ImplementationUnavailableError where an implementation cannot run on a platform."""
    if reason := computations(name).unavailable(platform):
        raise ImplementationUnavailableError(_cannot_run(name, reason))


def _cannot_run(name: str, reason: str) -> str:
    return f"implementation {name!r} cannot run here: {reason}"


def get_kernel_info() -> dict[str, Any]:
    """What can compute here, as a dict that `json.dumps` takes.

    Returns:
      - "platform": the default JAX backend, "cpu" or "gpu";
      - "devices": its devices, as text;
      - "default": the implementation that a broadcast to a few requests takes where nothing is
        named; None where the settings name only ones that cannot run;
      - "strategy": the broadcast strategy that the settings select;
      - "implementations": for each name, "available" (bool), "reason" (None where available),
        "version" of what it is built on (None where that is not installed), "prefix_sum_fusion"
        (bool): whether prefix sums and what needs them are one launch, and "variants": for each
        function that has several, their names, the default first, and what they do;
      - "versions": of jaxnsa, jax, jaxlib and numpy.

    Raises:
      ValueError: an environment variable holds no legal value.
    """
    platform = jax.default_backend()
    here = settings()
    implementations = {}
    for name, module in IMPLEMENTATIONS.items():
        reason = module.unavailable(platform)
        implementations[name] = {
            "available": reason is None,
            "reason": reason,
            "version": module.version(),
            "prefix_sum_fusion": name in FUSED,
            "variants": VARIANTS.get(name, {}),
        }
    try:
        default = choose(None, here, platform, Call())
    except ImplementationUnavailableError:
        default = None
    return {
        "platform": platform,
        "devices": [device.device_kind for device in jax.devices()],
        "default": default,
        "strategy": here.strategy,
        "implementations": implementations,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("jaxnsa", "jax", "jaxlib", "numpy")
        },
    }
