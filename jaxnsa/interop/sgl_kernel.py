"""The functions that engines call today, with their names, on torch tensors.

The names, arguments and return values are those of the source documents' CUDA kernels. They run
kernels of the native library on PyTorch's current stream, for any batch size and number of
backends; given CPU tensors, its CPU functions. Each raises ValueError or TypeError, before anything
is written, where an argument is wrong, and RuntimeError where the library was not built.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from jaxnsa import argument_checks
from jaxnsa.implementations.ffi import VARIANTS
from jaxnsa.implementations.native_library import unavailable
from jaxnsa.interop.copies import CopyCache
from jaxnsa.interop.fills import CheckedInputs, FillCache
from jaxnsa.interop.launch_cache import key_of
from jaxnsa.interop.launches import (
    launch_checked,
    library_for,
    native_rows,
    on_device,
    prepared,
    stream_of,
)
from jaxnsa.interop.registration import field_of
from jaxnsa.interop.tensor_checks import (
    Checked,
    WrittenMemory,
    checked,
    checked_pool,
    checked_vector,
)
from jaxnsa.metadata import FIELDS, ForwardMode, NSAMetadata
from jaxnsa.spec import INT32_MAX, MAX_LEN, Rows, Spec

_FILLS = FillCache()
_COPIES = CopyCache()


def fused_metadata_precompute_and_broadcast_cuda(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens_list: Sequence[torch.Tensor],
    cu_seqlens_k_list: Sequence[torch.Tensor],
    page_indices_list: Sequence[torch.Tensor],
    nsa_cache_seqlens_list: Sequence[torch.Tensor],
    nsa_cu_seqlens_k_list: Sequence[torch.Tensor],
    real_page_table_list: Sequence[torch.Tensor | None] | None,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
) -> None:
    """The metadata of a decode step, written to the start of N backends' tensors.

    Args:
      seq_lens: int32 or int64 [bs].
      req_pool_indices: int32 or int64 [bs].
      req_to_token: int32 [pool_rows, pool_cols].
      cache_seqlens_list: N int32 tensors of at least [bs].
      cu_seqlens_k_list: N int32 tensors of at least [bs + 1].
      page_indices_list: N int32 tensors of at least [bs, max_len], of which max_len columns are
        written whatever is live.
      nsa_cache_seqlens_list: N int32 tensors of at least [bs].
      nsa_cu_seqlens_k_list: N int32 tensors of at least [bs + 1].
      real_page_table_list: N int32 tensors of at least [bs, ceil(max_len / real_page_size)]; None
        with a page size of 1.
      max_len: columns of the page table, in tokens.
      nsa_index_topk: the indexer's top-k, in tokens.
      real_page_size: tokens in a physical page.
    """
    numbers = _checked_numbers(max_len, nsa_index_topk, real_page_size)
    inputs = (seq_lens, req_pool_indices, req_to_token, None)
    given: dict[str, Any] = {
        "cache_seqlens": cache_seqlens_list,
        "cu_seqlens_k": cu_seqlens_k_list,
        "page_indices": page_indices_list,
        "nsa_cache_seqlens": nsa_cache_seqlens_list,
        "nsa_cu_seqlens_k": nsa_cu_seqlens_k_list,
    }
    if real_page_size > 1:
        if real_page_table_list is None:
            raise ValueError(
                f"real_page_table_list: got None, expected tensors as real_page_size is "
                f"{real_page_size}"
            )
        given["real_page_table"] = real_page_table_list
    # Fields that there is no list for are left out.
    lists = {field: given[field] for field in FIELDS if field in given}
    for field, tensors in lists.items():
        if not isinstance(tensors, list | tuple):
            raise TypeError(
                f"{field}_list: got {argument_checks.described(tensors)}, expected a list of "
                f"tensors"
            )
    key = None
    if isinstance(seq_lens, torch.Tensor) and seq_lens.dim() == 1:
        facts = (seq_lens.shape[0], *numbers, *map(len, lists.values()))
        key = key_of(seq_lens, itertools.chain(*lists.values()), facts)
    if _FILLS.try_launch(key, inputs):
        return
    read = _checked_inputs(seq_lens, req_pool_indices, req_to_token)
    spec = _decode_spec(read, *numbers)
    if not cache_seqlens_list:
        raise ValueError("cache_seqlens_list: got no tensors, expected at least one")
    backends: list[dict[str, Checked]] = [{} for _ in cache_seqlens_list]
    for field, tensors in lists.items():
        if len(tensors) != len(cache_seqlens_list):
            raise ValueError(
                f"{field}_list: got {len(tensors)} tensors, expected {len(cache_seqlens_list)} as "
                f"in cache_seqlens_list"
            )
        for k, tensor in enumerate(tensors):
            backends[k][field] = _checked_output(
                f"{field}_list[{k}]", tensor, spec.shapes()[field].shape, seq_lens
            )
    _FILLS.launch(key, spec, read, backends)


def precompute_decode_metadata_cuda(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
) -> NSAMetadata:
    """The metadata of a decode step in new tensors.

    Args:
      seq_lens, req_pool_indices, req_to_token, max_len, nsa_index_topk, real_page_size: as in
        `fused_metadata_precompute_and_broadcast_cuda`.

    Returns:
      NSAMetadata of int32 tensors; its docstring gives the shapes.
    """
    numbers = _checked_numbers(max_len, nsa_index_topk, real_page_size)
    read = _checked_inputs(seq_lens, req_pool_indices, req_to_token)
    spec = _decode_spec(read, *numbers)
    backend: dict[str, Any] = {
        field: torch.empty(array.shape, dtype=torch.int32, device=seq_lens.device)
        for field, array in spec.shapes().items()
    }
    native = library_for(seq_lens.device)
    launch_checked(prepared(native, spec, [backend]), native_rows(native, spec.rows), *read)
    return spec.metadata(backend)


def fused_metadata_copy_cuda(precomputed: Any, metadata: Any) -> None:
    """Copies all arrays of `precomputed` to the start of those of `metadata`, in one launch.

    Args:
      precomputed: mapping or object with NSAMetadata's field names: contiguous int32 tensors; None
        or absent ones are left out.
      metadata: the same, of tensors at least as large.
    """
    found = {field: field_of(precomputed, field) for field in FIELDS}
    given = {field: value for field, value in found.items() if value is not None}
    if not given:
        raise ValueError("precomputed: got no tensors, expected those of NSAMetadata's fields")
    targets = {field: field_of(metadata, field) for field in given}
    tensors = [*given.values(), *targets.values()]
    key = key_of(tensors[0], tensors, tuple(given))
    if _COPIES.try_copy(key):
        return
    read: list[Checked] = []
    written: list[Checked] = []
    for field, value in given.items():
        device = read[0].tensor.device if read else None
        dimensions = FIELDS[field].extent.dimensions
        name = f"precomputed.{field}"
        source = checked(name, value, device=device, dimensions=dimensions)
        if not value.is_contiguous():
            raise ValueError(f"{name}: got strides {value.stride()}, expected a contiguous matrix")
        read.append(source)
        written.append(_checked_output(f"metadata.{field}", targets[field], source.shape, value))
    _COPIES.copy(key, read, [written])


def fill_draft_extend_metadata_cuda(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    use_optimized: bool = True,
) -> int:
    """The lengths of a draft-extend step, written to the start of two tensors.

    Args:
      extend_seq_lens: int32 or int64 [bs], rows of each request.
      seq_lens: int32 or int64 [bs], KV length of each request, its extend tokens counted.
      nsa_index_topk: the indexer's top-k, in tokens.
      out_seqlens_expanded: int32 [capacity]; what lies past the total is left alone.
      out_nsa_cache_seqlens: int32 [capacity].
      use_adaptive: without `use_optimized`, linear search up to 16 requests and binary search
        above; False: always binary search.
      use_optimized: prefix sum, search and clamp in one launch.

    Returns:
      The number of rows of all requests, also where it exceeds the capacity; one past int32 wraps.
      Reading it waits for the device.
    """
    variant = "optimized" if use_optimized else "adaptive" if use_adaptive else "basic"
    out = (out_seqlens_expanded, out_nsa_cache_seqlens)
    return int(_fill(variant, extend_seq_lens, seq_lens, nsa_index_topk, *out).item())


def fill_draft_extend_metadata_cuda_adaptive(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    """`fill_draft_extend_metadata_cuda` in two launches, without waiting for the device.

    Returns:
      int32 [], the number of rows of all requests.
    """
    out = (out_seqlens_expanded, out_nsa_cache_seqlens)
    return _fill("adaptive", extend_seq_lens, seq_lens, nsa_index_topk, *out)


def fill_draft_extend_metadata_cuda_optimized(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    """`fill_draft_extend_metadata_cuda` in one launch, without waiting for the device.

    Returns:
      int32 [], the number of rows of all requests.
    """
    out = (out_seqlens_expanded, out_nsa_cache_seqlens)
    return _fill("optimized", extend_seq_lens, seq_lens, nsa_index_topk, *out)


def fill_draft_extend_metadata_fused_simple(
    extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, nsa_index_topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lengths of a draft-extend step in new tensors of exactly as many rows as there are.

    Args:
      extend_seq_lens, seq_lens, nsa_index_topk: as in `fill_draft_extend_metadata_cuda`.

    Returns:
      seqlens_expanded and nsa_cache_seqlens, int32 [total]. Their size waits for the device.
    """
    checked_vector("extend_seq_lens", extend_seq_lens, None, None)
    total = int(extend_seq_lens.clamp(0, INT32_MAX).sum())
    if total > INT32_MAX:
        raise ValueError(f"extend_seq_lens: got {total} rows in all, expected at most {INT32_MAX}")
    expanded, clamped = torch.empty(
        (2, total), dtype=torch.int32, device=extend_seq_lens.device
    ).unbind()
    _fill("optimized", extend_seq_lens, seq_lens, nsa_index_topk, expanded, clamped)
    return expanded, clamped


