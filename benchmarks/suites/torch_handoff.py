"""Refreshing a PyTorch engine's static buffers: what an engine has, and what it could have."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import on_gpu, timing
from benchmarks.problem import PAGE_SIZE, TOPK, Problem
from benchmarks.suite import Job, Suite
from benchmarks.suites.schedules import ALL
from jaxnsa import ForwardMode

# SGLang's own function, where an installation is found.
SGLANG = ("sglang.kernels.ops.attention.dsa.metadata", "fused_dsa_decode_metadata")
# The order in which engines pass a backend's tensors.
SGL_FIELDS = (
    "cache_seqlens",
    "cu_seqlens_k",
    "page_indices",
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "real_page_table",
)


def _tensors(problem: Problem) -> tuple[Any, ...]:
    """seq_lens, req_pool_indices, req_to_token, and each backend's zeroed tensors."""
    import torch

    device = "cuda" if on_gpu() else "cpu"
    inputs = [torch.from_numpy(a).to(device) for a in problem.arguments]
    backends = [
        {
            field: torch.zeros(array.shape, dtype=torch.int32, device=device)
            for field, array in problem.expected.arrays().items()
        }
        for _ in range(problem.num_backends)
    ]
    return (*inputs, backends)


def _registered(path: Any, problem: Problem, tensors: Any) -> Callable[[], None]:
    from jaxnsa.interop.torch import BackendBuffers, DlpackOptions

    *inputs, backends = tensors
    buffers = BackendBuffers(
        backends,
        nsa_index_topk=TOPK,
        real_page_size=PAGE_SIZE,
        schedules=problem.schedules,
        path=path,
        dlpack=DlpackOptions(inputs[2]),
    )
    return functools.partial(buffers.update, *inputs)


def _sgl_names(problem: Problem, tensors: Any) -> Callable[[], None]:
    from jaxnsa.interop import sgl_kernel

    *inputs, backends = tensors
    lists = [[backend[field] for backend in backends] for field in SGL_FIELDS]
    arguments: list[Any] = [*inputs, *lists, problem.max_len, TOPK, PAGE_SIZE]
    return functools.partial(sgl_kernel.fused_metadata_precompute_and_broadcast_cuda, *arguments)


def _eager(problem: Problem, tensors: Any) -> Callable[[], None]:
    import torch

    seq_lens, indices, pool, backends = tensors

    def call() -> None:
        for b in backends:
            lengths = seq_lens.to(torch.int32)
            clamped = lengths.clamp(max=TOPK)
            pages = pool[indices.long()]
            b["cache_seqlens"].copy_(lengths)
            b["cu_seqlens_k"][1:].copy_(torch.cumsum(lengths, 0, dtype=torch.int32))
            b["seqlens_expanded"].copy_(lengths)
            b["nsa_cache_seqlens"].copy_(clamped)
            b["nsa_cu_seqlens_k"][1:].copy_(torch.cumsum(clamped, 0, dtype=torch.int32))
            b["page_indices"].copy_(pages)
            b["real_page_table"].copy_(
                torch.div(pages[:, ::PAGE_SIZE], PAGE_SIZE, rounding_mode="floor")
            )

    return call


def _triton(problem: Problem, tensors: Any) -> Callable[[], None]:
    from benchmarks.suites.triton_decode import decode_metadata

    seq_lens, indices, pool, backends = tensors

    def call() -> None:
        for backend in backends:
            decode_metadata(seq_lens, indices, pool, backend, TOPK, PAGE_SIZE)

    return call


def _sglang(problem: Problem, tensors: Any) -> Callable[[], None]:
    module, name = SGLANG
    fused = getattr(importlib.import_module(module), name)
    seq_lens, indices, pool, backends = tensors

    def call() -> None:
        for b in backends:
            given = [b[field] for field in SGL_FIELDS]
            fused(seq_lens, indices, pool, *given, problem.bs, problem.max_len, TOPK, PAGE_SIZE)
            b["seqlens_expanded"].copy_(b["cache_seqlens"])

    return call


def _measure(make: Callable, problem: Problem) -> dict[str, float]:
    import torch

    tensors = _tensors(problem)
    call = make(problem, tensors)
    call()
    lengths = problem.arguments[0]
    for backend in tensors[-1]:
        for field, array in problem.expected.arrays().items():
            got = backend[field].cpu().numpy()
            if field in ("page_indices", "real_page_table"):  # compared as far as they are live
                tokens = 1 if field == "page_indices" else PAGE_SIZE
                live = np.arange(array.shape[1]) * tokens < lengths[:, None]
                got = np.where(live, got, 0)
            if make is _sgl_names and field == "seqlens_expanded":
                continue  # which those names do not have
            if not np.array_equal(got, array):
                raise AssertionError(f"{field} is wrong for {problem.case}")
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu() else (lambda _: None)
    return timing([call], 500, wait, cached=True)


def jobs(quick: bool) -> list[Job]:
    """Ways to refresh; none without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return []
    makers: dict[str, Callable] = {
        "direct": functools.partial(_registered, "direct"),
        "DLPack": functools.partial(_registered, "dlpack"),
        "sgl_kernel names": _sgl_names,
        "torch eager x N": _eager,
    }
    if on_gpu() and importlib.util.find_spec("triton") is not None:
        makers["Triton x N"] = _triton
    if on_gpu() and importlib.util.find_spec("sglang") is not None:
        makers["SGLang's Triton x N"] = _sglang
    shapes = [(4, 1024, 1024)] if quick else [(32, 2048, 2048), (32, 65_536, 8192)]
    found = []
    for bs, n, live in shapes:
        problem = Problem(ForwardMode.DECODE, bs, n, 3, live)
        ways = {name: (make, problem) for name, make in makers.items()}
        ways["direct, schedules"] = makers["direct"], dataclasses.replace(problem, schedules=ALL)
        found += [
            Job(problem.case, name, functools.partial(_measure, *way)) for name, way in ways.items()
        ]
    return found


SUITE = Suite(
    name="torch",
    title="Host time to refresh a PyTorch engine's buffers",
    note="Until the call returns; on a CPU that is when the work is done. direct and DLPack are "
    "the paths of BackendBuffers, which write live columns, also with all schedules registered; "
    "the sgl_kernel names write max_len columns; torch eager gathers with PyTorch's own "
    "operations, and Triton in one plain kernel that writes live columns, both for each backend "
    "again. On a CPU JAX does not write the memory of others, so that DLPack copies whole tables. "
    "Each is the median of the fastest of three passes.",
    jobs=jobs,
    metric="issue_us",
    passes=3,
)
