"""Finds the inputs: local JSONL, JSON and Parquet files, directories of them, hub datasets, and which rows of them.

Names and digests what there is; what stands in a row is not known here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from eagle_offline.errors import DataError, UsageError, one_line
from eagle_offline.provenance import digest_file
from eagle_offline.text.hub import identify, load_split
from eagle_offline.text.input_names import listed_inputs, named_apart, parse_input
from eagle_offline.text.rows import DATA_SUFFIXES, Source, count_rows, data_suffix
from eagle_offline.text.token_table import SourceRecord

_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?P<slice>\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_USUAL_SPLIT = re.compile(r"(train|test|valid|val|dev|eval)(?:idation|ing)?(?:[_-].*)?", re.IGNORECASE)
_SHARD_SUFFIX = re.compile(r"-\d+-of-\d+$")  # how hub exports number the files of one split


def resolve_sources(
    input_data: str | Sequence[str], *, split: str | None = None, revision: str | None = None, digests: bool = True
) -> tuple[Source, ...]:
    """Name every file or dataset that the inputs stand for, in reading order, each with a digest.

    An input is `NAME[@REVISION][:SPLIT]`; `split` and `revision` are for those that say none of their own. A split
    selects files by name (`train` takes `train.jsonl`, `train-00000-of-00002.parquet`, `train/a.json`); a slice
    (`train[:100]`, `[10:20]`, `[-5:]`, `[:10%]`) counts rows over all selected files of an input in order.

    Args:
        input_data: One input, or several.
        split, revision: For inputs without; a revision is for hub datasets only.
        digests: Without them no file is read as a whole, and each digest is empty.

    Raises:
        DataError: Nothing is there, it is empty, or the hub cannot give it.
        UsageError: A split that does not exist or cannot be read, a slice without rows, a file of another kind, rows
            that are asked for twice, or a revision for local files alone.
    """
    inputs = [parse_input(text) for text in listed_inputs(input_data)]
    if not inputs:
        raise UsageError("no input data; pass a file, a directory or a hub id `owner/name`")
    if revision is not None and all(given.path is not None for given in inputs):
        raise UsageError(
            f"{inputs[0].name}: a revision ({revision}) belongs to a hub dataset, this is a local path; leave it out"
        )
    digest = cache(digest_file) if digests else lambda _: ""
    sources: list[Source] = []
    for given in inputs:
        wanted = given.split if given.split is not None else split
        if given.path is None:
            sources.append(_describe_hub(given.name, wanted, given.revision or revision))
        else:
            sources += _describe_local(given.path, wanted, digest)
    _refuse_rows_twice(sources)
    return named_apart(sources)


def splits_read_together(input_data: str | Sequence[str], split: str | None) -> list[str]:
    """Return the splits, by the usual names, that one directory is read with because none of them is asked for."""
    for given in map(parse_input, listed_inputs(input_data)):
        if given.path is None or given.split or split or not given.path.is_dir():
            continue
        names = {name for file in _list_files(given.path) for name in _split_names(given.path, file)}
        usual = {match[0]: match[1].lower() for match in map(_USUAL_SPLIT.fullmatch, names) if match}
        if len(set(usual.values())) > 1:
            return sorted(usual)
    return []


def pinned_inputs(input_data: str | Sequence[str], sources: Sequence[Source | SourceRecord]) -> tuple[str, ...]:
    """Return the inputs that name the same from any working directory and at any later time.

    Args:
        input_data: The inputs that `sources` were resolved from.
        sources: In reading order.
    """
    hub_sources = (source for source in sources if source.hub_id is not None)
    pinned = []
    for given in map(parse_input, listed_inputs(input_data)):
        if given.path is not None:
            # JSON has no place for names that are no Unicode text.
            name = os.fsencode(given.path.absolute()).decode(errors="replace")
        else:
            revision = next(hub_sources).revision
            name = given.name + (f"@{revision}" if revision else "")
        pinned.append(name + (f":{given.split}" if given.split is not None else ""))
    return tuple(pinned)


def _describe_local(path: Path, split: str | None, digest: Callable[[Path], str]) -> tuple[Source, ...]:
    """Return the wanted rows of a file, or of the files of a directory."""
    wanted = _parse_split(split) if split is not None else None
    files = _list_files(path)
    if wanted is not None and wanted["name"]:
        files = _select_split(path, files, wanted["name"])
    sources = tuple(_describe_file(path, file, split, digest) for file in files)
    if wanted is not None and wanted["slice"]:
        return _slice_sources(sources, wanted["start"], wanted["stop"], str(split))
    return sources


def _refuse_rows_twice(sources: Sequence[Source]) -> None:
    """Refuse a row that is asked for twice; several parts of one file are fine."""
    taken: dict[object, list[Source]] = {}
    for source in sources:
        whole = (source.hub_id, source.revision, source.split)
        key = whole if source.path is None else os.path.realpath(source.path)
        for other in taken.setdefault(key, []):
            first = max(source.first_row, other.first_row)
            stop = min(_stop(source), _stop(other))
            if first < stop:
                place = source.path or source.name
                raise UsageError(
                    f"the input data names {place} twice, row {first + 1} among others; give each row once, or parts "
                    "that do not overlap, such as FILE:[:100] and FILE:[100:]"
                )
        taken[key].append(source)


def _stop(source: Source) -> float:
    return math.inf if source.stop_row is None else source.stop_row


def _list_files(path: Path) -> list[Path]:
    """List the data files at `path`, sorted; names that begin with a dot or an underscore are not data."""
    if path.is_file():
        if data_suffix(path) is None:
            raise UsageError(f"{path}: a file of kind '{path.suffix}'; expected one of {', '.join(DATA_SUFFIXES)}")
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if data_suffix(file) is not None
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
    return [_SHARD_SUFFIX.sub("", file.name[: -len(data_suffix(file) or "")]), *directories]


def _describe_file(root: Path, file: Path, split: str | None, digest: Callable[[Path], str]) -> Source:
    name = file.name if file == root else file.relative_to(root).as_posix()
    try:
        num_bytes = file.stat().st_size
        if num_bytes == 0:
            raise DataError(f"{file}: an empty file; give it rows or take it away")
        return Source(name, file, None, split, None, num_bytes, digest(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({one_line(error.strerror or error)})") from error


def _slice_sources(sources: Sequence[Source], start: str | None, stop: str | None, split: str) -> tuple[Source, ...]:
    """Spread one slice over the rows of all `sources` in order; sources without a wanted row are left out."""
    # A slice from the front needs no rows counted behind its end.
    end = int(stop) if stop is not None and stop.isdigit() and (start is None or start.isdigit()) else None
    counts, total = [], 0
    for source in sources:
        assert source.path is not None
        within = end is None or total < end
        counts.append(count_rows(source, source.path, None if end is None else end - total) if within else 0)
        total += counts[-1]
    first, last, _ = slice(_slice_bound(start, total), _slice_bound(stop, total)).indices(total)
    if first >= last:
        counted = f" of {total}" if end is None else ""
        raise UsageError(f"--split {split} selects no row{counted}; expected a slice that holds at least one")
    wanted = []
    offset = 0
    for source, count in zip(sources, counts, strict=True):
        low, high = max(first - offset, 0), min(last - offset, count)
        if low < high:
            wanted.append(dataclasses.replace(source, first_row=low, stop_row=high))
        offset += count
    return tuple(wanted)


def _slice_bound(text: str | None, total: int) -> int | None:
    if text is None:
        return None
    return round(total * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _describe_hub(hub_id: str, split: str | None, revision: str | None) -> Source:
    dataset = load_split(hub_id, split, revision)
    if len(dataset) == 0:
        raise DataError(f"hub dataset {hub_id}: split {split or dataset.split} holds no rows")
    pinned, digest = identify(hub_id, dataset)
    return Source(hub_id, None, hub_id, split, pinned or revision, dataset.info.dataset_size or 0, digest)