def get_kernel_info() -> dict[str, Any]:
    """Which kernels these functions run.

    Returns:
      - "available" (bool) and "reason" (None where available);
      - "backend": "CUDA C++", or "C++" where there is no GPU;
      - "variants": of `fill_draft_extend_metadata_cuda`, and "default", one of them;
      - "prefix_sum_fusion" (bool): the default's prefix sum is part of its launch.
    """
    platform = "gpu" if torch.cuda.is_available() else "cpu"
    reason = unavailable(platform)
    variants = VARIANTS["fill_draft_extend_metadata"]
    return {
        "available": reason is None,
        "reason": reason,
        "backend": "CUDA C++" if platform == "gpu" else "C++",
        "variants": dict(variants),
        "default": next(iter(variants)),
        "prefix_sum_fusion": True,
    }


def _checked_numbers(
    max_len: int, nsa_index_topk: int, real_page_size: int
) -> tuple[int, int, int]:
    return (
        argument_checks.integer("max_len", max_len, 1, MAX_LEN),
        argument_checks.integer("nsa_index_topk", nsa_index_topk, 1),
        argument_checks.integer("real_page_size", real_page_size, 1),
    )


def _checked_inputs(
    seq_lens: torch.Tensor, req_pool_indices: torch.Tensor, req_to_token: torch.Tensor
) -> CheckedInputs:
    """The inputs of a decode step."""
    lengths = checked_vector("seq_lens", seq_lens, None, None)
    return CheckedInputs(
        lengths,
        checked_vector("req_pool_indices", req_pool_indices, seq_lens.device, len(seq_lens)),
        checked_pool(req_to_token, seq_lens.device),
        None,
    )


