"""The functions that engines call today, with their names, on torch tensors.

The names, arguments and return values are those of the source documents' CUDA kernels. They run the
kernels of the FFI library on PyTorch's current stream, for any batch size and number of backends;
given CPU tensors, its CPU functions. Each raises ValueError or TypeError, before anything is
written, where an argument is wrong, and RuntimeError where the library was not built.
"""

from collections.abc import Sequence
from typing import Any

import torch

from jaxnsa import checks, direct
from jaxnsa.ffi import VARIANTS
from jaxnsa.interop.broadcasts import Broadcasts
from jaxnsa.interop.direct_path import (
    on_device,
    rows_struct,
    set_backends,
    set_inputs,
    set_vector,
    stream_of,
)
from jaxnsa.interop.registration import FIELDS, TABLES, field_of
from jaxnsa.interop.tensors import (
    Checked,
    check_rows,
    checked_pool,
    checked_vector,
    extent,
    platform_of,
)
from jaxnsa.metadata import ForwardMode, NSAMetadata
from jaxnsa.spec import MAX_LEN, Rows, Spec

_BROADCASTS = Broadcasts()


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
    numbers = _check_numbers(max_len, nsa_index_topk, real_page_size)
    inputs = (seq_lens, req_pool_indices, req_to_token)
    lists: dict[str, Sequence[torch.Tensor | None]] = {
        "cache_seqlens": cache_seqlens_list,
        "cu_seqlens_k": cu_seqlens_k_list,
        "nsa_cache_seqlens": nsa_cache_seqlens_list,
        "nsa_cu_seqlens_k": nsa_cu_seqlens_k_list,
        "page_indices": page_indices_list,
    }
    if real_page_size > 1:
        if real_page_table_list is None:
            raise ValueError(
                f"real_page_table_list: got None, expected tensors as real_page_size is "
                f"{real_page_size}"
            )
        lists["real_page_table"] = real_page_table_list
    for field, tensors in lists.items():
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"{field}_list: got {_described(tensors)}, expected a list of tensors")
    key = _BROADCASTS.key(seq_lens, lists.values(), numbers)
    if _BROADCASTS.launch(key, inputs):
        return
    read = _check_inputs(*inputs)
    args = _fused(read, *numbers)
    sizes = _sizes(args)
    written = []
    for field, tensors in lists.items():
        if len(tensors) != len(cache_seqlens_list):
            raise ValueError(
                f"{field}_list: got {len(tensors)} tensors, expected {len(cache_seqlens_list)} as "
                f"in cache_seqlens_list"
            )
        for k, tensor in enumerate(tensors):
            name = f"{field}_list[{k}]"
            written.append(_check_written(name, tensor, sizes[field], seq_lens.device, read))
    backends = [
        {field: tensors[k] for field, tensors in lists.items()}
        for k in range(len(cache_seqlens_list))
    ]
    groups = _groups(backends)
    for group in groups:
        _launch_fused(args, group, seq_lens.device)
    if len(groups) == 1 and key is not None:
        _BROADCASTS.add(key, seq_lens.device, args, written)


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
    numbers = _check_numbers(max_len, nsa_index_topk, real_page_size)
    args = _fused(_check_inputs(seq_lens, req_pool_indices, req_to_token), *numbers)
    backend = {
        field: torch.empty(size, dtype=torch.int32, device=seq_lens.device)
        for field, size in _sizes(args).items()
    }
    _launch_fused(args, [backend], seq_lens.device)
    return NSAMetadata(**({"real_page_table": None} | backend))  # type: ignore[arg-type]


