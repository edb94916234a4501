"""The functions that engines call today, by name, in a loop written against them."""

import inspect
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from helpers import inputs, mode_options, skip_without_library

from jaxnsa import ForwardMode, NSAMetadata, reference
from jaxnsa.metadata import FIELDS

torch = pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")

from jaxnsa.interop import launch_cache, launches, sgl_kernel  # noqa: E402
from jaxnsa.interop.copies import CopyCache  # noqa: E402
from jaxnsa.interop.fills import FillCache  # noqa: E402
from jaxnsa.interop.tensor_checks import exchange_api  # noqa: E402

ON_GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
HELD = -7


@pytest.fixture(params=[pytest.param("cuda:0", marks=pytest.mark.gpu) if ON_GPU else "cpu"])
def device(request):
    skip_without_library(ON_GPU)
    return torch.device(request.param)


@pytest.fixture(params=(True, False), autouse=True)
def has_exchange_api(request, monkeypatch):
    """Whether PyTorch has DLPack's C exchange API, as from 2.10 on."""
    if not request.param:
        monkeypatch.setattr(launch_cache, "exchange_api", lambda: None)
    elif exchange_api() is None:
        pytest.skip("runs with PyTorch 2.10 or newer")
    monkeypatch.setattr(sgl_kernel, "_FILLS", FillCache())
    monkeypatch.setattr(sgl_kernel, "_COPIES", CopyCache())
    return request.param


