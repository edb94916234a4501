"""Plants mistakes in copies of this tree, one at a time, and runs the tests that should see them.

    python tests/planted_mistakes.py [--only NAME]... [--list]

A mistake replaces a text that occurs exactly once in a file. It is caught if a test fails with it
and passes without; those in `ffi/` are compiled first, the CUDA kernels for the simulator of
tests/cuda_simulator, without nvcc. Exits with status 1 if a mistake is not caught or cannot be
planted. Takes what `pip install '.[test,torch]' nanobind cmake ninja` installs, a C++ compiler, no
GPU, and a quarter of an hour on two CPUs.
"""

import concurrent.futures
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 400  # for the tests of one mistake; whoever takes longer has not caught it
TESTS_FAILED = 1  # pytest's exit status; another one, but for a crash, says nothing about a mistake


class Mistake(NamedTuple):
    """A mistake in a file: `old`, which occurs once there, becomes `new`, which `tests` should see.

    The tests are arguments of pytest, file names without their folder.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


class Result(NamedTuple):
    """Whether a mistake was caught, by which tests (unknown after a crash), or what went wrong."""

    mistake: Mistake
    verdict: str
    failed: list[str]
    seconds: float


CAUGHT, CRASHED, NOT_CAUGHT = "caught", "caught by a crash", "NOT CAUGHT"
OPERATIONS = "test_operations.py"


def operations(implementation: str, *functions: str) -> str:
    """Tests of the matrix with one implementation."""
    names = " ".join(f"{OPERATIONS}::test_{function}" for function in functions)
    return f"{names} -k '{implementation}'"


def pallas(*functions: str) -> str:
    """Tests of the matrix with the interpreted Pallas kernels."""
    return operations("interpreted and pallas", *functions)


def triton(*functions: str) -> str:
    """Tests of the matrix with the interpreted Triton kernels."""
    return operations("interpreted and triton", *functions)


XLA = "jaxnsa/implementations/xla.py"
OWNERS = "jaxnsa/row_owners.py"
TRITON = "jaxnsa/implementations/triton_kernels"
HANDLERS = "ffi/xla_handlers.cc"
CHECKS = "jaxnsa/argument_checks.py"

MISTAKES = [
    # The description of a computation, and plain XLA.
    Mistake(
        "lengths past int32 wrap",
        "jaxnsa/spec.py",
        "return jnp.clip(x, INT32_MIN, INT32_MAX).astype(jnp.int32)",
        "return x.astype(jnp.int32)",
        operations("xla", "int64_inputs_are_narrowed"),
    ),
    Mistake(
        "draft tokens take lengths past int32",
        "jaxnsa/spec.py",
        "return INT32_MAX - self.added_tokens",
        "return INT32_MAX",
        operations("xla", "extreme_values"),
    ),
    Mistake(
        "a page that is not full is no column",
        "jaxnsa/spec.py",
        "return -(-self.max_len // self.tokens_per_column(field))",
        "return self.max_len // self.tokens_per_column(field)",
        operations("xla", "page_sizes_and_widths"),
    ),
    Mistake(
        "xla: negative pool indices count from the end",
        XLA,
        "jnp.clip(inputs.req_pool_indices, 0, len(pool) - 1)",
        "jnp.minimum(inputs.req_pool_indices, len(pool) - 1)",
        operations("xla", "in_place"),
    ),
    Mistake(
        "xla: division truncates",
        XLA,
        'source.at[self.source_rows].get(mode="promise_in_bounds") // self.page_size',
        "lax.div(source[self.source_rows], jnp.int32(self.page_size))",
        operations("xla", "extreme_values"),
    ),
    Mistake(
        "xla: tail zero is copy",
        XLA,
        'if tail == "zero":',
        'if tail == "none":',
        operations("xla", "in_place"),
    ),
    Mistake(
        "xla: padding rows keep a request's columns",
        XLA,
        "elif table.owners.total is not None:",
        "elif False:",
        operations("xla", "in_place"),
    ),
    Mistake(
        "xla: a page that is partly live is not",
        XLA,
        " + (tokens % self.tokens_per_column > 0)",
        "",
        operations("xla", "in_place"),
    ),
    Mistake(
        "xla: pages are rounded up past int32",
        XLA,
        "tokens // self.tokens_per_column + (tokens % self.tokens_per_column > 0)",
        "(tokens + self.tokens_per_column - 1) // self.tokens_per_column",
        operations("xla", "padding_rows_and_dead_columns"),
    ),
    Mistake(
        "xla: the last tile of keep ends past the table",
        XLA,
        "start = jnp.minimum(whole_tiles * tile, table.columns - tile)",
        "start = whole_tiles * tile",
        operations("xla", "long_context_in_place"),
    ),
    Mistake(
        "xla: keep under vmap writes a column too many",
        XLA,
        "live = jnp.arange(table.columns) < table.live_columns()[:, None]",
        "live = jnp.arange(table.columns) <= table.live_columns()[:, None]",
        "test_transformations.py::test_vmap -k xla",
    ),
    Mistake(
        "xla: a copy is live as far as top-k",
        XLA,
        "RowOwners(rows, jnp.asarray(live.table_kv_lens(src)), None)",
        "RowOwners(rows, jnp.asarray(src.nsa_cache_seqlens), None)",
        "test_strategies.py::test_same_bits -k xla",
    ),
    Mistake(
        "a row belongs to the request before",
        OWNERS,
        'side="right"',
        'side="left"',
        operations("xla", "draft_extend_capacity"),
    ),
    Mistake(
        "extend totals wrap",
        OWNERS,
        "jnp.where(past_int32, capacity, jnp.minimum(ends, capacity))",
        "jnp.minimum(ends, capacity)",
        operations("xla", "draft_extend_totals_past_int32_fill_the_capacity"),
    ),
    Mistake(
        "padding rows have lengths",
        OWNERS,
        "jnp.where(row < total, kv_len, 0)",
        "kv_len",
        operations("xla", "draft_extend_capacity"),
    ),
    # Pallas.
    Mistake(
        "pallas: fill_draft_extend_metadata is one too many",
        "pallas_kernels/fill_draft_extend_metadata.py",
        "results[name][row] = values[name]",
        "results[name][row] = values[name] + 1",
        pallas("fill_draft_extend_metadata"),
    ),
    Mistake(
        "pallas: fill_draft_extend_metadata leaves padding rows unwritten",
        "pallas_kernels/fill_draft_extend_metadata.py",
        "lambda row: store(row, jnp.int32(0))",
        "lambda row: None",
        pallas("fill_draft_extend_metadata"),
    ),
    Mistake(
        "pallas: negative extend lengths count",
        "pallas_kernels/fill_draft_extend_metadata.py",
        "jnp.where(exists, jnp.maximum(q, 0), 0)",
        "jnp.where(exists, q, 0)",
        pallas("fill_draft_extend_metadata"),
    ),
    Mistake(
        "pallas: stacked backends are all the first",
        "pallas_kernels/destinations.py",
        "[(refs[name], (k,)) for k in",
        "[(refs[name], (0,)) for k in",
        pallas("stacked"),
    ),
    Mistake(
        "pallas: the second backend is unwritten",
        "pallas_kernels/destinations.py",
        "for refs in self._refs]",
        "for refs in self._refs[:1]]",
        pallas("in_place"),
    ),
    Mistake(
        "pallas: pool indices are not clamped",
        "pallas_kernels/fused_metadata.py",
        "pool_row = jnp.clip(inputs.req_pool_indices[i], 0, pool_rows - 1)\n"
        "                lanes.start_load(pool_row)\n"
        "                request = Request.load(lanes, spec.rows.tables,",
        "pool_row = jnp.maximum(inputs.req_pool_indices[i], 0)\n"
        "                lanes.start_load(pool_row)\n"
        "                request = Request.load(lanes, spec.rows.tables,",
        pallas("batch_sizes"),
    ),
    Mistake(
        "pallas: the last prefix sum is not repeated",
        "pallas_kernels/fused_metadata.py",
        "nsa_cu_seqlens_k=sums.nsa_total)",
        "nsa_cu_seqlens_k=sums.nsa_cache_seqlens)",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: fields are swapped",
        "pallas_kernels/rows.py",
        '"seqlens_expanded": kv_len,\n        "nsa_cache_seqlens": jnp.minimum(kv_len, topk),',
        '"nsa_cache_seqlens": kv_len,\n        "seqlens_expanded": jnp.minimum(kv_len, topk),',
        pallas("batch_sizes"),
    ),
    Mistake(
        "pallas: rows past the capacity",
        "pallas_kernels/rows.py",
        "jnp.minimum(count, capacity - first)",
        "count",
        pallas("draft_extend_capacity"),
    ),
    Mistake(
        "pallas: padding rows without their stride",
        "pallas_kernels/rows.py",
        "first + m * rows.requests",
        "first + m",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: a series of clamped lengths overflows",
        "pallas_kernels/rows.py",
        "jnp.where((low & 1) == 0, half * (low + 1), low * (half + 1))",
        "(low * (low + 1)) >> 1",
        pallas("extreme_values"),
    ),
    Mistake(
        "pallas: tail zero is copy",
        "pallas_kernels/tables.py",
        'live = table.live_tokens(self.request.kv_len(j)) if table.tail == "zero" else None',
        "live = None",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: tail zero is copy in narrow tables",
        "pallas_kernels/tables.py",
        'if table.tail == "zero":\n                    value =',
        "if False:\n                    value =",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: tail keep writes whole vectors",
        "pallas_kernels/tables.py",
        "last_token = (start + (table.vector - 1)) * tokens",
        "last_token = start * tokens",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: tail keep writes a column too many in narrow tables",
        "pallas_kernels/tables.py",
        'token < live if table.tail == "keep"',
        'token <= live if table.tail == "keep"',
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: columns that fill no vector are unwritten",
        "pallas_kernels/tables.py",
        "[self.columns - self.vector] if self.columns % self.vector else []",
        "[]",
        pallas("in_place"),
    ),
    Mistake(
        "pallas: padding rows of tables are not cleared",
        "pallas_kernels/tables.py",
        "for_rows(location, write_row)\n        self.request.for_padding_rows(location, clear_row)",
        "for_rows(location, write_row)",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: padding rows of narrow tables are not cleared",
        "pallas_kernels/tables.py",
        'if table.tail != "keep":\n            self.request.for_padding_rows',
        "if False:\n            self.request.for_padding_rows",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: tiles without their grid stride",
        "pallas_kernels/tables.py",
        "block + k * self.blocks",
        "block + k",
        "test_pallas.py::test_blocks_stride_over_tiles",
    ),
    Mistake(
        "pallas: the last live tile is left out",
        "pallas_kernels/tables.py",
        "lax.div(live + (tile_tokens - 1), jnp.int32(tile_tokens))",
        "lax.div(live, jnp.int32(tile_tokens))",
        "test_pallas.py::test_blocks_stride_over_tiles",
    ),
    Mistake(
        "pallas: pages start inside an access",
        "pallas_kernels/tables.py",
        "self.tokens_per_column == 1 and self.width > 0 and page_size % self.width == 0",
        "self.tokens_per_column == 1 and self.width > 0",
        "test_pallas.py",
    ),
    Mistake(
        "pallas: copies read the first row",
        "pallas_kernels/copy.py",
        "Source(sources[name], row)",
        "Source(sources[name], jnp.int32(0))",
        "test_strategies.py::test_same_bits -k 'interpreted and pallas'",
    ),
    Mistake(
        "pallas: division truncates",
        "pallas_kernels/lanes.py",
        "jnp.where(x - quotient * divisor < 0, 1, 0)",
        "0",
        pallas("extreme_values"),
    ),
    Mistake(
        "pallas: a page past the live columns",
        "pallas_kernels/lanes.py",
        "(column < end)",
        "(column <= end)",
        pallas("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "pallas: the last vectors of requests are the first",
        "pallas_kernels/lanes.py",
        "sums = add_blocks(rounds * _UNROLL, whole % _UNROLL, sums)",
        "sums = add_blocks(0, whole % _UNROLL, sums)",
        "test_pallas.py::test_sums_over_requests",
    ),
    Mistake(
        "pallas: sums stop at twice their limit",
        "pallas_kernels/lanes.py",
        "jnp.where(high > 0x7FFF, limit, jnp.minimum(total, limit))",
        "jnp.minimum(total, limit)",
        "test_pallas.py::test_sums_over_requests",
    ),
    Mistake(
        "pallas: prefix sums start anew in each block",
        "pallas_kernels/prefix_sum.py",
        "_sum_before(lanes, ref, block, size) if blocks > 1 else 0",
        "0",
        pallas("prefix_sum"),
    ),
    Mistake(
        "pallas: prefix sums leave out a term of four",
        "pallas_kernels/prefix_sum.py",
        "for k in (1, 2, 3) if",
        "for k in (1, 2) if",
        pallas("prefix_sum"),
    ),
    # Triton.
    Mistake(
        "triton: pool indices are not clamped",
        f"{TRITON}/fused_metadata.py",
        "tl.minimum(tl.maximum(index, 0), sizes.pool_rows - 1)",
        "tl.maximum(index, 0) % (sizes.pool_rows + 1)",
        triton("batch_sizes"),
    ),
    Mistake(
        "triton: tail zero is copy",
        f"{TRITON}/fused_metadata.py",
        'if TABLES.tail != "copy":',
        'if TABLES.tail == "keep":',
        triton("in_place"),
    ),
    Mistake(
        "triton: padding rows of tables are not cleared",
        f"{TRITON}/fused_metadata.py",
        'if ROWS.rows_per_request is None and TABLES.tail != "keep":',
        "if False:",
        triton("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "triton: tiles of the wrong grid stride",
        f"{TRITON}/fused_metadata.py",
        "tl.cdiv(longest, TABLES.tile), programs):",
        "tl.cdiv(longest, TABLES.tile), programs + 1):",
        "test_triton.py::test_programs_stride_over_tiles",
    ),
    Mistake(
        "triton: stacked backends are all the first",
        f"{TRITON}/destinations.py",
        "pointer = group[k][destination] + backend * size",
        "pointer = group[k][destination]",
        triton("stacked"),
    ),
    Mistake(
        "triton: the last prefix sum is not repeated",
        f"{TRITON}/rows.py",
        "RowSums(sums.nsa_total)",
        "RowSums(sums.nsa_cache_seqlens)",
        triton("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "triton: draft tokens take lengths past int32",
        f"{TRITON}/rows.py",
        "tl.minimum(cache_seqlen, ROWS.longest_seq_len)",
        "cache_seqlen",
        triton("extreme_values"),
    ),
    Mistake(
        "triton: a series of clamped lengths overflows",
        f"{TRITON}/rows.py",
        "tl.where((low & 1) == 0, half * (low + 1), low * (half + 1))",
        "(low * (low + 1)) >> 1",
        triton("extreme_values"),
    ),
    Mistake(
        "triton: division truncates",
        f"{TRITON}/tables.py",
        "return quotient - tl.where(x - quotient * DIVISOR < 0, 1, 0)",
        "return quotient",
        triton("extreme_values"),
    ),
    Mistake(
        "triton: tiles past the live ones get no zeros",
        f"{TRITON}/tables.py",
        "elif start * TOKENS_PER_COLUMN < end:",
        "elif start * TOKENS_PER_COLUMN < live:",
        triton("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "triton: a page past the live columns",
        f"{TRITON}/tables.py",
        "pages.in_tile & (pages.token < end)",
        "pages.in_tile & (pages.token <= end)",
        triton("padding_rows_and_dead_columns"),
    ),
    Mistake(
        "triton: copies go past the live columns",
        f"{TRITON}/copy.py",
        "live = tl.minimum(tl.load(source.kv_lens + row), tokens)",
        "live = tokens",
        "test_strategies.py::test_same_bits -k 'interpreted and triton'",
    ),
    Mistake(
        "triton: prefix sums leave out the first block",
        f"{TRITON}/prefix_sum.py",
        "for start in range(0, first, BLOCK):",
        "for start in range(BLOCK, first, BLOCK):",
        triton("prefix_sum"),
    ),
    Mistake(
        "triton: negative extend lengths count",
        f"{TRITON}/fill_draft_extend_metadata.py",
        "total += tl.maximum(q, 0)",
        "total += q",
        triton("fill_draft_extend_metadata"),
    ),
    # What the native libraries share.
    Mistake(
        "native: division truncates",
        "ffi/integers.h",
        "return quotient - (x % divisor < 0);",
        "return quotient;",
        operations("ffi", "extreme_values"),
    ),
    Mistake(
        "native: pool indices are not clamped",
        "ffi/computations.h",
        "Min(Max(index, 0), last_row) * stride",
        "Max(index, 0) % (int64_t{last_row} + 1) * stride",
        operations("ffi", "in_place"),
    ),
    Mistake(
        "native: int64 lengths wrap",
        "ffi/rows.h",
        "return high == low >> 31 ? low : high >> 31 ^ kInt32Max;",
        "return high == low ? low : low;",
        "test_ffi.py::test_handlers_take_int64_lengths",
    ),
    Mistake(
        "native: draft tokens take lengths past int32",
        "ffi/rows.h",
        "Min(Max(seq_len, 0), kInt32Max - added_tokens) + added_tokens",
        "Add(Max(seq_len, 0), added_tokens)",
        operations("ffi", "extreme_values"),
    ),
    Mistake(
        "native: fields are swapped",
        "ffi/generate_fields.py",
        "to.{name}[index] = values.{name};",
        "to.{name}[index] = values.{names[-1]};",
        operations("ffi", "batch_sizes"),
    ),
    # C++.
    Mistake(
        "cpu: tail keep is zero",
        "ffi/cpu/fused_metadata.cc",
        "tail_ == Tail::kKeep ? live : columns_",
        "columns_",
        operations("ffi", "in_place"),
    ),
    Mistake(
        "cpu: padding rows are not cleared",
        "ffi/cpu/fused_metadata.cc",
        "if (args.tail == Tail::kKeep) return;",
        "if (args.tail != Tail::kZero) return;",
        operations("ffi", "in_place"),
    ),
    Mistake(
        "cpu: the last column of a tile is 0",
        "ffi/cpu/fused_metadata.cc",
        "std::clamp(content.live, begin, end)",
        "std::clamp(content.live, begin, end - 1)",
        operations("ffi", "in_place"),
    ),
    Mistake(
        "cpu: the second backend is unwritten",
        "ffi/cpu/fused_metadata.cc",
        "for (int b = 0; b < args.num_backends; ++b) Store(",
        "for (int b = 0; b < 1; ++b) Store(",
        operations("ffi", "in_place"),
    ),
    Mistake(
        "cpu: copies take the source's stride",
        "ffi/cpu/copy.cc",
        "row * array.destination_stride",
        "row * array.columns",
        "test_sgl_kernel.py::test_copy_into_larger_tensors",
    ),
    Mistake(
        "cpu: rows past the total are cleared for who asked to leave them",
        "ffi/cpu/fill_draft_extend_metadata.cc",
        "if (!args.clears_padding) return;",
        "",
        "test_sgl_kernel.py::test_fill_draft_extend",
    ),
    Mistake(
        "native: drafts count as written",
        "ffi/batch_tracker.h",
        "rows[row] = {request_id, Min(kv_len, Max(seq_len, 0))};",
        "rows[row] = {request_id, kv_len};",
        "test_request_ids.py::test_histories",
    ),
    # CUDA, in the simulator.
    Mistake(
        "cuda: what rows hold is written before all blocks have read it",
        "ffi/cuda/batch_tracker.cuh",
        "atomicInc(&tracker.readers[i], gridDim.x - 1) == gridDim.x - 1",
        "atomicInc(&tracker.readers[i], gridDim.x - 1) == 0",
        "test_request_ids.py::test_histories",
    ),
    Mistake(
        "cuda: rows of no request are remembered",
        "ffi/cuda/batch_tracker.cuh",
        "row < tracker.count; row += kThreads",
        "row < first; row += kThreads",
        "test_request_ids.py::test_what_is_written_again",
    ),
    Mistake(
        "cuda: an access ends past the live columns",
        "ffi/cuda/tables.cuh",
        "if (column + kWidth <= content.end) {",
        "if (column < content.end) {",
        operations("ffi", "tiles_and_tails"),
    ),
    Mistake(
        "cuda: the first padding row is not cleared",
        "ffi/cuda/tables.cuh",
        "int64_t row = total + i;",
        "int64_t row = total + i + 1;",
        operations("ffi", "in_place"),
    ),
    Mistake(
        "cuda: division truncates",
        "ffi/cuda/parameters.cuh",
        "static_cast<uint32_t>((magnitude * multiplier) >> shift) ^ sign)",
        "static_cast<uint32_t>((magnitude * multiplier) >> shift))",
        operations("ffi", "extreme_values"),
    ),
    Mistake(
        "cuda: vectors in rows that are not aligned",
        "ffi/cuda/fused_metadata.cu",
        "allows = allows && args.tables[kPageIndices].stride % 4 == 0;",
        "",
        operations("ffi", "in_place"),
    ),
    Mistake(
        "cuda: every block of lengths is a backend",
        "ffi/cuda/fused_metadata.cu",
        "b = block / blocks;",
        "b = block;",
        operations("ffi", "batch_sizes"),
    ),
    Mistake(
        "cuda: the last prefix sum is not repeated",
        "ffi/cuda/lengths.cuh",
        "Store(to, row + 1, nsa_total);",
        "Store(to, row, nsa_total);",
        operations("ffi", "draft_extend_capacity"),
    ),
    Mistake(
        "cuda: a row belongs to the request before",
        "ffi/cuda/lengths.cuh",
        "(requests[middle].first_row) <= row",
        "(requests[middle].first_row) < row",
        operations("ffi", "draft_extend_capacity"),
    ),
    Mistake(
        "cuda: a series of clamped lengths overflows",
        "ffi/cuda/lengths.cuh",
        "low % 2 == 0 ? low / 2 * (low + 1) : low * (low / 2 + 1)",
        "low * (low + 1) / 2",
        operations("ffi", "extreme_values"),
    ),
    Mistake(
        "cuda: fill_draft_extend_metadata stops scanning too early",
        "ffi/cuda/fill_draft_extend_metadata.cu",
        "before > first_row + kExpandThreads",
        "before > first_row",
        "test_ffi.py::test_draft_extend_variants",
    ),
    Mistake(
        "cuda: linear search ends a request early",
        "ffi/cuda/fill_draft_extend_metadata.cu",
        "args.offsets[i + 1] <= row",
        "args.offsets[i + 1] < row",
        "test_ffi.py::test_draft_extend_variants",
    ),
    Mistake(
        "cuda: prefix sums carry nothing from tile to tile",
        "ffi/cuda/prefix_sum.cu",
        "if (thread == 0) carry += total;",
        "if (thread == 0) carry = total;",
        "test_ffi.py::test_prefix_sum_variants",
    ),
    Mistake(
        "cuda: copies end with an access",
        "ffi/cuda/copy.cu",
        "if (vectors && is_copied(column + 3)) {",
        "if (vectors && is_copied(column)) {",
        "test_strategies.py::test_same_bits -k ffi",
    ),
    # The native boundary.
    Mistake(
        "handlers: the second launch takes the first backends",
        HANDLERS,
        "std::copy_n(backends.begin() + first, count",
        "std::copy_n(backends.begin() + 0 * first, count",
        "test_ffi.py::test_numbers_of_backends",
    ),
    Mistake(
        "handlers: a pool may be narrower than the tables",
        HANDLERS,
        'Expect(pool_columns >= max_len, "req_to_token: expected at least max_len columns");',
        "",
        "test_ffi.py::test_handlers_name_what_is_wrong",
    ),
    Mistake(
        "handlers: fields come in any order",
        HANDLERS,
        "index > (fields.empty() ? -1 : fields.back()) && index < kFields",
        "index >= 0 && index < kFields",
        "test_ffi.py::test_handlers_name_what_is_wrong",
    ),
    Mistake(
        "handlers: kv_lens have any length",
        HANDLERS,
        'ExpectArray(kv_lens, "kv_lens", {rows});',
        'ExpectArray(kv_lens, "kv_lens", {-1});',
        "test_ffi.py::test_other_handlers_name_what_is_wrong",
    ),
    Mistake(
        "ffi: XLA hands over slices",
        "jaxnsa/implementations/ffi.py",
        "held = lax.optimization_barrier(jax.tree.leaves(out))",
        "held = jax.tree.leaves(out)",
        "test_lowering.py::test_destinations_pass_a_barrier",
    ),
    Mistake(
        "native: a library for other fields is taken",
        "jaxnsa/implementations/native_library.py",
        "if list(module.fields) != expected:",
        "if len(module.fields) != len(expected):",
        "test_ffi.py::test_a_library_for_other_fields_is_refused",
    ),
    Mistake(
        "native: an input may begin where a tensor does",
        "ffi/prepared_launch.cc",
        "end <= next->first) return true;",
        "begin <= next->first) return true;",
        "test_torch.py::test_python_and_the_library_agree_about_tensors",
    ),
    Mistake(
        "native: inputs of any stride",
        "ffi/prepared_launch.cc",
        "(size > 1 && tensor.strides[0] != 1) || ",
        "",
        "test_torch.py::test_python_and_the_library_agree_about_tensors",
    ),
    Mistake(
        "native: columns past the pool",
        "ffi/prepared_launch.cc",
        "args_.max_len = static_cast<int32_t>(std::min<int64_t>(max_len_, columns));",
        "args_.max_len = max_len_;",
        "test_torch.py::test_a_pool_narrower_than_the_tables",
    ),
    # PyTorch.
    Mistake(
        "torch: tables of different strides are taken for equal",
        "jaxnsa/interop/registration.py",
        "if tensor.dim() == 2 and tensor.stride(0) != first[field].stride(0):",
        "if False:",
        "test_torch.py::test_wrong_buffers_are_refused",
    ),
    Mistake(
        "torch: the direct path writes what it reads",
        "jaxnsa/interop/direct_path.py",
        "written=registered.memory.spans",
        "written=[]",
        "test_torch.py::test_wrong_updates_are_refused_before_anything_is_written",
    ),
    Mistake(
        "torch: the DLPack path writes past the batch",
        "jaxnsa/interop/dlpack_path.py",
        "Extent.REQUESTS_PLUS_1: requests + 1,",
        "Extent.REQUESTS_PLUS_1: requests + 2,",
        "test_torch.py::test_update -k dlpack",
    ),
    Mistake(
        "torch: the DLPack path writes draft tokens of padding rows",
        "jaxnsa/interop/dlpack_path.py",
        "columns = -(-spec.rows.added_tokens // spec.tokens_per_column(field))",
        "columns = 0",
        "test_torch.py::test_update -k dlpack",
    ),
    Mistake(
        "torch: memory that was freed",
        "jaxnsa/interop/tensor_checks.py",
        "if size and (not start or held < size):",
        "if size and not start:",
        "test_torch.py test_sgl_kernel.py -k 'refused or refuses'",
    ),
    Mistake(
        "sgl_kernel: a known launch takes a narrower pool",
        "jaxnsa/interop/fills.py",
        "min_columns=spec.max_len",
        "min_columns=1",
        "test_sgl_kernel.py::test_a_launch_that_is_known_is_checked_all_the_same",
    ),
    Mistake(
        "sgl_kernel: rows past the smaller tensor",
        "jaxnsa/interop/sgl_kernel.py",
        "capacity = min(*expanded.shape, *clamped.shape)",
        "capacity = expanded.shape[0]",
        "test_sgl_kernel.py::test_the_smaller_tensor_is_the_capacity",
    ),
    Mistake(
        "sgl_kernel: strides of the first backend for all",
        "jaxnsa/interop/fills.py",
        "alike.setdefault(strides, [])",
        "alike.setdefault((), [])",
        "test_sgl_kernel.py::test_backends_whose_tables_have_different_strides",
    ),
    Mistake(
        "sglang: rows have the columns that they see themselves",
        "ffi/cpu/fused_metadata.cc",
        "rows.prefill || args.requests_are_items ?",
        "rows.prefill ?",
        "test_sglang.py::test_every_row_of_a_request_has_its_live_columns",
    ),
    Mistake(
        "sglang: a known step of other numbers",
        "jaxnsa/interop/sglang.py",
        "(step, *outputs)",
        "(step.bs, *outputs)",
        "test_sglang.py::test_wrong_arguments_are_refused_before_anything_is_written",
    ),
    Mistake(
        "sglang: copies with the first destination's strides",
        "jaxnsa/interop/copies.py",
        "alike.setdefault(strides, [])",
        "alike.setdefault((), [])",
        "test_sglang.py::test_copies_to_three_backends",
    ),
    Mistake(
        "sglang: replaced by halves",
        "jaxnsa/interop/replacement.py",
        "for module, attribute, held in done:",
        "for module, attribute, held in []:",
        "test_sglang.py::test_install_replaces_all_or_nothing",
    ),
    # The public functions.
    Mistake(
        "strategies: copies go past the live columns",
        "jaxnsa/strategies.py",
        'live = one if spec.tail == "keep" else None',
        "live = None",
        "test_strategies.py::test_same_bits -k xla",
    ),
    Mistake(
        "strategies: stacked destinations are all the first",
        "jaxnsa/strategies.py",
        "lambda array: array[k], out[0]",
        "lambda array: array[0], out[0]",
        "test_strategies.py::test_same_bits -k xla",
    ),
    Mistake(
        "operations: kernels are launched for nothing",
        "jaxnsa/operations.py",
        "_computing(name, not spec.is_empty)",
        "name",
        pallas("batch_sizes"),
    ),
    Mistake(
        "operations: negative extend lengths count",
        "jaxnsa/operations.py",
        "int(np.clip(lengths, 0, INT32_MAX).sum())",
        "max(int(lengths.sum()), 0)",
        operations("xla", "fill_draft_extend_metadata"),
    ),
    Mistake(
        "arguments: nothing to keep",
        CHECKS,
        'if result.tail == "keep" and fresh:',
        "if False:",
        "test_argument_checks.py",
    ),
    Mistake(
        "arguments: an array is written twice",
        CHECKS,
        "if id(value) in seen:",
        "if False:",
        "test_argument_checks.py",
    ),
    Mistake(
        "arguments: True is an int",
        "jaxnsa/scalar_checks.py",
        "if isinstance(value, bool):",
        "if False:",
        "test_argument_checks.py",
    ),
    Mistake(
        "arguments: tables wider than kernels count",
        CHECKS,
        "1, min(pool_cols, MAX_LEN))",
        "1, pool_cols)",
        "test_argument_checks.py",
    ),
    Mistake(
        "arguments: int64 of the host wraps",
        CHECKS,
        "vector = np.clip(vector, INT32_MIN, INT32_MAX)",
        "pass",
        operations("xla", "int64_inputs_are_narrowed"),
    ),
    Mistake(
        "values: a length of max_len is too long",
        "jaxnsa/value_checks.py",
        "seq_lens > max_len, seq_lens)",
        "seq_lens >= max_len, seq_lens)",
        "test_value_checks.py",
    ),
    Mistake(
        "values: the row past the pool is in it",
        "jaxnsa/value_checks.py",
        "(req_pool_indices >= pool_rows)",
        "(req_pool_indices > pool_rows)",
        "test_value_checks.py",
    ),
    Mistake(
        "values: traced sums past int32 pass",
        "jaxnsa/value_checks.py",
        "(total > most) | (total < 0)",
        "total > most",
        "test_value_checks.py",
    ),
    Mistake(
        "settings: the environment beats override",
        "jaxnsa/config.py",
        "Settings(**(values | dict(overrides)))",
        "Settings(**(dict(overrides) | values))",
        "test_config.py",
    ),
    Mistake(
        "settings: SGLang's names beat ours",
        "jaxnsa/config.py",
        "(v for v in variables if v in environment)",
        "(v for v in variables[::-1] if v in environment)",
        "test_config.py",
    ),
    Mistake(
        "choice: Triton is taken against the settings",
        "jaxnsa/implementations/choice.py",
        'if n != "triton" or settings.triton_metadata)',
        ")",
        "test_config.py",
    ),
    Mistake(
        "choice: a measurement that nobody recorded",
        "jaxnsa/implementations/measurements.py",
        'Measurement("cpu", 6, 131_072, 1, 131_072,',
        'Measurement("cpu", 7, 131_072, 1, 131_072,',
        "test_config.py",
    ),
    # The command line and the benchmarks.
    Mistake(
        "verify: nothing differs",
        "jaxnsa/app/verify.py",
        "a.dtype != e.dtype or not np.array_equal(a, e)",
        "a.dtype != e.dtype",
        "test_command_line.py -k verify",
    ),
    Mistake(
        "verify: prints another program",
        "jaxnsa/app/verify.py",
        'return "\\n".join(lines)',
        'return "import jax\\narguments = dict(int32=3)\\nprint([0])\\nprint([1])"',
        "test_command_line.py -k verify",
    ),
    Mistake(
        "verify: the case is not shrunk",
        "jaxnsa/app/verify.py",
        "_SHRINK_STEPS = 200",
        "_SHRINK_STEPS = 0",
        "test_command_line.py -k verify",
    ),
    Mistake(
        "demo: everything is right",
        "jaxnsa/app/demo.py",
        "return all(jax.tree.leaves(jax.tree.map(equal, actual, expected)))",
        "return True",
        "test_command_line.py -k demo",
    ),
    Mistake(
        "demo: bytes of one backend",
        "jaxnsa/app/demo.py",
        "written += tokens.nbytes + pages.nbytes",
        "written = tokens.nbytes + pages.nbytes",
        "test_command_line.py -k demo",
    ),
    Mistake(
        "benchmarks: wrong results are timed",
        "benchmarks/problem.py",
        "if not np.array_equal(getattr(backend, field), array):",
        "if False:",
        "test_benchmarks.py::test_a_wrong_result_stops_the_run",
    ),
    Mistake(
        "benchmarks: wrong tensors are timed",
        "benchmarks/suites/torch_handoff.py",
        'if field != "seqlens_expanded" and not np.array_equal(got, array):',
        "if False:",
        "test_benchmarks.py::test_wrong_tensors_stop_the_run",
    ),
    Mistake(
        "benchmarks: comparisons are the wrong way round",
        "benchmarks/compare.py",
        "return self.after / self.before",
        "return self.before / self.after",
        "test_benchmarks.py::test_compare",
    ),
]


class Builder:
    """A copy of the tree, in a folder of its own, and the native library that was built of it."""

    def __init__(self, folder: Path):
        self.tree = folder / "tree"
        self._folder = folder
        listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, text=True).split("\0"):
            if name and (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.tree / name)

    def build(self, simulated: bool) -> Path:
        """Compiles what has changed; RuntimeError where it does not compile.

        Returns:
          A folder for PYTHONPATH with a distribution of jaxnsa that has the library and no more.
        """
        kind = "simulated" if simulated else "cpu"
        build, site = self._folder / f"{kind}-build", self._folder / f"{kind}-site"
        options = {
            "NVCC": "OFF",
            "JAXNSA_SIMULATE_CUDA": "ON" if simulated else "OFF",
            "CMAKE_BUILD_TYPE": "Debug",
            "Python_EXECUTABLE": sys.executable,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        for command in (
            ["cmake", "-G", "Ninja", *defines, "-S", self.tree / "ffi", "-B", build],
            ["cmake", "--build", build],
            ["cmake", "--install", build, "--prefix", site],
        ):
            done = subprocess.run(command, capture_output=True, text=True, env=_environment())
            if done.returncode:
                raise RuntimeError(f"{kind} library: {(done.stdout + done.stderr)[-2000:]}")
        metadata = site / "jaxnsa-0.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text("Metadata-Version: 2.1\nName: jaxnsa\nVersion: 0\n")
        return site

    def test(self, site: Path, arguments: list[str]) -> tuple[int, list[str], str]:
        """Pytest's exit status, the tests that failed, and what it printed."""
        cache = self._folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-o", f"cache_dir={cache}"]
        environment = _environment() | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [*command, *arguments],
                cwd=self.tree,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return 2, [], f"took more than {SECONDS} s"
        failed = cache / "v" / "cache" / "lastfailed"
        return (
            done.returncode,
            list(json.loads(failed.read_text())) if failed.exists() else [],
            done.stdout,
        )


