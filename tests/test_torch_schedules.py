"""Schedules and pooled arrays in an engine's static tensors, by both paths."""

import numpy as np
import pytest
from helpers import skip_without_library
from test_schedules import KINDS, lengths_of, schedules_of

import jaxnsa
from jaxnsa import FlashMlaSchedule, ForwardMode, Schedules, reference
from jaxnsa.constant_schedules import flash_mla_constants
from jaxnsa.reference_schedules import flash_mla_schedule

torch = pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")

from jaxnsa.interop import direct_path  # noqa: E402
from jaxnsa.interop.torch import BackendBuffers, DlpackOptions  # noqa: E402

REQUESTS, ROWS, MAX_LEN, PAGE, TOPK, HELD = 9, 36, 64, 4, 600, -7


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    skip_without_library(request.param == "cuda")
    return request.param


def buffers_for(schedules, kpool, device, count=2):
    """Tensors of as many backends, at the sizes of the largest batch."""
    largest = reference.precompute_draft_extend_metadata(
        np.zeros(REQUESTS, np.int32),
        np.zeros(REQUESTS, np.int32),
        np.zeros(REQUESTS, np.int32),
        np.zeros((1, MAX_LEN), np.int32),
        max_total_tokens=ROWS,
        real_page_size=PAGE,
        schedules=schedules,
        index_kpool=kpool,
    )
    return [
        {
            name: torch.full(array.shape, HELD, dtype=torch.int32, device=device)
            for name, array in largest.arrays().items()
        }
        for _ in range(count)
    ]


def check_vectors(backend, before, fresh):
    """All arrays but the tables: `fresh` where a step has elements, behind them what was before."""
    for name, array in fresh.arrays().items():
        actual, wanted = backend[name].cpu().numpy(), before[name]
        if name.endswith("table") or name == "page_indices":
            continue
        if name == "topk_plan":
            array = array[: array[0, 1] + 1]
        if name == "paged_mqa_ctx_lens":
            array, wanted, actual = array.ravel(), wanted.ravel(), actual.ravel()
        wanted[: len(array)] = array
        np.testing.assert_array_equal(actual, wanted, name)


@pytest.mark.parametrize("path", ("direct", "dlpack"))
@pytest.mark.parametrize("kpool", (1, 3))
@pytest.mark.parametrize("k", range(4))
def test_update(k, kpool, path, device):
    schedules = schedules_of(k)
    backends = buffers_for(schedules, kpool, device)
    rng = np.random.default_rng(k)
    pool = rng.integers(0, 999, (3, MAX_LEN), dtype=np.int32)
    pool_tensor = torch.from_numpy(pool).to(device)
    modes = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND)
    buffers = BackendBuffers(
        backends,
        nsa_index_topk=TOPK,
        real_page_size=PAGE,
        index_kpool=kpool,
        schedules=schedules,
        path=path,
        dlpack=DlpackOptions(pool_tensor, modes, num_draft_tokens=3),
    )
    for step, mode in enumerate(modes * 2):
        bs = (9, 0, 5, 2)[step % 4]
        lengths, indices = lengths_of(KINDS[step % 6], bs), rng.integers(0, 3, bs, dtype=np.int32)
        options = {}
        if mode is ForwardMode.TARGET_VERIFY:
            options["num_draft_tokens"] = 3
        if mode is ForwardMode.DRAFT_EXTEND:
            options["extend_seq_lens"] = rng.integers(0, 4, bs, dtype=np.int32)
            options["max_total_tokens"] = 20
        expected = [
            {name: tensor.cpu().numpy().copy() for name, tensor in b.items()} for b in backends
        ]
        (fresh,) = reference.fused_metadata_precompute_and_broadcast(
            lengths,
            indices,
            pool,
            num_backends=1,
            forward_mode=mode,
            nsa_index_topk=TOPK,
            real_page_size=PAGE,
            index_kpool=kpool,
            schedules=schedules,
            tail="zero",
            **options,
        )
        arguments = [torch.from_numpy(a).to(device) for a in (lengths, indices)]
        arguments.append(pool_tensor)
        if "extend_seq_lens" in options:
            extend = torch.from_numpy(options["extend_seq_lens"]).to(device)
            options["extend_seq_lens"] = extend
        buffers.update(*arguments, forward_mode=mode, **options)
        for backend, before in zip(backends, expected, strict=True):
            check_vectors(backend, before, fresh)
            if kpool > 1:
                table = backend["pooled_page_table"].cpu().numpy()
                real = backend["real_page_table"].cpu().numpy()[:, ::kpool]
                live = (
                    np.asarray(fresh.seqlens_expanded)[:, None]
                    > np.arange(real.shape[1]) * PAGE * kpool
                )
                rows = len(live)
                np.testing.assert_array_equal(table[:rows][live], real[:rows][live])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"topk_plan": None}, "those that index_kpool and schedules ask for"),
        ({"flash_mla_schedule": (7, 8)}, r"flash_mla_schedule: got shape .7, 8., expected"),
        ({"paged_mqa_ctx_lens": (6, 7)}, r"paged_mqa_ctx_lens: got shape .6, 7., expected"),
    ],
)
def test_wrong_buffers_are_refused(change, message, device):
    backends = buffers_for(schedules_of(0), 1, device)
    for name, shape in change.items():
        for backend in backends:
            tensor = None if shape is None else torch.zeros(shape, dtype=torch.int32, device=device)
            backend[name] = tensor
    with pytest.raises(ValueError, match=message):
        BackendBuffers(
            backends, nsa_index_topk=TOPK, real_page_size=PAGE, schedules=schedules_of(0)
        )


