"""The PyTorch hand-off: zero-copy conversions and an engine's static buffers, on CPU or GPU."""

import concurrent.futures
import ctypes
import dataclasses
import gc
import re
import subprocess
import sys
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_compilations, inputs, mode_options, skip_without_library

from jaxnsa import ForwardMode, NSAMetadata, override, reference
from jaxnsa.metadata import FIELDS, Extent
from jaxnsa.spec import Rows, Spec

torch = pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")

from jaxnsa.interop import direct_path, launches  # noqa: E402
from jaxnsa.interop.registration import Registered  # noqa: E402
from jaxnsa.interop.tensor_checks import exchange_api  # noqa: E402
from jaxnsa.interop.torch import BackendBuffers, DlpackOptions, from_torch, to_torch  # noqa: E402

HELD = -7
MODES = {
    ForwardMode.DECODE: {},
    ForwardMode.TARGET_VERIFY: {"num_draft_tokens": 3},
    ForwardMode.DRAFT_EXTEND: {},
}
ON_GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
DEVICE = pytest.param("cuda:0", marks=pytest.mark.gpu) if ON_GPU else "cpu"


@pytest.fixture(params=[DEVICE])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=("direct", "direct before PyTorch 2.10", "dlpack"))
def path(request, device, monkeypatch):
    if request.param == "direct before PyTorch 2.10":
        monkeypatch.setattr(direct_path, "exchange_api", lambda: None)
    if request.param != "dlpack":
        skip_without_library(device.type == "cuda")
    return request.param.split()[0]


@pytest.fixture
def library(device):
    skip_without_library(device.type == "cuda")


@dataclasses.dataclass
class Engine:
    """N backends' static tensors, and NumPy twins of them."""

    backends: list
    pool: torch.Tensor
    expected: list

    @classmethod
    def of(cls, device, *, requests=8, rows=24, max_len=300, page=16, count=3, wide=True, gap=0):
        spec = Spec(Rows(requests, rows, None, 0), max_len, 64, page, wide, "keep")
        shapes = {field: None for field in FIELDS} | {
            field: array.shape for field, array in spec.shapes().items()
        }

        def tensor(shape):
            if len(shape) == 1 or not gap:
                return torch.full(shape, HELD, dtype=torch.int32, device=device)
            apart = torch.full((shape[0], shape[1] + gap), HELD, dtype=torch.int32, device=device)
            return apart[:, : shape[1]]

        backends = [
            {field: shape and tensor(shape) for field, shape in shapes.items()}
            for _ in range(count)
        ]
        pool = inputs(requests, pool_cols=max_len + 5)[2]
        return cls(
            backends,
            torch.from_numpy(pool).to(device),
            [{f: s and np.full(s, HELD, np.int32) for f, s in shapes.items()} for _ in backends],
        )

    @property
    def device(self):
        return self.pool.device

    def tensor(self, values):
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def expect(self, seq_lens, indices, *, page, capacity=None, mode=ForwardMode.DECODE, **options):
        """The reference's result at the start of the twins."""
        q = options.get("num_draft_tokens", 1)
        bs = len(seq_lens)
        rows = bs * q
        if mode is ForwardMode.DRAFT_EXTEND:
            rows = options["max_total_tokens"] = capacity
        sizes = {
            Extent.REQUESTS: bs,
            Extent.REQUESTS_PLUS_1: bs + 1,
            Extent.ROWS: rows,
            Extent.ROWS_PLUS_1: rows + 1,
            Extent.TABLE: rows,
        }
        views = [
            NSAMetadata(
                **{
                    field: None if array is None else array[: sizes[FIELDS[field].extent]]
                    for field, array in twin.items()
                }
            )
            for twin in self.expected
        ]
        wide = views[0].page_indices is not None
        reference.fused_metadata_precompute_and_broadcast(
            seq_lens,
            indices,
            self.pool.cpu().numpy(),
            num_backends=len(views),
            max_len=views[0].page_indices.shape[1] if wide else self.pool.shape[1] - 5,
            nsa_index_topk=64,
            real_page_size=page,
            wide_table=wide,
            forward_mode=mode,
            out=tuple(views),
            **options,
        )

    def check(self):
        for backend, twin in zip(self.backends, self.expected, strict=True):
            for field, array in twin.items():
                if array is not None:
                    np.testing.assert_array_equal(backend[field].cpu().numpy(), array, field)


def registered(engine, path, page, backend_offsets=None, **options):
    return BackendBuffers(
        engine.backends,
        nsa_index_topk=64,
        real_page_size=page,
        backend_offsets=backend_offsets,
        path=path,
        dlpack=DlpackOptions(engine.pool, tuple(MODES), num_draft_tokens=3, **options),
    )


@pytest.mark.parametrize("page, wide", ((16, True), (1, True), (48, False)))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wide_lengths", (False, True))
def test_update(mode, page, wide, wide_lengths, path, device):
    engine = Engine.of(device, page=page, wide=wide)
    buffers = registered(engine, path, page)
    assert buffers.path == path
    engine.check()  # registering changes nothing
    pointers = [t.data_ptr() for b in engine.backends for t in b.values() if t is not None]
    for bs in (8, 3, 7, 1, 0):
        seq_lens, indices, _ = inputs(bs, pool_cols=300, pool_rows=10, seed=bs)
        options = dict(MODES[mode])
        arguments = dict(options)
        if mode is ForwardMode.DRAFT_EXTEND:
            options["extend_seq_lens"] = mode_options(mode, bs, seed=bs)["extend_seq_lens"]
            arguments["extend_seq_lens"] = engine.tensor(options["extend_seq_lens"])
        dtype = torch.int64 if wide_lengths else torch.int32
        buffers.update(
            engine.tensor(seq_lens).to(dtype),
            engine.tensor(indices).to(dtype),
            engine.pool,
            forward_mode=mode,
            **arguments,
        )
        engine.expect(seq_lens, indices, page=page, mode=mode, capacity=24, **options)
        engine.check()
    assert pointers == [t.data_ptr() for b in engine.backends for t in b.values() if t is not None]


