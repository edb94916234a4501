"""The FFI implementation: hand-written CUDA and its C++ twin for the CPU, called through XLA."""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jaxnsa.implementations.native_library import (
    LIBRARIES,
    how_to_rebuild,
    library,
    schedule_arguments,
)
from jaxnsa.implementations.native_library import unavailable as library_unavailable
from jaxnsa.metadata import FIELDS, Array, DraftExtendSeqlens, Extent, NSAMetadata
from jaxnsa.spec import Inputs, Spec

VARIANTS = {
    "prefix_sum": {
        "block_scan": "one launch; each block adds up what comes before it and scans its tile",
        "sequential": "one launch of one thread",
        "blelloch": "one launch of one block; Blelloch's work-efficient scan, tile by tile",
    },
    "fill_draft_extend_metadata": {
        "optimized": "one launch; prefix sum, search and clamp fused",
        "adaptive": "two launches; linear search up to 16 requests, binary search above",
        "basic": "two launches; binary search",
    },
}
"""What the source documents compare, correct at every size here; the default comes first. On the
CPU all variants are the same loop."""

_PREFIX_SUM = "jaxnsa_prefix_sum"
_FILL_DRAFT_EXTEND = "jaxnsa_fill_draft_extend_metadata"
_COPY = "jaxnsa_copy"
_FUSED = "jaxnsa_fused_metadata"
_TARGETS = (_PREFIX_SUM, _FILL_DRAFT_EXTEND, _COPY, _FUSED)

_FIELD_INDICES = {name: index for index, name in enumerate(FIELDS)}

EXPORT_CHECKS = tuple(export.DisabledSafetyCheck.custom_call(target) for target in _TARGETS)
"""The `disabled_checks` with which `jax.export.export` takes functions that use the FFI. The
process that runs the exported function calls `native_library.library` for its platform first."""


def unavailable(platform: str | None) -> str | None:
    """Why this cannot run on a platform; None where it can."""
    if platform is None:
        reasons = [library_unavailable(p) for p in LIBRARIES]
        return None if None in reasons else reasons[0]
    if platform not in LIBRARIES:
        return f"needs a CPU or an NVIDIA GPU, not a {platform}"
    return library_unavailable(platform) or _probe(platform)


def version() -> str | None:
    """The XLA FFI API of each library; None where none was built."""
    built = [p for p in LIBRARIES if library_unavailable(p) is None]
    return ", ".join(f"XLA FFI API {_built_api(p)} ({p})" for p in built) or None


