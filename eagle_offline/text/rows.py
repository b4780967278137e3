"""Reads the rows of a source: JSON lines, a JSON list (either plain or gzip) or Parquet on this machine, or a split of
a hub dataset.

A row is whatever JSON object stands there; what a conversation is, and which rows are usable, is not known here.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_offline.errors import DataError, one_line
from eagle_offline.text.hub import load_split

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP_SUFFIX, GZIP_MAGIC = ".gz", b"\x1f\x8b"
PARQUET_BATCH_ROWS = 256  # bounds memory: at most this many rows of a Parquet file are held


@dataclass(frozen=True)
class Source:
    """One file, or one hub dataset, and which of its rows are wanted.

    Attributes:
        name: What a reader of a report knows it by: the path below the input directory, the file's name, the hub id.
        path: The local file; None for a hub dataset.
        hub_id: `owner/name`; None for a local file.
        split: The split as it was asked for, a slice included.
        revision: The hub revision, resolved to a commit where that is known.
        num_bytes: Size in bytes, 0 where it is not known.
        digest: xxh3_128 hex of the file's bytes; for a hub dataset, of its resolved revision and fingerprint.
        first_row: Index of the first row wanted, 0-based, blank lines not counted.
        stop_row: Index after the last row wanted; None for all that follow.
    """

    name: str
    path: Path | None
    hub_id: str | None
    split: str | None
    revision: str | None
    num_bytes: int
    digest: str
    first_row: int = 0
    stop_row: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a source, or why it cannot be read.

    Attributes:
        source: Where it comes from.
        row_number: 1-based; the line number in JSONL.
        value: The object, or None when there is a problem.
        problem: What is wrong, for a reader; None for a readable row.
        reason: The problem's short code; None for a readable row.
    """

    source: Source
    row_number: int
    value: dict[str, Any] | None
    problem: str | None = None
    reason: str | None = None


def iter_rows(source: Source) -> Iterator[Row]:
    """Read the wanted rows of `source` in order, in memory of one batch (a `.json` list: of one file).

    A line that is no JSON object comes as a row with a problem, and reading goes on.

    Raises:
        DataError: The file as a whole cannot be read; file, line and column are named.
    """
    if source.path is None:
        return _iter_hub(source)
    return itertools.islice(_iter_file(source, source.path), source.first_row, source.stop_row)


def count_rows(source: Source, path: Path, at_most: int | None = None) -> int:
    """Return how many rows the local file of `source` holds, parsing no more than needed to count up to `at_most`.

    Raises:
        DataError: As `iter_rows`.
    """
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return _open_parquet(path).metadata.num_rows
    if suffix is not None and suffix.startswith(".jsonl"):
        return sum(1 for _ in itertools.islice(_iter_lines(path), at_most))
    return sum(1 for _ in itertools.islice(_iter_json(source, path), at_most))


def _iter_hub(source: Source) -> Iterator[Row]:
    assert source.hub_id is not None
    for index, value in enumerate(load_split(source.hub_id, source.split, source.revision)):
        yield _row_of(source, index + 1, value)


def _iter_file(source: Source, path: Path) -> Iterator[Row]:
    try:
        yield from _READERS[data_suffix(path) or ""](source, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error.strerror or error)})") from error


def _row_of(source: Source, row_number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(source, row_number, value)
    return Row(source, row_number, None, f"a JSON {type(value).__name__}, expected an object", "not-an-object")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file for its bytes, those within if its name ends in `.gz`.

    Raises:
        DataError: Damaged gzip, also while the bytes are read; or gzip under another name.
    """
    if path.suffix.lower() == GZIP_SUFFIX:
        try:
            with gzip.open(path) as file:
                yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not readable as gzip ({one_line(error)}); expected what `gzip` writes") from error
        return
    with open(path, "rb") as file:
        if file.read(len(GZIP_MAGIC)) == GZIP_MAGIC:
            raise DataError(f"{path}: compressed with gzip; rename it to {path.name}{GZIP_SUFFIX}, or decompress it")
        file.seek(0)
        yield file


def _iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line number, bytes) of every line that is not blank; no byte order mark, no line end."""
    with _opened(path) as file:
        for line_number, line in enumerate(file, start=1):
            text = line.removeprefix(BYTE_ORDER_MARK) if line_number == 1 else line
            if text := text.rstrip():
                yield line_number, text


def _iter_jsonl(source: Source, path: Path) -> Iterator[Row]:
    for line_number, line in _iter_lines(path):
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
            yield Row(source, line_number, None, problem, "not-utf8")
        except json.JSONDecodeError as error:
            yield Row(source, line_number, None, f"not JSON ({error.msg} at column {error.colno})", "not-json")
        except (ValueError, RecursionError) as error:
            yield Row(source, line_number, None, f"not JSON ({one_line(error)})", "not-json")
        else:
            yield _row_of(source, line_number, value)


def _iter_json(source: Source, path: Path) -> Iterator[Row]:
    """Read a list of objects, one object, or JSON lines under the name `.json`."""
    if _begins_with_object_line(path):
        yield from _iter_jsonl(source, path)
        return
    with _opened(path) as file:
        content = file.read().removeprefix(BYTE_ORDER_MARK)
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise DataError(f"{path}: line {line}, column {column}: not UTF-8; expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not JSON ({error.msg}); expected a list of objects, or one object a line") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read ({one_line(error)})") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: line 1, column 1: a JSON {type(value).__name__}; expected a list of objects")
    if not value:
        raise DataError(f"{path}: an empty list; expected a list of objects")
    for index, item in enumerate(value):
        yield _row_of(source, index + 1, item)


def _begins_with_object_line(path: Path) -> bool:
    _, line = next(_iter_lines(path), (0, b""))
    if not line.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _open_parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error)})") from error


def _iter_parquet(source: Source, path: Path) -> Iterator[Row]:
    file = _open_parquet(path)
    row_number = 0
    try:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for value in batch.to_pylist():
                row_number += 1
                yield Row(source, row_number, value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged after row {row_number} ({one_line(error)})") from error


_READERS: dict[str, Callable[[Source, Path], Iterator[Row]]] = {
    ".jsonl": _iter_jsonl,
    ".json": _iter_json,
    ".parquet": _iter_parquet,
    ".jsonl.gz": _iter_jsonl,
    ".json.gz": _iter_json,
}
DATA_SUFFIXES = tuple(_READERS)


def data_suffix(path: Path) -> str | None:
    """Return which of `DATA_SUFFIXES` the name of a file ends with, None if it is no data.

    >>> data_suffix(Path("chat.v2.JSONL.gz"))
    '.jsonl.gz'
    """
    name = path.name.lower()
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix) and name != suffix), None)
