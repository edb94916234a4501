"""What the implementations for NVIDIA GPUs ask of a device, and refuse."""

from typing import TypeVar

import jax

Read = TypeVar("Read")
Written = TypeVar("Written")


def reason_to_refuse(platform: str, oldest: float, generation: str) -> str | None:
    """Why the device is no NVIDIA GPU of a compute capability or newer; None where it is."""
    needs = f"needs an NVIDIA GPU of compute capability {oldest} ({generation}) or newer, not"
    if platform != "gpu":
        return f"{needs} a {platform}; install jax[cuda13] on a machine that has one"
    capability = jax.devices("gpu")[0].compute_capability
    if not capability.replace(".", "").isdigit() or float(capability) < oldest:
        return f"{needs} {capability}; use another implementation"
    return None


def unbatched(inputs: Read, out: Written | None) -> tuple[Read, Written | None]:
    """What a kernel reads and, in place, writes: the same arrays, which may not be batched then.

    Raises:
      NotImplementedError: under `jax.vmap`, where one of them is batched and `out` is given.
    """
    return (inputs, out) if out is None else _unbatched((inputs, out))


@jax.custom_batching.custom_vmap
def _unbatched(arrays):
    return arrays


@_unbatched.def_vmap
def _refuse_batch(axis_size, batched, arrays):
    raise NotImplementedError(
        "kernels that write in place cannot run under jax.vmap: call without out=, or take another "
        "implementation"
    )