def _checked_output(name: str, value: Any, size: tuple[int, ...], beside: torch.Tensor) -> Checked:
    """`value`, which must be an int32 tensor that has room for `size`."""
    return checked(name, value, device=beside.device, dimensions=len(size), at_least=size)


def _decode_spec(
    read: CheckedInputs, max_len: int, nsa_index_topk: int, real_page_size: int
) -> Spec:
    """A decode step of these inputs."""
    return Spec(
        rows=Rows.of(ForwardMode.DECODE, read.seq_lens.shape[0]),
        max_len=argument_checks.integer("max_len", max_len, 1, read.req_to_token.shape[1]),
        nsa_index_topk=nsa_index_topk,
        real_page_size=real_page_size,
        wide_table=True,
        tail="copy",
    )


def _fill(
    variant: str,
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    lengths = checked_vector("seq_lens", seq_lens, None, None)
    bs, device = len(seq_lens), seq_lens.device
    extend = checked_vector("extend_seq_lens", extend_seq_lens, device, bs)
    expanded = checked("out_seqlens_expanded", out_seqlens_expanded, device=device)
    clamped = checked("out_nsa_cache_seqlens", out_nsa_cache_seqlens, device=device)
    WrittenMemory([expanded, clamped]).check_apart([lengths, extend])
    topk = argument_checks.integer("nsa_index_topk", nsa_index_topk, 1)
    capacity = min(*expanded.shape, *clamped.shape)
    total = torch.empty((), dtype=torch.int32, device=device)
    offsets = torch.empty(0 if variant == "optimized" else bs + 1, dtype=torch.int32, device=device)
    native = library_for(device)
    on_device(
        device,
        lambda: native.fill_draft_extend_metadata(
            stream_of(device),
            variant=variant,
            rows=native.Rows(bs, capacity, 0, 0, False),
            nsa_index_topk=topk,
            extend_seq_lens=extend.vector,
            seq_lens=lengths.vector,
            seqlens_expanded=expanded.start,
            nsa_cache_seqlens=clamped.start,
            total_tokens=total.data_ptr(),
            offsets=offsets.data_ptr(),
        ),
    )
    return total
