"""The functions that SGLang 0.5.23 fills DSA metadata with, by its names, and `install`.

Names, arguments and what is written are those of `sglang.kernels.ops.attention.dsa.metadata` and
`.fused_metadata_copy`. Each call is one launch of the native library on PyTorch's current stream;
given CPU tensors, it runs the library's CPU functions. Tensors that are written may be larger than
a step needs and keep what they hold elsewhere: past the sizes given below, and in the page tables
past the columns that are live for the row's request (SGLang's own kernels write up to 127 columns
more). Lengths that are negative count as 0, and rows of the pool are clamped into it.

Each function raises ValueError or TypeError, before anything is written, where an argument is
wrong, and RuntimeError where the library was not built.
"""

import torch

from jaxnsa import argument_checks
from jaxnsa.implementations.native_library import unavailable
from jaxnsa.interop.replacement import Replacement
from jaxnsa.interop.sglang_copies import Arrays, copy
from jaxnsa.interop.sglang_fills import Step, fill
from jaxnsa.metadata import ForwardMode


def fused_dsa_decode_metadata(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor,
    bs: int,
    max_len: int,
    dsa_index_topk: int,
    physical_page_size: int,
) -> None:
    """The metadata of a decode step.

    Args:
      seq_lens: int32 or int64, at least [bs].
      req_pool_indices: int32 or int64, at least [bs].
      req_to_token: int32 [pool_rows, pool_cols], rows contiguous.
      cache_seqlens: int32, at least [bs].
      cu_seqlens_k: int32, at least [bs + 1].
      page_table_1: int32, at least [bs, max_len], rows contiguous; None: only real_page_table.
      dsa_cache_seqlens: int32, at least [bs].
      dsa_cu_seqlens_k: int32, at least [bs + 1].
      real_page_table: int32, at least [bs, ceil(max_len / physical_page_size)], rows contiguous;
        ignored with a page size of 1.
      bs: requests.
      max_len: columns of page_table_1, in tokens; at most pool_cols.
      dsa_index_topk: the indexer's top-k, in tokens.
      physical_page_size: tokens in a physical page.
    """
    step = Step(ForwardMode.DECODE, bs, max_len, dsa_index_topk, physical_page_size)
    inputs = (seq_lens, req_pool_indices, req_to_token, None)
    outputs = {
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "nsa_cache_seqlens": dsa_cache_seqlens,
        "nsa_cu_seqlens_k": dsa_cu_seqlens_k,
    }
    fill(step, inputs, outputs, page_table_1, real_page_table)


def fused_dsa_target_verify_metadata(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    seqlens_expanded: torch.Tensor,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor,
    bs: int,
    max_seqlen_k: int,
    dsa_index_topk: int,
    physical_page_size: int,
    next_n: int,
    paged_mqa_ctx_lens_2d: torch.Tensor | None = None,
) -> None:
    """The metadata of a target-verify step, of rows = bs * next_n.

    Args:
      seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, bs, dsa_index_topk,
        physical_page_size: as in `fused_dsa_decode_metadata`.
      page_table_1: int32, at least [rows, max_seqlen_k]; or None.
      seqlens_expanded: int32, at least [rows].
      dsa_cache_seqlens: int32, at least [rows].
      dsa_cu_seqlens_k: int32, at least [rows + 1].
      real_page_table: int32, at least [rows, ceil(max_seqlen_k / physical_page_size)].
      max_seqlen_k: columns of page_table_1, in tokens; at most pool_cols.
      next_n: tokens to verify for each request, which seq_lens do not count.
      paged_mqa_ctx_lens_2d: int32 [bs, next_n], contiguous, filled with the lengths of
        cache_seqlens; or None.
    """
    step = Step(
        ForwardMode.TARGET_VERIFY,
        bs,
        max_seqlen_k,
        dsa_index_topk,
        physical_page_size,
        next_n,
    )
    inputs = (seq_lens, req_pool_indices, req_to_token, None)
    outputs = {
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "seqlens_expanded": seqlens_expanded,
        "nsa_cache_seqlens": dsa_cache_seqlens,
        "nsa_cu_seqlens_k": dsa_cu_seqlens_k,
    }
    if paged_mqa_ctx_lens_2d is not None:
        outputs["paged_mqa_ctx_lens"] = paged_mqa_ctx_lens_2d
    fill(step, inputs, outputs, page_table_1, real_page_table)


