"""The tokenised corpus on disk, opened by memory map.

A directory holds `tokens.arrow` (Arrow IPC file: `input_ids` list<int32>, `loss_mask` list<uint8>, `source` int32,
`row` int64), `quarantine.jsonl` (rows left out and why) and, written last, `tokens.json`: without it there is no table.
Knows the records and how to read them; not how they are made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from eagle_offline.errors import DataError, one_line
from eagle_offline.provenance import digest_file

FORMAT_VERSION = 2
TOKENS_FILE = "tokens.arrow"
QUARANTINE_FILE = "quarantine.jsonl"
META_FILE = "tokens.json"
SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("loss_mask", pa.list_(pa.uint8())),
        pa.field("source", pa.int32()),
        pa.field("row", pa.int64()),
    ]
)


class SourceRecord(BaseModel, frozen=True, extra="forbid"):
    """A `Source` without the place where it lies on this machine."""

    name: str
    hub_id: str | None
    split: str | None
    revision: str | None
    num_bytes: int
    digest: str
    first_row: int
    stop_row: int | None


class FileRecord(BaseModel, frozen=True, extra="forbid"):
    """Size in bytes and xxh3_128 hex digest of a file of the table."""

    num_bytes: int
    digest: str


class TokenTableMeta(BaseModel, frozen=True, extra="forbid"):
    """`tokens.json`. `key` digests all that shapes the table; `rows_digest` covers (length, ids, mask) of every row.

    `reasons` counts the rows left out; `notes` counts rows that are in the table, of which something is not rendered.
    """

    format_version: int
    key: str
    tokenizer_digest: str
    template_digest: str
    seq_length: int
    on_bad_row: Literal["quarantine", "stop"]
    sources: tuple[SourceRecord, ...]
    num_rows: int
    num_tokens: int
    num_supervised: int
    max_length: int
    max_token_id: int
    truncated_rows: int
    num_quarantined: int
    reasons: dict[str, int]
    notes: dict[str, int]
    rows_digest: str
    rows_per_batch: int
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class TokenProgress:
    """How far a build is; passed to `report` after every record batch and at the end."""

    source: str
    rows_read: int
    num_rows: int
    num_tokens: int


class TokenRow(NamedTuple):
    """A row of the table: int32 [T], uint8 [T] (read-only views of the file), index into the sources, row number."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: int
    row: int


def open_token_table(directory: Path | str) -> TokenTable:
    """Open a finished table by memory map, after checking size and digest of its files.

    Raises:
        DataError: There is no finished table, it has another format version, or its files disagree.
    """
    directory = Path(directory)
    path = directory / META_FILE
    again = "run `eagle-offline tokenize` again"
    try:
        stored = json.loads(path.read_bytes())
        version = stored.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version}, expected {FORMAT_VERSION}; {again}")
        meta = TokenTableMeta.model_validate(stored)
        for name, record in meta.files.items():
            num_bytes = (directory / name).stat().st_size
            if num_bytes != record.num_bytes:
                raise DataError(f"{directory / name}: {num_bytes} bytes, expected {record.num_bytes}; {again}")
            if digest_file(directory / name) != record.digest:
                raise DataError(f"{directory / name}: its digest is not the recorded {record.digest}; {again}")
        return TokenTable(directory, meta)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: not there, so this is no finished token table; {again}") from error
    except (ValidationError, ValueError, AttributeError, OSError) as error:
        raise DataError(f"{path}: not readable as a token table ({one_line(error)}); {again}") from error


class TokenTable:
    """A finished table, memory-mapped. `table[i]` and `lengths` are in input order.

    Attributes:
        meta: What `tokens.json` says.
    """

    def __init__(self, directory: Path, meta: TokenTableMeta) -> None:
        self.directory = directory
        self.meta = meta
        self._reader = pa.ipc.open_file(pa.memory_map(str(directory / TOKENS_FILE)))
        self._batches: dict[int, _BatchView] = {}

    def __len__(self) -> int:
        return self.meta.num_rows

    def __getitem__(self, index: int) -> TokenRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch_index, offset = divmod(index % len(self), self.meta.rows_per_batch)
        batch = self._batch(batch_index)
        start, stop = batch.offsets[offset], batch.offsets[offset + 1]
        tokens = slice(int(start), int(stop))
        return TokenRow(
            batch.input_ids[tokens], batch.loss_mask[tokens], int(batch.source[offset]), int(batch.row[offset])
        )

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, int32 [num_rows]."""
        parts = [np.diff(self._batch(index).offsets) for index in range(self._reader.num_record_batches)]
        return np.concatenate(parts).astype(np.int32, copy=False)

    def supervised_counts(self) -> np.ndarray:
        """How often each id is a supervised token, int64 [max_token_id + 1]; reads one record batch at a time."""
        counts = np.zeros(self.meta.max_token_id + 1, dtype=np.int64)
        for index in range(self._reader.num_record_batches):
            batch = self._batch(index)
            counts += np.bincount(batch.input_ids[batch.loss_mask == 1], minlength=len(counts))
        return counts

    def _batch(self, index: int) -> _BatchView:
        if index not in self._batches:
            self._batches[index] = _BatchView.of(self._reader.get_batch(index))
        return self._batches[index]


class _BatchView(NamedTuple):
    """Numpy views of one record batch: int32 [rows + 1], int32 [tokens], uint8 [tokens], int32 [rows], int64 [rows]."""

    offsets: np.ndarray
    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _BatchView:
        ids, mask, source, row = (batch.column(name) for name in SCHEMA.names)
        arrays = (ids.offsets, ids.values, mask.values, source, row)
        return cls(*(array.to_numpy(zero_copy_only=True) for array in arrays))
