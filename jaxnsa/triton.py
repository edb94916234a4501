"""The Triton implementation: `triton_kernels` behind the interface of implementations."""

import functools
import importlib.metadata
import importlib.util
from typing import Any

import jax

from jaxnsa import xla
from jaxnsa.metadata import Array, DraftExtendSeqlens, NSAMetadata
from jaxnsa.spec import Spec

_OLDEST = 8.0  # Ampere


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    if missing := _missing():
        return f"{' and '.join(missing)} not installed; run: pip install 'jaxnsa[triton]'"
    if platform is None:
        return None
    if platform != "gpu":
        if _interpreted():
            return None
        return (
            f"needs an NVIDIA GPU of compute capability {_OLDEST} (Ampere) or newer, not a "
            f"{platform}; install jax[cuda13] on a machine that has one"
        )
    capability = jax.devices("gpu")[0].compute_capability
    if not capability.replace(".", "").isdigit():
        return f"needs an NVIDIA GPU, not {capability}; use another implementation"
    if float(capability) < _OLDEST:
        return (
            f"needs compute capability {_OLDEST} (Ampere) or newer, this GPU has {capability}; "
            f"use another implementation"
        )
    return _import_error()


def version() -> str | None:
    """Of jax-triton and Triton; None where one is missing."""
    if _missing():
        return None
    packages = ("jax-triton", "triton")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def prefix_sum(x: Array) -> Array:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
    if not len(x):
        return xla.prefix_sum(x)
    return _kernels().prefix_sum(x)


def fill_draft_extend_metadata(
    extend_seq_lens: Array, seq_lens: Array, *, nsa_index_topk: int, max_total_tokens: int
) -> DraftExtendSeqlens:
    """See `jaxnsa.fill_draft_extend_metadata`."""
    if not len(seq_lens) or not max_total_tokens:
        return xla.fill_draft_extend_metadata(
            extend_seq_lens,
            seq_lens,
            nsa_index_topk=nsa_index_topk,
            max_total_tokens=max_total_tokens,
        )
    result = _kernels().seqlen_expansion(
        extend_seq_lens, seq_lens, nsa_index_topk=nsa_index_topk, max_total_tokens=max_total_tokens
    )
    return DraftExtendSeqlens(
        result.seqlens_expanded, result.nsa_cache_seqlens, result.total_tokens.reshape(())
    )


def broadcast(
    seq_lens: Array,
    req_pool_indices: Array,
    req_to_token: Array,
    extend_seq_lens: Array | None,
    out: tuple[NSAMetadata, ...] | None,
    spec: Spec,
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of `spec` for all of its destinations."""
    if not spec.rows.requests or not spec.rows.count:
        return xla.broadcast(seq_lens, req_pool_indices, req_to_token, extend_seq_lens, out, spec)
    kernels = _kernels()
    results = kernels.fused_metadata(
        seq_lens,
        req_pool_indices,
        req_to_token,
        extend_seq_lens,
        None if out is None else tuple(kernels.Metadata(**vars(d)) for d in out),
        rows=kernels.RowMap(
            requests=spec.rows.requests,
            rows=spec.rows.count,
            tokens_per_request=spec.rows.tokens_per_request,
            added_tokens=spec.rows.added_tokens,
            nsa_index_topk=spec.nsa_index_topk,
        ),
        max_len=spec.max_len,
        real_page_size=spec.real_page_size,
        wide_table=spec.wide_table,
        tail=spec.tail,
        num_backends=spec.num_backends,
        stacked=spec.stacked,
    )
    return tuple(NSAMetadata(**result._asdict()) for result in results)


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies `src` to `num_backends` destinations; its live columns only with `live`."""
    if any(not array.size for array in jax.tree.leaves(src)):
        return xla.copy(src, out, num_backends=num_backends, live=live)
    return _kernels().broadcast(
        src,
        out,
        num_backends=num_backends,
        column_tokens=None if live is None else live.column_tokens(src),
        kv_lens=None if live is None else src.seqlens_expanded,
    )


def _missing() -> list[str]:
    return [name for name in ("jax_triton", "triton") if not importlib.util.find_spec(name)]


def _interpreted() -> bool:
    from triton_kernels.launch import INTERPRET

    return INTERPRET


@functools.cache
def _import_error() -> str | None:
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"jax_triton cannot be imported: {error}"
    return None


def _kernels() -> Any:
    # Imports Triton, which takes a second: only where it is used.
    import triton_kernels

    return triton_kernels
