"""What SGLang's functions of these names copy."""


def fused_metadata_copy_cuda(
    cache_seqlens_src,
    cu_seqlens_k_src,
    page_indices_src,
    dsa_cache_seqlens_src,
    seqlens_expanded_src,
    dsa_cu_seqlens_k_src,
    real_page_table_src,
    flashmla_num_splits_src,
    flashmla_metadata_src,
    cache_seqlens_dst,
    cu_seqlens_k_dst,
    page_table_1_dst,
    dsa_cache_seqlens_dst,
    seqlens_expanded_dst,
    dsa_cu_seqlens_k_dst,
    real_page_table_dst,
    flashmla_num_splits_dst,
    flashmla_metadata_dst,
    forward_mode,
    bs,
    max_len,
    max_seqlen_k,
    seqlens_expanded_size,
):
    decode = forward_mode == 0
    size = bs if decode else seqlens_expanded_size
    rows = bs if decode else len(page_indices_src)
    columns = max_len if decode else max_seqlen_k
    cache_seqlens_dst[:bs] = cache_seqlens_src[:bs]
    cu_seqlens_k_dst[1 : bs + 1] = cu_seqlens_k_src[1 : bs + 1]
    page_table_1_dst[:rows, :columns] = page_indices_src[:rows]
    dsa_cache_seqlens_dst[:size] = dsa_cache_seqlens_src[:size]
    if not decode:
        seqlens_expanded_dst[:size] = seqlens_expanded_src[:size]
    dsa_cu_seqlens_k_dst[1 : size + 1] = dsa_cu_seqlens_k_src[1 : size + 1]
    if real_page_table_src is not None:
        pages = real_page_table_src.shape[1]
        real_page_table_dst[:rows, :pages] = real_page_table_src[:rows]
    if flashmla_num_splits_src is not None:
        flashmla_num_splits_dst[: size + 1] = flashmla_num_splits_src[: size + 1]
        flat = flashmla_metadata_src.reshape(-1)
        flashmla_metadata_dst.view(-1)[: len(flat)] = flat


def fused_metadata_copy_multi_cuda(
    cache_seqlens_src,
    cu_seqlens_k_src,
    page_indices_src,
    dsa_cache_seqlens_src,
    dsa_cu_seqlens_k_src,
    real_page_table_src,
    flashmla_num_splits_src,
    flashmla_metadata_src,
    cache_seqlens_dst0,
    cu_seqlens_k_dst0,
    page_table_1_dst0,
    dsa_cache_seqlens_dst0,
    dsa_cu_seqlens_k_dst0,
    real_page_table_dst0,
    flashmla_num_splits_dst0,
    flashmla_metadata_dst0,
    cache_seqlens_dst1,
    cu_seqlens_k_dst1,
    page_table_1_dst1,
    dsa_cache_seqlens_dst1,
    dsa_cu_seqlens_k_dst1,
    real_page_table_dst1,
    flashmla_num_splits_dst1,
    flashmla_metadata_dst1,
    cache_seqlens_dst2,
    cu_seqlens_k_dst2,
    page_table_1_dst2,
    dsa_cache_seqlens_dst2,
    dsa_cu_seqlens_k_dst2,
    real_page_table_dst2,
    flashmla_num_splits_dst2,
    flashmla_metadata_dst2,
    bs,
    max_len,
    seqlens_expanded_size,
):
    given = dict(locals())
    names = [name.removesuffix("_src") for name in given if name.endswith("_src")]
    source = {f"{name}_src": given[f"{name}_src"] for name in names}
    for k in range(3):
        out = {
            f"{'page_table_1' if name == 'page_indices' else name}_dst": given[
                f"{'page_table_1' if name == 'page_indices' else name}_dst{k}"
            ]
            for name in names
        }
        fused_metadata_copy_cuda(
            **source,
            **out,
            seqlens_expanded_src=None,
            seqlens_expanded_dst=None,
            forward_mode=0,
            bs=bs,
            max_len=max_len,
            max_seqlen_k=max_len,
            seqlens_expanded_size=bs,
        )
