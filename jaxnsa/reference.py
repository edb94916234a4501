"""The specification in NumPy: plain loops, to be read, and what every test compares with.

Same names, arguments and results as the public functions, with NumPy arrays in and out. Nothing
here calls JAX. `out` takes writable NumPy arrays and fills them in place.

Lengths are int32 and wrap as int32 does: wider inputs are first brought into int32's range.
"""

import numpy as np

from jaxnsa.metadata import DraftExtendSeqlens, ForwardMode, NSAMetadata

_INT32 = np.iinfo(np.int32)


def prefix_sum(x) -> np.ndarray:
    """int [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""
    sums = [0]
    for value in np.asarray(x):
        sums.append(sums[-1] + int(value))
    return _wrap(sums)


def fill_draft_extend_metadata(
    extend_seq_lens, seq_lens, *, nsa_index_topk, max_total_tokens=None
) -> DraftExtendSeqlens:
    """One row per extend token: see `seqlens_expanded` of draft extend."""
    extend_seq_lens, seq_lens = _lengths(extend_seq_lens), _lengths(seq_lens)
    total = sum(extend_seq_lens)
    capacity = total if max_total_tokens is None else max_total_tokens
    expanded = np.zeros(capacity, np.int32)
    for row, (i, j) in enumerate(_draft_extend_rows(extend_seq_lens, capacity)):
        expanded[row] = max(seq_lens[i] - extend_seq_lens[i] + 1 + j, 0)
    return DraftExtendSeqlens(
        expanded, np.minimum(expanded, np.int32(nsa_index_topk)), _wrap(total)
    )


def precompute_decode_metadata(seq_lens, req_pool_indices, req_to_token, **options) -> NSAMetadata:
    """One row per request."""
    return _one(seq_lens, req_pool_indices, req_to_token, ForwardMode.DECODE, options)


def precompute_target_verify_metadata(
    seq_lens, req_pool_indices, req_to_token, *, num_draft_tokens, **options
) -> NSAMetadata:
    """num_draft_tokens rows per request, whose tokens the step appends."""
    options["num_draft_tokens"] = num_draft_tokens
    return _one(seq_lens, req_pool_indices, req_to_token, ForwardMode.TARGET_VERIFY, options)


def precompute_draft_extend_metadata(
    seq_lens, extend_seq_lens, req_pool_indices, req_to_token, *, max_total_tokens, **options
) -> NSAMetadata:
    """extend_seq_lens[i] rows for request i, which seq_lens[i] already counts."""
    options |= {"extend_seq_lens": extend_seq_lens, "max_total_tokens": max_total_tokens}
    return _one(seq_lens, req_pool_indices, req_to_token, ForwardMode.DRAFT_EXTEND, options)


def fused_metadata_precompute_and_broadcast(
    seq_lens,
    req_pool_indices,
    req_to_token,
    *,
    num_backends,
    forward_mode=ForwardMode.DECODE,
    num_draft_tokens=None,
    extend_seq_lens=None,
    max_total_tokens=None,
    max_len=None,
    nsa_index_topk=2048,
    real_page_size=64,
    wide_table=True,
    tail=None,
    out=None,
    stacked=False,
) -> tuple[NSAMetadata, ...] | NSAMetadata:
    """The same metadata for every backend, each in its own arrays."""
    seq_lens = _lengths(seq_lens)
    req_to_token = np.asarray(req_to_token)
    max_len = req_to_token.shape[1] if max_len is None else max_len
    tail = tail or ("copy" if out is None else "keep")
    bs = len(seq_lens)

    # Which request and which of its tokens each row stands for, and what the row sees.
    if forward_mode is ForwardMode.DECODE:
        cache_seqlens = seq_lens
        rows = [(i, seq_lens[i]) for i in range(bs)]
    elif forward_mode is ForwardMode.TARGET_VERIFY:
        cache_seqlens = [_wrapped(n + num_draft_tokens) for n in seq_lens]
        rows = [
            (i, max(_wrapped(seq_lens[i] + j + 1), 0))
            for i in range(bs)
            for j in range(num_draft_tokens)
        ]
    else:
        cache_seqlens = seq_lens
        q = _lengths(extend_seq_lens)
        rows = [
            (i, max(seq_lens[i] - q[i] + 1 + j, 0))
            for i, j in _draft_extend_rows(q, max_total_tokens)
        ]
    count = max_total_tokens if forward_mode is ForwardMode.DRAFT_EXTEND else len(rows)

    expanded = np.zeros(count, np.int32)
    for r, (_, kv_len) in enumerate(rows):
        expanded[r] = kv_len
    nsa_cache_seqlens = np.minimum(expanded, np.int32(nsa_index_topk))
    lengths = {
        "cache_seqlens": _wrap(cache_seqlens),
        "cu_seqlens_k": prefix_sum(cache_seqlens),
        "seqlens_expanded": expanded,
        "nsa_cache_seqlens": nsa_cache_seqlens,
        "nsa_cu_seqlens_k": prefix_sum(nsa_cache_seqlens),
    }

    pages = -(-max_len // real_page_size)

    def fresh() -> NSAMetadata:
        return NSAMetadata(
            **{name: np.zeros(value.shape, np.int32) for name, value in lengths.items()},
            page_indices=np.zeros((count, max_len), np.int32) if wide_table else None,
            real_page_table=np.zeros((count, pages), np.int32) if real_page_size > 1 else None,
        )

    def fill(metadata: NSAMetadata) -> NSAMetadata:
        for name, value in lengths.items():
            getattr(metadata, name)[:] = value
        wide, real = metadata.page_indices, metadata.real_page_table
        if tail != "keep":
            for table in (wide, real):
                if table is not None:
                    table[:] = 0
        for r, (i, kv_len) in enumerate(rows):
            columns = max_len if tail == "copy" else min(kv_len, max_len)
            slot = min(max(int(np.asarray(req_pool_indices)[i]), 0), len(req_to_token) - 1)
            tokens = req_to_token[slot, :columns]
            if wide is not None:
                wide[r, :columns] = tokens
            if real is not None:
                first_tokens = tokens[::real_page_size]
                real[r, : len(first_tokens)] = first_tokens // real_page_size
        return metadata

    if stacked and out is not None:
        for k in range(num_backends):
            fill(_map(lambda array, k=k: array[k], out))
        return out
    backends = tuple(fill(m) for m in (out or [fresh() for _ in range(num_backends)]))
    return _map(lambda *arrays: np.stack(arrays), *backends) if stacked else backends


def fused_metadata_copy(src, *, num_backends=None, out=None) -> tuple[NSAMetadata, ...]:
    """num_backends copies of `src`."""
    if out is None:
        return tuple(_map(np.array, src) for _ in range(num_backends))
    for destination in out:
        _map(np.copyto, destination, src)
    return tuple(out)


def _one(seq_lens, req_pool_indices, req_to_token, mode, options) -> NSAMetadata:
    out = options.pop("out", None)
    backends = fused_metadata_precompute_and_broadcast(
        seq_lens,
        req_pool_indices,
        req_to_token,
        num_backends=1,
        forward_mode=mode,
        out=None if out is None else (out,),
        **options,
    )
    assert isinstance(backends, tuple)
    return backends[0]


def _draft_extend_rows(extend_seq_lens, capacity):
    """(request, token of the request) of each row, as far as the capacity reaches."""
    row = 0
    for i, q in enumerate(extend_seq_lens):
        for j in range(min(q, capacity - row)):
            yield i, j
            row += 1


def _lengths(lengths) -> list[int]:
    """Negative lengths count as 0; what exceeds int32 is its largest value."""
    return [min(max(int(n), 0), _INT32.max) for n in np.asarray(lengths)]


def _wrapped(value: int) -> int:
    return (value - _INT32.min) % 2**32 + _INT32.min


def _wrap(values):
    return np.asarray(values, np.int64).astype(np.int32)


def _map(function, *metadata: NSAMetadata) -> NSAMetadata:
    fields = {}
    for name in NSAMetadata.__dataclass_fields__:
        arrays = [getattr(m, name) for m in metadata]
        fields[name] = None if arrays[0] is None else function(*arrays)
    return NSAMetadata(**fields)
