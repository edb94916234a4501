"""Request lengths: read from a trace file, or drawn from a distribution fitted to public traces."""

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

# Column names of the prompt and the output length: the Azure LLM inference traces, and the
# Mooncake traces.
COLUMNS = (("ContextTokens", "GeneratedTokens"), ("input_length", "output_length"))

_LONGEST_LINE = 2**20  # characters
_SHOWN = 40  # characters of what came, in an error


class Request(NamedTuple):
    """One request of a trace.

    Attributes:
      prompt_tokens: length of the prompt.
      output_tokens: tokens that are generated for it.
    """

    prompt_tokens: int
    output_tokens: int


class LogNormal(NamedTuple):
    """Tokens whose logarithm has the given mean and standard deviation."""

    mean: float
    deviation: float

    def draw(self, rng: np.random.Generator) -> int:
        """A length, at least 1."""
        return max(1, round(math.exp(rng.normal(self.mean, self.deviation))))


FITTED = {
    "Azure conversation 2023": (LogNormal(6.633, 0.985), LogNormal(5.019, 0.859)),
    "Azure code 2023": (LogNormal(6.999, 1.360), LogNormal(2.788, 0.847)),
    "Mooncake conversation": (LogNormal(8.737, 1.199), LogNormal(5.336, 1.358)),
}
"""Prompt and output lengths of each trace: mean and deviation of the logarithm over all its rows
(19,366, 8,819 and 12,031 requests), which is the maximum-likelihood log-normal. Medians come out at
760, 1,095 and 6,227 prompt tokens, where the traces have 1,020, 1,469 and 6,909."""


class TraceError(ValueError):
    """A trace cannot be read; the message names file, line and reason."""


def synthetic_requests(rng: np.random.Generator) -> Iterator[Request]:
    """Endless requests, each from one of the `FITTED` traces with equal chance."""
    distributions = list(FITTED.values())
    while True:
        prompt, output = distributions[rng.integers(len(distributions))]
        yield Request(prompt.draw(rng), output.draw(rng))


def read_trace(path: Path) -> list[Request]:
    """The requests of a trace in file order; arrival times are not used.

    Takes CSV with a header or JSON lines, plain or gzip, told apart by content. The columns are
    those of the Azure LLM inference traces (ContextTokens, GeneratedTokens) or of the Mooncake
    traces (input_length, output_length); others are ignored.

    Raises:
      TraceError: the file cannot be read, has no request, or has a malformed row.
    """
    try:
        # Opened once: a pipe cannot be read again.
        with path.open("rb") as file:
            is_compressed = file.peek(2)[:2] == b"\x1f\x8b"
            content: Any = gzip.GzipFile(fileobj=file) if is_compressed else file
            with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
                requests = list(_requests(_lines(text, path), path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    if not requests:
        raise TraceError(f"{path}: no requests")
    return requests


def _lines(file: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold something, numbered from 1."""
    for number in itertools.count(1):
        line = file.readline(_LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > _LONGEST_LINE:
            raise TraceError(
                f"{path}:{number}: got a longer line, expected at most {_LONGEST_LINE} characters"
            )
        if line.strip():
            yield number, line


def _requests(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Request]:
    number, first = next(lines, (1, ""))
    if first.lstrip().startswith("{"):
        yield from _json_requests(itertools.chain([(number, first)], lines), path)
    elif first:
        yield from _csv_requests(number, first, lines, path)


def _json_requests(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Request]:
    columns = None
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{path}:{number}: got {_shown(line.strip())}, expected an object")
        columns = columns or _columns(row, path, number)
        yield _request(row, columns, path, number)


def _csv_requests(
    header_line: int, first: str, lines: Iterator[tuple[int, str]], path: Path
) -> Iterator[Request]:
    header = _csv_fields(first, path, header_line)
    columns = _columns(header, path, header_line)
    for number, line in lines:
        fields = _csv_fields(line, path, number)
        if len(fields) != len(header):
            raise TraceError(
                f"{path}:{number}: got {len(fields)} columns, expected {len(header)} as in line "
                f"{header_line}"
            )
        yield _request(dict(zip(header, fields, strict=True)), columns, path, number)


def _csv_fields(line: str, path: Path, number: int) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise TraceError(f"{path}:{number}: not CSV: {error}") from None


def _columns(names, path: Path, number: int) -> tuple[str, str]:
    for columns in COLUMNS:
        if all(column in names for column in columns):
            return columns
    expected = " or ".join(", ".join(columns) for columns in COLUMNS)
    got = _shown(", ".join(map(str, names)))
    raise TraceError(f"{path}:{number}: got columns {got}, expected {expected}")


def _request(row: dict, columns: tuple[str, str], path: Path, number: int) -> Request:
    lengths = []
    for column in columns:
        value = row.get(column)
        try:
            length = int(value) if isinstance(value, (int, str)) else None
        except ValueError:
            length = None
        if length is None or isinstance(value, bool) or length < 0:
            got = _shown(value)
            raise TraceError(f"{path}:{number}: {column}: got {got}, expected tokens >= 0")
        lengths.append(length)
    return Request(*lengths)


def _shown(value: object) -> str:
    """`value` as an error shows what came."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