@pytest.mark.parametrize("mode", MODES)
def test_python_does_not_look_at_tensors_that_are_well(mode, path, device, monkeypatch):
    def looked(*arguments):
        raise AssertionError("Python looked at a tensor")

    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    lengths, indices, _ = inputs(5, pool_cols=300, pool_rows=10)
    given = [engine.tensor(lengths), engine.tensor(indices), engine.pool]
    options, arguments = dict(MODES[mode]), dict(MODES[mode])
    if mode is ForwardMode.DRAFT_EXTEND:
        options["extend_seq_lens"] = mode_options(mode, 5)["extend_seq_lens"]
        arguments["extend_seq_lens"] = engine.tensor(options["extend_seq_lens"])
    monkeypatch.setattr(Registered, "check_unchanged", looked)
    if path == "dlpack" or direct_path.exchange_api() is None:
        with pytest.raises(AssertionError, match="Python looked at a tensor"):
            buffers.update(*given, forward_mode=mode, **arguments)
        return
    buffers.update(*given, forward_mode=mode, **arguments)
    engine.expect(lengths, indices, page=16, mode=mode, capacity=24, **options)
    engine.check()


def vectors(engine):
    lengths = engine.tensor(inputs(4, pool_cols=300)[0])
    return {
        "int32": lengths,
        "int64": lengths.long(),
        "int16": lengths.short(),
        "float": lengths.float(),
        "every other": engine.tensor(inputs(8, pool_cols=300)[0])[::2],
        "one of every other": lengths[::4],
        "one for all": lengths[:1].expand(4),
        "offset": engine.tensor(inputs(8, pool_cols=300)[0])[3:7],
        "fewer": lengths[:3],
        "none": lengths[:0],
        "scalar": lengths[0],
        "matrix": lengths[None],
        "registered": engine.backends[0]["seqlens_expanded"][:4],
        "beside": engine.beside[-4:],
        "partly registered": engine.beside[-5:-1],
        "parameter": torch.nn.Parameter(lengths, requires_grad=False),
        "sparse": lengths.to_sparse(),
        "list": lengths.tolist(),
        "nothing": None,
    }


def pools(engine):
    pool = engine.pool
    return {
        "all": pool,
        "narrow": pool[:, :100],
        "offset": pool[2:, 5:],
        "one row": pool[:1],
        "one token": pool[:1, :1],
        "one column": pool[:, ::7][:, :1],
        "every other row": pool[::2],
        "every other column": pool[:, ::2],
        "one row for all": pool[:1].expand(5, -1),
        "transposed": pool.T,
        "wide": pool.long(),
        "no rows": pool[:0],
        "no columns": pool[:, :0],
        "vector": pool[0],
        "3-d": pool[None],
        "registered": engine.backends[1]["page_indices"],
        "array": pool.cpu().numpy(),
    }


def outcome(buffers, engine, given):
    try:
        buffers.update(*given)
    except (TypeError, ValueError) as error:
        return str(error)
    return [t.tolist() for b in engine.backends for t in b.values() if t is not None]


@pytest.mark.usefixtures("library")
def test_python_and_the_library_agree_about_tensors(device, monkeypatch):
    """The library takes what Python takes; what it does not take, Python says."""
    results = []
    for available in (True, False):
        if not available:
            monkeypatch.setattr(direct_path, "exchange_api", lambda: None)
        engine = Engine.of(device)
        # The memory before and after a registered tensor is not registered.
        engine.beside = torch.full((32,), 5, dtype=torch.int32, device=device)
        engine.backends[2]["cache_seqlens"] = engine.beside[20:28]
        buffers = registered(engine, "direct", 16)
        some, all_pools = vectors(engine), pools(engine)
        steps = [(x, some["int32"], engine.pool) for x in some.values()]
        steps += [(some["int32"], x, engine.pool) for x in some.values()]
        steps += [(x, x, engine.pool) for x in some.values()]
        steps += [(some["int64"], some["int32"], x) for x in all_pools.values()]
        results.append([outcome(buffers, engine, step) for step in steps])
    taken, said = results
    assert sum(isinstance(result, list) for result in said) == 25
    for number, (one, other) in enumerate(zip(taken, said, strict=True)):
        assert _without_addresses(one) == _without_addresses(other), number


def _without_addresses(result):
    return re.sub("0x[0-9a-f]+", "0x", result) if isinstance(result, str) else result


def test_lengths_past_int32_saturate(path, device):
    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    huge = torch.tensor([2**40, -(2**40)], device=device)
    buffers.update(huge, torch.zeros(2, dtype=torch.int32, device=device), engine.pool)
    assert engine.backends[2]["cache_seqlens"].tolist()[:3] == [2**31 - 1, 0, HELD]


def test_a_draft_extend_of_fewer_rows(path, device):
    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    lengths, indices, _ = inputs(4, pool_cols=300, pool_rows=10)
    extend = np.array([2, 3, 0, 4], np.int32)
    arguments = [engine.tensor(lengths), engine.tensor(indices), engine.pool]
    options = {"forward_mode": ForwardMode.DRAFT_EXTEND, "extend_seq_lens": engine.tensor(extend)}
    if path == "dlpack":
        with pytest.raises(ValueError, match="max_total_tokens: got 7, expected None or 24"):
            buffers.update(*arguments, max_total_tokens=7, **options)
        engine.check()
        return
    buffers.update(*arguments, max_total_tokens=7, **options)
    engine.expect(
        lengths,
        indices,
        page=16,
        mode=ForwardMode.DRAFT_EXTEND,
        capacity=7,
        extend_seq_lens=extend,
    )
    engine.check()


@pytest.mark.usefixtures("library")
def test_rows_that_are_apart(device):
    engine = Engine.of(device, gap=20)
    with pytest.raises(ValueError, match=r"page_indices: got strides .*, expected a contiguous"):
        registered(engine, "dlpack", 16)
    buffers = registered(engine, "direct", 16)
    wider = torch.full((10, 400), 5, dtype=torch.int32, device=device)
    wider[:, :305] = engine.pool
    lengths, indices, _ = inputs(6, pool_cols=300, pool_rows=10)
    buffers.update(engine.tensor(lengths), engine.tensor(indices), wider[:, :305])
    engine.expect(lengths, indices, page=16)
    engine.check()


@pytest.mark.usefixtures("library")
def test_tables_side_by_side_in_one_tensor(device):
    engine = Engine.of(device, count=2, page=1)
    both = torch.full((24, 600), HELD, dtype=torch.int32, device=device)
    for k, backend in enumerate(engine.backends):
        backend["page_indices"] = both[:, 300 * k : 300 * (k + 1)]
    buffers = registered(engine, "direct", 1)
    lengths, indices, _ = inputs(6, pool_cols=300, pool_rows=10)
    buffers.update(engine.tensor(lengths), engine.tensor(indices), engine.pool)
    engine.expect(lengths, indices, page=1)
    engine.check()
    engine.backends[1]["page_indices"] = both[:, 299:599]
    with pytest.raises(ValueError, match=r"page_indices: got memory that buffers\[0\].page_ind"):
        registered(engine, "direct", 1)