def test_schedules_that_were_not_asked_for_are_refused(device):
    with pytest.raises(ValueError, match="schedules ask for"):
        BackendBuffers(
            buffers_for(schedules_of(0), 1, device), nsa_index_topk=TOPK, real_page_size=PAGE
        )
    with pytest.raises(TypeError, match="schedules: got"):
        BackendBuffers([], nsa_index_topk=1, real_page_size=1, schedules=jaxnsa.TopkPlan.h200())


@pytest.mark.gpu
@pytest.mark.parametrize("k", range(3))
def test_captured_updates_of_several_sizes_take_turns(k):
    schedules = schedules_of(k)
    backends = buffers_for(schedules, 1, "cuda")
    buffers = BackendBuffers(
        backends, nsa_index_topk=TOPK, real_page_size=PAGE, schedules=schedules, path="direct"
    )
    pool = torch.zeros((1, MAX_LEN), dtype=torch.int32, device="cuda")
    sizes = (4, REQUESTS)
    lengths = {bs: torch.zeros(bs, dtype=torch.int32, device="cuda") for bs in sizes}
    buffers.update(lengths[4], torch.zeros_like(lengths[4]), pool)  # the other comes unannounced
    graphs = {}
    for bs in sizes:
        indices = torch.zeros_like(lengths[bs])
        graphs[bs] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[bs]):
            buffers.update(lengths[bs], indices, pool)
    for step in range(6):
        bs = sizes[step % 2]
        new = lengths_of(KINDS[step], bs)
        lengths[bs].copy_(torch.from_numpy(new))
        before = [{name: t.cpu().numpy().copy() for name, t in b.items()} for b in backends]
        graphs[bs].replay()
        fresh = reference.precompute_decode_metadata(
            new,
            np.zeros(bs, np.int32),
            np.zeros((1, MAX_LEN), np.int32),
            nsa_index_topk=TOPK,
            real_page_size=PAGE,
            schedules=schedules,
        )
        for backend, was in zip(backends, before, strict=True):
            check_vectors(backend, was, fresh)


def test_constants_are_computed_once_for_each_size(device, monkeypatch):
    computed = []

    def constants(spec):
        computed.append(spec.rows.count)
        return flash_mla_constants(spec)

    monkeypatch.setattr(direct_path, "flash_mla_constants", constants)
    schedules = Schedules(flash_mla=FlashMlaSchedule(66, "topk"))
    backends = buffers_for(schedules, 1, device)
    buffers = BackendBuffers(
        backends, nsa_index_topk=TOPK, real_page_size=PAGE, schedules=schedules, path="direct"
    )
    assert computed == [ROWS]
    pool = torch.zeros((1, MAX_LEN), dtype=torch.int32, device=device)
    for bs in (REQUESTS, 4, REQUESTS, 4):
        lengths = torch.full((bs,), 7, dtype=torch.int32, device=device)
        for backend in backends:
            backend["flash_mla_schedule"].fill_(HELD)
        buffers.update(lengths, torch.zeros_like(lengths), pool)
        schedule, splits = flash_mla_schedule([TOPK] * bs, schedules.flash_mla)
        for backend in backends:
            np.testing.assert_array_equal(backend["flash_mla_schedule"].cpu(), schedule)
            np.testing.assert_array_equal(backend["flash_mla_num_splits"][: bs + 1].cpu(), splits)
    assert computed == [ROWS, REQUESTS, 4]
    # A graph could not hold what is computed while it is captured.
    lengths = torch.zeros(3, dtype=torch.int32, device=device)
    with monkeypatch.context() as capture:
        capture.setattr(direct_path, "_is_capturing", lambda device: True)
        buffers.update(lengths, lengths, pool)
    assert computed == [ROWS, REQUESTS, 4]
    buffers.update(lengths, lengths, pool)
    assert computed == [ROWS, REQUESTS, 4, 3]