def prefix_sum(x: jax.Array, *, variant: str = "block_scan") -> jax.Array:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum, by one of `VARIANTS`."""
    return _call(_PREFIX_SUM, jax.ShapeDtypeStruct((len(x) + 1,), jnp.int32), x, variant=variant)


def fill_draft_extend_metadata(
    extend_seq_lens: Array,
    seq_lens: Array,
    *,
    nsa_index_topk: int,
    max_total_tokens: int,
    variant: str = "optimized",
) -> DraftExtendSeqlens:
    """See `jaxnsa.fill_draft_extend_metadata`; by one of `VARIANTS`."""
    rows = jax.ShapeDtypeStruct((max_total_tokens,), jnp.int32)
    total = jax.ShapeDtypeStruct((), jnp.int32)
    offsets = jax.ShapeDtypeStruct((0 if variant == "optimized" else len(seq_lens) + 1,), jnp.int32)
    *lengths, _ = _call(
        _FILL_DRAFT_EXTEND,
        (rows, rows, total, offsets),
        extend_seq_lens,
        seq_lens,
        nsa_index_topk=np.int64(nsa_index_topk),
        variant=variant,
    )
    return DraftExtendSeqlens(*lengths)


def fused_metadata(
    inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec
) -> tuple[NSAMetadata, ...]:
    """Computes the metadata of `spec` for all of its destinations."""
    fields, rows = spec.fields(), spec.rows
    shapes: Mapping[str, Any] = spec.shapes()
    return _call_in_place(
        _FUSED,
        jax.tree.leaves(inputs),
        out,
        (spec.metadata(shapes),) * spec.destinations,
        fields=np.array([_FIELD_INDICES[field.name] for field in fields], np.int64),
        tokens_per_column=_tokens_per_column([field.name for field in fields], spec),
        slots_per_page=np.array(
            [spec.slots_per_page(f) if f.extent is Extent.TABLE else 0 for f in fields], np.int64
        ),
        rows=np.int64(rows.count),
        rows_per_request=np.int64(rows.rows_per_request or 0),
        added_tokens=np.int64(rows.added_tokens),
        prefill=rows.prefill,
        max_total_keys=np.int64(spec.max_total_keys or 0),
        max_len=np.int64(spec.max_len),
        nsa_index_topk=np.int64(spec.nsa_index_topk),
        index_kpool=np.int64(spec.index_kpool),
        **{
            name: np.array(numbers, np.int64)
            for name, numbers in schedule_arguments(spec.schedules).items()
        },
        tail=spec.tail,
        num_backends=np.int64(spec.num_backends),
        stacked=spec.stacked,
        backend_offsets=np.array(spec.offsets, np.int64),
        written=inputs.written_lens is not None,
        max_new_tokens=np.int64(spec.max_new_tokens),
    )


def copy(
    src: NSAMetadata,
    out: tuple[NSAMetadata, ...] | None,
    *,
    num_backends: int,
    live: Spec | None = None,
) -> tuple[NSAMetadata, ...]:
    """Copies `src` to `num_backends` destinations; its live columns only with `live`."""
    inputs = list(src.arrays().values())
    tokens_per_column = _tokens_per_column(src.arrays(), live)
    if tokens_per_column.any():
        assert live is not None
        inputs.append(live.table_kv_lens(src))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), src)
    return _call_in_place(
        _COPY,
        inputs,
        out,
        (shapes,) * num_backends,
        num_backends=np.int64(num_backends),
        tokens_per_column=tokens_per_column,
    )


def _tokens_per_column(names: Iterable[str], spec: Spec | None) -> np.ndarray:
    """Of each array, what a column stands for; 0 where it is no table, or there is no spec."""
    return np.array(
        [
            spec.tokens_per_column(FIELDS[name])
            if spec is not None and FIELDS[name].extent is Extent.TABLE
            else 0
            for name in names
        ],
        np.int64,
    )


def _call_in_place(target: str, inputs: list, out: Any, shapes: Any, **attributes: Any) -> Any:
    """A call whose results, a pytree of the given shapes, lie in `out` where that is given."""
    # The barrier keeps XLA from handing the call a slice of a larger array in place of the array
    # that it is to write: the result would be another buffer, which nobody fills.
    held = lax.optimization_barrier(jax.tree.leaves(out))
    flat_shapes, structure = jax.tree.flatten(shapes)
    aliases = {len(inputs) + k: k for k in range(len(held))}
    results = _call(target, flat_shapes, *inputs, *held, aliases=aliases, **attributes)
    return jax.tree.unflatten(structure, results)


def _call(
    target: str, shapes: Any, *operands: Array, aliases: Any = None, **attributes: Any
) -> Any:
    for platform in LIBRARIES:
        library_unavailable(platform)  # registers the handlers of what there is
    call = jax.ffi.ffi_call(
        target, shapes, vmap_method="sequential", input_output_aliases=aliases or {}
    )
    return call(*operands, **attributes)


@functools.cache
def _probe(platform: str) -> str | None:
    """Runs the smallest call: a runtime may refuse a handler and not say so until it is called."""
    x = np.arange(3, dtype=np.int32)
    try:
        with jax.disable_jit(False), jax.default_device(jax.devices(platform)[0]):
            compiled = jax.jit(prefix_sum).lower(x).compile()
            result = np.asarray(compiled(x))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return (
            f"{LIBRARIES[platform]} was built with XLA FFI API {_built_api(platform)}, this "
            f"jaxlib has {_runtime_api()}, and a probe call failed: {reason}; to rebuild the "
            f"library for this jaxlib, run: {how_to_rebuild()}"
        )
    if result.tolist() != [0, 0, 1, 3]:
        return f"a probe call of {LIBRARIES[platform]} returned {result.tolist()}"
    return None


def _built_api(platform: str) -> str:
    return ".".join(map(str, library(platform).xla_ffi_api))


def _runtime_api() -> str:
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    numbers = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header.read_text())
    return ".".join(numbers)