def fused_metadata_copy_cuda(precomputed: Any, metadata: Any) -> None:
    """Copies all arrays of `precomputed` to the start of those of `metadata`, in one launch.

    Args:
      precomputed: mapping or object with NSAMetadata's field names: contiguous int32 tensors; None
        or absent ones are left out.
      metadata: the same, of tensors at least as large.
    """
    args = direct.Copy()
    args.num_backends = 1
    device = None
    for k, field in enumerate(FIELDS):
        source = field_of(precomputed, field)
        if source is None:
            continue
        name = f"precomputed.{field}"
        if not isinstance(source, torch.Tensor) or source.dtype != torch.int32:
            raise TypeError(f"{name}: got {_described(source)}, expected an int32 torch.Tensor")
        if source.dim() != (2 if field in TABLES else 1) or not source.is_contiguous():
            raise ValueError(
                f"{name}: got shape {tuple(source.shape)} and strides {source.stride()}, expected "
                f"a contiguous {'matrix' if field in TABLES else 'vector'}"
            )
        device = device or source.device
        if source.device != device:
            raise ValueError(f"{name}: got a tensor on {source.device}, expected {device}")
        target = field_of(metadata, field)
        own = {name: Checked(source, *extent(source))}
        _check_written(f"metadata.{field}", target, tuple(source.shape), device, own)
        rows, columns = source.shape if source.dim() == 2 else (1, len(source))
        stride = target.stride(0) if source.dim() == 2 else columns
        args.arrays[k] = direct.CopiedArray(source.data_ptr(), rows, columns, stride, 0)
        args.destinations[0][k] = target.data_ptr()
    if device is None:
        raise ValueError("precomputed: got no tensors, expected those of NSAMetadata's fields")
    library = direct.library(platform_of(device))
    on_device(device, lambda: library.copy_metadata(stream_of(device), args))


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
      The number of rows of all requests, also where it exceeds the capacity. Reading it waits for
      the device.
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
    if not isinstance(extend_seq_lens, torch.Tensor):
        raise TypeError(
            f"extend_seq_lens: got {_described(extend_seq_lens)}, expected a torch.Tensor"
        )
    total = int(extend_seq_lens.clamp(min=0).sum())
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
    reason = direct.unavailable(platform)
    variants = VARIANTS["fill_draft_extend_metadata"]
    return {
        "available": reason is None,
        "reason": reason,
        "backend": "CUDA C++" if platform == "gpu" else "C++",
        "variants": dict(variants),
        "default": next(iter(variants)),
        "prefix_sum_fusion": True,
    }


def _check_numbers(max_len: int, nsa_index_topk: int, real_page_size: int) -> tuple[int, int, int]:
    return (
        checks.integer("max_len", max_len, 1, MAX_LEN),
        checks.integer("nsa_index_topk", nsa_index_topk, 1),
        checks.integer("real_page_size", real_page_size, 1),
    )


def _check_inputs(
    seq_lens: torch.Tensor, req_pool_indices: torch.Tensor, req_to_token: torch.Tensor
) -> dict[str, Checked]:
    """The inputs of a decode step by name."""
    if not isinstance(seq_lens, torch.Tensor):
        raise TypeError(f"seq_lens: got {_described(seq_lens)}, expected a torch.Tensor")
    device = seq_lens.device
    lengths = checked_vector("seq_lens", seq_lens, device, None)
    return {
        "seq_lens": lengths,
        "req_pool_indices": checked_vector(
            "req_pool_indices", req_pool_indices, device, len(seq_lens)
        ),
        "req_to_token": checked_pool(req_to_token, device),
    }


def _fused(
    read: dict[str, Checked], max_len: int, nsa_index_topk: int, real_page_size: int
) -> direct.Fused:
    """Everything but the destinations."""
    pool = read["req_to_token"]
    args = direct.Fused()
    args.max_len = checks.integer("max_len", max_len, 1, pool.tensor.shape[1])
    args.real_page_size = real_page_size
    args.tail = direct.TAILS.index("copy")
    args.rows = rows_struct(
        Rows.of(ForwardMode.DECODE, len(read["seq_lens"].tensor)), nsa_index_topk
    )
    set_inputs(args, read["seq_lens"], read["req_pool_indices"], pool)
    return args