def _environment() -> dict[str, str]:
    """With the programs that were installed beside this Python, such as cmake and ninja."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _simulated(mistake: Mistake) -> bool:
    return mistake.file.startswith("ffi/cuda/")


def _try(mistake: Mistake, builder: Builder, unchanged: Path) -> Result:
    """Plants a mistake, runs its tests and takes it back."""
    start = time.perf_counter()
    path = builder.tree / mistake.file
    text = path.read_text() if path.exists() else ""
    failed: list[str] = []
    if (count := text.count(mistake.old)) != 1:
        verdict = f"{mistake.file}: the old text occurs {count} times, expected once"
        return Result(mistake, verdict, failed, 0)
    path.write_text(text.replace(mistake.old, mistake.new))
    try:
        native = mistake.file.startswith("ffi/")
        site = builder.build(_simulated(mistake)) if native else unchanged
        words = shlex.split(mistake.tests)
        tests = [f"tests/{word}" if word.startswith("test_") else word for word in words]
        status, failed, output = builder.test(site, ["-x", *tests])
        verdict = {TESTS_FAILED: CAUGHT, 0: NOT_CAUGHT}.get(status, output[-2000:])
        verdict = CRASHED if status < 0 else verdict
    except RuntimeError as error:
        verdict = f"does not compile: {error}"
    finally:
        path.write_text(text)
    return Result(mistake, verdict, failed, time.perf_counter() - start)


def _fail_anyway(results: list[Result], builder: Builder) -> set[str]:
    """The tests that caught a mistake and fail without it too."""
    failing: set[str] = set()
    for simulated in (False, True):
        found = {t for r in results if _simulated(r.mistake) == simulated for t in r.failed}
        if found:
            _, failed, _ = builder.test(builder.build(simulated), sorted(found))
            failing.update(failed)
    return failing


@click.command()
@click.option("--only", multiple=True, help="A mistake, or part of the names of several.")
@click.option("--list", "only_list", is_flag=True, help="Print the names of all mistakes.")
def main(only: tuple[str, ...], only_list: bool) -> None:
    """Plant mistakes and run the tests that should see them."""
    chosen = [m for m in MISTAKES if not only or any(part in m.name for part in only)]
    if only_list or not chosen:
        click.echo("\n".join(m.name for m in MISTAKES))
        sys.exit(not only_list)
    console = Console()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        workers = min(os.cpu_count() or 1, len(chosen))
        builders = [Builder(Path(name, str(k))) for k in range(workers)]
        free: queue.SimpleQueue[Builder] = queue.SimpleQueue()
        unchanged = Path(shutil.copytree(builders[0].build(False), Path(name, "unchanged")))
        for builder in builders:
            free.put(builder)

        def attempt(mistake: Mistake) -> Result:
            builder = free.get()
            try:
                result = _try(mistake, builder, unchanged)
            finally:
                free.put(builder)
            console.print(escape(f"{result.seconds:4.0f} s  {mistake.name}: {result.verdict}"))
            return result

        # Those that are compiled first: they take longest.
        order = sorted(chosen, key=lambda m: (not m.file.startswith("ffi/"), m.file))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(attempt, order))
        anyway = _fail_anyway(results, builders[0])
    table = Table()
    for column in ("mistake", "result", "by"):
        table.add_column(column, overflow="fold")
    good = 0
    for mistake, verdict, failed, _ in results:
        if anyway.intersection(failed):
            verdict = "its test fails without it too"
        good += verdict in (CAUGHT, CRASHED)
        by = ", ".join(test.removeprefix("tests/") for test in failed)
        table.add_row(mistake.name, escape(verdict.splitlines()[-1]), escape(by))
    console.print(table)
    took = time.perf_counter() - start
    console.print(f"{good} of {len(results)} mistakes caught, {took / 60:.0f} minutes")
    sys.exit(good < len(results))


if __name__ == "__main__":
    main()