@pytest.mark.usefixtures("library")
def test_a_pool_narrower_than_the_tables(device):
    engine = Engine.of(device)
    buffers = registered(engine, "direct", 16)
    narrow = engine.pool[:, :100].contiguous()
    lengths, indices, _ = inputs(6, pool_cols=300, pool_rows=10)
    buffers.update(engine.tensor(lengths), engine.tensor(indices), narrow)
    capped = engine.backends[0]["page_indices"].cpu().numpy()
    rows = narrow.cpu().numpy()[np.clip(indices, 0, 9)]
    live = np.arange(100) < lengths[:, None]
    np.testing.assert_array_equal(capped[:6, :100], np.where(live, rows, HELD))
    assert (capped[:, 100:] == HELD).all()


@pytest.mark.usefixtures("library")
def test_objects_and_the_default_path(device):
    engine = Engine.of(device)
    objects = [types.SimpleNamespace(**backend) for backend in engine.backends]
    buffers = BackendBuffers(objects, nsa_index_topk=64, real_page_size=16)
    assert buffers.path == "direct"
    lengths, indices, _ = inputs(5, pool_cols=300, pool_rows=10)
    buffers.update(engine.tensor(lengths), engine.tensor(indices), engine.pool)
    engine.expect(lengths, indices, page=16)
    engine.check()


def test_nothing_compiles_after_registration(path, device):
    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    arguments = []
    for bs in (1, 8, 5, 0):
        lengths, indices, _ = inputs(bs, pool_cols=300, pool_rows=10)
        arguments.append((engine.tensor(lengths), engine.tensor(indices), engine.pool))
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    with count_compilations() as compiled:
        for given in arguments:
            buffers.update(*given)
            buffers.update(
                *given, forward_mode=ForwardMode.DRAFT_EXTEND, extend_seq_lens=given[0].clone()
            ) if device.type == "cpu" else None
            buffers.update(*given, forward_mode=ForwardMode.TARGET_VERIFY, num_draft_tokens=3)
    assert not compiled
    if device.type == "cuda":
        assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


def wrong_buffers(device):
    other = {"cpu": "meta", "cuda": "cpu"}[device.type]

    def change(k, **fields):
        def apply(backends):
            backends[k].update(fields)

        return apply

    def share(backends):
        backends[1]["cache_seqlens"] = backends[0]["cache_seqlens"]

    def overlap(backends):
        one = torch.zeros(40, dtype=torch.int32, device=device)
        backends[2]["seqlens_expanded"], backends[2]["nsa_cache_seqlens"] = one[:24], one[16:]

    def free(backends):
        backends[1]["nsa_cu_seqlens_k"].untyped_storage().resize_(40)

    ints = {"dtype": torch.int32, "device": device}
    return [
        (lambda b: b.clear(), r"buffers: got none, expected a list of at least one backend"),
        (change(1, cache_seqlens=None), r"buffers\[1\].cache_seqlens: got NoneType, expected a"),
        (
            change(1, cache_seqlens=torch.zeros(8, device=device)),
            r"buffers\[1\].cache_seqlens: got torch.float32, expected torch.int32",
        ),
        (
            change(2, cu_seqlens_k=torch.zeros(8, **ints)),
            r"buffers\[2\].cu_seqlens_k: got shape \(8,\), expected \(9,\)",
        ),
        (
            change(0, nsa_cache_seqlens=torch.zeros(48, **ints)[::2]),
            r"buffers\[0\].nsa_cache_seqlens: got stride 2, expected a contiguous vector",
        ),
        (
            change(0, page_indices=torch.zeros((300, 24), **ints).T),
            r"buffers\[0\].page_indices: got strides \(1, 24\), expected rows that are contiguous",
        ),
        (
            change(1, page_indices=torch.zeros((24, 320), **ints)[:, :300]),
            r"buffers\[1\].page_indices: got rows 320 elements apart, expected 300 as in buffers",
        ),
        (
            change(1, page_indices=None),
            r"buffers\[1\]: got page_indices in some backends, expected it in all or none",
        ),
        (
            change(1, real_page_table=None),
            r"buffers\[1\]: got real_page_table in some backends, expected it in all or none",
        ),
        (
            lambda b: [backend.update(real_page_table=None) for backend in b],
            r"buffers\[0\].real_page_table: got None, expected a tensor as real_page_size is 16",
        ),
        (
            change(2, page_indices=torch.zeros((24, 300), **ints).to_sparse()),
            r"buffers\[2\].page_indices: got a tensor of layout torch.sparse_coo",
        ),
        (
            change(2, seqlens_expanded=torch.zeros((24, 1), **ints)),
            r"buffers\[2\].seqlens_expanded: got shape \(24, 1\), expected one dimension",
        ),
        (free, r"buffers\[1\].nsa_cu_seqlens_k: got a tensor whose memory was freed"),
        (
            change(1, cache_seqlens=torch.zeros(8, dtype=torch.int32, device=other)),
            rf"buffers\[1\].cache_seqlens: got a tensor on {other}, expected {device}",
        ),
        (share, r"buffers\[1\].cache_seqlens: got memory that buffers\[0\].cache_seqlens uses"),
        (overlap, r"buffers\[2\].nsa_cache_seqlens: got memory that buffers\[2\].seqlens_expanded"),
    ]


@pytest.mark.parametrize("number", range(len(wrong_buffers(torch.device("cpu")))))
def test_wrong_buffers_are_refused(number, device):
    engine = Engine.of(device)
    change, message = wrong_buffers(device)[number]
    change(engine.backends)
    with pytest.raises((ValueError, TypeError), match=message):
        registered(engine, None, 16)


