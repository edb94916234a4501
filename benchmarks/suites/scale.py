"""Data-parallel over devices: requests are split, each device fills its own backends."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnsa
from benchmarks.measure import on_gpu, timing
from benchmarks.problem import PAGE_SIZE, TOPK, Problem, check
from benchmarks.suite import Job, Suite, runnable
from jaxnsa import ForwardMode, reference


def _measure(devices: int, bs: int, max_len: int, name: str) -> dict[str, float]:
    problem = Problem(ForwardMode.DECODE, bs * devices, max_len, 3, max_len)
    seq_lens, _, pool = problem.arguments
    indices = np.tile(np.arange(bs, dtype=np.int32), devices)  # rows of a device's own share
    mesh = Mesh(np.array(jax.devices()[:devices]), ("requests",))
    sharded = NamedSharding(mesh, P("requests"))

    options: Any = {"num_backends": 3, "nsa_index_topk": TOPK, "real_page_size": PAGE_SIZE}

    def fill(*arrays: Any) -> Any:
        return jaxnsa.fused_metadata_precompute_and_broadcast(
            *arrays, stacked=True, implementation=name, **options
        )

    compute = jax.jit(
        jax.shard_map(
            fill, mesh=mesh, in_specs=P("requests"), out_specs=P(None, "requests"), check_vma=False
        )
    )
    arguments = [jax.device_put(a, sharded) for a in (seq_lens, indices, pool)]
    result = jax.tree.map(np.asarray, compute(*arguments))
    for device in range(devices):
        share = slice(device * bs, (device + 1) * bs)
        given = (seq_lens[share], indices[share], pool[share])
        expected: Any = reference.fused_metadata_precompute_and_broadcast(*given, **options)
        for k, wanted in enumerate(expected):
            got = jax.tree.map(lambda a, k=k, d=device: np.split(a[k], devices)[d], result)
            check(got, wanted, f"of backend {k} is wrong on device {device}")
    metrics = timing([lambda: compute(*arguments)], cached=True)
    for key in ("hot_device_us", "launches"):
        if key in metrics:
            metrics[key] /= devices
    return metrics


def jobs(quick: bool) -> list[Job]:
    """One to as many devices as there are; none on a machine of one."""
    bs, max_len = (2, 256) if quick else (32, 16_384 if on_gpu() else 4096)
    counts = [n for n in (1, 2, 4, 8, 16) if n <= jax.device_count()]
    if len(counts) < 2:  # nothing scales on one device
        return []
    return [
        Job(
            {"devices": n, "bs": bs * n, "max_len": max_len},
            name,
            functools.partial(_measure, n, bs, max_len, name),
        )
        for n in counts
        for name in runnable()
    ]


SUITE = Suite(
    name="scale",
    title="Data-parallel by shard_map, cost per device",
    note="Fresh results, N = 3, the same inputs in each call. Each device has its own requests and "
    "pool; device times are per device. Devices of one CPU share its cores.",
    jobs=jobs,
)
