"""SGLang's copies of a step's metadata, from the tensors of one backend to those of others."""

import functools
from typing import Any, NamedTuple

import torch

from jaxnsa import argument_checks
from jaxnsa.interop.copies import CopyCache
from jaxnsa.interop.launch_cache import key_of
from jaxnsa.interop.tensor_checks import Checked, check_memory, checked
from jaxnsa.spec import MAX_LEN

_COPIES = CopyCache()


class Arrays(NamedTuple):
    """What is copied, by SGLang's names of sources, as it came: tensors, or None."""

    cache_seqlens: Any
    cu_seqlens_k: Any
    page_indices: Any
    dsa_cache_seqlens: Any
    seqlens_expanded: Any
    dsa_cu_seqlens_k: Any
    real_page_table: Any
    flashmla_num_splits: Any
    flashmla_metadata: Any


@functools.cache
def _wanted(
    decode: bool, real_page_table: bool, num_splits: bool, metadata: bool
) -> tuple[int, ...]:
    """Positions in `Arrays._fields` of what is copied."""
    absent = {
        "seqlens_expanded": decode,
        "real_page_table": not real_page_table,
        "flashmla_num_splits": not num_splits,
        "flashmla_metadata": not (num_splits and metadata),
    }
    return tuple(k for k, name in enumerate(Arrays._fields) if not absent.get(name))


def copy(
    decode: bool,
    bs: int,
    size: int,
    columns: int,
    source: Arrays,
    destinations: dict[str, Arrays],
) -> None:
    """Copies from arrays to others.

    Args:
      decode: whether the mode is decode.
      bs: requests.
      size: rows, of the arrays that have an element for each.
      columns: of page_indices.
      source: what is copied.
      destinations: what it is copied to, by the end of the arguments' names.
    """
    wanted = _wanted(
        decode,
        source.real_page_table is not None,
        source.flashmla_num_splits is not None,
        source.flashmla_metadata is not None,
    )
    tensors = [arrays[k] for arrays in (source, *destinations.values()) for k in wanted]
    key = key_of(source.cache_seqlens, tensors, (decode, bs, size, columns, *wanted))
    if _COPIES.try_copy(key):
        return
    integer = argument_checks.integer
    bs = integer("bs", bs, 0)
    size = integer("seqlens_expanded_size", size, 0)
    width = "max_len" if decode else "max_seqlen_k"
    columns = integer(width, columns, 0, MAX_LEN)
    ends = {
        "cache_seqlens": bs,
        "cu_seqlens_k": bs + 1,
        "dsa_cache_seqlens": size,
        "seqlens_expanded": size,
        "dsa_cu_seqlens_k": size + 1,
        "flashmla_num_splits": size + 1,
    }
    read: list[Checked] = []
    written: dict[str, list[Checked]] = {end: [] for end in destinations}
    rows = bs
    for k in wanted:
        name, value = Arrays._fields[k], source[k]
        device = read[0].tensor.device if read else None
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            check_memory(f"{name}_src", value)
            key, value = None, value.contiguous()
        if name == "flashmla_metadata":
            value = _flat(f"{name}_src", value)
        dimensions = 2 if name in ("page_indices", "real_page_table") else 1
        whole = checked(f"{name}_src", value, device=device, dimensions=dimensions)
        if name == "page_indices":
            rows = bs if decode else whole.shape[0]
            if whole.shape[1] != columns:
                raise ValueError(
                    f"{name}_src: got shape {whole.shape}, expected {columns} columns, as {width} "
                    f"says"
                )
        shape = (rows, whole.shape[1]) if dimensions == 2 else (ends.get(name, *whole.shape),)
        first = name in ("cu_seqlens_k", "dsa_cu_seqlens_k")
        read.append(_part(f"{name}_src", value, whole.tensor.device, shape, first))
        for end, arrays in destinations.items():
            target = f"{'page_table_1' if name == 'page_indices' else name}_{end}"
            value = _flat(target, arrays[k]) if name == "flashmla_metadata" else arrays[k]
            written[end].append(_part(target, value, whole.tensor.device, shape, first))
    _COPIES.copy(key, read, list(written.values()))


def _flat(name: str, value: Any) -> Any:
    """A tensor as a vector; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_contiguous():
        raise ValueError(f"{name}: got strides {value.stride()}, expected a contiguous tensor")
    return value.view(-1)


def _part(
    name: str, value: Any, device: torch.device, shape: tuple[int, ...], first: bool
) -> Checked:
    """What is copied of `value`, which has at least `shape`; with `first`, all but one element."""
    part = checked(name, value, device=device, dimensions=len(shape), at_least=shape)
    if not first:
        return part
    return part._replace(start=part.start + value.itemsize, shape=(shape[0] - 1,))