def test_wrong_options_are_refused(device):
    engine = Engine.of(device)
    with pytest.raises(ValueError, match="path: got 'fast', expected one of 'direct', 'dlpack'"):
        registered(engine, "fast", 16)
    with pytest.raises(TypeError, match="dlpack: got 3, expected DlpackOptions"):
        BackendBuffers(engine.backends, nsa_index_topk=64, real_page_size=16, dlpack=3)
    with pytest.raises(ValueError, match="dlpack: got None, expected DlpackOptions"):
        BackendBuffers(engine.backends, nsa_index_topk=1, real_page_size=16, path="dlpack")
    for dlpack, message in (
        (engine.pool, "dlpack: got torch.int32 Tensor of shape .*, expected DlpackOptions"),
        (DlpackOptions(engine.pool, "decode"), "dlpack.forward_modes: got 'decode', expected sev"),
        (DlpackOptions(engine.pool, ForwardMode.DECODE), "dlpack.forward_modes: got <Forward"),
        (DlpackOptions(engine.pool, ()), r"dlpack.forward_modes: got \(\), expected several Forw"),
    ):
        with pytest.raises(TypeError, match=message):
            BackendBuffers(
                engine.backends, nsa_index_topk=1, real_page_size=16, path="dlpack", dlpack=dlpack
            )
    with pytest.raises(ValueError, match="real_page_table: got a tensor, expected None as real_p"):
        registered(engine, "direct", 1)
    with pytest.raises(ValueError, match="nsa_index_topk: got 0"):
        BackendBuffers(engine.backends, nsa_index_topk=0, real_page_size=16)


def test_updates_validate_on_request(path, device, monkeypatch):
    engine = Engine.of(device)
    good, bad = engine.tensor(np.array([3, 4])), engine.tensor(np.array([3, -4]))
    slots = engine.tensor(np.array([0, 1], np.int32))
    modes = {"forward_mode": ForwardMode.DRAFT_EXTEND, "extend_seq_lens": good}

    def buffers_now():
        options = DlpackOptions(engine.pool, (ForwardMode.DECODE,))
        return BackendBuffers(
            engine.backends, nsa_index_topk=64, real_page_size=16, path=path, dlpack=options
        )

    buffers = buffers_now()
    with override(validate=True):
        with pytest.raises(ValueError, match=r"seq_lens: got -4 at row\(s\) 1, expected lengths >"):
            buffers.update(bad, slots, engine.pool)
        with pytest.raises(ValueError, match=r"extend_seq_lens: got 3, 7 at row\(s\) 0, 1, .* = 2"):
            buffers.update(good, slots, engine.pool, **modes, max_total_tokens=2)
        engine.check()
        launches.declined.clear()
        buffers.update(good, slots, engine.pool)
        assert not launches.declined
    monkeypatch.setenv("JAXNSA_VALIDATE", "1")
    buffers = buffers_now()
    with pytest.raises(ValueError, match="seq_lens: got -4"):
        buffers.update(bad, slots, engine.pool)
    with override(validate=False):
        buffers.update(bad, slots, engine.pool)


def wrong_updates(engine):
    device = engine.device
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    good = {"seq_lens": lengths, "req_pool_indices": lengths, "req_to_token": engine.pool}
    other = torch.ones(3, dtype=torch.int32, device={"cpu": "meta", "cuda": "cpu"}[device.type])
    extend = ForwardMode.DRAFT_EXTEND
    verify = ForwardMode.TARGET_VERIFY
    freed, shrunk = lengths.clone(), lengths.clone()
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(8)
    shrunk_pool = engine.pool.clone()
    shrunk_pool.untyped_storage().resize_(4 * shrunk_pool.numel() - 1)
    cases = [
        ({"seq_lens": [1, 2]}, "seq_lens: got list, expected a torch.Tensor"),
        ({"seq_lens": other}, f"seq_lens: got a tensor on {other.device}, expected {device}"),
        ({"seq_lens": lengths.float()}, "seq_lens: got torch.float32, expected torch.int32 or"),
        ({"seq_lens": lengths[None]}, r"seq_lens: got shape \(1, 3\), expected one dimension"),
        ({"seq_lens": freed}, "seq_lens: got a tensor whose memory was freed"),
        ({"req_pool_indices": shrunk}, "req_pool_indices: got a tensor whose memory was freed"),
        ({"req_to_token": shrunk_pool}, "req_to_token: got a tensor whose memory was freed"),
        (
            {"seq_lens": torch.ones(6, dtype=torch.int32, device=device)[::2]},
            "seq_lens: got stride 2, expected a contiguous vector",
        ),
        (
            {"seq_lens": torch.ones(9, dtype=torch.int32, device=device)},
            "seq_lens: got 9 requests, expected at most 8",
        ),
        (
            {"seq_lens": engine.backends[1]["cache_seqlens"][:3]},
            r"seq_lens: got memory within that of buffers\[1\].cache_seqlens",
        ),
        ({"req_pool_indices": lengths[:2]}, r"req_pool_indices: got shape \(2,\), expected \(3,\)"),
        ({"req_to_token": engine.pool.long()}, "req_to_token: got torch.int64, expected"),
        ({"req_to_token": engine.pool[0]}, r"req_to_token: got shape \(305,\), expected two dim"),
        ({"req_to_token": engine.pool[:0]}, r"req_to_token: got shape \(0, 305\), expected"),
        ({"req_to_token": engine.pool.T}, r"req_to_token: got strides \(1, 305\), expected rows"),
        ({"num_draft_tokens": 2}, "num_draft_tokens: got 2, expected None in ForwardMode.DECODE"),
        ({"max_total_tokens": 2}, "max_total_tokens: got 2, expected None in ForwardMode.DECODE"),
        ({"extend_seq_lens": lengths}, "extend_seq_lens: got a tensor, expected None in"),
        ({"forward_mode": "decode"}, "forward_mode: got 'decode', expected a jaxnsa.ForwardMode"),
        ({"forward_mode": extend}, "extend_seq_lens: got None, expected a tensor in"),
        (
            {"forward_mode": extend, "extend_seq_lens": lengths, "max_total_tokens": 25},
            r"max_total_tokens: got 25, expected an int in \[0, 24\]",
        ),
        (
            {"forward_mode": verify},
            "num_draft_tokens: got None, expected a value in ForwardMode.TARGET",
        ),
        (
            {"forward_mode": verify, "num_draft_tokens": 9},
            "seq_lens: got 3 requests of 9 rows each, expected at most 24 rows",
        ),
    ]
    return [(good | change, message) for change, message in cases]


@pytest.mark.parametrize("number", range(len(wrong_updates(Engine.of(torch.device("cpu"))))))
def test_wrong_updates_are_refused_before_anything_is_written(number, path, device):
    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    arguments, message = wrong_updates(engine)[number]
    with pytest.raises((ValueError, TypeError), match=message):
        buffers.update(**arguments)
    engine.check()


