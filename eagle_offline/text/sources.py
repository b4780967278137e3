"""Finds the input rows: local JSONL, JSON and Parquet files, directories of them, hub datasets.

A row is whatever JSON object stands there; what a conversation is, and which rows are usable, is not known here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from eagle_offline.errors import DataError, UsageError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
DEFAULT_HUB_SPLIT = "train"
BLOCK_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?P<slice>\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_SHARD_SUFFIX = re.compile(r"-\d+-of-\d+$")  # how hub exports number the files of one split
_PINNED_REVISION = re.compile(r"@([0-9a-f]{40})/")


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


def resolve_sources(input_data: str, *, split: str | None = None, revision: str | None = None) -> tuple[Source, ...]:
    """Name every file or dataset that `input_data` stands for, in reading order, each with a digest.

    `split` selects files by name (`train` takes `train.jsonl`, `train-00000-of-00002.parquet`, `train/a.json`); a slice
    (`train[:100]`, `[10:20]`, `[-5:]`, `[:10%]`) counts rows over all selected files in order.

    Raises:
        DataError: Nothing is there, it is empty, or the hub cannot give it.
        UsageError: A split that does not exist or cannot be read, a slice without rows, a file of another kind, or a
            revision for local files.
    """
    if not input_data.strip():
        raise UsageError("the input data is an empty string; pass a file, a directory or a hub id `owner/name`")
    path = Path(input_data).expanduser()
    if not path.exists():
        if _HUB_ID.fullmatch(input_data) and path.suffix.lower() not in DATA_SUFFIXES:
            return (_resolve_hub(input_data, split, revision),)
        raise DataError(f"{input_data}: no such file or directory; pass a file, a directory or a hub id `owner/name`")
    if revision is not None:
        raise UsageError(
            f"{path}: a revision ({revision}) belongs to a hub dataset, this is a local path; leave it out"
        )
    wanted = _parse_split(split) if split is not None else None
    files = _list_files(path)
    if wanted is not None and wanted["name"]:
        files = _select_split(path, files, wanted["name"])
    sources = tuple(_describe_file(path, file, split) for file in files)
    if wanted is not None and wanted["slice"]:
        return _slice_sources(sources, wanted["start"], wanted["stop"], str(split))
    return sources


def iter_rows(source: Source) -> Iterator[Row]:
    """Read the wanted rows of `source` in order, in memory of one batch (a `.json` list: of one file).

    A line that is no JSON object comes as a row with a problem, and reading goes on.

    Raises:
        DataError: The file as a whole cannot be read; file, line and column are named.
    """
    if source.path is None:
        return _iter_hub(source)
    return itertools.islice(_iter_file(source), source.first_row, source.stop_row)


def file_digest(path: Path) -> str:
    """Return the xxh3_128 hex digest of the bytes of `path`, read in blocks."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Return the message of `error` as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


# Local files


def _list_files(path: Path) -> list[Path]:
    """List the data files at `path`, sorted; names that begin with a dot or an underscore are not data."""
    if path.is_file():
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise UsageError(f"{path}: a file of kind '{path.suffix}'; expected one of {', '.join(DATA_SUFFIXES)}")
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in DATA_SUFFIXES
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"{path}: a directory without data; expected {', '.join(DATA_SUFFIXES)} files in it")
    return files


def _parse_split(split: str) -> dict[str, str | None]:
    match = _SPLIT.fullmatch(split.strip())
    if match is None or not split.strip():
        raise UsageError(
            f"--split {split!r} cannot be read; expected a name, a slice, or both: train, [10:20], train[:5%]"
        )
    return match.groupdict()


def _select_split(root: Path, files: Sequence[Path], name: str) -> list[Path]:
    """Keep the files whose stem or a directory above is `name`; failing that, begins with it."""
    names = {file: _split_names(root, file) for file in files}
    exact = [file for file in files if name in names[file]]
    selected = exact or [file for file in files if any(found.startswith(name) for found in names[file])]
    if not selected:
        found = sorted({found for file in files for found in names[file]})
        shown = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
        raise UsageError(f"{root}: no split named '{name}'; found {shown}")
    return selected


def _split_names(root: Path, file: Path) -> list[str]:
    """Return the split names that `file` answers to: its stem without a shard number, its directories below `root`."""
    directories = file.relative_to(root).parts[:-1] if file != root else ()
    return [_SHARD_SUFFIX.sub("", file.stem), *directories]


