"""Shards as Arrow IPC files: samples streamed out one by one, read back zero-copy from a memory map."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from eagle_offline.cache import codec
from eagle_offline.cache.layout import FORMAT_NAME, FORMAT_VERSION, MERGED_BATCH_BYTES, FieldLayout, SampleTable
from eagle_offline.cache.samples import StoredSample, TableBuilder
from eagle_offline.durable import fsync_file
from eagle_offline.errors import DataError, one_line, unreadable
from eagle_offline.provenance import plain_size

_ID_COLUMNS = (
    pa.field("sample_id", pa.int64(), nullable=False),
    pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
    pa.field("loss_mask", pa.list_(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
    pa.field("target_argmax", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
    pa.field("target_log_normalizer", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
)


def shard_schema(fields: Sequence[FieldLayout], shard: int, identity_digest: str) -> pa.Schema:
    """Return the Arrow schema of a shard; its metadata ties the shard to its place and its manifest."""
    columns = [pa.field(name, pa.large_binary(), nullable=False) for f in fields for name in codec.column_names(f)]
    metadata = {
        "format": FORMAT_NAME,
        "version": str(FORMAT_VERSION),
        "shard": str(shard),
        "identity_digest": identity_digest,
        "fields": json.dumps([field.model_dump() for field in fields]),
    }
    return pa.schema([*_ID_COLUMNS, *columns], metadata=metadata)


class _DigestingFile(io.RawIOBase):
    """A file that digests what is written to it: the shard's digest costs no second read."""

    def __init__(self, path: Path):
        self._file = path.open("xb")
        self.digest = xxhash.xxh3_128()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.digest.update(view)
        self.num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        super().close()


class ArrowShardWriter:
    """Writes one shard, sample by sample; memory stays at one record batch.

    Args:
        path: a name that is not taken.
        fields: the float fields, in layout order.
        shard, identity_digest: go into the file's metadata.
    """

    def __init__(self, path: Path, fields: Sequence[FieldLayout], shard: int, identity_digest: str):
        self._path = path
        self._schema = shard_schema(fields, shard, identity_digest)
        self._file = _DigestingFile(path)
        self._sink = pa.PythonFile(self._file, mode="w")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._pending: list[StoredSample] = []
        self._pending_bytes = 0
        self._num_batches = 0
        self._table = TableBuilder()
        self.column_bytes = dict.fromkeys(self._schema.names, 0)

    def append(self, sample: StoredSample) -> None:
        """Add a sample; it reaches the file with its record batch."""
        self._table.add(sample, self._num_batches, len(self._pending))
        self._pending.append(sample)
        self._pending_bytes += sample.num_bytes
        if self._pending_bytes >= MERGED_BATCH_BYTES:
            self._write_batch()

    def _write_batch(self) -> None:
        if not self._pending:
            return
        arrays = [
            pa.array([sample.sample_id for sample in self._pending], pa.int64()),
            _list_array([sample.input_ids for sample in self._pending], self._schema.field("input_ids").type),
            _list_array([sample.loss_mask for sample in self._pending], self._schema.field("loss_mask").type),
            _list_array([sample.target_argmax for sample in self._pending], self._schema.field("target_argmax").type),
            _list_array(
                [sample.target_log_normalizer for sample in self._pending],
                self._schema.field("target_log_normalizer").type,
            ),
        ]
        for index in range(len(self._schema) - len(arrays)):
            arrays.append(_binary_array([sample.columns[index] for sample in self._pending]))
        batch = pa.record_batch(arrays, schema=self._schema)
        for name, array in zip(self._schema.names, arrays, strict=True):
            self.column_bytes[name] += array.nbytes
        self._writer.write_batch(batch)
        self._pending, self._pending_bytes, self._num_batches = [], 0, self._num_batches + 1

    def close(self) -> tuple[SampleTable, str, int]:
        """Finish the file durably and return its sample table, digest and size."""
        self._write_batch()
        self._writer.close()
        self._sink.close()
        self._file.close()
        fsync_file(self._path)
        return self._table.build(), self._file.digest.hexdigest(), self._file.num_bytes

    def abort(self) -> None:
        """Close the file without finishing it."""
        self._file.close()


