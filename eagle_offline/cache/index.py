"""All sample tables of a complete cache in one file, so that it opens at once however many shards it has.

The file is derived: from the commit records, which stay the truth. Its name carries the digest of its bytes. One that
is damaged, or that does not name exactly the shards that stand there, is left alone and the records are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from eagle_offline.cache.layout import (
    ByteCount,
    CommitRecord,
    Count,
    Digest,
    EncodingError,
    Frozen,
    LostSample,
    SampleTable,
    ShardFile,
)
from eagle_offline.durable import write_bytes
from eagle_offline.errors import DataError, unreadable
from eagle_offline.provenance import digest_bytes, plain_size

# A sample takes 40 bytes; what is larger is not read, and the records are.
_MAX_BYTES = 1 << 30

_INDEX_NAME = re.compile(r"index-([0-9a-f]{32})\.arrow")

# How a column of the sample table stands in arrays and in the file.
_COLUMNS: dict[str, Any] = {
    "sample_id": np.int32,
    "num_tokens": np.int32,
    "num_supervised": np.int32,
    "num_target_positions": np.int32,
    "num_in_vocab": np.int32,
    "vocab_mass": np.float32,
    "record_batch": np.int32,
    "row": np.int32,
    "digest": np.uint64,
}


class ShardEntry(Frozen):
    """A committed shard: how many samples it holds, and of its record what is not the samples'."""

    shard: Count
    file: ShardFile
    file_bytes: ByteCount
    digest: Digest
    num_samples: Count
    lost: list[LostSample]
    column_bytes: dict[str, ByteCount]
    encoding_errors: dict[str, EncodingError]


@dataclass(frozen=True)
class SampleIndex:
    """Where every sample of a cache is, in the order of shards and of places inside them.

    Attributes:
        entries: the shards read from, in order.
        sample_id, num_tokens, num_supervised, num_target_positions, num_in_vocab, record_batch, row: int32 ``[N]``.
        vocab_mass: float32 ``[N]``; digest: uint64 ``[N]``.
    """

    entries: list[ShardEntry]
    sample_id: np.ndarray
    num_tokens: np.ndarray
    num_supervised: np.ndarray
    num_target_positions: np.ndarray
    num_in_vocab: np.ndarray
    vocab_mass: np.ndarray
    record_batch: np.ndarray
    row: np.ndarray
    digest: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def shards(self) -> np.ndarray:
        """Int64 ``[N]``: the shard number of every sample."""
        counts = [entry.num_samples for entry in self.entries]
        return np.repeat(np.array([entry.shard for entry in self.entries], np.int64), counts)


def index_of(records: Iterable[CommitRecord]) -> SampleIndex:
    """Return the index of shards, from their records, in order."""
    entries: list[ShardEntry] = []
    columns: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in _COLUMNS.items()}
    for record in records:
        entries.append(
            ShardEntry(
                shard=record.shard,
                file=record.file,
                file_bytes=record.file_bytes,
                digest=record.digest,
                num_samples=len(record.samples),
                lost=record.lost,
                column_bytes=record.column_bytes,
                encoding_errors=record.encoding_errors,
            )
        )
        for name, dtype in _COLUMNS.items():
            columns[name].append(_column(record.samples, name, dtype))
    return SampleIndex(entries=entries, **{name: np.concatenate(parts) for name, parts in columns.items()})


def _column(samples: SampleTable, name: str, dtype: Any) -> np.ndarray:
    values = getattr(samples, name)
    with np.errstate(over="ignore"):  # what no sample has is infinite, not a warning
        return np.array([int(value, 16) for value in values] if name == "digest" else values, dtype)


def index_names(names: Iterable[str]) -> list[str]:
    """Return those of some file names that are an index's."""
    return sorted(name for name in names if _INDEX_NAME.fullmatch(name))


def write_index(directory: Path, index: SampleIndex, identity_digest: str) -> str:
    """Write the index of a complete cache, take away older ones, and return its name."""
    metadata = {
        "identity_digest": identity_digest,
        "shards": json.dumps([entry.model_dump() for entry in index.entries], separators=(",", ":")),
    }
    columns = {name: pa.array(getattr(index, name)) for name in _COLUMNS}
    batch = pa.record_batch(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue().to_pybytes()
    name = f"index-{digest_bytes(content)}.arrow"
    write_bytes(directory / name, content)
    drop_indexes(directory, but=name)
    return name


def drop_indexes(directory: Path, but: str | None = None) -> None:
    """Take away the indexes of a directory; the records say the same."""
    for name in index_names(path.name for path in directory.iterdir()):
        if name != but:
            (directory / name).unlink(missing_ok=True)


def read_index(
    directory: Path, names: Collection[str] | None, committed: list[int], identity_digest: str
) -> SampleIndex | None:
    """Return the index that stands in a directory, None when there is none that can be relied on.

    Args:
        directory: where the index lies.
        names: what stands in the cache, shards among them; None for what the directory holds, shards not looked for.
        committed: the shards that have a commit record, in order.
        identity_digest: of the manifest.
    """
    for name in index_names(os.listdir(directory) if names is None else names):
        index = _read(directory / name, identity_digest)
        if index is None or [entry.shard for entry in index.entries] != committed:
            continue
        if names is None or all(entry.file in names for entry in index.entries):
            return index
    return None


def _read(path: Path, identity_digest: str) -> SampleIndex | None:
    """Return an index that is whole and of this cache; what is derived is never an error: the records are there."""
    match = _INDEX_NAME.fullmatch(path.name)
    try:
        if plain_size(path) > _MAX_BYTES:
            return None
        # Not mapped: whoever cuts the file short would take the reader down.
        content = pa.py_buffer(path.read_bytes())
        if match is None or digest_bytes(content) != match[1]:
            return None
        return _parsed(content, identity_digest)
    except OSError as error:
        if not isinstance(unreadable(path, "", error), DataError):
            raise unreadable(path, "cannot be read", error) from error
        return None
    except (pa.ArrowException, ValidationError, DataError, ValueError, LookupError):
        return None


def _parsed(content: pa.Buffer, identity_digest: str) -> SampleIndex | None:
    reader = pa.ipc.open_file(content)
    metadata = reader.schema.metadata or {}
    if metadata.get(b"identity_digest") != identity_digest.encode() or reader.num_record_batches != 1:
        return None
    batch = reader.get_batch(0)
    batch.validate(full=True)
    entries = TypeAdapter(list[ShardEntry]).validate_json(metadata.get(b"shards", b""))
    arrays: dict[str, np.ndarray] = {}
    for name, dtype in _COLUMNS.items():
        column = batch.column(name)
        if column.type != pa.from_numpy_dtype(dtype) or column.null_count:
            return None
        # Not by `to_numpy`, which imports pandas.
        arrays[name] = np.from_dlpack(column)
        if name != "digest" and not (arrays[name] >= 0).all():
            return None
    if sum(entry.num_samples for entry in entries) != batch.num_rows:
        return None
    assert {field.name for field in fields(SampleIndex)} == {"entries", *arrays}
    return SampleIndex(entries=entries, **arrays)