def shrink(tensor):
    """Gives a tensor a storage that is too small, at the old address where that is free."""
    storage = tensor.untyped_storage()
    address, size = storage.data_ptr(), storage.nbytes()
    for smaller in range(size - 4, size // 2, -1000):
        storage.resize_(0)
        storage.resize_(smaller)
        if storage.data_ptr() == address:
            return


CHANGES = {
    "freed": lambda tensor: tensor.untyped_storage().resize_(0),
    "shrunk": shrink,
    "resized": lambda tensor: tensor.resize_(10, 5),
    "resized to as many elements": lambda tensor: tensor.resize_(24 * 300 // 2, 2),
    "transposed": lambda tensor: tensor.t_(),
    "of other strides": lambda tensor: tensor.as_strided_((24, 300), (150, 1)),
    "of other memory": lambda tensor: setattr(tensor, "data", torch.zeros_like(tensor)),
    "of another dtype": lambda tensor: setattr(tensor, "data", tensor.view(torch.float32)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_registered_tensors_that_changed_are_refused(what, path, device):
    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    CHANGES[what](engine.backends[1]["page_indices"])
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"buffers\[1\].page_indices: .* freed or resized"):
        buffers.update(lengths, lengths, engine.pool)
    assert (engine.backends[0]["cache_seqlens"] == HELD).all()


@pytest.mark.usefixtures("library")
def test_buffers_hold_their_tensors_no_longer_than_they_live(device):
    engine = Engine.of(device)
    buffers = registered(engine, "direct", 16)
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    buffers.update(lengths, lengths, engine.pool)
    table = weakref.ref(engine.backends[1]["page_indices"])
    gc.disable()
    try:
        engine.backends.clear()
        del buffers
        assert table() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("library")
def test_numbers_that_change_are_not_remembered(device):
    engine = Engine.of(device)
    buffers = registered(engine, "direct", 16)
    lengths, indices, _ = inputs(4, pool_cols=300, pool_rows=10)
    given = (engine.tensor(lengths), engine.tensor(indices), engine.pool)
    number = torch.tensor(3)
    for value in (3, 2, 5):
        number.fill_(value)
        mode = ForwardMode.TARGET_VERIFY
        buffers.update(*given, forward_mode=mode, num_draft_tokens=number)
        engine.expect(lengths, indices, page=16, mode=mode, num_draft_tokens=value)
        engine.check()
    extend = np.array([2, 3, 0, 4], np.int32)
    for capacity in (3, 7):
        number.fill_(capacity)
        mode, more = ForwardMode.DRAFT_EXTEND, {"extend_seq_lens": extend}
        buffers.update(
            *given,
            forward_mode=mode,
            extend_seq_lens=engine.tensor(extend),
            max_total_tokens=number,
        )
        engine.expect(lengths, indices, page=16, mode=mode, capacity=capacity, **more)
        engine.check()


def test_the_dlpack_path_takes_no_pool_in_vain(device):
    """At an address for which JAX copies a pool on a CPU, and takes none on a GPU."""
    engine = Engine.of(device)
    bytes_of_pool = torch.zeros(4 * engine.pool.numel() + 64, dtype=torch.uint8, device=device)
    pool = bytes_of_pool[4:][: 4 * engine.pool.numel()].view(torch.int32).view(engine.pool.shape)
    pool.copy_(engine.pool)
    engine.pool = pool
    if device.type == "cuda":
        with pytest.raises(ValueError, match="req_to_token: got memory at .*, expected a multiple"):
            registered(engine, "dlpack", 16)
        with pytest.raises(ValueError, match=r"tree\['x'\]: got memory at .*, expected a multiple"):
            from_torch({"x": pool})
        return
    buffers = registered(engine, "dlpack", 16)
    lengths, indices, _ = inputs(6, pool_cols=300, pool_rows=10)
    for _ in range(2):
        engine.pool += 16
        buffers.update(engine.tensor(lengths), engine.tensor(indices), engine.pool)
        engine.expect(lengths, indices, page=16)
        engine.check()


def test_pages_past_half_of_int32(path, device):
    """One page holds a row: its first token is live, whatever the page size."""
    page = 2**31 - 1
    engine = Engine.of(device, max_len=300, page=page)
    buffers = registered(engine, path, page)
    engine.pool[:, 0] = page
    lengths = torch.tensor([300, 0, 1], dtype=torch.int32, device=device)
    indices = torch.arange(3, dtype=torch.int32, device=device)
    buffers.update(lengths, indices, engine.pool)
    for backend in engine.backends:
        assert backend["real_page_table"][:3].tolist() == [[1], [HELD], [1]]


def test_threads_that_update_the_same_tensors_do_so_one_after_the_other(path, device):
    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    batches = []
    for seed in range(4):
        lengths, indices, _ = inputs(8, pool_cols=300, pool_rows=10, seed=seed)
        batches.append((engine.tensor(lengths), engine.tensor(indices), engine.pool))

    def update(batch):
        for _ in range(50):
            buffers.update(*batch)

    with concurrent.futures.ThreadPoolExecutor(len(batches)) as threads:
        list(threads.map(update, batches))
    last = engine.backends[0]["cache_seqlens"].tolist()
    ((lengths, indices, _),) = [b for b in batches if b[0].clamp(min=0).tolist() == last]
    engine.expect(lengths.cpu().numpy(), indices.cpu().numpy(), page=16)
    for backend, twin in zip(engine.backends, engine.expected, strict=True):
        for field, expected in twin.items():
            if expected is not None:  # dead columns are of other batches
                got = backend[field].cpu().numpy()
                np.testing.assert_array_equal(np.where(expected == HELD, HELD, got), expected)


@pytest.mark.usefixtures("library")
def test_a_step_that_comes_while_another_is_looked_at(device):
    """As one of another thread may, where Python runs."""
    if exchange_api() is None:
        pytest.skip("runs with PyTorch 2.10 or newer")
    engine = Engine.of(device)
    buffers = registered(engine, "direct", 16)
    first, second = (
        [engine.tensor(a) for a in inputs(bs, pool_cols=300, pool_rows=10, seed=bs)[:2]]
        for bs in (5, 3)
    )
    comes = [second]

    class Interrupted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.untyped_storage and comes:
                buffers.update(*comes.pop(), engine.pool)
            return super().__torch_function__(function, types, args, kwargs)

    buffers.update(first[0], first[1].as_subclass(Interrupted), engine.pool)
    assert not comes
    engine.expect(*(a.cpu().numpy() for a in second), page=16)
    engine.expect(*(a.cpu().numpy() for a in first), page=16)
    engine.check()


def test_threads_with_tensors_of_their_own(path, device):
    engines = [Engine.of(device, count=1) for _ in range(4)]
    options = DlpackOptions(engines[0].pool)

    def run(engine):
        buffers = BackendBuffers(
            engine.backends,
            nsa_index_topk=64,
            real_page_size=16,
            path=path,
            dlpack=dataclasses.replace(options, req_to_token=engine.pool),
        )
        for bs in (1, 5, 3, 8) * 4:
            lengths = np.arange(bs, dtype=np.int32) * 9
            buffers.update(engine.tensor(lengths), engine.tensor(lengths % 8), engine.pool)
            engine.expect(lengths, lengths % 8, page=16)
        engine.check()

    with concurrent.futures.ThreadPoolExecutor(len(engines)) as threads:
        list(threads.map(run, engines))


FORKED = """
import os
import torch
from jaxnsa.interop.torch import BackendBuffers

def vector(size):
    return torch.zeros(size, dtype=torch.int32)

names = ("cache_seqlens", "seqlens_expanded", "nsa_cache_seqlens")
backend = {name: vector(2) for name in names}
backend |= {"cu_seqlens_k": vector(3), "nsa_cu_seqlens_k": vector(3)}
backend["page_indices"] = torch.zeros((2, 8), dtype=torch.int32)
buffers = BackendBuffers([backend], nsa_index_topk=4, real_page_size=1, path="direct")
pool = torch.arange(16, dtype=torch.int32).view(2, 8)
lengths = torch.tensor([3, 5], dtype=torch.int32)
child = os.fork()
buffers.update(lengths + (child == 0), torch.tensor([1, 0]), pool)
sums = [0, 4, 10] if child == 0 else [0, 3, 8]
right = backend["cu_seqlens_k"].tolist() == sums
if child == 0:
    os._exit(0 if right else 1)
assert right and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(ON_GPU, reason="runs on a machine without a GPU: CUDA does not outlive a fork")
def test_a_forked_child_updates_by_the_direct_path():
    skip_without_library()
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.usefixtures("library")
def test_what_the_library_declines_without_reason_is_counted_and_logged_once(device, caplog):
    if exchange_api() is None:
        pytest.skip("runs with PyTorch 2.10 or newer")
    launches.declined.clear()
    engine = Engine.of(device)
    buffers = registered(engine, "direct", 16)
    lengths, indices, _ = inputs(5, pool_cols=300, pool_rows=10)
    given = engine.tensor(lengths), engine.tensor(indices), engine.pool
    buffers.update(*given)
    with pytest.raises(TypeError, match="seq_lens: got torch.float32"):
        buffers.update(given[0].float(), *given[1:])
    assert not launches.declined
    native = buffers._path._launch

    class Declines:
        declined = "seq_lens: not today"

        def launch(self, *arguments):
            native.launch(*arguments)

    buffers._path._launch = Declines()
    buffers._path.try_step = lambda *step: False
    with caplog.at_level("WARNING", logger="jaxnsa"):
        for _ in range(3):
            buffers.update(*given)
    assert launches.declined == {"seq_lens: not today": 3}
    assert [record.getMessage() for record in caplog.records] == [
        "updates take some microseconds more, as Python checks the tensors: seq_lens: not today"
    ]
    engine.expect(lengths, indices, page=16)
    engine.check()


def exchange_api_of_version_2():
    """The memory of a capsule must outlive it: that of both is returned."""
    table, name = (ctypes.c_uint64 * 8)(2), ctypes.create_string_buffer(b"dlpack_exchange_api")
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
    return new(ctypes.addressof(table), ctypes.addressof(name), None), (table, name)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "reason",
    (
        "a registered tensor cannot be looked at through LibTorch's C ABI",
        "the DLPack C exchange API is of another version than 1",
    ),
)
def test_a_pytorch_whose_tensors_the_library_cannot_look_at(reason, device, monkeypatch):
    """Python looks at them then, and says that it does; the library keeps none of them."""
    if exchange_api() is None:
        pytest.skip("runs with PyTorch 2.10 or newer")
    if "version" in reason:
        api, _memory = exchange_api_of_version_2()
        monkeypatch.setattr(direct_path, "exchange_api", lambda: api)
    else:
        monkeypatch.delattr(torch._C._aoti, "unsafe_alloc_void_ptrs_from_tensors")
    launches.declined.clear()
    engine = Engine.of(device)
    buffers = registered(engine, "direct", 16)
    lengths, indices, _ = inputs(5, pool_cols=300, pool_rows=10)
    buffers.update(engine.tensor(lengths), engine.tensor(indices), engine.pool)
    engine.expect(lengths, indices, page=16)
    engine.check()
    assert launches.declined == {reason: 1}
    table = weakref.ref(engine.backends[1]["page_indices"])
    engine.backends.clear()
    del buffers
    gc.collect()
    assert table() is None


def test_steps_of_equal_requests_differ_in_their_rows(path, device):
    """Each follows one that differs in its mode, or in a number that decides the rows."""
    engine = Engine.of(device)
    verify, extend = ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND
    lengths, indices, _ = inputs(5, pool_cols=300, pool_rows=8)
    tokens = np.array([1, 0, 3, 2, 2], np.int32)
    buffers = registered(engine, path, 16)
    # The path "dlpack" is compiled for one number of each.
    drafts, totals = ((3,), (24,)) if path == "dlpack" else ((2, 3), (7, 9))
    steps = [(ForwardMode.DECODE, {}), *((verify, {"num_draft_tokens": d}) for d in drafts)]
    steps += [(extend, {"max_total_tokens": total}) for total in totals]
    for mode, numbers in steps * 2:
        given = {"extend_seq_lens": tokens} if mode is extend else {}
        buffers.update(
            engine.tensor(lengths),
            engine.tensor(indices),
            engine.pool,
            forward_mode=mode,
            **numbers,
            **{name: engine.tensor(array) for name, array in given.items()},
        )
        capacity = numbers.get("max_total_tokens")
        if mode is verify:
            given = numbers
        engine.expect(lengths, indices, page=16, capacity=capacity, mode=mode, **given)
        engine.check()


def test_the_dlpack_path_refuses_what_it_was_not_compiled_for(device):
    engine = Engine.of(device)
    buffers = BackendBuffers(
        engine.backends,
        nsa_index_topk=64,
        real_page_size=16,
        path="dlpack",
        dlpack=DlpackOptions(engine.pool),
    )
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    with pytest.raises(
        ValueError, match="TARGET_VERIFY of 2 draft tokens, expected ForwardMode.DECODE as"
    ):
        buffers.update(
            lengths,
            lengths,
            engine.pool,
            forward_mode=ForwardMode.TARGET_VERIFY,
            num_draft_tokens=2,
        )
    with pytest.raises(ValueError, match="req_to_token: got shape .* expected the pool of Dlpack"):
        buffers.update(lengths, lengths, engine.pool.clone())
    with pytest.raises(
        ValueError, match="req_to_token: got 200 columns, expected at least those of"
    ):
        BackendBuffers(
            engine.backends,
            nsa_index_topk=64,
            real_page_size=16,
            path="dlpack",
            dlpack=DlpackOptions(engine.pool[:, :200].contiguous()),
        )
    engine.check()


def test_metadata_crosses_without_a_copy(device):
    lengths, indices, pool = inputs(5, pool_cols=128)
    arrays = jax.tree.map(
        jnp.array, reference.precompute_decode_metadata(lengths, indices, pool, real_page_size=1)
    )
    tensors = to_torch((arrays, {"more": arrays.cache_seqlens}))
    assert tensors[0].real_page_table is None
    for array, tensor in zip(jax.tree.leaves(arrays), jax.tree.leaves(tensors[0]), strict=True):
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
        assert tensor.dtype == torch.int32
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
    back = from_torch(tensors)
    assert isinstance(back[0], NSAMetadata)
    for array, tensor in zip(jax.tree.leaves(back), jax.tree.leaves(tensors), strict=True):
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    engine = Engine.of(device)
    there = from_torch(engine.backends[0])
    assert there["cache_seqlens"].unsafe_buffer_pointer() == (
        engine.backends[0]["cache_seqlens"].data_ptr()
    )


def test_what_cannot_cross_is_named(device):
    with pytest.raises(TypeError, match=r"tree\['a'\]: got ndarray, expected a concrete jax.Array"):
        to_torch({"a": np.zeros(3)})
    with pytest.raises(TypeError, match=r"tree: got \w*Tracer, expected a concrete jax.Array"):
        jax.jit(to_torch)(jnp.zeros(3))
    with pytest.raises(TypeError, match=r"tree\[0\]: got list|tree\[0\]\[0\]: got int"):
        from_torch([[1], torch.zeros(3)])
    table = torch.zeros((3, 4), dtype=torch.int32, device=device)[:, :2]
    with pytest.raises(ValueError, match=r"tree\[1\]: got strides \(4, 1\), expected a contig"):
        from_torch((torch.zeros(3, device=device), table))
    wide = torch.zeros(3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"tree\[0\]: got torch.float64, .* jax_enable_x64 alone"):
        from_torch([wide])
    with jax.enable_x64(True):
        assert from_torch(wide).dtype == jnp.float64
    with pytest.raises(TypeError, match=r"tree\['a'\]: got what DLPack .* require gradient"):
        from_torch({"a": torch.zeros(3, device=device, requires_grad=True)})
    with pytest.raises(TypeError, match=r"tree\['a'\]: got key<fry>, expected a dtype that"):
        to_torch({"a": jax.random.key(0)})
    with pytest.raises(TypeError, match=r"tree: got what DLPack .* S4 has no DLPack equivalent"):
        to_torch(jnp.zeros(3, jnp.int4))
    assert to_torch(None) is None
    array = jnp.zeros(3) + 0
    array.delete()
    with pytest.raises(ValueError, match="tree: got a deleted array"):
        to_torch(array)
    for size in (0, 8):
        freed = torch.ones(3, dtype=torch.int32, device=device)
        freed.untyped_storage().resize_(size)
        with pytest.raises(ValueError, match="tree: got a tensor whose memory was freed"):
            from_torch(freed)


def test_int64_lengths_cross(device):
    lengths = torch.tensor([3, 2**20, 2**32 + 5, -(2**40)], device=device)
    array = from_torch(lengths)
    assert array.tolist() == [3, 2**20, 2**31 - 1, -(2**31)]
    with jax.enable_x64(True):
        assert from_torch(lengths).dtype == jnp.int64


def test_pytorch_describes_tensors():
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert (exchange_api() is not None) == (version >= (2, 10))


@pytest.mark.gpu
@pytest.mark.parametrize("path", ("direct", "dlpack"))
def test_stress_on_side_streams(path):
    """20,000 updates between kernels that poison and read: no stale and no torn value."""
    engine = Engine.of(torch.device("cuda:0"), requests=8, rows=8, max_len=256, page=64)
    buffers = registered(engine, path, 64) if path == "direct" else _decode_only(engine)
    slots = torch.arange(8, dtype=torch.int32, device="cuda")
    seq_lens = torch.zeros(8, dtype=torch.int32, device="cuda")
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    whole = [engine.pool[:8, :256], engine.pool[:8, :256:64].div(64, rounding_mode="floor")]
    streams = [torch.cuda.Stream() for _ in range(3)]
    last = torch.cuda.current_stream()
    for step in range(20_000):
        stream = streams[step % 3]
        stream.wait_stream(last)
        last = stream
        backend = engine.backends[step % 3]
        with torch.cuda.stream(stream):
            seq_lens.fill_(256 if step % 2 else step % 200)
            backend["cache_seqlens"].fill_(HELD)
            backend["cu_seqlens_k"].fill_(HELD)
            backend["page_indices"].fill_(HELD)
            backend["real_page_table"].fill_(HELD)
            buffers.update(seq_lens, slots, engine.pool)
            bad += (backend["cache_seqlens"] != seq_lens).sum()
            bad += (backend["cu_seqlens_k"][1:] != seq_lens.cumsum(0)).sum()
            if step % 2:
                bad += (backend["page_indices"] != whole[0]).sum()
                bad += (backend["real_page_table"] != whole[1]).sum()
            else:
                bad += (backend["page_indices"][:, step % 200 :] != HELD).sum()
            seq_lens.fill_(-1)
    torch.cuda.synchronize()
    assert bad.item() == 0


def _decode_only(engine):
    return BackendBuffers(
        engine.backends,
        nsa_index_topk=64,
        real_page_size=64,
        path="dlpack",
        dlpack=DlpackOptions(engine.pool),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_update_follows_changed_inputs(mode):
    engine = Engine.of(torch.device("cuda:0"))
    buffers = registered(engine, "direct", 16)
    lengths = torch.zeros(6, dtype=torch.int32, device="cuda")
    indices, extend = lengths.clone(), lengths.clone()
    arguments = dict(MODES[mode])
    if mode is ForwardMode.DRAFT_EXTEND:
        arguments["extend_seq_lens"] = extend
    read = torch.zeros((24, 300), dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers.update(lengths, indices, engine.pool, forward_mode=mode, **arguments)
        read.copy_(engine.backends[2]["page_indices"])
    for seed in range(5):
        new_lengths, new_indices, _ = inputs(6, pool_cols=300, pool_rows=10, seed=seed)
        new_extend = mode_options(ForwardMode.DRAFT_EXTEND, 6, seed=seed)["extend_seq_lens"]
        lengths.copy_(engine.tensor(new_lengths))
        indices.copy_(engine.tensor(new_indices))
        extend.copy_(engine.tensor(new_extend))
        graph.replay()
        options = dict(MODES[mode])
        if mode is ForwardMode.DRAFT_EXTEND:
            options["extend_seq_lens"] = new_extend
        engine.expect(new_lengths, new_indices, page=16, mode=mode, capacity=24, **options)
        engine.check()
        np.testing.assert_array_equal(read.cpu().numpy(), engine.expected[2]["page_indices"])


@pytest.mark.gpu
def test_threads_update_while_another_captures():
    engine = Engine.of(torch.device("cuda:0"))
    buffers = registered(engine, "direct", 16)
    given = [inputs(bs, pool_cols=300, pool_rows=10, seed=bs)[:2] for bs in (8, 3, 5)]
    batches = [(*map(engine.tensor, vectors), engine.pool) for vectors in given]
    captured, stop = threading.Event(), threading.Event()

    def update(batch):
        captured.wait()
        count = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                buffers.update(*batch)
                count += 1
        return count

    graphs = [torch.cuda.CUDAGraph() for _ in range(10)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        counts = [threads.submit(update, batch) for batch in batches[1:]]
        try:
            for graph in graphs:
                with torch.cuda.graph(graph):
                    captured.set()
                    for _ in range(100):
                        buffers.update(*batches[0])
        finally:
            captured.set()
            stop.set()
    assert min(count.result() for count in counts) > 0
    engine.expect(*given[0], page=16)
    for graph in graphs:
        torch.cuda.synchronize()
        for tensor in (tensor for backend in engine.backends for tensor in backend.values()):
            if tensor is not None:
                tensor.fill_(HELD)
        graph.replay()
        engine.check()


@pytest.mark.gpu
@pytest.mark.parametrize("current", (0, 1))
@pytest.mark.parametrize("number", (0, 1))
def test_devices_other_than_the_first_and_than_the_current(number, current):
    if torch.cuda.device_count() < 2:
        pytest.skip("runs on a machine with two GPUs")
    engine = Engine.of(torch.device("cuda", number))
    lengths, indices, _ = inputs(5, pool_cols=300, pool_rows=10)
    given = engine.tensor(lengths), engine.tensor(indices), engine.pool
    with torch.cuda.device(current):
        buffers = registered(engine, "direct", 16)
        buffers.update(*given)
        assert torch.cuda.current_device() == current
    engine.expect(lengths, indices, page=16)
    engine.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page, offsets", ((16, None), (1, (0, 1, 2))))
def test_update_leaves_written_columns_alone(mode, page, offsets, path, device):
    engine = Engine.of(device, page=page)
    buffers = registered(engine, path, page, backend_offsets=offsets)
    for bs, max_new_tokens in ((8, None), (3, 1), (0, 0), (5, 400)):
        seq_lens, indices, _ = inputs(bs, pool_cols=300, pool_rows=10, seed=bs)
        options = dict(MODES[mode])
        arguments = dict(options)
        if mode is ForwardMode.DRAFT_EXTEND:
            options["extend_seq_lens"] = mode_options(mode, bs, seed=bs)["extend_seq_lens"]
            arguments["extend_seq_lens"] = engine.tensor(options["extend_seq_lens"])
        written = seq_lens.astype(np.int64) - np.arange(bs) % 4 * 20
        written[:1] = 2**40
        buffers.update(
            *(engine.tensor(seq_lens), engine.tensor(indices), engine.pool),
            forward_mode=mode,
            written_lens=engine.tensor(written),
            max_new_tokens=max_new_tokens,
            **arguments,
        )
        options |= {"written_lens": written, "backend_offsets": offsets}
        engine.expect(seq_lens, indices, page=page, mode=mode, capacity=24, **options)
        engine.check()
    buffers.update(*(engine.tensor(a) for a in (seq_lens, indices)), engine.pool)  # all of them
    engine.expect(seq_lens, indices, page=page, backend_offsets=offsets)
    engine.check()


def test_written_lens_that_are_wrong(path, device):
    engine = Engine.of(device)
    buffers = registered(engine, path, 16)
    lengths = engine.tensor(inputs(4, pool_cols=300)[0])
    given = (lengths, lengths, engine.pool)
    for error, message, options in (
        (
            ValueError,
            r"written_lens: got shape \(3,\), expected \(4,\)",
            {"written_lens": lengths[:3]},
        ),
        (TypeError, "written_lens: got torch.float32", {"written_lens": lengths.float()}),
        (ValueError, "max_new_tokens: got 3, expected None", {"max_new_tokens": 3}),
        (
            ValueError,
            "max_new_tokens: got -1, expected an int",
            {"written_lens": lengths, "max_new_tokens": -1},
        ),
        (
            ValueError,
            "max_new_tokens: got 2147483648, expected an int",
            {"written_lens": lengths, "max_new_tokens": 2**31},
        ),
        (
            ValueError,
            "written_lens: got memory within that of",
            {"written_lens": engine.backends[0]["seqlens_expanded"][:4]},
        ),
    ):
        with pytest.raises(error, match=message):
            buffers.update(*given, **options)
    engine.check()
    with pytest.raises(ValueError, match="backend_offsets: got 2 of them, expected a tuple of 3"):
        registered(engine, path, 16, backend_offsets=(0, 1))