def _describe_file(root: Path, file: Path, split: str | None) -> Source:
    name = file.name if file == root else file.relative_to(root).as_posix()
    try:
        num_bytes = file.stat().st_size
        if num_bytes == 0:
            raise DataError(f"{file}: an empty file; give it rows or take it away")
        digest = file_digest(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({one_line(error.strerror or error)})") from error
    return Source(name, file, None, split, None, num_bytes, digest)


def _slice_sources(sources: Sequence[Source], start: str | None, stop: str | None, split: str) -> tuple[Source, ...]:
    """Spread one slice over the rows of all `sources` in order; sources without a wanted row are left out."""
    counts = [sum(1 for _ in _iter_countable(source)) for source in sources]
    total = sum(counts)
    first, last, _ = slice(_slice_bound(start, total), _slice_bound(stop, total)).indices(total)
    if first >= last:
        raise UsageError(f"--split {split} selects no row of {total}; expected a slice that holds at least one")
    wanted = []
    offset = 0
    for source, count in zip(sources, counts, strict=True):
        low, high = max(first - offset, 0), min(last - offset, count)
        if low < high:
            record = {**source.__dict__, "first_row": low, "stop_row": high}
            wanted.append(Source(**record))
        offset += count
    return tuple(wanted)


def _slice_bound(text: str | None, total: int) -> int | None:
    if text is None:
        return None
    return round(total * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _iter_countable(source: Source) -> Iterator[object]:
    """Yield something for each row of a local file, parsing no more than needed to count."""
    assert source.path is not None
    if source.path.suffix.lower() == ".parquet":
        return iter(range(_open_parquet(source.path).metadata.num_rows))
    if source.path.suffix.lower() == ".jsonl":
        return _iter_lines(source.path)
    return _iter_json(source)


def _iter_file(source: Source) -> Iterator[Row]:
    assert source.path is not None
    suffix = source.path.suffix.lower()
    readers = {".jsonl": _iter_jsonl, ".json": _iter_json, ".parquet": _iter_parquet}
    try:
        yield from readers[suffix](source)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({one_line(error.strerror or error)})") from error


def _iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line number, bytes) of every line that is not blank; no byte order mark, no line end."""
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            text = line.removeprefix(BYTE_ORDER_MARK) if line_number == 1 else line
            if text := text.rstrip():
                yield line_number, text


def _iter_jsonl(source: Source) -> Iterator[Row]:
    assert source.path is not None
    for line_number, line in _iter_lines(source.path):
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


def _row_of(source: Source, row_number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(source, row_number, value)
    return Row(source, row_number, None, f"a JSON {type(value).__name__}, expected an object", "not-an-object")


def _iter_json(source: Source) -> Iterator[Row]:
    """Read a list of objects, one object, or JSON lines under the name `.json`."""
    path = source.path
    assert path is not None
    if _begins_with_object_line(path):
        yield from _iter_jsonl(source)
        return
    content = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error)})") from error


def _iter_parquet(source: Source) -> Iterator[Row]:
    import pyarrow as pa

    assert source.path is not None
    file = _open_parquet(source.path)
    row_number = 0
    try:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for value in batch.to_pylist():
                row_number += 1
                yield Row(source, row_number, value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.path}: damaged after row {row_number} ({one_line(error)})") from error


# Hub datasets


def _load_hub(hub_id: str, split: str | None, revision: str | None) -> Any:
    """Load one split of a hub dataset as a `datasets.Dataset`."""
    import datasets

    if split is not None and split.startswith("["):
        split = DEFAULT_HUB_SPLIT + split
    try:
        loaded = datasets.load_dataset(hub_id, split=split, revision=revision)
    except Exception as error:  # whatever the hub client, the network or a loader raises: the user sees one line
        if "Unknown split" in str(error):
            raise UsageError(f"hub dataset {hub_id}: {one_line(error)}") from error
        raise DataError(
            f"{hub_id}: no such file or directory, and as a hub dataset it could not be loaded ({one_line(error)}); "
            "check the id, the network and access, or pass a local path"
        ) from error
    if not isinstance(loaded, dict):
        return loaded
    if DEFAULT_HUB_SPLIT in loaded:
        return loaded[DEFAULT_HUB_SPLIT]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise UsageError(f"hub dataset {hub_id}: several splits ({', '.join(loaded)}); choose one with --split")


def _resolve_hub(hub_id: str, split: str | None, revision: str | None) -> Source:
    dataset = _load_hub(hub_id, split, revision)
    if len(dataset) == 0:
        raise DataError(f"hub dataset {hub_id}: split {split or dataset.split} holds no rows")
    files = sorted((dataset.info.download_checksums or {}).keys())
    pinned = next((match[1] for file in files if (match := _PINNED_REVISION.search(file))), None)
    # Recorded file names carry the commit they were fetched at; without them the fingerprint has to do.
    identity = [hub_id, str(dataset.split), len(dataset), files if pinned else dataset._fingerprint]
    digest = xxhash.xxh3_128_hexdigest(json.dumps(identity).encode())
    return Source(hub_id, None, hub_id, split, pinned or revision, dataset.info.dataset_size or 0, digest)


def _iter_hub(source: Source) -> Iterator[Row]:
    assert source.hub_id is not None
    dataset = _load_hub(source.hub_id, source.split, source.revision)
    for index, value in enumerate(dataset):
        yield _row_of(source, index + 1, value)