def fused_dsa_draft_extend_metadata(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    seqlens_expanded: torch.Tensor,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor,
    bs: int,
    total_len: int,
    max_seqlen_k: int,
    dsa_index_topk: int,
    physical_page_size: int,
    max_extend_len: int,
    max_total_len: int,
    static_extend_len: bool = False,
) -> None:
    """The metadata of a draft-extend step, of total_len rows.

    Args:
      seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, bs, dsa_index_topk,
        physical_page_size: as in `fused_dsa_decode_metadata`; seq_lens count the step's tokens.
      extend_seq_lens: int32 or int64, at least [bs], rows of each request.
      page_table_1: int32, at least [total_len, max_seqlen_k]; or None.
      seqlens_expanded: int32, at least [total_len].
      dsa_cache_seqlens: int32, at least [total_len].
      dsa_cu_seqlens_k: int32, at least [total_len + 1].
      real_page_table: int32, at least [total_len, ceil(max_seqlen_k / physical_page_size)].
      total_len: rows: the sum of extend_seq_lens. Rows past that sum get lengths of 0.
      max_seqlen_k: columns of page_table_1, in tokens; at most pool_cols.
      max_extend_len: the most rows of a request; total_len is at most bs times as many.
      max_total_len: total_len is at most this.
      static_extend_len: the caller's word that all of extend_seq_lens are equal. It changes
        nothing here: rows follow extend_seq_lens either way.
    """
    del static_extend_len
    step = Step(
        ForwardMode.DRAFT_EXTEND,
        bs,
        max_seqlen_k,
        dsa_index_topk,
        physical_page_size,
        total_len=total_len,
        max_extend_len=max_extend_len,
        max_total_len=max_total_len,
    )
    inputs = (seq_lens, req_pool_indices, req_to_token, extend_seq_lens)
    outputs = {
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "seqlens_expanded": seqlens_expanded,
        "nsa_cache_seqlens": dsa_cache_seqlens,
        "nsa_cu_seqlens_k": dsa_cu_seqlens_k,
    }
    fill(step, inputs, outputs, page_table_1, real_page_table)


