"""SGLang's functions against a package that stands in for it, and put in that package's place."""

import importlib
import inspect
import itertools
import logging
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import skip_without_library

torch = pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")

from jaxnsa.interop import (  # noqa: E402
    launch_cache,
    launches,
    sglang,
    sglang_copies,
    sglang_fills,
)
from jaxnsa.interop.copies import CopyCache  # noqa: E402
from jaxnsa.interop.fills import FillCache  # noqa: E402
from jaxnsa.interop.tensor_checks import checked, exchange_api  # noqa: E402

ON_GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
HELD = -7
STAND_IN = Path(__file__).parent / "sglang_stand_in"
DSA = "sglang.kernels.ops.attention.dsa"
MANAGER = "sglang.srt.layers.attention.dsa.dsa_metadata_manager"
BACKEND = "sglang.srt.layers.attention.dsa_backend"
NAMES = (
    "fused_dsa_decode_metadata",
    "fused_dsa_target_verify_metadata",
    "fused_dsa_draft_extend_metadata",
    "fused_metadata_copy_cuda",
    "fused_metadata_copy_multi_cuda",
)


@pytest.fixture(params=[pytest.param("cuda:0", marks=pytest.mark.gpu) if ON_GPU else "cpu"])
def device(request):
    skip_without_library(ON_GPU)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch):
    monkeypatch.setattr(sglang_fills, "_FILLS", FillCache())
    monkeypatch.setattr(sglang_copies, "_COPIES", CopyCache())
    launches.declined.clear()


@pytest.fixture(params=(True, False))
def has_exchange_api(request, monkeypatch):
    """Whether PyTorch has DLPack's C exchange API, as from 2.10 on."""
    if not request.param:
        monkeypatch.setattr(launch_cache, "exchange_api", lambda: None)
    elif exchange_api() is None:
        pytest.skip("runs with PyTorch 2.10 or newer")
    return request.param


@pytest.fixture
def checks(monkeypatch):
    """The names that were checked in Python, emptied by whoever looks."""
    looked = []

    def check(name, *rest, **more):
        looked.append(name)
        return checked(name, *rest, **more)

    for module in (sglang_fills, sglang_copies):
        monkeypatch.setattr(module, "checked", check)
    return looked


@pytest.fixture
def package(monkeypatch):
    """Imports a package of SGLang's name from a folder; all is forgotten after the test."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
            del sys.modules[name]

    def importer(folder):
        monkeypatch.syspath_prepend(folder)
        forget()
        return importlib.import_module

    monkeypatch.setattr(
        sglang,
        "_REPLACEMENT",
        type(sglang._REPLACEMENT)("sglang", "0.5.23", sglang._REPLACEMENT._functions),
    )
    yield importer
    forget()


@pytest.fixture
def stand_in(package):
    """The stand-in's five functions, by name."""
    modules = [package(STAND_IN)(f"{DSA}.{name}") for name in ("metadata", "fused_metadata_copy")]
    return {name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in NAMES}