def _sizes(args: direct.Fused) -> dict[str, tuple[int, ...]]:
    """What a decode step writes of each array."""
    spec = Spec(
        rows=Rows.of(ForwardMode.DECODE, args.rows.requests),
        max_len=args.max_len,
        nsa_index_topk=args.rows.nsa_index_topk,
        real_page_size=args.real_page_size,
        wide_table=True,
        tail="copy",
    )
    return {field: array.shape for field, array in vars(spec.shapes()).items() if array is not None}


def _check_written(
    name: str,
    value: Any,
    size: tuple[int, ...],
    device: torch.device,
    read: dict[str, Checked],
) -> tuple[int, int]:
    """The memory of `value`, which must be an int32 tensor that holds `size` and is not read."""
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.int32:
        raise TypeError(f"{name}: got {_described(value)}, expected an int32 torch.Tensor")
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}")
    shape, rows, columns = value.shape, size[0], size[-1]
    if len(shape) != len(size) or shape[0] < rows or shape[-1] < columns:
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected at least {size}")
    span = columns
    if len(size) == 2:
        span += (rows - 1) * check_rows(name, value)
    elif not value.is_contiguous():
        raise ValueError(f"{name}: got stride {value.stride(0)}, expected a contiguous vector")
    start = value.data_ptr()
    if span > 0 and not start:
        raise ValueError(f"{name}: got a tensor whose memory was freed")
    end = start + 4 * span
    for other, (_, first, last) in read.items():
        if first < end and start < last:
            raise ValueError(f"{name}: got memory of {other}, which is read; expected its own")
    return start, end


def _groups(backends: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Backends as launches take them: so many, whose tables have rows equally far apart."""
    alike: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for backend in backends:
        strides = tuple(backend[table].stride(0) for table in TABLES if table in backend)
        alike.setdefault(strides, []).append(backend)
    return [
        group[first : first + direct.MAX_BACKENDS]
        for group in alike.values()
        for first in range(0, len(group), direct.MAX_BACKENDS)
    ]


def _launch_fused(
    args: direct.Fused, backends: list[dict[str, torch.Tensor]], device: torch.device
) -> None:
    # In decode seqlens_expanded is cache_seqlens, and not every caller has both.
    complete = [{"seqlens_expanded": backend["cache_seqlens"]} | backend for backend in backends]
    set_backends(args, complete)
    library = direct.library(platform_of(device))
    on_device(device, lambda: library.fused_metadata(stream_of(device), args))


def _fill(
    variant: str,
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> torch.Tensor:
    if not isinstance(seq_lens, torch.Tensor):
        raise TypeError(f"seq_lens: got {_described(seq_lens)}, expected a torch.Tensor")
    device = seq_lens.device
    read = {"seq_lens": checked_vector("seq_lens", seq_lens, device, None)}
    bs = len(seq_lens)
    read |= {
        "extend_seq_lens": checked_vector("extend_seq_lens", extend_seq_lens, device, bs),
    }
    written = {
        "out_seqlens_expanded": out_seqlens_expanded,
        "out_nsa_cache_seqlens": out_nsa_cache_seqlens,
    }
    for name, tensor in written.items():
        _check_written(name, tensor, (0,), device, read)
    capacity = min(len(out_seqlens_expanded), len(out_nsa_cache_seqlens))
    total = torch.empty((), dtype=torch.int32, device=device)
    args = direct.DraftExtend()
    rows = args.rows
    rows.requests, rows.count = bs, capacity
    rows.nsa_index_topk = checks.integer("nsa_index_topk", nsa_index_topk, 1)
    set_vector(rows.seq_lens, read["seq_lens"])
    set_vector(rows.extend_seq_lens, read["extend_seq_lens"])
    args.seqlens_expanded = out_seqlens_expanded.data_ptr()
    args.nsa_cache_seqlens = out_nsa_cache_seqlens.data_ptr()
    args.total_tokens = total.data_ptr()
    args.tail = direct.TAILS.index("keep")
    if variant != "optimized":
        offsets = torch.empty(bs + 1, dtype=torch.int32, device=device)
        args.offsets = offsets.data_ptr()
    library = direct.library(platform_of(device))
    on_device(device, lambda: library.fill_draft_extend(stream_of(device), variant, args))
    return total


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