def fused_metadata_copy_cuda(
    cache_seqlens_src: torch.Tensor,
    cu_seqlens_k_src: torch.Tensor,
    page_indices_src: torch.Tensor,
    dsa_cache_seqlens_src: torch.Tensor,
    seqlens_expanded_src: torch.Tensor | None,
    dsa_cu_seqlens_k_src: torch.Tensor,
    real_page_table_src: torch.Tensor | None,
    flashmla_num_splits_src: torch.Tensor | None,
    flashmla_metadata_src: torch.Tensor | None,
    cache_seqlens_dst: torch.Tensor,
    cu_seqlens_k_dst: torch.Tensor,
    page_table_1_dst: torch.Tensor,
    dsa_cache_seqlens_dst: torch.Tensor,
    seqlens_expanded_dst: torch.Tensor | None,
    dsa_cu_seqlens_k_dst: torch.Tensor,
    real_page_table_dst: torch.Tensor | None,
    flashmla_num_splits_dst: torch.Tensor | None,
    flashmla_metadata_dst: torch.Tensor | None,
    forward_mode: int,
    bs: int,
    max_len: int,
    max_seqlen_k: int,
    seqlens_expanded_size: int,
) -> None:
    """Copies a step's metadata to the start of one backend's tensors.

    All tensors are int32. Those named _dst may be larger than those named _src, and the rows of
    their page tables may be apart. The first element of the prefix sums, 0, is not copied.

    Args:
      cache_seqlens_src, cache_seqlens_dst: [bs].
      cu_seqlens_k_src, cu_seqlens_k_dst: [bs + 1].
      page_indices_src, page_table_1_dst: [bs, max_len] in decode; otherwise [rows, max_seqlen_k],
        with as many rows as page_indices_src has.
      dsa_cache_seqlens_src, dsa_cache_seqlens_dst: [size], which is bs in decode and otherwise
        seqlens_expanded_size.
      seqlens_expanded_src, seqlens_expanded_dst: [size]; not copied in decode.
      dsa_cu_seqlens_k_src, dsa_cu_seqlens_k_dst: [size + 1].
      real_page_table_src, real_page_table_dst: of as many rows as page_indices_src; None as source:
        not copied.
      flashmla_num_splits_src, flashmla_num_splits_dst: [size + 1], copied whole; None as source:
        nothing of FlashMLA's is copied.
      flashmla_metadata_src, flashmla_metadata_dst: contiguous, of any shape; or None.
      forward_mode: 0 for decode, 1 for target verify, 2 for draft extend.
      bs: requests.
      max_len: columns of page_indices_src in decode.
      max_seqlen_k: columns of page_indices_src in the other modes.
      seqlens_expanded_size: rows in the other modes.
    """
    decode = argument_checks.integer("forward_mode", forward_mode, 0, 2) == 0
    size, columns = (bs, max_len) if decode else (seqlens_expanded_size, max_seqlen_k)
    source = Arrays(
        cache_seqlens=cache_seqlens_src,
        cu_seqlens_k=cu_seqlens_k_src,
        page_indices=page_indices_src,
        dsa_cache_seqlens=dsa_cache_seqlens_src,
        seqlens_expanded=seqlens_expanded_src,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k_src,
        real_page_table=real_page_table_src,
        flashmla_num_splits=flashmla_num_splits_src,
        flashmla_metadata=flashmla_metadata_src,
    )
    destination = Arrays(
        cache_seqlens=cache_seqlens_dst,
        cu_seqlens_k=cu_seqlens_k_dst,
        page_indices=page_table_1_dst,
        dsa_cache_seqlens=dsa_cache_seqlens_dst,
        seqlens_expanded=seqlens_expanded_dst,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k_dst,
        real_page_table=real_page_table_dst,
        flashmla_num_splits=flashmla_num_splits_dst,
        flashmla_metadata=flashmla_metadata_dst,
    )
    copy(decode, bs, size, columns, source, {"dst": destination})


