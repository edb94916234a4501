"""The decode of `benchmarks/sparse_attention.py`: what its steps accept, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import kernel_times, on_gpu, step_times
from benchmarks.sparse_attention import DRAFTS, Sizes, Weights, generate, scattered_pool
from benchmarks.suite import Job, Suite
from jaxnsa.implementations.choice import get_kernel_info

SMALL = Sizes(256, 64, 4, 32, 4, 16, 96, 8, 256)


def _measure(bs: int, steps: int, sizes: Sizes) -> dict[str, float]:
    """Metrics of a decode, the means of its steps: one launch of a program runs all of them."""
    weights, pool = Weights.random(sizes), scattered_pool(bs, sizes.max_len)
    lens = jnp.full(bs, sizes.max_len // 128)
    prompts = jax.random.randint(jax.random.key(1), (int(lens.sum()),), 0, sizes.vocabulary)
    run = functools.partial(
        generate, weights, pool, prompts, lens, sizes=sizes, steps=steps, drafts=True
    )
    _, _, kept = run()
    tokens = {"tokens": float(kept.mean())}
    if not on_gpu():
        return tokens | {"step_us": float(np.mean(step_times([run] * 3))) / steps}
    spent = {k.name: k.launches * k.microseconds for k in kernel_times(run, calls=5)}
    metadata = sum(us for name, us in spent.items() if "fused_metadata" in name)
    return tokens | {"step_us": sum(spent.values()) / steps, "metadata_us": metadata / steps}


def jobs(quick: bool) -> list[Job]:
    """A decode by the default implementation."""
    bs, steps = (16, 12) if on_gpu() and not quick else (3, 2 if quick else 6)
    sizes = Sizes() if on_gpu() and not quick else SMALL
    case = {"requests": bs, "drafts": DRAFTS, "steps": steps}
    return [Job(case, get_kernel_info()["default"], functools.partial(_measure, bs, steps, sizes))]


SUITE = Suite(
    name="sparse-attention",
    title="A whole sparse-attention decode",
    note="One layer of an untrained model, on a GPU with the attention of DeepSeek-V3.2: prefill, "
    "then steps that draft, verify and accept, all in one jit. `step_us` is the time of that "
    "program's kernels over its steps, on a CPU end to end; `metadata_us` that of this library's. "
    "`tokens` are those that a request keeps of a step.",
    jobs=jobs,
    metric="step_us",
)