def tensor(values, device):
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def static_buffers(device, bs, max_len, page):
    shapes = {
        "cache_seqlens": (bs,),
        "cu_seqlens_k": (bs + 1,),
        "page_indices": (bs, max_len),
        "nsa_cache_seqlens": (bs,),
        "nsa_cu_seqlens_k": (bs + 1,),
        "real_page_table": (bs, -(-max_len // page)),
    }
    made = {
        field: torch.full(shape, HELD, dtype=torch.int32, device=device)
        for field, shape in shapes.items()
    }
    return types.SimpleNamespace(**made)


def engine_loop(kernels, backends, req_to_token, steps, *, max_len, topk, page):
    """What a speculative decoder does at each replay of its graph, in SGLang's names."""
    for seq_lens, req_pool_indices, extend_seq_lens in steps:
        kernels.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens,
            req_pool_indices,
            req_to_token,
            cache_seqlens_list=[b.cache_seqlens for b in backends],
            cu_seqlens_k_list=[b.cu_seqlens_k for b in backends],
            page_indices_list=[b.page_indices for b in backends],
            nsa_cache_seqlens_list=[b.nsa_cache_seqlens for b in backends],
            nsa_cu_seqlens_k_list=[b.nsa_cu_seqlens_k for b in backends],
            real_page_table_list=[b.real_page_table for b in backends],
            max_len=max_len,
            nsa_index_topk=topk,
            real_page_size=page,
        )
        precomputed = kernels.precompute_decode_metadata_cuda(
            seq_lens, req_pool_indices, req_to_token, max_len, topk, page
        )
        expanded, clamped = kernels.fill_draft_extend_metadata_fused_simple(
            extend_seq_lens=extend_seq_lens, seq_lens=seq_lens, nsa_index_topk=topk
        )
        yield precomputed, expanded, clamped


@pytest.mark.parametrize("count", (1, 3, 70))
def test_an_engine_loop(count, device):
    bs, max_len, page, topk = 9, 130, 16, 64
    backends = [static_buffers(device, bs, max_len, page) for _ in range(count)]
    _, _, pool = inputs(bs, pool_cols=140)
    batches = []
    for step in range(4):
        size = (9, 7, 1, 4)[step]
        lengths, indices, _ = inputs(size, pool_cols=140, pool_rows=11, seed=step)
        extend = mode_options(ForwardMode.DRAFT_EXTEND, size, seed=step)["extend_seq_lens"]
        batches.append((lengths, indices, extend))
    steps = [tuple(tensor(array, device) for array in batch) for batch in batches]
    results = engine_loop(
        sgl_kernel,
        backends,
        tensor(pool, device),
        steps,
        max_len=max_len,
        topk=topk,
        page=page,
    )
    for (lengths, indices, extend), (precomputed, expanded, clamped) in zip(
        batches, results, strict=True
    ):
        expected = reference.precompute_decode_metadata(
            lengths, indices, pool, max_len=max_len, nsa_index_topk=topk, real_page_size=page
        )
        for field, array in expected.arrays().items():
            np.testing.assert_array_equal(getattr(precomputed, field).cpu().numpy(), array, field)
            if not hasattr(backends[0], field):
                continue
            for backend in backends:
                written = getattr(backend, field).cpu().numpy()[tuple(map(slice, array.shape))]
                np.testing.assert_array_equal(written, array, field)
        rows = reference.fill_draft_extend_metadata(extend, lengths, nsa_index_topk=topk)
        np.testing.assert_array_equal(expanded.cpu().numpy(), rows.seqlens_expanded)
        np.testing.assert_array_equal(clamped.cpu().numpy(), rows.nsa_cache_seqlens)


def test_backends_whose_tables_have_different_strides(device):
    lengths, indices, pool = inputs(5, pool_cols=100)
    backends = [static_buffers(device, 5, 90 + 10 * k, 10) for k in range(3)]
    list(
        engine_loop(
            sgl_kernel,
            backends,
            tensor(pool, device),
            [(tensor(lengths, device), tensor(indices, device), tensor(lengths % 3, device))],
            max_len=90,
            topk=8,
            page=10,
        )
    )
    expected = reference.precompute_decode_metadata(
        lengths, indices, pool, max_len=90, nsa_index_topk=8, real_page_size=10
    )
    for backend in backends:
        table = backend.page_indices.cpu().numpy()
        np.testing.assert_array_equal(table[:, :90], expected.page_indices)
        assert (table[:, 90:] == HELD).all()
        pages = backend.real_page_table.cpu().numpy()
        np.testing.assert_array_equal(pages[:, :9], expected.real_page_table)


def test_a_launch_that_is_known_is_checked_all_the_same(device, has_exchange_api, monkeypatch):
    bs, max_len, page, topk = 5, 130, 16, 64
    backends = [static_buffers(device, bs, max_len, page) for _ in range(2)]
    lists = [[getattr(b, field) for b in backends] for field in vars(backends[0])]

    def broadcast(*given):
        sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(*given, *lists, max_len, topk, page)

    looked = []
    check = sgl_kernel.checked_vector
    monkeypatch.setattr(
        sgl_kernel, "checked_vector", lambda name, *rest: looked.append(name) or check(name, *rest)
    )
    for seed in range(3):
        lengths, indices, pool = inputs(bs, pool_cols=140 + seed, seed=seed)
        given = [tensor(array, device) for array in (lengths, indices, pool)]
        if seed == 2:
            given[:2] = given[0].long(), given[1].long()
        looked.clear()
        broadcast(*given)
        assert bool(looked) == (seed == 0 or not has_exchange_api)
        expected = reference.precompute_decode_metadata(
            lengths, indices, pool, max_len=max_len, nsa_index_topk=topk, real_page_size=page
        )
        for b in backends:
            for field, array in vars(b).items():
                np.testing.assert_array_equal(array.cpu().numpy(), getattr(expected, field), field)

    before = [[t.clone() for t in tensors] for tensors in lists]
    seq_lens, rows, pool = given
    for wrong, message in (
        ((seq_lens.float(), rows, pool), "seq_lens: got torch.float32"),
        ((seq_lens, rows[:3], pool), r"req_pool_indices: got shape \(3,\), expected \(5,\)"),
        ((seq_lens, rows, pool[:, :129]), r"max_len: got 130, expected an int in \[1, 129\]"),
        ((seq_lens, rows, pool.T), "req_to_token: got strides"),
        (
            (lists[0][1], rows, pool),
            r"seq_lens: got memory within that of cache_seqlens_list\[1\], which is written",
        ),
        (
            (seq_lens, rows, lists[2][0]),
            r"req_to_token: got memory within that of page_indices_list\[0\], which is written",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            broadcast(*wrong)
    lists[1][0].resize_(4)
    with pytest.raises(ValueError, match=r"cu_seqlens_k_list\[0\]: got shape \(4,\), expected at"):
        broadcast(*given)
    lists[1][0].resize_(6)
    for tensors, copies in zip(lists, before, strict=True):
        for now, copy in zip(tensors, copies, strict=True):
            assert torch.equal(now, copy)


def test_page_size_one_takes_no_real_page_table(device):
    lengths, indices, pool = (tensor(a, device) for a in inputs(5, pool_cols=40))
    b = static_buffers(device, 5, 40, 2)
    call = [lengths, indices, pool, [b.cache_seqlens], [b.cu_seqlens_k], [b.page_indices]]
    call += [[b.nsa_cache_seqlens], [b.nsa_cu_seqlens_k], None, 40, 8]
    sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(*call, 1)
    assert (b.real_page_table == HELD).all()
    assert (b.cache_seqlens == lengths.clamp(min=0)).all()
    precomputed = sgl_kernel.precompute_decode_metadata_cuda(lengths, indices, pool, 40, 8, 1)
    assert precomputed.real_page_table is None
    with pytest.raises(ValueError, match="real_page_table_list: got None, expected tensors"):
        sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(*call, 2)


def test_copy_into_larger_tensors(device):
    lengths, indices, pool = inputs(5, pool_cols=70)
    src = jax.tree.map(
        lambda a: tensor(a, device),
        reference.precompute_decode_metadata(lengths, indices, pool, real_page_size=10),
    )
    sizes = {"page_indices": (8, 77), "real_page_table": (6, 7)}
    dst = {
        field: torch.full(sizes.get(field, (len(t) + 3,)), HELD, dtype=torch.int32, device=device)
        for field, t in src.arrays().items()
    }
    for _ in range(2):
        src.page_indices.sub_(1)
        sgl_kernel.fused_metadata_copy_cuda(src, dst)
    for field, source in src.arrays().items():
        target = dst[field]
        inside = tuple(map(slice, source.shape))
        assert (target[inside] == source).all(), field
        assert (target == HELD).sum() >= target.numel() - source.numel()
    with pytest.raises(ValueError, match=r"metadata.page_indices: got shape \(5, 60\), expected"):
        sgl_kernel.fused_metadata_copy_cuda(src, dst | {"page_indices": src.page_indices[:, :60]})
    with pytest.raises(TypeError, match=r"metadata.cu_seqlens_k: got NoneType, expected a torch"):
        sgl_kernel.fused_metadata_copy_cuda(src, dst | {"cu_seqlens_k": None})
    with pytest.raises(
        ValueError, match=r"precomputed.\w+: got memory within that of metadata.\w+, "
    ):
        sgl_kernel.fused_metadata_copy_cuda(src, src)
    with pytest.raises(ValueError, match=r"precomputed: got no tensors"):
        sgl_kernel.fused_metadata_copy_cuda({}, dst)


@pytest.mark.parametrize("bs", (0, 1, 6, 7, 16, 17, 100, 300))
@pytest.mark.parametrize("flags", ({}, {"use_optimized": False}, {"use_adaptive": False}))
def test_fill_draft_extend(bs, flags, device):
    lengths = inputs(bs, pool_cols=200, seed=bs)[0]
    extend = mode_options(ForwardMode.DRAFT_EXTEND, bs, seed=bs)["extend_seq_lens"]
    expected = reference.fill_draft_extend_metadata(extend, lengths, nsa_index_topk=50)
    total = int(expected.total_tokens)
    if flags == {"use_adaptive": False}:
        flags = {"use_adaptive": False, "use_optimized": False}
    out = [torch.full((total + 5,), HELD, dtype=torch.int32, device=device) for _ in range(2)]
    arguments = (tensor(extend, device).long(), tensor(lengths, device), 50)
    got = sgl_kernel.fill_draft_extend_metadata_cuda(*arguments, *out, **flags)
    assert (type(got), got) == (int, total)
    names = ("seqlens_expanded", "nsa_cache_seqlens")
    for values, name in zip(out, names, strict=True):
        np.testing.assert_array_equal(values.cpu().numpy()[:total], getattr(expected, name))
        assert (values[total:] == HELD).all()
    for function in (
        sgl_kernel.fill_draft_extend_metadata_cuda_adaptive,
        sgl_kernel.fill_draft_extend_metadata_cuda_optimized,
    ):
        small = [torch.full((total // 2,), HELD, dtype=torch.int32, device=device) for _ in out]
        assert function(*arguments, *small).item() == total
        np.testing.assert_array_equal(
            small[0].cpu().numpy(), expected.seqlens_expanded[: total // 2]
        )


@pytest.mark.parametrize("function", ("", "_adaptive", "_optimized"))
@pytest.mark.parametrize("smaller", (0, 1))
def test_the_smaller_tensor_is_the_capacity(smaller, function, device):
    memory = torch.full((2, 20), HELD, dtype=torch.int32, device=device)
    out = [memory[0, :12], memory[1, :12]]
    out[smaller] = memory[smaller, :5]
    extend, lengths = np.array([3, 4], np.int32), np.array([9, 9], np.int32)
    fill = getattr(sgl_kernel, f"fill_draft_extend_metadata_cuda{function}")
    assert int(fill(tensor(extend, device), tensor(lengths, device), 8, *out)) == 7
    left = [HELD] * 15
    assert memory.tolist() == [[7, 8, 9, 6, 7, *left], [7, 8, 8, 6, 7, *left]]


def test_wrong_arguments_are_refused_before_anything_is_written(device):
    lengths, indices, pool = (tensor(a, device) for a in inputs(5, pool_cols=40))
    b = static_buffers(device, 5, 40, 2)
    good = {
        "seq_lens": lengths,
        "req_pool_indices": indices,
        "req_to_token": pool,
        "cache_seqlens_list": [b.cache_seqlens],
        "cu_seqlens_k_list": [b.cu_seqlens_k],
        "page_indices_list": [b.page_indices],
        "nsa_cache_seqlens_list": [b.nsa_cache_seqlens],
        "nsa_cu_seqlens_k_list": [b.nsa_cu_seqlens_k],
        "real_page_table_list": [b.real_page_table],
        "max_len": 40,
        "nsa_index_topk": 8,
        "real_page_size": 2,
    }
    other = torch.ones(5, dtype=torch.int32, device="cpu" if ON_GPU else "meta")
    both = torch.full((11,), HELD, dtype=torch.int32, device=device)
    freed = torch.ones(6, dtype=torch.int32, device=device)
    freed.untyped_storage().resize_(0)
    for change, message in (
        (
            {"cu_seqlens_k_list": [freed]},
            r"cu_seqlens_k_list\[0\]: got a tensor whose memory was f",
        ),
        ({"seq_lens": [1]}, "seq_lens: got list"),
        ({"req_pool_indices": indices[:3]}, r"req_pool_indices: got shape \(3,\), expected \(5,\)"),
        ({"req_pool_indices": other}, "req_pool_indices: got a tensor on"),
        ({"max_len": 41}, r"max_len: got 41, expected an int in \[1, 40\]"),
        ({"real_page_size": 0}, "real_page_size: got 0"),
        ({"cu_seqlens_k_list": []}, "cu_seqlens_k_list: got 0 tensors, expected 1"),
        (
            {"cu_seqlens_k_list": None},
            "cu_seqlens_k_list: got NoneType, expected a list of tensors",
        ),
        (
            {"cache_seqlens_list": b.cache_seqlens},
            r"cache_seqlens_list: got torch.int32 Tensor of shape .*, expected a list of",
        ),
        (
            {"nsa_cu_seqlens_k_list": [b.cu_seqlens_k[:5]]},
            r"nsa_cu_seqlens_k_list\[0\]: got shape \(5,\), expected at least \(6,\)",
        ),
        (
            {"cache_seqlens_list": [lengths]},
            r"seq_lens: got memory within that of cache_seqlens_list\[0\], which is written",
        ),
        (
            {"cache_seqlens_list": [b.nsa_cache_seqlens]},
            r"_list\[0\]: got memory that \w+_list\[0\] uses too, expected its own",
        ),
        (
            {"cu_seqlens_k_list": [both[:6]], "nsa_cu_seqlens_k_list": [both[5:]]},
            r"nsa_cu_seqlens_k_list\[0\]: got memory that cu_seqlens_k_list\[0\] uses too",
        ),
        ({"cache_seqlens_list": [other]}, r"cache_seqlens_list\[0\]: got a tensor on"),
        (
            {"page_indices_list": [b.page_indices.float()]},
            r"page_indices_list\[0\]: got torch.float32, expected torch.int32",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(**(good | change))
    assert all((t == HELD).all() for t in [*vars(b).values(), both])
    with pytest.raises(TypeError, match="extend_seq_lens: got list"):
        sgl_kernel.fill_draft_extend_metadata_fused_simple([1], lengths, 3)
    with pytest.raises(TypeError, match="out_nsa_cache_seqlens: got torch.int64"):
        sgl_kernel.fill_draft_extend_metadata_cuda(lengths, indices, 3, lengths + 0, lengths.long())


def ones(size, device):
    return torch.ones(size, dtype=torch.int32, device=device)


def test_fill_draft_extend_refuses_memory_that_is_not_its_own(device):
    extend, lengths = ones(3, device), ones(3, device)
    both = torch.full((9,), HELD, dtype=torch.int32, device=device)
    freed, shrunk = ones(9, device), ones(9, device)
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(16)
    fill = sgl_kernel.fill_draft_extend_metadata_cuda_optimized
    for arguments, message in (
        ((both[:3], lengths, 8, both, ones(9, device)), "extend_seq_lens: got memory within that"),
        (
            (extend, both[5:8], 8, ones(9, device), both),
            "seq_lens: got memory within that of out_n",
        ),
        ((extend, lengths, 8, both, both), "got memory that out_.* uses too, expected its own"),
        ((extend, lengths, 8, both[:5], both[4:]), "got memory that out_.* uses too, expected"),
        ((extend, lengths, 8, freed, both), "out_seqlens_expanded: got a tensor whose memory was"),
        ((extend, lengths, 8, both, shrunk), "out_nsa_cache_seqlens: got a tensor whose memory"),
        ((extend, lengths, 8, both[::2], freed), "out_seqlens_expanded: got stride 2, expected a"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(*arguments)
        assert (both == HELD).all()


def test_no_requests(device):
    """In tensors of NumPy's strides, which are 0 where there is no element."""

    def zeros(*shape):
        return torch.from_numpy(np.zeros(shape, np.int32)).to(device)

    totals = [zeros(1) - 1, zeros(1) - 1]
    sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(
        *(zeros(0), zeros(0), zeros(4, 64)),
        *([zeros(0)], totals[:1], [zeros(0, 64)], [zeros(0)], totals[1:], [zeros(0, 1)]),
        *(64, 64, 64),
    )
    assert [total.tolist() for total in totals] == [[0], [0]]


def test_no_backends_are_refused(device):
    with pytest.raises(ValueError, match="cache_seqlens_list: got no tensors, expected at least"):
        sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(
            *(ones(3, device), ones(3, device), ones((4, 64), device)), *[[]] * 6, *(64, 64, 64)
        )


def test_more_rows_than_int32_counts_are_refused(device):
    huge = torch.tensor([2**62, 2**62, -5], device=device)
    with pytest.raises(ValueError, match=r"extend_seq_lens: got \d+ rows in all, expected at most"):
        sgl_kernel.fill_draft_extend_metadata_fused_simple(huge, ones(3, device), 8)


def test_copy_refuses_memory_that_is_not_there_or_not_its_own(device):
    src = {"cache_seqlens": ones(5, device), "seqlens_expanded": ones(5, device)}
    both = torch.full((9,), HELD, dtype=torch.int32, device=device)
    freed, shrunk = ones(5, device), ones(5, device)
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(16)
    dst = {"cache_seqlens": both, "seqlens_expanded": ones(5, device)}
    for wrong_src, wrong_dst, message in (
        (
            {"seqlens_expanded": freed},
            {},
            "precomputed.seqlens_expanded: got a tensor whose memory",
        ),
        ({"seqlens_expanded": shrunk}, {}, "precomputed.seqlens_expanded: got a tensor whose mem"),
        ({}, {"seqlens_expanded": freed}, "metadata.seqlens_expanded: got a tensor whose memory"),
        (
            {},
            {"seqlens_expanded": both[4:]},
            "metadata.seqlens_expanded: got memory that metadata.",
        ),
        (
            {},
            {"seqlens_expanded": ones(5, "meta")},
            "metadata.seqlens_expanded: got a tensor on meta",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sgl_kernel.fused_metadata_copy_cuda(src | wrong_src, dst | wrong_dst)
        assert (both == HELD).all()


def test_lists_are_of_fields():
    """Fields without a list are left out, as seqlens_expanded is by the source documents."""
    names = inspect.signature(sgl_kernel.fused_metadata_precompute_and_broadcast_cuda).parameters
    lists = {name.removesuffix("_list") for name in names if name.endswith("_list")}
    assert lists < set(FIELDS)


@pytest.mark.parametrize("has_exchange_api", [True], indirect=True)
def test_a_known_launch_that_is_declined_without_reason_is_counted(device, has_exchange_api):
    launches.declined.clear()
    b = static_buffers(device, 5, 40, 2)
    given = [tensor(a, device) for a in inputs(5, pool_cols=40)]
    lists = [[getattr(b, field)] for field in vars(b)]

    def broadcast():
        sgl_kernel.fused_metadata_precompute_and_broadcast_cuda(*given, *lists, 40, 8, 2)

    broadcast()
    broadcast()
    assert not launches.declined
    ((key, (_, rows)),) = sgl_kernel._FILLS._known.items()
    declines = types.SimpleNamespace(try_launch=lambda *_: False, declined="not today")
    sgl_kernel._FILLS._known[key] = declines, rows
    broadcast()
    assert launches.declined == {"not today": 1}
    assert (b.cache_seqlens == given[0].clamp(min=0)).all()


def test_kernel_info(device):
    info = sgl_kernel.get_kernel_info()
    assert info["available"]
    assert info["backend"] == ("CUDA C++" if ON_GPU else "C++")
    assert set(info["variants"]) == {"optimized", "adaptive", "basic"}
    assert info["default"] == "optimized"
    assert info["prefix_sum_fusion"] is True


def test_signatures_are_those_of_the_source_documents():
    def names(function):
        return " ".join(inspect.signature(function).parameters)

    assert names(sgl_kernel.fused_metadata_precompute_and_broadcast_cuda) == (
        "seq_lens req_pool_indices req_to_token cache_seqlens_list cu_seqlens_k_list "
        "page_indices_list nsa_cache_seqlens_list nsa_cu_seqlens_k_list real_page_table_list "
        "max_len nsa_index_topk real_page_size"
    )
    outputs = "out_seqlens_expanded out_nsa_cache_seqlens"
    three = f"extend_seq_lens seq_lens nsa_index_topk {outputs}"
    assert names(sgl_kernel.fill_draft_extend_metadata_cuda_optimized) == three
    assert names(sgl_kernel.fill_draft_extend_metadata_cuda_adaptive) == three
    fill = sgl_kernel.fill_draft_extend_metadata_cuda
    assert names(fill) == f"{three} use_adaptive use_optimized"
    assert inspect.signature(fill).parameters["use_optimized"].default is True


def test_torch_is_imported_only_by_the_interop_modules():
    code = "import sys, jaxnsa; jaxnsa.get_kernel_info(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert NSAMetadata.__module__ == "jaxnsa.metadata"
