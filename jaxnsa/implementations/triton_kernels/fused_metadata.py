"""The whole job in one launch: lengths, prefix sums and page tables, for every destination.

A grid of independent programs. Program 0 of each request writes its lengths and prefix sums, which
it adds up by itself; every other program copies pieces of the request's page tables to all of its
rows in all destinations. No program waits for another.
"""

import math
from typing import Any

import jax
import triton
import triton.language as tl

from jaxnsa.triton_kernels.columns import floor_div, load_tokens, store, store_tokens
from jaxnsa.triton_kernels.launch import launch
from jaxnsa.triton_kernels.rows import (
    constants,
    load_request,
    locate,
    prefix_sums,
    scalars,
    write_row_lengths,
)
from jaxnsa.triton_kernels.tuning import BlockConfig
from nsa_kernel_types import FusedJob, Metadata

_TAILS = {"copy": 0, "zero": 1, "keep": 2}
_COPY, _KEEP = (tl.constexpr(_TAILS[tail]) for tail in ("copy", "keep"))


def fused_metadata(
    seq_lens: jax.Array,
    req_pool_indices: jax.Array,
    req_to_token: jax.Array,
    extend_seq_lens: jax.Array | None,
    out: tuple[Metadata, ...] | None,
    job: FusedJob,
    *,
    config: BlockConfig | None = None,
) -> tuple[Metadata, ...]:
    """Computes the metadata of a step for all backends in one kernel launch.

    Args:
      seq_lens: int32 [requests].
      req_pool_indices: int32 [requests].
      req_to_token: int32 [pool_rows, pool_cols].
      extend_seq_lens: int32 [requests] where rows are ragged, otherwise None.
      out: destinations to fill in place, or None for fresh ones.
      job: what to compute. tail "keep" without `out` leaves the columns unspecified.
      config: block sizes; None: `BlockConfig.heuristic`.

    Returns:
      As many Metadata as `job` has destinations.
    """
    rows, max_len, real_page_size = job.rows, job.max_len, job.real_page_size
    pool_rows, pool_cols = req_to_token.shape
    config = config or BlockConfig.heuristic(rows.rows, max_len)
    if job.wide_table:
        piece = config.tokens
        page_lanes = triton.next_power_of_2(piece // real_page_size + 1)
        if piece % real_page_size == 0:
            page_lanes = piece // real_page_size
    else:
        page_lanes = min(config.pages, triton.next_power_of_2(job.pages))
        piece = min(page_lanes * real_page_size, 2**30)
    pieces = -(-max_len // piece)
    pieces_at_once = min(pieces, max(1, config.programs // rows.requests))
    widths = math.gcd(4, pool_cols), math.gcd(4, max_len)

    ragged = rows.tokens_per_request is None
    inputs = (seq_lens, req_pool_indices, req_to_token, *([extend_seq_lens] if ragged else []))
    shapes = job.shapes()
    fields = [field for field, shape in shapes._asdict().items() if shape is not None]
    results = launch(
        _fused_metadata,
        inputs,
        None if out is None else [[getattr(o, field) for o in out] for field in fields],
        [[getattr(shapes, field)] * job.destinations for field in fields],
        programs=rows.requests * (1 + pieces_at_once),
        warps=config.warps,
        scalars=scalars(rows)
        | {
            "max_len": max_len,
            "pages": job.pages,
            "pool_rows": pool_rows,
            "pool_units": pool_cols // widths[0],
            "table_units": max_len // widths[1],
            "programs": 1 + pieces_at_once,
        },
        constants=constants(rows)
        | {
            "PAGE": real_page_size,
            "WIDE": int(job.wide_table),
            "TAIL": _TAILS[job.tail],
            "COPIES": job.num_backends if job.stacked else 1,
            "POOL_WIDTH": widths[0],
            "TABLE_WIDTH": widths[1],
            "PIECE": piece,
            "PAGE_LANES": page_lanes,
        },
    )
    absent: dict[str, Any] = {"page_indices": None, "real_page_table": None}
    return tuple(
        Metadata(**absent | dict(zip(fields, arrays, strict=True)))
        for arrays in zip(*results, strict=True)
    )


@triton.jit
def _fused_metadata(
    inputs,
    results,
    requests,
    rows,
    added_tokens,
    topk,
    max_len,
    pages,
    pool_rows,
    pool_units,
    table_units,
    programs,
    TOKENS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    SCAN: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    TAIL: tl.constexpr,
    COPIES: tl.constexpr,
    POOL_WIDTH: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    PAGE_LANES: tl.constexpr,
):
    seq_lens, indices, pool = inputs[0], inputs[1], inputs[2]
    extend_seq_lens = inputs[3] if TOKENS == 0 else seq_lens
    # Neighbouring programs write neighbouring memory.
    i = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    cache_seqlen, q = load_request(seq_lens, extend_seq_lens, i, added_tokens, TOKENS)
    if program == 0:
        cache_before, nsa_before, nsa_total = prefix_sums(
            seq_lens, extend_seq_lens, i, requests, added_tokens, topk, TOKENS, SCAN
        )
        store(results[0], i, cache_seqlen, None, requests, COPIES)
        if i == 0:
            store(results[1], 0, 0, None, requests + 1, COPIES)
        store(results[1], i + 1, cache_before + cache_seqlen, None, requests + 1, COPIES)
        write_row_lengths(
            results[2],
            results[3],
            results[4],
            extend_seq_lens,
            i,
            cache_seqlen,
            q,
            nsa_before,
            nsa_total,
            requests,
            rows,
            topk,
            TOKENS,
            ROW_LANES,
            SCAN,
            COPIES,
        )
    else:
        index = tl.minimum(tl.maximum(tl.load(indices + i), 0), pool_rows - 1)
        _write_tables(
            pool + index.to(tl.int64) * (pool_units * POOL_WIDTH),
            results[5:],
            extend_seq_lens,
            i,
            program - 1,
            programs - 1,
            cache_seqlen,
            q,
            requests,
            rows,
            max_len,
            pages,
            table_units,
            TOKENS,
            SCAN,
            PAGE,
            WIDE,
            TAIL,
            COPIES,
            TABLE_WIDTH,
            PIECE,
            PAGE_LANES,
        )


@triton.jit
def _write_tables(
    source,
    tables,
    extend_seq_lens,
    i,
    program,
    programs,
    cache_seqlen,
    q,
    requests,
    rows,
    max_len,
    pages,
    table_units,
    TOKENS: tl.constexpr,
    SCAN: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    TAIL: tl.constexpr,
    COPIES: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    PAGE_LANES: tl.constexpr,
):
    """One program's share of a request's rows in both tables."""
    longest = max_len
    if TAIL == _KEEP:
        # A KV length past int32 has wrapped; the rows before that are whole.
        longest = tl.where(cache_seqlen < 0, max_len, tl.minimum(cache_seqlen, max_len))
    first_row, count, total = locate(extend_seq_lens, i, q, requests, rows, TOKENS, SCAN)
    wide_size = tl.cast(rows, tl.int64) * max_len
    real_size = tl.cast(rows, tl.int64) * pages
    for piece in range(program, tl.cdiv(longest, PIECE), programs):
        start = piece * PIECE
        if WIDE:
            tokens = load_tokens(source, start, longest, PIECE)
        if PAGE > 1:
            # The pages that start in this piece.
            begin = tl.cast(start, tl.int64)
            page = tl.cdiv(begin, PAGE) + tl.arange(0, PAGE_LANES)
            token = page * PAGE
            in_piece = token < begin + PIECE
            page_starts = tl.load(source + token, in_piece & (token < longest), 0)
            page_values = floor_div(page_starts, PAGE)
        for j in range(0, count):
            row = tl.cast(first_row + j, tl.int64)
            live = max_len
            if TAIL != _COPY:
                live = tl.minimum(tl.maximum(cache_seqlen - q + 1 + j, 0), max_len)
            end = live if TAIL == _KEEP else max_len
            if WIDE:
                base = row * (table_units * TABLE_WIDTH)
                store_tokens(tables[0], base, start, tokens, live, end, wide_size, COPIES, PIECE)
            if PAGE > 1:
                values = tl.where(token < live, page_values, 0)
                mask = in_piece & (token < end)
                store(tables[WIDE], row * pages + page, values, mask, real_size, COPIES)
        if TOKENS == 0 and TAIL != _KEEP:
            for spare in range(total + i, rows, requests):
                row = tl.cast(spare, tl.int64)
                if WIDE:
                    base = row * (table_units * TABLE_WIDTH)
                    store_tokens(
                        tables[0], base, start, tokens, 0, max_len, wide_size, COPIES, PIECE
                    )
                if PAGE > 1:
                    mask = in_piece & (token < max_len)
                    store(tables[WIDE], row * pages + page, 0, mask, real_size, COPIES)