def fused_metadata_copy_multi_cuda(
    cache_seqlens_src: torch.Tensor,
    cu_seqlens_k_src: torch.Tensor,
    page_indices_src: torch.Tensor,
    dsa_cache_seqlens_src: torch.Tensor,
    dsa_cu_seqlens_k_src: torch.Tensor,
    real_page_table_src: torch.Tensor | None,
    flashmla_num_splits_src: torch.Tensor | None,
    flashmla_metadata_src: torch.Tensor | None,
    cache_seqlens_dst0: torch.Tensor,
    cu_seqlens_k_dst0: torch.Tensor,
    page_table_1_dst0: torch.Tensor,
    dsa_cache_seqlens_dst0: torch.Tensor,
    dsa_cu_seqlens_k_dst0: torch.Tensor,
    real_page_table_dst0: torch.Tensor | None,
    flashmla_num_splits_dst0: torch.Tensor | None,
    flashmla_metadata_dst0: torch.Tensor | None,
    cache_seqlens_dst1: torch.Tensor,
    cu_seqlens_k_dst1: torch.Tensor,
    page_table_1_dst1: torch.Tensor,
    dsa_cache_seqlens_dst1: torch.Tensor,
    dsa_cu_seqlens_k_dst1: torch.Tensor,
    real_page_table_dst1: torch.Tensor | None,
    flashmla_num_splits_dst1: torch.Tensor | None,
    flashmla_metadata_dst1: torch.Tensor | None,
    cache_seqlens_dst2: torch.Tensor,
    cu_seqlens_k_dst2: torch.Tensor,
    page_table_1_dst2: torch.Tensor,
    dsa_cache_seqlens_dst2: torch.Tensor,
    dsa_cu_seqlens_k_dst2: torch.Tensor,
    real_page_table_dst2: torch.Tensor | None,
    flashmla_num_splits_dst2: torch.Tensor | None,
    flashmla_metadata_dst2: torch.Tensor | None,
    bs: int,
    max_len: int,
    seqlens_expanded_size: int,
) -> None:
    """Copies a decode step's metadata to the start of three backends' tensors.

    It is one launch where their page tables have equal strides.

    The arguments are those of `fused_metadata_copy_cuda` in decode, for each of three destinations.
    Without real_page_table_dst0 no real page table is copied; seqlens_expanded_size is ignored, as
    a decode step has bs rows.
    """
    del seqlens_expanded_size
    source = Arrays(
        cache_seqlens=cache_seqlens_src,
        cu_seqlens_k=cu_seqlens_k_src,
        page_indices=page_indices_src,
        dsa_cache_seqlens=dsa_cache_seqlens_src,
        seqlens_expanded=None,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k_src,
        real_page_table=None if real_page_table_dst0 is None else real_page_table_src,
        flashmla_num_splits=flashmla_num_splits_src,
        flashmla_metadata=flashmla_metadata_src,
    )
    destinations = {
        "dst0": Arrays(
            cache_seqlens=cache_seqlens_dst0,
            cu_seqlens_k=cu_seqlens_k_dst0,
            page_indices=page_table_1_dst0,
            dsa_cache_seqlens=dsa_cache_seqlens_dst0,
            seqlens_expanded=None,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k_dst0,
            real_page_table=real_page_table_dst0,
            flashmla_num_splits=flashmla_num_splits_dst0,
            flashmla_metadata=flashmla_metadata_dst0,
        ),
        "dst1": Arrays(
            cache_seqlens=cache_seqlens_dst1,
            cu_seqlens_k=cu_seqlens_k_dst1,
            page_indices=page_table_1_dst1,
            dsa_cache_seqlens=dsa_cache_seqlens_dst1,
            seqlens_expanded=None,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k_dst1,
            real_page_table=real_page_table_dst1,
            flashmla_num_splits=flashmla_num_splits_dst1,
            flashmla_metadata=flashmla_metadata_dst1,
        ),
        "dst2": Arrays(
            cache_seqlens=cache_seqlens_dst2,
            cu_seqlens_k=cu_seqlens_k_dst2,
            page_indices=page_table_1_dst2,
            dsa_cache_seqlens=dsa_cache_seqlens_dst2,
            seqlens_expanded=None,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k_dst2,
            real_page_table=real_page_table_dst2,
            flashmla_num_splits=flashmla_num_splits_dst2,
            flashmla_metadata=flashmla_metadata_dst2,
        ),
    }
    copy(True, bs, bs, max_len, source, destinations)


_KERNELS = "sglang.kernels.ops.attention.dsa"
_REPLACEMENT = Replacement(
    "sglang",
    "0.5.23",
    {
        f"{_KERNELS}.metadata": (
            fused_dsa_decode_metadata,
            fused_dsa_target_verify_metadata,
            fused_dsa_draft_extend_metadata,
        ),
        f"{_KERNELS}.fused_metadata_copy": (
            fused_metadata_copy_cuda,
            fused_metadata_copy_multi_cuda,
        ),
    },
)


def install() -> tuple[str, ...]:
    """Puts the functions of this module in place of an installed SGLang's own.

    They are replaced where they are defined and in all of SGLang's modules that have imported them.
    A backend keeps the functions that it was made with: call this before backends are made, in
    each process that makes some. SGLang does that by itself for an entry point of the group
    "sglang.srt.plugins" that names `jaxnsa.interop.sglang:install`. Calling it again replaces what
    was imported anew.

    Returns:
      What holds these functions now, as "module.attribute"; the logger `jaxnsa` says so too.

    Raises:
      RuntimeError: there is no SGLang, the signature of one of its functions is another than in
        0.5.23, or the native library was not built. Nothing is replaced then.
    """
    reason = unavailable("gpu" if torch.cuda.is_available() else "cpu")
    if reason is not None:
        raise RuntimeError(reason)
    return _REPLACEMENT.install()


def uninstall() -> tuple[str, ...]:
    """Undoes `install`, also in modules that were imported after it.

    Returns:
      What holds SGLang's own functions again, as "module.attribute"; empty if nothing was replaced.
    """
    return _REPLACEMENT.uninstall()