class Tensors:
    """Tensors of random values and larger than they need be, the same on every machine."""

    def __init__(self, seed, device):
        self.rng = np.random.default_rng(seed)
        self.device = device

    def values(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def any(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def out(self, *shape):
        """Holds HELD everywhere; in a larger tensor, so that it has neighbours to be spoilt."""
        more = [n + int(self.rng.integers(3)) for n in shape]
        whole = torch.full([n + 4 for n in more], HELD, dtype=torch.int32, device=self.device)
        return whole[tuple(slice(2, 2 + n) for n in more)]

    def vector(self, low, high, bs, more=0):
        """int32 or int64."""
        array = self.rng.integers(low, high, bs + more)
        return self.values(array.astype(self.any(np.int32, np.int64)))

    def pool(self, rows, columns):
        wide = self.rng.integers(-50, 2**31 - 1, (rows, columns + 3), dtype=np.int32)
        return self.values(wide)[:, :columns]


def whole(tensor):
    """The larger tensor that a tensor of `Tensors.out` lies in."""
    return torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // 4,), (1,), 0)


def twin(arguments):
    """The same arguments with outputs of their own, in memory that holds the same."""

    memory = {}

    def copy(name, tensor):
        if not isinstance(tensor, torch.Tensor) or name in READ or name.endswith("_src"):
            return tensor
        held = memory.setdefault(tensor.untyped_storage().data_ptr(), whole(tensor).clone())
        return torch.as_strided(held, tensor.shape, tensor.stride(), tensor.storage_offset())

    return {name: copy(name, value) for name, value in arguments.items()}


READ = ("seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token")


def step(make, name):
    """Arguments of a step, by name."""
    bs, page = int(make.rng.integers(1, 8)), make.any(1, 2, 7, 16, 64)
    width = int(make.rng.integers(1, 150))
    wide = page == 1 or make.any(True, False)
    more = make.any(0, 2)
    seq_lens = make.vector(0, 190, bs, more)
    given = {
        "seq_lens": seq_lens,
        "req_pool_indices": make.vector(0, 9, bs, more),
        "req_to_token": make.pool(9, width + make.any(0, 5)),
        "bs": bs,
        "dsa_index_topk": make.any(1, 64, 2048),
        "physical_page_size": page,
        "max_len" if "decode" in name else "max_seqlen_k": width,
    }
    rows = bs
    if "verify" in name:
        given["next_n"] = make.any(1, 2, 5)
        rows = bs * given["next_n"]
        if make.any(True, False):
            given["paged_mqa_ctx_lens_2d"] = make.out(rows)[:rows].view(bs, -1)
    elif "extend" in name:
        static = make.any(True, False)
        extend = np.full(bs, 3) if static else make.rng.integers(0, 5, bs)
        given["extend_seq_lens"] = make.values(np.append(extend, [1]).astype(np.int32))
        given["static_extend_len"] = static
        rows = int(extend.sum()) - make.any(0, 1) * bool(extend.sum())
        given |= {"total_len": rows, "max_extend_len": 5, "max_total_len": rows + 1}
    given |= {
        "cache_seqlens": make.out(bs),
        "cu_seqlens_k": make.out(bs + 1),
        "dsa_cache_seqlens": make.out(rows),
        "dsa_cu_seqlens_k": make.out(rows + 1),
        "page_table_1": make.out(rows, width) if wide else None,
        "real_page_table": make.out(rows, -(-width // page)) if page > 1 else None,
    }
    if "decode" not in name:
        given["seqlens_expanded"] = make.out(rows)
    if page == 1 and make.any(True, False):
        given["real_page_table"] = given["page_table_1"]
    return given


def assert_same(given, expected):
    for name, tensor in given.items():
        if isinstance(tensor, torch.Tensor) and name not in READ:
            assert torch.equal(whole(tensor), whole(expected[name])), name


@pytest.mark.parametrize("name", NAMES[:3])
def test_fills_what_sglang_fills_and_nothing_else(name, device, stand_in, has_exchange_api, checks):
    ours = getattr(sglang, name)
    for seed in range(30):
        make = Tensors(seed, device)
        given = step(make, name)
        for again in (False, True):
            expected = twin(given)
            stand_in[name](**expected)
            checks.clear()
            ours(**given)
            assert bool(checks) == (not again or not has_exchange_api)
            assert_same(given, expected)
            bs, seq_lens = given["bs"], given["seq_lens"]
            given["seq_lens"] = make.values(make.rng.integers(0, 190, 2 * bs)).to(seq_lens.dtype)
            given["seq_lens"] = given["seq_lens"][:: make.any(1, 2)]
    assert not launches.declined


def test_tensors_of_storages_that_end_elsewhere_are_others():
    skip_without_library()
    if exchange_api() is None:
        pytest.skip("runs with PyTorch 2.10 or newer")
    memory = np.zeros(64, np.int32)
    long, short = torch.from_numpy(memory)[:8], torch.from_numpy(memory[:8])
    assert long.data_ptr() == short.data_ptr()
    keys = [launch_cache.key_of(tensor, [tensor], ()) for tensor in (long, short, long)]
    assert keys[0] is not None
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


@pytest.mark.parametrize("name", NAMES[:3])
def test_numbers_of_another_type_are_refused_though_they_are_equal(name, device):
    given = step(Tensors(0, device), name)
    getattr(sglang, name)(**given)
    for argument in given.keys() & {"bs", "dsa_index_topk", "next_n", "total_len", "max_len"}:
        number = given[argument]
        for equal in (float(number), np.float32(number)):
            with pytest.raises(TypeError, match=rf"{argument}: got .*{number}.*, expected an int"):
                getattr(sglang, name)(**given | {argument: equal})


def test_a_step_of_no_requests_or_no_rows_writes_the_first_sums(device, stand_in):
    for name, bs in itertools.product(NAMES[:3], (0, 3)):
        make = Tensors(0, device)
        given = step(make, name) | {"bs": bs, "seq_lens": make.vector(0, 90, 3)}
        given["req_pool_indices"] = make.vector(0, 9, 3)
        given.pop("paged_mqa_ctx_lens_2d", None)
        if "extend" in name:
            given["total_len"] = 0
        elif bs:
            continue
        given |= {field: make.out(6) for field in ("cache_seqlens", "cu_seqlens_k")}
        expected = twin(given)
        stand_in[name](**expected)
        getattr(sglang, name)(**given)
        assert_same(given, expected)
        assert given["cu_seqlens_k"][0] == given["dsa_cu_seqlens_k"][0] == 0


def test_every_row_of_a_request_has_its_live_columns(device):
    """DeepGEMM's native paged MQA reads the first row of a request for all of its tokens."""
    given = step(Tensors(3, device), NAMES[1]) | {"bs": 1, "next_n": 5, "physical_page_size": 4}
    given |= {"max_seqlen_k": 12, "page_table_1": None, "paged_mqa_ctx_lens_2d": None}
    pool = torch.arange(12, dtype=torch.int32, device=device) + 40
    make = Tensors(3, device)
    outputs = ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded", "dsa_cache_seqlens")
    given |= {name: make.out(9) for name in (*outputs, "dsa_cu_seqlens_k")}
    given["real_page_table"] = make.out(5, 3)[:5, :3]
    given |= {"seq_lens": make.values([4]), "req_pool_indices": make.values([0])}
    sglang.fused_dsa_target_verify_metadata(**given | {"req_to_token": pool[None]})
    assert given["real_page_table"].tolist() == [[10, 11, 12]] * 5
    assert given["seqlens_expanded"].tolist()[:5] == [5, 6, 7, 8, 9]


def test_negative_lengths_and_rows_outside_the_pool(device):
    make = Tensors(0, device)
    given = step(make, NAMES[2]) | {"bs": 3, "total_len": 4, "max_total_len": 4}
    given |= {"seq_lens": make.values([-5, 1, 9]), "req_pool_indices": make.values([-3, 99, 1])}
    given |= {"extend_seq_lens": make.values([0, 2, -1]), "physical_page_size": 1}
    given |= {name: make.out(9) for name in given if "seqlens" in name and "max" not in name}
    given["page_table_1"] = make.out(4, given["max_seqlen_k"])
    sglang.fused_dsa_draft_extend_metadata(**given)
    assert given["cache_seqlens"].tolist()[:4] == [0, 1, 9, HELD]
    assert given["seqlens_expanded"].tolist()[:5] == [0, 1, 0, 0, HELD]  # past the sum: 0
    assert given["dsa_cu_seqlens_k"].tolist()[:6] == [0, 0, 1, 1, 1, HELD]
    assert (given["page_table_1"][:2, 0] == given["req_to_token"][-1, 0]).all()
    assert (given["page_table_1"][2:] == HELD).all()


def copied(make, mode, *, real=True, flash=True):
    """Arguments of a copy but for its destinations, and the shapes of these, by name."""
    bs, columns = 5, 40
    rows = size = bs if mode == 0 else 9
    shapes = {
        "cache_seqlens": (bs,),
        "cu_seqlens_k": (bs + 1,),
        "page_indices": (rows, columns),
        "dsa_cache_seqlens": (size,),
        "seqlens_expanded": (size,),
        "dsa_cu_seqlens_k": (size + 1,),
        "real_page_table": (rows, 7) if real else None,
        "flashmla_num_splits": (size + 1,) if flash else None,
        "flashmla_metadata": (6, 8) if flash else None,
    }
    source = {
        f"{name}_src": None
        if shape is None
        else make.values(make.rng.integers(-9, 2**31 - 1, shape, dtype=np.int32))
        for name, shape in shapes.items()
    }
    width = {"max_len": columns} if mode == 0 else {"max_len": -1, "max_seqlen_k": columns}
    sizes = {"bs": bs, "seqlens_expanded_size": size, **width}
    return source | sizes, {
        "page_table_1" if name == "page_indices" else name: shape for name, shape in shapes.items()
    }


def destination(make, shapes, end):
    def out(name, shape):
        if name == "flashmla_metadata":
            return torch.full((7, 8), HELD, dtype=torch.int32, device=make.device)
        return make.out(*shape)

    return {
        f"{name}_{end}": None if shape is None else out(name, shape)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("mode", (0, 1, 2))
def test_copies_what_sglang_copies_and_nothing_else(
    mode, device, stand_in, has_exchange_api, checks
):
    name = "fused_metadata_copy_cuda"
    for seed, (real, flash) in enumerate(itertools.product((True, False), repeat=2)):
        make = Tensors(seed, device)
        given, shapes = copied(make, mode, real=real, flash=flash)
        given |= destination(make, shapes, "dst") | {"forward_mode": mode}
        given.setdefault("max_seqlen_k", -1)
        if mode == 0:
            given["seqlens_expanded_src"] = given["cache_seqlens_src"]
            given["seqlens_expanded_dst"] = given["cache_seqlens_dst"]
        for again in (False, True):
            expected = twin(given)
            stand_in[name](**expected)
            checks.clear()
            sglang.fused_metadata_copy_cuda(**given)
            assert bool(checks) == (not again or not has_exchange_api)
            assert_same(given, expected)
            given["page_indices_src"].add_(1)
        given["page_indices_src"] = given["page_indices_src"].T.contiguous().T
        expected = twin(given)
        stand_in[name](**expected)
        sglang.fused_metadata_copy_cuda(**given)
        assert_same(given, expected)


def test_copies_to_three_backends(device, stand_in):
    name = "fused_metadata_copy_multi_cuda"
    for seed, (real, flash) in enumerate(itertools.product((True, False), repeat=2)):
        make = Tensors(seed, device)
        given, shapes = copied(make, 0, real=real, flash=flash)
        for k in range(3):
            given |= destination(make, shapes, f"dst{k}")
        wanted = inspect.signature(stand_in[name]).parameters
        given = {argument: value for argument, value in given.items() if argument in wanted}
        for _ in range(2):
            expected = twin(given)
            stand_in[name](**expected)
            sglang.fused_metadata_copy_multi_cuda(**given)
            assert_same(given, expected)
            given["page_indices_src"].add_(1)
    given |= {"real_page_table_src": given["page_indices_src"]}  # and nowhere to copy it to
    sglang.fused_metadata_copy_multi_cuda(**given)


def test_wrong_arguments_are_refused_before_anything_is_written(device):
    make = Tensors(5, device)
    step_of = {name: step(make, name) for name in NAMES[:3]}
    decode = step_of[NAMES[0]] | {"bs": 2, "physical_page_size": 2, "max_len": 8}
    decode |= {name: make.out(9) for name in decode if "seqlens" in name}
    decode |= {"seq_lens": make.vector(0, 9, 2), "req_pool_indices": make.vector(0, 9, 2)}
    decode |= {"req_to_token": make.pool(9, 8)}
    decode |= {"page_table_1": make.out(2, 8), "real_page_table": make.out(2, 4)}
    verify = {name: value for name, value in decode.items() if name != "max_len"}
    verify |= {"max_seqlen_k": 8, "next_n": 2, "seqlens_expanded": make.out(4)}
    verify |= {"page_table_1": make.out(4, 8), "real_page_table": make.out(4, 4)}
    extend = {name: value for name, value in verify.items() if name != "next_n"}
    extend |= {"total_len": 4, "max_extend_len": 2, "max_total_len": 4}
    extend |= {"extend_seq_lens": make.values(np.array([2, 2]))}
    copy, shapes = copied(make, 1)
    copy |= destination(make, shapes, "dst") | {"forward_mode": 1}
    shared = make.out(12)
    apart = torch.ones(4, dtype=torch.int32, device=device)[::2]
    table = torch.ones((40, 9), dtype=torch.int32, device=device).T
    for shrunk in (apart, table):
        shrunk.untyped_storage().resize_(8)
    for name, good, changes in (
        (
            NAMES[0],
            decode,
            (
                ({"seq_lens": [1]}, "seq_lens: got list, expected a torch.Tensor"),
                ({"seq_lens": apart}, "seq_lens: got a tensor whose memory was freed"),
                ({"seq_lens": decode["seq_lens"].to("meta")}, "seq_lens: got a tensor on meta"),
                ({"seq_lens": decode["seq_lens"].float()}, "seq_lens: got torch.float32"),
                ({"bs": 3}, r"seq_lens: got shape \(2,\), expected \(3,\)"),
                ({"bs": -1}, "bs: got -1, expected an int in"),
                ({"dsa_index_topk": [64]}, r"dsa_index_topk: got \[64\], expected an int"),
                ({"max_len": 9}, r"max_len: got 9, expected an int in \[1, 8\]"),
                ({"dsa_index_topk": 0}, "dsa_index_topk: got 0"),
                ({"physical_page_size": 0}, "physical_page_size: got 0"),
                ({"real_page_table": None}, "real_page_table: got NoneType"),
                ({"page_table_1": None, "physical_page_size": 1}, "page_table_1: got None, expect"),
                (
                    {"page_table_1": make.out(1, 8)[:1]},
                    r"page_table_1: got shape .* at least \(2, ",
                ),
                ({"dsa_cu_seqlens_k": shared[:2]}, r"dsa_cu_seqlens_k: got shape \(2,\), expected"),
                (
                    {"cu_seqlens_k": shared[:4], "dsa_cu_seqlens_k": shared[2:]},
                    "dsa_cu_seqlens_k: got memory that cu_seqlens_k uses too",
                ),
                ({"seq_lens": shared[:2], "cache_seqlens": shared}, "seq_lens: got memory within"),
            ),
        ),
        (
            NAMES[1],
            verify,
            (
                ({"next_n": 0}, "next_n: got 0"),
                ({"max_seqlen_k": 9}, "max_seqlen_k: got 9"),
                ({"seqlens_expanded": shared[:3]}, r"seqlens_expanded: got shape \(3,\)"),
                ({"paged_mqa_ctx_lens_2d": make.out(2, 2)[:2, :1]}, "_ctx_lens_2d: got shape"),
                ({"paged_mqa_ctx_lens_2d": make.out(2, 2)[:2, :2]}, "_ctx_lens_2d: got strides"),
                (
                    {"paged_mqa_ctx_lens_2d": shared[:4].view(2, 2), "cache_seqlens": shared},
                    "got memory that .* uses too",
                ),
            ),
        ),
        (
            NAMES[2],
            extend,
            (
                ({"total_len": 5}, r"total_len: got 5, expected an int in \[0, 4\]"),
                ({"max_extend_len": 1}, r"total_len: got 4, expected an int in \[0, 2\]"),
                ({"extend_seq_lens": None}, "extend_seq_lens: got NoneType"),
            ),
        ),
        (
            NAMES[3],
            copy,
            (
                ({"forward_mode": 3}, "forward_mode: got 3"),
                ({"cache_seqlens_src": None}, "cache_seqlens_src: got NoneType"),
                ({"cache_seqlens_dst": None}, "cache_seqlens_dst: got NoneType"),
                ({"seqlens_expanded_src": None}, "seqlens_expanded_src: got NoneType"),
                ({"page_indices_src": table}, "page_indices_src: got a tensor whose memory was"),
                ({"bs": [5]}, r"bs: got \[5\], expected an int"),
                ({"max_seqlen_k": 39}, r"page_indices_src: got shape .*, expected 39 columns, as"),
                ({"seqlens_expanded_size": 10}, r"dsa_cache_seqlens_src: got shape \(9,\)"),
                ({"page_table_1_dst": make.out(9, 30)[:, :30]}, "page_table_1_dst: got shape"),
                ({"flashmla_metadata_dst": make.out(6, 8)}, "flashmla_metadata_dst: got strides"),
                ({"flashmla_metadata_dst": shared}, "flashmla_metadata_dst: got "),
                ({"real_page_table_dst": None}, "real_page_table_dst: got NoneType"),
                ({"cache_seqlens_src": copy["cache_seqlens_dst"]}, "_src: got memory within that"),
            ),
        ),
    ):
        getattr(sglang, name)(**good)
        for change, message in changes:
            given = good | change
            before = twin(given)
            for _ in range(2):
                with pytest.raises((ValueError, TypeError), match=message):
                    getattr(sglang, name)(**given)
                assert_same(given, before)


def test_install_and_uninstall(device, package, caplog):
    load = package(STAND_IN)
    manager, metadata = load(MANAGER), load(f"{DSA}.metadata")
    theirs = metadata.fused_dsa_decode_metadata
    old = manager.Backend()
    with caplog.at_level(logging.INFO, "jaxnsa"):
        places = sglang.install()
    assert f"{MANAGER}.renamed" in places
    assert {f"{DSA}.metadata.{name}" for name in NAMES[:3]} <= {*places}
    assert {f"{DSA}.fused_metadata_copy.{name}" for name in NAMES[3:]} <= {*places}
    assert len(places) == 3 + 2 + 4
    assert all(place in caplog.text for place in places)
    assert manager.renamed is manager.fused_dsa_decode_metadata is sglang.fused_dsa_decode_metadata

    backend = load(BACKEND)  # imported while they are replaced
    assert backend.fused_metadata_copy_multi_cuda is sglang.fused_metadata_copy_multi_cuda
    assert sglang.install() == tuple(sorted([*places, f"{BACKEND}.fused_metadata_copy_multi_cuda"]))
    new = manager.Backend()
    assert (old.decode, new.decode) == (theirs, sglang.fused_dsa_decode_metadata)
    given = step(Tensors(1, device), NAMES[0])
    expected = twin(given)
    old.decode(**expected)
    new.decode(**given)
    assert_same(given, expected)

    restored = sglang.uninstall()
    assert len(restored) == len(places) + 1
    assert manager.renamed is metadata.fused_dsa_decode_metadata is theirs
    assert backend.fused_metadata_copy_multi_cuda is not sglang.fused_metadata_copy_multi_cuda
    assert sglang.uninstall() == ()
    assert sglang.install() == tuple(sorted(restored))
    sglang.uninstall()


def everything(modules):
    return {name: dict(vars(module)) for name, module in modules.items()}


@pytest.mark.parametrize("kind", ("signature", "default", "function", "module", "package"))
def test_install_refuses_what_it_does_not_know(kind, package, tmp_path, device):
    parts = f"{DSA}.fused_metadata_copy".split(".")
    if kind == "package":
        load = package(tmp_path)
        (tmp_path / "sglang.py").write_text("")
        message = "could not be imported"
    else:
        for source in STAND_IN.rglob("*.py"):
            target = tmp_path / source.relative_to(STAND_IN)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text())
        path = tmp_path.joinpath(*parts).with_suffix(".py")
        text = path.read_text()
        new, message = {
            "signature": (
                text.replace("    bs,\n    max_len,\n    seq", "    max_len,\n    bs,\n    seq"),
                r"fused_metadata_copy_multi_cuda: got positional or keyword parameter max_len as "
                r"parameter 32, expected positional or keyword parameter bs as in sglang 0.5.23",
            ),
            "default": (
                text.replace("    seqlens_expanded_size,\n)", "    seqlens_expanded_size=0,\n)"),
                "fused_metadata_copy_cuda: got positional or keyword parameter "
                "seqlens_expanded_size=0 as parameter 22, expected .* seqlens_expanded_size as in",
            ),
            "function": (
                text.replace("def fused_metadata_copy_multi_cuda", "def something_else"),
                "fused_metadata_copy_multi_cuda: got NoneType, expected a function as in sglang",
            ),
            "module": ("import that_is_not_there", "fused_metadata_copy could not be imported: No"),
        }[kind]
        assert new != text
        path.write_text(new)
        load = package(tmp_path)
        load(MANAGER)
    before = everything({k: m for k, m in sys.modules.items() if k.startswith("sglang")})
    with pytest.raises(RuntimeError, match=message):
        sglang.install()
    assert sglang.uninstall() == ()
    for name, attributes in before.items():
        assert {k: vars(sys.modules[name])[k] for k in attributes} == attributes


def test_install_replaces_all_or_nothing(package, device, monkeypatch):
    load = package(STAND_IN)
    modules = [load(name) for name in (BACKEND, MANAGER, f"{DSA}.metadata")]
    before = everything({module.__name__: module for module in modules})

    class Frozen(type(sys)):
        def __setattr__(self, name, value):
            raise AttributeError("read-only")

    modules[1].__class__ = Frozen
    with pytest.raises(AttributeError, match="read-only"):
        sglang.install()
    assert everything({module.__name__: module for module in modules}) == before
    assert sglang.uninstall() == ()

    object.__setattr__(modules[1], "__class__", type(sys))
    monkeypatch.setattr(sglang, "unavailable", lambda platform: f"no library for {platform}")
    with pytest.raises(RuntimeError, match="no library for"):
        sglang.install()
    assert everything({module.__name__: module for module in modules}) == before
