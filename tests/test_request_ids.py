"""`BackendBuffers.update(request_ids=)`: a launch that knows by itself what is written."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")

from kept_tables import TorchTables  # noqa: E402
from test_torch import Engine, device, library, path, registered  # noqa: E402, F401

from jaxnsa import ForwardMode, PagedMqaSchedule, Schedules  # noqa: E402
from jaxnsa.interop.torch import BackendBuffers  # noqa: E402


def test_histories(path, device):  # noqa: F811
    # Columns of which one block writes a row, or several; by JAX each shape would be compiled.
    shapes = {"direct": ((40, (0, 2, -3), 150), (1200, (0,), 100)), "dlpack": ((40, (1, -2), 40),)}
    for columns, offsets, steps in shapes[path]:
        options = {"columns": columns, "backend_offsets": offsets, "by_reference": True}
        tables = TorchTables(path, device, **options)
        tables.run(steps)
        assert tables.left_alone > steps * columns / 20


class Decode:
    """Decode updates of requests whose pool rows are their ids modulo 10."""

    def __init__(self, path, device):  # noqa: F811
        self.engine = Engine.of(device)
        self.buffers = registered(self.engine, path, 16)

    def pool_changes(self):
        self.engine.pool += 16

    def given(self, ids, lengths):
        tensor = self.engine.tensor
        rows = np.array(ids, np.int64) % 10
        return tensor(np.array(lengths, np.int32)), tensor(rows), self.engine.pool

    def update(self, ids, lengths, **options):
        given_ids = self.engine.tensor(np.asarray(ids, getattr(ids, "dtype", np.int64)))
        self.buffers.update(*self.given(ids, lengths), request_ids=given_ids, **options)

    def left_alone(self, ids, lengths, **options):
        """Leading columns that an update of rows with other pool entries leaves alone."""
        table = self.engine.backends[1]["page_indices"]
        before = table.clone()
        self.pool_changes()
        self.update(ids, lengths, **options)
        changed = (table != before).cpu().numpy()[: len(ids)]
        return [int(row.argmax()) if row.any() else len(row) for row in changed]


def test_what_is_written_again(path, device):  # noqa: F811
    decode = Decode(path, device)
    ids = [2**40 + 1, 2, -3]
    assert decode.left_alone(ids, [50, 60, 0]) == [0, 0, 300]
    assert decode.left_alone(ids, [51, 64, 3]) == [50, 60, 0]
    # Of two equal steps CUDA's kernels, simulated or not, may write again what the first one wrote.
    again = [[0, 300, 3]] + [[0, 60, 3]] * (path == "direct")
    assert decode.left_alone(np.array([1, 2, -3], np.int32), [52, 64, 5]) in again
    assert decode.left_alone([2, 1, -3], [65, 53, 6], max_new_tokens=1) == [0, 0, 5]
    assert decode.left_alone([2, 1], [66, 54]) == [65, 53]
    assert decode.left_alone([2, 1, -3], [67, 55, 7]) == [66, 54, 0]  # -3 was in no batch
    assert decode.left_alone([2, 1, -3], [20, 56, 8]) == [300, 55, 7]
    assert decode.left_alone([2, 1, -3], [30, 57, 9]) == [20, 56, 8]  # as long as it was
    decode.buffers.invalidate(decode.engine.tensor(np.array([2, 77, -3], np.int32)))
    assert decode.left_alone([2, 1, -3], [31, 58, 10]) == [0, 57, 0]
    decode.buffers.invalidate()
    assert decode.left_alone([2, 1, -3], [32, 59, 11]) == [0, 0, 0]
    assert decode.left_alone([2, 1, -3], [33, 60, 12]) == [32, 59, 11]
    decode.update([], [])
    assert decode.left_alone([2, 1, -3], [33, 60, 12]) == [0, 0, 0]
    # An update that does not say whose rows it writes: it may be any request's.
    decode.buffers.update(*decode.given([5], [40]))
    assert decode.left_alone([2, 1, -3], [34, 61, 13]) == [0, 0, 0]
    lengths = decode.engine.tensor(np.array([34, 61, 13], np.int32))
    decode.buffers.update(*decode.given([5, 5, 5], [40, 70, 20]), written_lens=lengths)
    assert decode.left_alone([2, 1, -3], [34, 61, 13]) == [0, 0, 0]


@pytest.mark.usefixtures("library")
def test_a_row_holds_no_more_than_the_pool_had_columns(device):  # noqa: F811
    decode = Decode("direct", device)
    lengths, rows, pool = decode.given([1, 2, 3], [200, 60, 70])
    ids = torch.tensor([1, 2, 3], device=device)
    decode.buffers.update(lengths, rows, pool[:, :64].contiguous(), request_ids=ids)
    assert decode.left_alone([1, 2, 3], [200, 61, 71]) == [64, 60, 64]


@pytest.mark.usefixtures("library")
def test_many_backends_with_schedules(device):  # noqa: F811
    """Whose backends take several launches: rows hold what the shortest of all have."""
    count, columns, page = 12, 256, 64
    engine = Engine.of(device, requests=2, rows=2, max_len=columns, page=page, count=count)
    schedules = Schedules(paged_mqa=PagedMqaSchedule(num_sms=2, layout="sm90", per_row=True))
    for backend in engine.backends:
        for name, shape in (("paged_mqa_ctx_lens", (2, 1)), ("paged_mqa_schedule", (3, 2))):
            backend[name] = torch.zeros(shape, dtype=torch.int32, device=device)
    offsets = range(-8, count - 8)
    buffers = BackendBuffers(
        engine.backends,
        nsa_index_topk=64,
        real_page_size=page,
        schedules=schedules,
        backend_offsets=[*offsets],
        path="direct",
    )
    ids, rows = torch.tensor([41, 7], device=device), torch.tensor([2, 1], device=device)
    for length in (100, 104, 108):
        lengths = torch.tensor([length, length + 30], device=device)
        buffers.update(lengths, rows, engine.pool, request_ids=ids)
        for backend, offset in zip(engine.backends, offsets, strict=True):
            for row, live in enumerate((lengths + offset).tolist()):
                expected = engine.pool[rows[row], :live]
                assert torch.equal(backend["page_indices"][row, :live], expected)


def test_request_ids_that_are_wrong(path, device):  # noqa: F811
    decode = Decode(path, device)
    ids = decode.engine.tensor(np.arange(4))
    given = decode.given([1, 2, 3, 4], [5, 6, 7, 8])
    lengths = given[0]
    for error, message, options in (
        (ValueError, r"request_ids: got shape \(3,\), expected \(4,\)", {"request_ids": ids[:3]}),
        (TypeError, "request_ids: got torch.float32", {"request_ids": ids.float()}),
        (TypeError, "request_ids: got list", {"request_ids": [1, 2, 3, 4]}),
        (
            ValueError,
            "request_ids: got a tensor, expected None with written_lens",
            {"request_ids": ids, "written_lens": lengths},
        ),
        (
            ValueError,
            "max_new_tokens: got 3, expected None without written_lens or request_ids",
            {"max_new_tokens": 3},
        ),
        (
            ValueError,
            "request_ids: got memory within that of",
            {"request_ids": decode.engine.backends[0]["seqlens_expanded"][:4]},
        ),
    ):
        with pytest.raises(error, match=message):
            decode.buffers.update(*given, **options)
    with pytest.raises(TypeError, match="request_ids: got torch.float32"):
        decode.buffers.invalidate(ids.float())
    decode.engine.check()


class CapturedTables(TorchTables):
    """Decode steps of 6 requests by one CUDA graph."""

    graph = None

    def capture(self, max_new_tokens):
        self.given = [torch.zeros(6, dtype=torch.int32, device="cuda") for _ in range(2)]
        self.ids = torch.zeros(6, dtype=torch.int64, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.buffers.update(
                *self.given, self.pool, request_ids=self.ids, max_new_tokens=max_new_tokens
            )

    def update(self, mode, given, ids, arguments):
        if mode is not ForwardMode.DECODE or len(ids) != 6:
            super().update(mode, given, ids, arguments)
            return
        for static, new in zip((*self.given, self.ids), (*given[:2], ids), strict=True):
            static.copy_(new)
        self.graph.replay()


@pytest.mark.gpu
@pytest.mark.parametrize("max_new_tokens", (None, 1))
def test_captured_updates_know_what_the_ones_before_wrote(max_new_tokens):
    tables = CapturedTables("direct", torch.device("cuda:0"), columns=1200)
    tables.capture(max_new_tokens)
    tables.run(500)
    assert tables.left_alone > 50_000
