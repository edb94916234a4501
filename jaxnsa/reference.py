"""The specification in NumPy: plain loops, to be read, and what every test compares with.

Same names, arguments and results as the public functions, with NumPy arrays in and out. Nothing
here calls JAX. `out` takes writable NumPy arrays and fills them in place.

Lengths are int32: what is below 0 counts as 0, and a KV length past 2^31 - 1 as 2^31 - 1. Prefix
sums wrap as int32 does.
"""

import numpy as np

from jaxnsa.metadata import (
    DraftExtendSeqlens,
    ForwardMode,
    NSAMetadata,
    RaggedPagedAttentionMetadata,
)
from jaxnsa.reference_schedules import flash_mla_schedule, paged_mqa_schedule, topk_plan
from jaxnsa.schedules import NO_SCHEDULES

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
    for row, (_, kv_len) in enumerate(_draft_extend_rows(seq_lens, extend_seq_lens, capacity)):
        expanded[row] = kv_len
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


def precompute_extend_metadata(
    seq_lens,
    extend_seq_lens,
    req_pool_indices,
    req_to_token,
    *,
    max_total_tokens,
    max_total_keys=None,
    **options,
) -> NSAMetadata:
    """extend_seq_lens[i] rows, which seq_lens[i] counts already, and one table row of request i."""
    options |= {
        "extend_seq_lens": extend_seq_lens,
        "max_total_tokens": max_total_tokens,
        "max_total_keys": max_total_keys,
    }
    return _one(seq_lens, req_pool_indices, req_to_token, ForwardMode.EXTEND, options)


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
    max_total_keys=None,
    max_len=None,
    nsa_index_topk=2048,
    real_page_size=64,
    wide_table=True,
    index_kpool=1,
    schedules=None,
    tail=None,
    out=None,
    written_lens=None,
    max_new_tokens=None,
    stacked=False,
    backend_offsets=None,
) -> tuple[NSAMetadata, ...] | NSAMetadata:
    """The metadata of every backend, each in its own arrays."""
    del max_new_tokens  # sizes launches
    req_to_token = np.asarray(req_to_token)
    max_len = req_to_token.shape[1] if max_len is None else max_len
    tail = tail or ("copy" if out is None else "keep")
    schedules = schedules or NO_SCHEDULES
    written = _lengths([0] * len(seq_lens) if written_lens is None else written_lens)

    def pool_row(i) -> np.ndarray:
        return req_to_token[
            min(max(int(np.asarray(req_pool_indices)[i]), 0), len(req_to_token) - 1)
        ]

    # Of each table, every how many tokens it has a column, and how many slots its pages have.
    tables = {}
    if wide_table:
        tables["page_indices"] = (1, 1)
    if real_page_size > 1:
        tables["real_page_table"] = (real_page_size, real_page_size)
        if index_kpool > 1:
            tables["pooled_page_table"] = (real_page_size * index_kpool, real_page_size)

    def backend(offset: int, metadata: NSAMetadata | None) -> NSAMetadata:
        lens = _lengths(_saturated(seq_lens) + offset)
        # The KV length of each request; then, of each row, its request and the tokens that it sees.
        if forward_mode is ForwardMode.DECODE:
            cache_seqlens = lens
            rows = list(enumerate(cache_seqlens))
        elif forward_mode is ForwardMode.TARGET_VERIFY:
            d = num_draft_tokens
            cache_seqlens = [min(n, _INT32.max - d) + d for n in lens]
            rows = [(i, kv - d + 1 + j) for i, kv in enumerate(cache_seqlens) for j in range(d)]
        else:
            cache_seqlens = lens
            rows = _draft_extend_rows(lens, _lengths(extend_seq_lens), max_total_tokens)
        count = len(rows) if max_total_tokens is None else max_total_tokens
        prefill = forward_mode is ForwardMode.EXTEND
        table_rows = list(enumerate(cache_seqlens)) if prefill else rows
        table_count = len(table_rows) if prefill else count

        seqlens_expanded = np.zeros(count, np.int32)
        for r, (_, kv_len) in enumerate(rows):
            seqlens_expanded[r] = kv_len
        pooled_cache_seqlens = seqlens_expanded // index_kpool
        nsa_cache_seqlens = (
            np.minimum(pooled_cache_seqlens * index_kpool, np.int32(nsa_index_topk))
            + seqlens_expanded % index_kpool
        ).astype(np.int32)
        lengths = {
            "cache_seqlens": np.array(cache_seqlens, np.int32),
            "cu_seqlens_k": prefix_sum(cache_seqlens),
            "seqlens_expanded": seqlens_expanded,
            "nsa_cache_seqlens": nsa_cache_seqlens,
            "nsa_cu_seqlens_k": prefix_sum(nsa_cache_seqlens),
        }
        if prefill:
            token_to_request, first_key = np.zeros((2, count), np.int32)
            for r, (i, _) in enumerate(rows):
                token_to_request[r] = i
                first_key[r] = lengths["cu_seqlens_k"][i]
            lengths |= {
                "token_to_request": token_to_request,
                "indexer_ks": first_key,
                "indexer_ke": first_key + seqlens_expanded,
                "topk_indices_offset": first_key,
            }

        if index_kpool > 1:
            lengths["pooled_cache_seqlens"] = pooled_cache_seqlens
        if schedules.paged_mqa is not None:
            expanded = max_total_tokens is not None or schedules.paged_mqa.per_row
            next_n = num_draft_tokens if not expanded and num_draft_tokens else 1
            item_lengths = np.array(seqlens_expanded if expanded else cache_seqlens, np.int32)
            lengths["paged_mqa_ctx_lens"] = np.tile(item_lengths[:, None], next_n)
            if index_kpool > 1:
                item_lengths = np.maximum(item_lengths // index_kpool, 1)
            lengths["paged_mqa_schedule"] = paged_mqa_schedule(
                item_lengths.tolist(), next_n, schedules.paged_mqa
            )
        if schedules.flash_mla is not None:
            item_lengths = {
                "topk": [nsa_index_topk] * count,
                "nsa_cache_seqlens": np.maximum(nsa_cache_seqlens, 1).tolist(),
                "cache_seqlens": cache_seqlens,
            }[schedules.flash_mla.lengths]
            lengths["flash_mla_schedule"], lengths["flash_mla_num_splits"] = flash_mla_schedule(
                item_lengths, schedules.flash_mla
            )
        plan = []
        if schedules.topk_plan is not None:
            plan = topk_plan(seqlens_expanded.tolist(), schedules.topk_plan)

        if metadata is None:
            arrays = {name: value.copy() for name, value in lengths.items()}
            for name, (tokens, _) in tables.items():
                arrays[name] = np.zeros((table_count, -(-max_len // tokens)), np.int32)
            if max_total_keys is not None:
                arrays["flat_page_indices"] = np.zeros(max_total_keys, np.int32)
            if plan:
                arrays["topk_plan"] = np.zeros((count + 1, 2), np.int32)
            metadata = NSAMetadata(**arrays)
        for name, value in lengths.items():
            getattr(metadata, name)[:] = value
        if plan:
            np.asarray(metadata.topk_plan)[: len(plan)] = plan
        for name, (tokens, page_size) in tables.items():
            table = getattr(metadata, name)
            if tail != "keep":
                table[:] = 0
            for r, (i, kv_len) in enumerate(table_rows):
                live = max_len if tail == "copy" else min(kv_len, max_len)
                first_tokens = pool_row(i)[:live:tokens]
                first = -(-written[i] // tokens)
                table[r, first : len(first_tokens)] = first_tokens[first:] // page_size
        if max_total_keys is not None:
            keys = np.asarray(metadata.flat_page_indices)
            if tail != "keep":
                keys[:] = 0
            start = 0
            for i, kv_len in enumerate(cache_seqlens):
                slots = pool_row(i)[: min(kv_len, max_len)]
                keys[start : start + kv_len] = 0
                keys[start : start + len(slots)] = slots[: max(max_total_keys - start, 0)]
                start += kv_len
        return metadata

    offsets = [0] * num_backends if backend_offsets is None else backend_offsets
    if stacked and out is not None:
        for k, offset in enumerate(offsets):
            backend(offset, _map(lambda array, k=k: array[k], out))
        return out
    destinations = [None] * num_backends if out is None else out
    backends = tuple(map(backend, offsets, destinations))
    return _map(lambda *arrays: np.stack(arrays), *backends) if stacked else backends


def fused_metadata_copy(src, *, num_backends=None, out=None) -> tuple[NSAMetadata, ...]:
    """num_backends copies of `src`."""
    if out is None:
        return tuple(_map(np.array, src) for _ in range(num_backends))
    for destination in out:
        _map(np.copyto, destination, src)
    return tuple(out)


def ragged_paged_attention_metadata(
    seq_lens,
    extend_seq_lens,
    req_pool_indices,
    req_to_token,
    *,
    page_size,
    num_seqs=None,
    max_num_seqs=None,
    max_len=None,
    max_total_pages=None,
) -> RaggedPagedAttentionMetadata:
    """The metadata of JAX's ragged paged attention: one row per sequence, padding among them."""
    bs = len(seq_lens)
    extend_seq_lens = [1] * bs if extend_seq_lens is None else extend_seq_lens
    count = bs if num_seqs is None else min(max(int(num_seqs), 0), bs)
    padding = [0] * ((bs if max_num_seqs is None else max_num_seqs) - count)
    kv_lens = _lengths(seq_lens)[:count] + padding
    q_lens = _lengths(extend_seq_lens)[:count] + padding
    indices = list(np.asarray(req_pool_indices)[:count]) + padding
    table = precompute_decode_metadata(
        kv_lens, indices, req_to_token, max_len=max_len, real_page_size=page_size, tail="zero"
    )
    page_indices = np.asarray(table.page_indices if page_size == 1 else table.real_page_table)
    pages = [-(-n // page_size) for n in kv_lens]
    capacity = page_indices.size if max_total_pages is None else max_total_pages
    flat = np.zeros(capacity, np.int32)
    start = 0
    for row, n in zip(page_indices, pages, strict=True):
        live = row[:n][: max(capacity - start, 0)]
        flat[start : start + len(live)] = live
        start += n
    decoding = next((i for i in range(count) if q_lens[i] > 1), count)
    prefilling = next((i for i in range(decoding, count) if q_lens[i] <= 1), count)
    return RaggedPagedAttentionMetadata(
        kv_lens=np.array(kv_lens, np.int32),
        cu_q_lens=prefix_sum(q_lens),
        page_indices=page_indices,
        flat_page_indices=flat,
        cu_kv_lens=prefix_sum([n * page_size for n in pages]),
        distribution=np.array([decoding, prefilling, count], np.int32),
        num_seqs=np.array([count], np.int32),
    )


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


def _draft_extend_rows(seq_lens, extend_seq_lens, capacity) -> list[tuple[int, int]]:
    """Of each row, its request and the tokens that it sees, as far as the capacity reaches."""
    rows: list[tuple[int, int]] = []
    for i, (kv, q) in enumerate(zip(seq_lens, extend_seq_lens, strict=True)):
        rows += [(i, max(kv - q + 1 + j, 0)) for j in range(min(q, capacity - len(rows)))]
    return rows


def _saturated(lengths) -> np.ndarray:
    """int64 [n], lengths in int32's range."""
    return np.clip(np.asarray(lengths, np.int64), _INT32.min, _INT32.max)


def _lengths(lengths) -> list[int]:
    """Lengths in int32's range: negative ones count as 0."""
    return [min(max(int(n), 0), _INT32.max) for n in np.asarray(lengths)]


def _wrap(values):
    wrapped = (np.asarray(values, object) + 2**31) % 2**32 - 2**31
    return np.asarray(wrapped, np.int32)


def _map(function, *metadata: NSAMetadata) -> NSAMetadata:
    return NSAMetadata(
        **{name: function(*(getattr(m, name) for m in metadata)) for name in metadata[0].arrays()}
    )
