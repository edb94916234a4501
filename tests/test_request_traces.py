"""Trace files: formats, compression, and errors that name file, line and reason."""

import concurrent.futures
import gzip
import itertools
import json
import os

import numpy as np
import pytest

from jaxnsa.app.request_traces import FITTED, Request, TraceError, read_trace, synthetic_requests

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,4808,10\n,110,27\n"
MOONCAKE = "timestamp_ms,input_length,output_length\n0,4808,10\n30,110,27\n"
JSONL = (
    '{"timestamp": 0, "input_length": 4808, "output_length": 10, "hash_ids": [1]}\n\n'
    '{"timestamp": 30, "input_length": 110, "output_length": 27}\n'
)


@pytest.mark.parametrize("text", (AZURE, MOONCAKE, JSONL, "\ufeff" + AZURE.replace("\n", "\r\n")))
@pytest.mark.parametrize("compress", (False, True))
def test_formats(text, compress, tmp_path):
    path = tmp_path / "trace"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    assert read_trace(path) == [Request(4808, 10), Request(110, 27)]


@pytest.mark.parametrize("compress", (False, True))
def test_pipes(compress, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = gzip.compress(AZURE.encode()) if compress else AZURE.encode()
    with concurrent.futures.ThreadPoolExecutor(1) as writer:
        writer.submit(path.write_bytes, data)
        assert read_trace(path) == [Request(4808, 10), Request(110, 27)]


@pytest.mark.parametrize(
    "text, message",
    [
        (AZURE + "x,1\n", ":4: got 2 columns, expected 3 as in line 1"),
        (AZURE + "x,-1,2\n", ":4: ContextTokens: got '-1', expected tokens >= 0"),
        (AZURE + "x,1,many\n", ":4: GeneratedTokens: got 'many', expected"),
        (MOONCAKE + "1,2.5,3\n", ":4: input_length: got '2.5', expected"),
        ("a,b\n1,2\n", ":1: got columns 'a, b', expected ContextTokens, GeneratedTokens or input_"),
        ("\n \n" + AZURE + "\nx,-1,2\n", ":7: ContextTokens: got '-1', expected tokens >= 0"),
        (AZURE + f'"{"x" * 140_000}",1,2\n', ":4: not CSV: field larger than field limit"),
        (AZURE + "x,1,2" + " " * 2**20, ":4: got a longer line, expected at most 1048576"),
        (AZURE + f"x,{'9' * 5000},2\n", r":4: ContextTokens: got '9{39}\.\.\. \(5002 characters\)"),
        (f"a,{'b' * 500}\n", r":1: got columns 'a, b{36}\.\.\. \(505 characters\), expected Con"),
        (JSONL + '{"input_length": ' + "9" * 5000 + "}", ":4: not JSON: Exceeds the limit"),
        (JSONL + "[" * 100_000, ":4: not JSON: .*recursion"),
        (JSONL + '{"input_length": "' + "9" * 90 + 'x"}', r":4: input_length: got '9{39}\.\.\. "),
        (JSONL + "{oops\n", ":4: not JSON: "),
        (JSONL + "[1]\n", r":4: got '\[1\]', expected an object"),
        (JSONL + '{"input_length": 1}\n', ":4: output_length: got None, expected"),
        (JSONL + '{"input_length": true, "output_length": 1}\n', ":4: input_length: got True"),
        ("", ": no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", ": no requests"),
    ],
)
def test_malformed_rows(text, message, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=f"^{path}{message}"):
        read_trace(path)


@pytest.mark.parametrize(
    "data",
    (gzip.compress(AZURE.encode())[:-9], b"\x1f\x8bjunk", b"\xff\xfe\xff,1\n"),
    ids=("cut off", "not gzip", "not UTF-8"),
)
def test_damaged_files(data, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=f"^{path}: "):
        read_trace(path)


def test_synthetic_requests_follow_their_distribution():
    requests = list(itertools.islice(synthetic_requests(np.random.default_rng(0)), 20_000))
    assert requests == list(itertools.islice(synthetic_requests(np.random.default_rng(0)), 20_000))
    lengths = np.array(requests)
    assert lengths.min() >= 1
    for column in (0, 1):
        fitted = [distributions[column] for distributions in FITTED.values()]
        mean = np.mean([d.mean for d in fitted])
        variance = np.mean([d.deviation**2 + d.mean**2 for d in fitted]) - mean**2
        logs = np.log(lengths[:, column])
        assert abs(logs.mean() - mean) < 0.05
        assert abs(logs.std() - np.sqrt(variance)) < 0.05


def test_read_trace_json_numbers_only(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"input_length": 3, "output_length": 4}))
    assert read_trace(path) == [Request(3, 4)]
