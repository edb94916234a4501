"""The decode of `benchmarks/sparse_attention.py`: what its steps accept, and what they cost."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import kernel_times, on_gpu, step_times
from benchmarks.sparse_attention import DRAFTS, Sizes, Weights, generate, scattered_pool
from benchmarks.suite import Job, Suite
from jaxnsa.implementations.choice import get_kernel_info

SMALL = Sizes(256, 64, 4, 32, 4, 16, 96, 8, 256)


def _measure(bs: int, steps: int, sizes: Sizes) -> dict[str, float]:
    """Metrics of a decode: one launch of a program prefills and runs all of its steps.

    Those of a step are the difference to a decode of half the steps, over the others.
    """
    weights, pool = Weights.random(sizes), scattered_pool(bs, sizes.max_len)
    lens = jnp.full(bs, sizes.max_len // 128)
    prompts = jax.random.randint(jax.random.key(1), (int(lens.sum()),), 0, sizes.vocabulary)
    decode = functools.partial(generate, weights, pool, prompts, lens, sizes=sizes, drafts=True)
    half, whole = (_spent(functools.partial(decode, steps=n)) for n in (steps // 2, steps))
    _, _, kept = decode(steps=steps)
    spent = {name: (whole[name] - half[name]) / (steps - steps // 2) for name in whole}
    return spent | {"tokens": float(kept.mean())}


def _spent(run: Callable) -> dict[str, float]:
    """Microseconds of all kernels of a program, and of this library's; on a CPU end to end."""
    if not on_gpu():
        run()
        return {"step_us": float(np.min(step_times([run] * 5)))}
    spent = {k.name: k.launches * k.microseconds for k in kernel_times(run, calls=5)}
    metadata = sum(us for name, us in spent.items() if "fused_metadata" in name)
    return {"step_us": sum(spent.values()), "metadata_us": metadata}


def jobs(quick: bool) -> list[Job]:
    """A decode by the default implementation."""
    bs, steps = (16, 12) if on_gpu() and not quick else (3, 8 if quick else 12)
    sizes = Sizes() if on_gpu() and not quick else SMALL
    case = {"requests": bs, "drafts": DRAFTS, "steps": steps}
    return [Job(case, get_kernel_info()["default"], functools.partial(_measure, bs, steps, sizes))]


SUITE = Suite(
    name="sparse-attention",
    title="A whole sparse-attention decode",
    note="One layer of an untrained model, on a GPU with the attention of DeepSeek-V3.2: prefill, "
    "then steps that draft, verify and accept, all in one jit. `step_us` is the time of the "
    "kernels of a step, on a CPU end to end; `metadata_us` that of this library's. It is what the "
    "program takes beyond one of half the steps, over the others. `tokens` are those that a "
    "request keeps of a step.",
    jobs=jobs,
    metric="step_us",
)
