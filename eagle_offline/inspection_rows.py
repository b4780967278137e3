"""What a cache says of the input's rows: those that became samples, and those that were left out, and why."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pydantic import ValidationError

from eagle_offline.cache.layout import TOKENS_DIRECTORY, LostSample
from eagle_offline.cache.manifest import first_problem, read_json_object
from eagle_offline.errors import DataError
from eagle_offline.inspection_record import LeftOut, Quarantine
from eagle_offline.text.token_table import META_FILE, QUARANTINE_FILE, TOKENS_FILE, TokenTableMeta

# A cache may be a stranger's: what is taken from it is bounded.
_MAX_META_BYTES = 16 << 20
_QUARANTINE_BYTES = 1 << 20
_MAX_REASONS = 100
_MAX_DETAIL = 500


def file_size(path: Path) -> int | None:
    """Return the size of a regular file, None when there is none that can be looked at."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


class TableRow(NamedTuple):
    """A row of the token table: where it stands in the input, None if that is not known, its ids and its loss mask."""

    file: str | None
    row: int | None
    input_ids: list[int]
    loss_mask: list[int]


def read_row(path: Path, meta: TokenTableMeta | None, sample_id: int) -> TableRow | None:
    """Return a sample's row of the token table, None when there is no reading it: `--verify` says what is wrong.

    Unlike `TokenTable` it checks no file as a whole, trusts no offset, and needs no pandas.
    """
    file = path / TOKENS_DIRECTORY / TOKENS_FILE
    if meta is None or not file_size(file):
        return None
    batch_number, offset = divmod(sample_id, max(1, meta.rows_per_batch))
    try:
        with pa.memory_map(str(file)) as mapped:
            batch = pa.ipc.open_file(mapped).get_batch(batch_number)
            batch.validate(full=True)
            source, row, ids, mask = (
                batch.column(name)[offset].as_py() for name in ("source", "row", "input_ids", "loss_mask")
            )
        return TableRow(meta.sources[source].name, int(row), [int(id_) for id_ in ids], [int(m != 0) for m in mask])
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, OverflowError, SystemError):
        return None


def read_meta(path: Path) -> tuple[TokenTableMeta | None, str | None]:
    """Return what the token table says of itself, and what is wrong with that; neither when there is none."""
    file = path / TOKENS_DIRECTORY / META_FILE
    if file_size(file) is None:
        return None, None
    try:
        return TokenTableMeta.model_validate(read_json_object(file, _MAX_META_BYTES)), None
    except DataError as error:
        return None, str(error)
    except ValidationError as error:
        return None, f"{file}: {first_problem(error)}"


def quarantine(path: Path, meta: TokenTableMeta | None) -> Quarantine:
    if meta is None:
        return Quarantine(rows=None, reasons={}, shortened=None, examples=[], file=None)
    file = f"{TOKENS_DIRECTORY}/{QUARANTINE_FILE}"
    return Quarantine(
        rows=meta.num_quarantined,
        reasons=most_common(Counter(meta.reasons)),
        shortened=meta.truncated_rows,
        examples=_quarantine_examples(path / file),
        file=file,
    )


def _quarantine_examples(file: Path) -> list[LeftOut]:
    """Return the first row of each reason, as far as the start of the list has one."""
    if not file_size(file):
        return []
    with file.open("rb") as lines:
        content = lines.read(_QUARANTINE_BYTES)
    found: dict[str, LeftOut] = {}
    for line in content.splitlines():
        try:
            row = LeftOut.model_validate(json.loads(line))
        except (ValueError, RecursionError):  # damaged, or cut off where reading ended
            continue
        if len(found) < _MAX_REASONS:
            found.setdefault(row.reason, row.model_copy(update={"detail": (row.detail or "")[:_MAX_DETAIL]}))
    return list(found.values())


def lost_examples(path: Path, lost: Sequence[LostSample], meta: TokenTableMeta | None) -> list[LeftOut]:
    first: dict[str, LostSample] = {}
    for item in lost:
        first.setdefault(item.reason, item)
    examples = []
    for reason, item in list(first.items())[:_MAX_REASONS]:
        found = read_row(path, meta, item.sample_id)
        file, row = (None, None) if found is None else (found.file, found.row)
        examples.append(LeftOut(reason=reason, file=file, row=row, detail=f"sample {item.sample_id}"))
    return examples


def most_common(reasons: Counter[str]) -> dict[str, int]:
    return dict(reasons.most_common(_MAX_REASONS))
