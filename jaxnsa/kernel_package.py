"""A package of GPU kernels, such as `pallas_kernels`, behind the interface of implementations."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from jaxnsa import xla
from jaxnsa.metadata import Array, DraftExtendSeqlens, NSAMetadata
from jaxnsa.spec import Spec
from nsa_kernel_types import FusedJob, Metadata, RowMap


def too_old(platform: str, oldest: float, generation: str) -> str | None:
    """Why the device is no NVIDIA GPU of a compute capability or newer; None where it is."""
    needs = f"needs an NVIDIA GPU of compute capability {oldest} ({generation}) or newer, not"
    if platform != "gpu":
        return f"{needs} a {platform}; install jax[cuda13] on a machine that has one"
    capability = jax.devices("gpu")[0].compute_capability
    if not capability.replace(".", "").isdigit() or float(capability) < oldest:
        return f"{needs} {capability}; use another implementation"
    return None


class KernelPackage:
    """The four computations. A kernel takes at least one element: XLA returns the empty results.

    Args:
      name: of the package, which is imported when it is first used.
      options: gives the keyword arguments of every kernel.
    """

    def __init__(self, name: str, options: Callable[[], dict[str, Any]] = dict):
        self._name = name
        self._options = options

    def prefix_sum(self, x: Array) -> Array:
        """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
        if not len(x):
            return xla.prefix_sum(x)
        return self._kernels.prefix_sum(x, **self._options())

    def fill_draft_extend_metadata(
        self, extend_seq_lens: Array, seq_lens: Array, **sizes: int
    ) -> DraftExtendSeqlens:
        """See `jaxnsa.fill_draft_extend_metadata`."""
        if not len(seq_lens) or not sizes["max_total_tokens"]:
            return xla.fill_draft_extend_metadata(extend_seq_lens, seq_lens, **sizes)
        result = self._kernels.seqlen_expansion(
            extend_seq_lens, seq_lens, **sizes, **self._options()
        )
        return DraftExtendSeqlens(
            result.seqlens_expanded, result.nsa_cache_seqlens, result.total_tokens.reshape(())
        )

    def broadcast(
        self,
        seq_lens: Array,
        req_pool_indices: Array,
        req_to_token: Array,
        extend_seq_lens: Array | None,
        out: tuple[NSAMetadata, ...] | None,
        spec: Spec,
    ) -> tuple[NSAMetadata, ...]:
        """Computes the metadata of `spec` for all of its destinations."""
        inputs = (seq_lens, req_pool_indices, req_to_token, extend_seq_lens)
        if not spec.rows.requests or not spec.rows.count:
            return xla.broadcast(*inputs, out, spec)
        rows = RowMap(
            requests=spec.rows.requests,
            rows=spec.rows.count,
            tokens_per_request=spec.rows.tokens_per_request,
            added_tokens=spec.rows.added_tokens,
            nsa_index_topk=spec.nsa_index_topk,
        )
        job = FusedJob(
            rows=rows,
            max_len=spec.max_len,
            real_page_size=spec.real_page_size,
            wide_table=spec.wide_table,
            tail=spec.tail,
            num_backends=spec.num_backends,
            stacked=spec.stacked,
        )
        destinations = None if out is None else tuple(Metadata(**vars(d)) for d in out)
        results = self._kernels.fused_metadata(*inputs, destinations, job, **self._options())
        return tuple(NSAMetadata(**result._asdict()) for result in results)

    def copy(
        self,
        src: NSAMetadata,
        out: tuple[NSAMetadata, ...] | None,
        *,
        num_backends: int,
        live: Spec | None = None,
    ) -> tuple[NSAMetadata, ...]:
        """Copies `src` to `num_backends` destinations; its live columns only with `live`."""
        if any(not array.size for array in jax.tree.leaves(src)):
            return xla.copy(src, out, num_backends=num_backends, live=live)
        return self._kernels.broadcast(
            src,
            out,
            num_backends=num_backends,
            column_tokens=None if live is None else live.column_tokens(src),
            kv_lens=None if live is None else src.seqlens_expanded,
            **self._options(),
        )

    @property
    def _kernels(self) -> ModuleType:
        return importlib.import_module(self._name)