def _list_array(values: Sequence[np.ndarray], type_: pa.ListType) -> pa.Array:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    items = pa.array(np.concatenate(values), type_.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=type_)


def _binary_array(values: Sequence[bytes | memoryview]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    content = pa.py_buffer(values[0]) if len(values) == 1 else pa.py_buffer(b"".join(values))
    return pa.Array.from_buffers(pa.large_binary(), len(values), [None, pa.py_buffer(offsets), content])


class ArrowShardReader:
    """A shard opened by memory map, for any number of threads.

    Args:
        path: the shard file.
        fields: the fields the manifest promises, in layout order.
        shard, identity_digest: what the file's metadata must say.

    Raises:
        DataError: not an Arrow file, torn, or of another cache or place.
    """

    def __init__(self, path: Path, fields: Sequence[FieldLayout], shard: int, identity_digest: str):
        self._path = path
        self.fields = tuple(fields)
        # Arrow does not say that one file reader serves several threads; finding a batch takes microseconds.
        self._lock = threading.Lock()
        try:
            plain_size(path)
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except FileNotFoundError as error:
            raise DataError(f"{path}: shard file is missing") from error
        except (pa.ArrowException, OSError) as error:
            raise unreadable(path, "not a complete Arrow file", error) from error
        expected = shard_schema(fields, shard, identity_digest)
        if not self._reader.schema.equals(expected, check_metadata=True):
            raise DataError(f"{path}: shard {shard} has the columns or the manifest of another cache")

    def read(self, record_batch: int, row: int) -> StoredSample:
        """Return a sample, its bytes still in the memory map.

        Raises:
            DataError: no such row, or the batch cannot be read.
        """
        try:
            with self._lock:
                batch = self._reader.get_batch(record_batch)
            # Sizes of buffers against the lengths that the metadata claims: nothing outside the map is ever touched.
            batch.validate()
        except (pa.ArrowException, IndexError, ValueError, OverflowError, OSError, SystemError) as error:
            raise DataError(f"{self._path}: record batch {record_batch} cannot be read: {one_line(error)}") from error
        if any(column.null_count for column in batch.columns):
            raise DataError(f"{self._path}: record batch {record_batch} has nulls, expected none")
        if not 0 <= row < batch.num_rows:
            raise DataError(f"{self._path}: record batch {record_batch} has {batch.num_rows} rows, asked for row {row}")
        columns = [_binary_value(batch.column(index), row) for index in range(len(_ID_COLUMNS), batch.num_columns)]
        return StoredSample(
            sample_id=batch.column("sample_id")[row].as_py(),
            input_ids=_list_values(batch.column("input_ids"), row),
            loss_mask=_list_values(batch.column("loss_mask"), row),
            target_argmax=_list_values(batch.column("target_argmax"), row),
            target_log_normalizer=_list_values(batch.column("target_log_normalizer"), row),
            columns=columns,
        )


def _list_values(column: pa.ListArray, row: int) -> np.ndarray:
    start, end = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    if not 0 <= start <= end <= len(column.values):
        raise DataError("a list column's offsets point outside its values")
    values = column.values.slice(start, end - start)
    if values.null_count:
        raise DataError("a list column has nulls among its values")
    return values.to_numpy(zero_copy_only=True)


def _binary_value(column: pa.LargeBinaryArray, row: int) -> memoryview:
    _, offsets, content = column.buffers()
    bounds = np.frombuffer(offsets, np.int64, count=2, offset=8 * (column.offset + row))
    start, end = int(bounds[0]), int(bounds[1])
    size = 0 if content is None else content.size
    if not 0 <= start <= end <= size:
        raise DataError("a binary column's offsets point outside its values")
    return memoryview(b"") if content is None else memoryview(content)[start:end]
