"""Shards as Zarr v3 groups: one sharded array a column, for object stores and for readers in any language.

A shard is a directory. Its arrays hold the sample's number in the shard on their first axis and are as long as the
longest sample may be on their second; a sample's own rows come first, what follows is zero and is not stored::

    shard-000000-<digest>.zarr/
        zarr.json                       group: format, version, place and fields in its attributes
        sample_id/                      int64 [N]; num_tokens, num_target_positions int32 [N], zero where no sample is
        input_ids/                      int32 [N, T]; loss_mask uint8; target_argmax, target_log_normalizer
        aux_2.exponent/                 uint8 [N, T, W], a column of a float field
            zarr.json
            c.0.0.0                     an object: whole samples, or part of one that is too large

An object is cut into chunks of some rows of one sample, each compressed and followed by its crc32c; the object's index
says where they are. All that is written here any Zarr reader reads; what is read here is a stranger's, so nothing is
believed: chunks that hold rows must be there, sizes are checked before anything of that size is made, and no link is
followed. Files are read, not mapped: a mapped file that is cut short takes the process down.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import google_crc32c
import numpy as np
import pyarrow as pa
import xxhash
from numcodecs import blosc, zstd

from eagle_offline.cache import codec, frames
from eagle_offline.cache.layout import FORMAT_NAME, FORMAT_VERSION, FieldLayout, SampleTable
from eagle_offline.cache.manifest import Identity
from eagle_offline.cache.samples import StoredSample, TableBuilder
from eagle_offline.durable import fsync_directory
from eagle_offline.errors import DataError, unreadable

# Of one chunk, so that a sample's end costs little to read; and of one object, what an object store takes in one piece.
CHUNK_BYTES: Final = 512 << 10
OBJECT_BYTES: Final = 64 << 20

# Keeps an object's index, which is read with every sample, below 128 KiB.
_OBJECT_CHUNKS = 8192

# Of the chunks of both compressors: noise gains nothing by more.
ZSTD_LEVEL = 1

_DOCUMENT = "zarr.json"
_DIMENSIONS = ("sample", "token", "value")
_CRC_BYTES = 4
_ENTRY_BYTES = 16
_ABSENT = (1 << 64) - 1
_READ_BYTES = 4 << 20

_NUMBER_DTYPES = {"sample_id": "int64", "num_tokens": "int32", "num_target_positions": "int32"}
_TOKEN_DTYPES = {
    "input_ids": "int32",
    "loss_mask": "uint8",
    "target_argmax": "int32",
    "target_log_normalizer": "float32",
}

# Words of bf16 are stored as they are: Zarr has no such dtype.
_VALUE_DTYPES = {"bf16": "uint16", "fp16": "float16", "fp32": "float32"}


class _Compressor(Protocol):
    """What compresses a chunk."""

    def document(self, itemsize: int, chunk_bytes: int) -> dict[str, Any]:
        """Return what Zarr calls it."""

    def compress(self, chunk: np.ndarray) -> bytes:
        """Return a chunk, of its array's dtype, compressed."""

    def decompress(self, content: np.ndarray, size: int) -> np.ndarray | None:
        """Return uint8 ``[size]``, or None for what is not one chunk of that size; nothing larger is made."""


class _Zstd:
    def document(self, itemsize: int, chunk_bytes: int) -> dict[str, Any]:
        return {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}

    def compress(self, chunk: np.ndarray) -> bytes:
        return zstd.compress(chunk, ZSTD_LEVEL)

    def decompress(self, content: np.ndarray, size: int) -> np.ndarray | None:
        if frames.content_size(content.data) != size:
            return None
        try:
            # Arrow's decoder, because it works without Python's lock.
            return np.frombuffer(pa.decompress(pa.py_buffer(content), size, codec="zstd"), np.uint8)
        except (pa.ArrowException, OSError):
            return None


class _Blosc:
    # Version of the format and of its zstd, flags, size of a value, sizes of chunk, block and all.
    _header = struct.Struct("<4B3I")
    _zstd_flag = 4

    def document(self, itemsize: int, chunk_bytes: int) -> dict[str, Any]:
        # One block a chunk: many would come in the order in which threads end, and cost a tenth of the size.
        shuffle = "shuffle" if itemsize > 1 else "noshuffle"
        settings = {"cname": "zstd", "clevel": ZSTD_LEVEL, "shuffle": shuffle}
        return {"name": "blosc", "configuration": settings | {"typesize": itemsize, "blocksize": chunk_bytes}}

    def compress(self, chunk: np.ndarray) -> bytes:
        shuffle = blosc.SHUFFLE if chunk.itemsize > 1 else blosc.NOSHUFFLE
        return blosc.compress(chunk, b"zstd", ZSTD_LEVEL, shuffle, chunk.nbytes)

    def decompress(self, content: np.ndarray, size: int) -> np.ndarray | None:
        if len(content) < self._header.size:
            return None
        version, zstd_version, flags, _, *sizes = self._header.unpack_from(content.data)
        if (version, zstd_version, flags >> 5) != (2, 1, self._zstd_flag) or sizes != [size, size, len(content)]:
            return None
        chunk = np.empty(size, np.uint8)
        try:
            blosc.decompress(content, chunk)
        except (RuntimeError, ValueError):
            return None
        return chunk


_COMPRESSORS: dict[str, _Compressor] = {"zstd": _Zstd(), "blosc": _Blosc()}


class Piece(NamedTuple):
    """Rows ``start:stop`` of a chunk: its object's file name and its number there."""

    file_name: str
    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class ArrayLayout:
    """One column as a Zarr array. One without a token axis is laid out like a single sample whose tokens are samples.

    Attributes:
        name: of the column.
        dtype: Zarr's name for it, and numpy's.
        shape: ``[N]``, ``[N, T]`` or ``[N, T, W]``.
        compressor: ``zstd`` or ``blosc``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    compressor: str

    @cached_property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * prod(self.shape[2:])

    @cached_property
    def _num_rows(self) -> int:
        return self.shape[:2][-1]

    @cached_property
    def block(self) -> int:
        """Rows a chunk: a power of two, or all that a sample can have."""
        fitting = max(1, CHUNK_BYTES // self.row_bytes)
        return min(self._num_rows, 1 << (fitting.bit_length() - 1))

    @property
    def chunk_bytes(self) -> int:
        return self.block * self.row_bytes

    @cached_property
    def _object_blocks(self) -> int:
        return min(-(-self._num_rows // self.block), max(1, OBJECT_BYTES // self.chunk_bytes))

    @cached_property
    def object_samples(self) -> int:
        """Samples an object, one where an object does not even hold all of that one's rows."""
        if len(self.shape) == 1 or self._object_blocks * self.block < self._num_rows:
            return 1
        fitting = min(OBJECT_BYTES // self.chunk_bytes, _OBJECT_CHUNKS) // self._object_blocks
        return max(1, min(self.shape[0], fitting))

    @property
    def num_slots(self) -> int:
        """Return how many chunks an object has room for."""
        return self.object_samples * self._object_blocks

    def pieces(self, sample: int, first: int, count: int) -> Iterator[Piece]:
        """Yield where ``count`` rows of a sample from row ``first`` on are, in order."""
        row, end = first, first + count
        while row < end:
            block, start = divmod(row, self.block)
            stop = min(self.block, start + end - row)
            yield Piece(*self._place(sample, block), start, stop)
            row += stop - start

    def _place(self, sample: int, block: int) -> tuple[str, int]:
        group, within = divmod(sample, self.object_samples)
        part, slot = divmod(block, self._object_blocks)
        key = (part,) if len(self.shape) == 1 else (group, part, 0)[: len(self.shape)]
        return ".".join(map(str, ("c", *key))), within * self._object_blocks + slot

    def document(self) -> dict[str, Any]:
        """Return what ``zarr.json`` says of the array."""
        itemsize = np.dtype(self.dtype).itemsize
        compressor = _COMPRESSORS[self.compressor].document(itemsize, self.chunk_bytes)
        to_bytes, crc32c = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
        sharding = {
            "chunk_shape": self._chunk_shape(1, self.block),
            "codecs": [to_bytes, compressor, crc32c],
            "index_codecs": [to_bytes, crc32c],
            "index_location": "end",
        }
        object_shape = self._chunk_shape(self.object_samples, self._object_blocks * self.block)
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": object_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0 if self.dtype.startswith("float") else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": _DIMENSIONS[: len(self.shape)],
            "attributes": {},
        }

    def _chunk_shape(self, num_samples: int, num_rows: int) -> tuple[int, ...]:
        return (num_rows,) if len(self.shape) == 1 else (num_samples, num_rows, *self.shape[2:])


@dataclass(frozen=True)
class ZarrLayout:
    """What a shard's group holds; nothing of it depends on its samples.

    Attributes:
        arrays: the columns that every sample has, then those of the float fields in layout order.
        fields: the float fields.
        num_samples, num_tokens: how many samples there is room for, and how many tokens a sample may have.
    """

    arrays: tuple[ArrayLayout, ...]
    fields: tuple[FieldLayout, ...]
    num_samples: int
    num_tokens: int

    def documents(self, shard: int, identity_digest: str) -> dict[str, bytes]:
        """Return the content of every ``zarr.json`` by its path in the shard, the same bytes everywhere."""
        attributes = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "shard": shard,
            "identity_digest": identity_digest,
            "fields": [field.model_dump(mode="json") for field in self.fields],
        }
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        arrays = {f"{array.name}/{_DOCUMENT}": _canonical(array.document()) for array in self.arrays}
        return {_DOCUMENT: _canonical(group), **arrays}


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def zarr_layout(identity: Identity, shard: int) -> ZarrLayout:
    """Return how a shard of a cache is laid out.

    Raises:
        DataError: the cache has no such shard, no compressor, or two columns of one name.
    """
    capture, num_samples = identity.capture, identity.shard_samples(shard)
    if capture.compressor is None or num_samples < 1:
        raise DataError(f"shard {shard}: a cache of {identity.num_shards} shards in {capture.format} has no such one")
    rows = (num_samples, identity.text.seq_length)
    columns: list[tuple[str, str, tuple[int, ...]]] = [
        *((name, dtype, rows[:1]) for name, dtype in _NUMBER_DTYPES.items()),
        *((name, dtype, rows) for name, dtype in _TOKEN_DTYPES.items()),
    ]
    for field in capture.fields:
        for name, dtype, row_bytes in zip(
            codec.column_names(field), _column_dtypes(field), codec.plane_widths(field), strict=True
        ):
            columns.append((name, dtype, (*rows, row_bytes // np.dtype(dtype).itemsize)))
    if len({name for name, _, _ in columns}) != len(columns):
        raise DataError(f"shard {shard}: the manifest names two columns alike")
    arrays = tuple(ArrayLayout(name, dtype, shape, capture.compressor) for name, dtype, shape in columns)
    return ZarrLayout(arrays, tuple(capture.fields), *rows)


def _column_dtypes(field: FieldLayout) -> tuple[str, ...]:
    if field.encoding == "raw":
        return (_VALUE_DTYPES[field.dtype],)
    if field.encoding == "planes":
        return ("uint8", "uint8")
    if field.encoding == "fp8":
        return ("uint8", "float32")
    place_bytes = codec.plane_widths(field)[1] // (field.top_k or 1)
    return (_VALUE_DTYPES[field.dtype], "uint16" if place_bytes == 2 else "int32", "float32")


class _ArrayWriter:
    """Writes the objects of one array, sample after sample; memory stays at one chunk."""

    def __init__(self, directory: Path, array: ArrayLayout):
        self._directory = directory
        self._array = array
        self._compressor = _COMPRESSORS[array.compressor]
        self._file_name: str | None = None
        self.num_bytes = 0

    def write(self, sample: int, rows: np.ndarray) -> None:
        """Write a sample's rows, uint8 ``[n · row_bytes]``; samples come in ascending order."""
        row_bytes, written = self._array.row_bytes, 0
        for piece in self._array.pieces(sample, 0, len(rows) // row_bytes):
            size = (piece.stop - piece.start) * row_bytes
            self._go_to(piece.file_name)
            self._write_chunk(piece.slot, rows[written : written + size])
            written += size

    def _go_to(self, file_name: str) -> None:
        if file_name != self._file_name:
            self.finish()
            self._file = (self._directory / file_name).open("xb")
            self._file_name = file_name
            self._index = np.full((self._array.num_slots, 2), _ABSENT, "<u8")

    def _write_chunk(self, slot: int, content: np.ndarray) -> None:
        if len(content) < self._array.chunk_bytes:
            content = np.concatenate([content, np.zeros(self._array.chunk_bytes - len(content), np.uint8)])
        offset = self._file.tell()
        length = self._put(self._compressor.compress(content.view(_little_endian(self._array.dtype))))
        self._index[slot] = offset, length

    def _put(self, content: bytes) -> int:
        checked = content + google_crc32c.value(content).to_bytes(_CRC_BYTES, "little")
        self._file.write(checked)
        self.num_bytes += len(checked)
        return len(checked)

    def finish(self) -> None:
        """Make the object that is being written durable."""
        if self._file_name is None:
            return
        with self._file as file:
            self._put(self._index.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._file_name = None

    def abort(self) -> None:
        if self._file_name is not None:
            with suppress(OSError):
                self._file.close()


class ZarrShardWriter:
    """Writes one shard, sample by sample; memory stays at one chunk of a column.

    Args:
        path: a name that is not taken.
        layout: of the shard.
        shard, identity_digest: go into the group's attributes.

    Attributes:
        column_bytes: stored bytes a column so far.
    """

    def __init__(self, path: Path, layout: ZarrLayout, shard: int, identity_digest: str):
        self._path = path
        self._layout = layout
        self._table = TableBuilder()
        self._arrays = {array.name: _ArrayWriter(path / array.name, array) for array in layout.arrays}
        self.column_bytes = dict.fromkeys(self._arrays, 0)
        path.mkdir()
        for name, content in layout.documents(shard, identity_digest).items():
            (path / name).parent.mkdir(exist_ok=True)
            _write_durably(path / name, content)

    def append(self, sample: StoredSample) -> None:
        """Add a sample; it reaches the files at once, its numbers when the shard is closed."""
        row, rows = len(self._table), _sample_rows(self._layout, sample)
        if row == self._layout.num_samples:
            raise ValueError(f"the shard has room for {row} samples")
        for name, content in zip(list(self._arrays)[len(_NUMBER_DTYPES) :], rows, strict=True):
            self._arrays[name].write(row, content)
            self.column_bytes[name] = self._arrays[name].num_bytes
        self._table.add(sample, 0, row)

    def close(self) -> tuple[SampleTable, str, int]:
        """Finish the shard durably; return its sample table, digest and size."""
        table = self._table.build()
        for name, dtype in _NUMBER_DTYPES.items():
            self._arrays[name].write(0, np.array(getattr(table, name), _little_endian(dtype)).view(np.uint8))
        for name, array in self._arrays.items():
            array.finish()
            self.column_bytes[name] = array.num_bytes
            fsync_directory(self._path / name)
        fsync_directory(self._path)
        return table, *digest_tree(self._path)

    def abort(self) -> None:
        """Close what is open without finishing it."""
        for array in self._arrays.values():
            array.abort()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _row_counts(layout: ZarrLayout, num_tokens: int, num_positions: int) -> list[int]:
    """Return how many rows a sample has in each array that has a token axis."""
    by_axis = {"tokens": num_tokens, "supervised_positions": num_positions}
    counts = [num_tokens, num_tokens, num_positions, num_positions]
    for field in layout.fields:
        counts += [by_axis[field.rows]] * len(codec.column_names(field))
    return counts


def _sample_rows(layout: ZarrLayout, sample: StoredSample) -> list[np.ndarray]:
    """Return a sample's rows of each array that has a token axis, as bytes.

    Raises:
        ValueError: they are not what the layout calls for.
    """
    plain = (sample.input_ids, sample.loss_mask, sample.target_argmax, sample.target_log_normalizer)
    contents = [array.tobytes() for array in plain] + list(sample.columns)
    num_tokens, num_positions = len(sample.input_ids), len(sample.target_argmax)
    arrays = layout.arrays[len(_NUMBER_DTYPES) :]
    expected = [
        count * array.row_bytes
        for count, array in zip(_row_counts(layout, num_tokens, num_positions), arrays, strict=True)
    ]
    if sample.framed or not 0 < num_tokens <= layout.num_tokens or [len(c) for c in contents] != expected:
        raise ValueError(f"sample {sample.sample_id} does not fit a shard of {layout.num_tokens} tokens a sample")
    return [np.frombuffer(content, np.uint8) for content in contents]


class ZarrShardReader:
    """A shard opened for any number of threads; it holds no file open between samples.

    Args:
        path: the shard's directory.
        layout: what the manifest calls for.
        shard, identity_digest: what the group's attributes must say.

    Raises:
        DataError: not a shard, or of another cache or place.
    """

    def __init__(self, path: Path, layout: ZarrLayout, shard: int, identity_digest: str):
        self._path = path
        self._layout = layout
        self._numbers = {array.name: array for array in layout.arrays[: len(_NUMBER_DTYPES)]}
        self._columns = layout.arrays[len(_NUMBER_DTYPES) :]
        for name, content in layout.documents(shard, identity_digest).items():
            _check_directory((path / name).parent)
            with _opened(path / name) as file:
                if file.size != len(content) or file.read(0, file.size).tobytes() != content:
                    raise DataError(f"{path / name}: shard {shard} has the columns or the manifest of another cache")

    def read(self, record_batch: int, row: int) -> StoredSample:
        """Return a sample, its columns plain.

        Raises:
            DataError: no such row, or it cannot be read.
        """
        if record_batch != 0 or not 0 <= row < self._layout.num_samples:
            raise DataError(
                f"{self._path}: {self._layout.num_samples} rows in record batch 0, "
                f"asked for row {row} of record batch {record_batch}"
            )
        sample_id, num_tokens, num_positions = (self._number(name, row) for name in _NUMBER_DTYPES)
        if sample_id < 0 or not 0 <= num_positions <= num_tokens <= self._layout.num_tokens or not num_tokens:
            raise DataError(
                f"{self._path}: row {row} claims to be sample {sample_id} of {num_tokens} tokens, {num_positions} of "
                f"them with supervision; expected 1 to {self._layout.num_tokens}"
            )
        counts = _row_counts(self._layout, num_tokens, num_positions)
        input_ids, loss_mask, target_argmax, target_log_normalizer, *columns = (
            self._rows(array, row, 0, count) for array, count in zip(self._columns, counts, strict=True)
        )
        return StoredSample(
            sample_id=sample_id,
            input_ids=input_ids.view("<i4"),
            loss_mask=loss_mask,
            target_argmax=target_argmax.view("<i4"),
            target_log_normalizer=target_log_normalizer.view("<f4"),
            columns=[column.data for column in columns],
            framed=False,
        )

    def _number(self, name: str, row: int) -> int:
        array = self._numbers[name]
        return int(self._rows(array, 0, row, 1).view(_little_endian(array.dtype))[0])

    def _rows(self, array: ArrayLayout, sample: int, first: int, count: int) -> np.ndarray:
        """Return rows of a sample as uint8, from the chunks that hold them."""
        directory = self._path / array.name
        rows, filled = _room(directory, count * array.row_bytes), 0
        for file_name, pieces in groupby(array.pieces(sample, first, count), key=attrgetter("file_name")):
            with _opened(directory / file_name) as file:
                index = _read_index(file, array)
                for piece in pieces:
                    content = _read_chunk(file, array, *index[piece.slot].tolist())
                    part = content[piece.start * array.row_bytes : piece.stop * array.row_bytes]
                    rows[filled : filled + len(part)] = part
                    filled += len(part)
        return rows


@dataclass(frozen=True)
class _File:
    """A plain file, open: never a link, nothing beyond its end is read."""

    path: Path
    descriptor: int
    size: int

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return uint8 ``[length]``."""
        if not 0 <= offset <= offset + length <= self.size:
            raise DataError(f"{self.path}: {length} bytes at {offset} are called for, the file has {self.size}")
        content = os.pread(self.descriptor, length, offset)
        if len(content) != length:
            raise DataError(f"{self.path}: was cut short while it was read")
        return np.frombuffer(content, np.uint8)

    def read_checked(self, offset: int, length: int) -> np.ndarray:
        """Return uint8 ``[length - 4]``: what stands before its crc32c."""
        stored = self.read(offset, length)
        content, crc = stored[:-_CRC_BYTES], stored[-_CRC_BYTES:].tobytes()
        if google_crc32c.value(content).to_bytes(_CRC_BYTES, "little") != crc:
            raise DataError(f"{self.path}: {length} bytes at {offset} do not match their checksum")
        return content


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """Open a plain file of a shard; whatever goes wrong with it meanwhile is bad data."""
    try:
        # Neither a link nor, by waiting for its other end, a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: not a plain file")
            yield _File(path, descriptor, status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, "cannot be read", error) from error


def _check_directory(path: Path) -> None:
    try:
        plain = stat.S_ISDIR(path.lstat().st_mode)
    except OSError as error:
        raise unreadable(path, "cannot be read", error) from error
    if not plain:
        raise DataError(f"{path}: not a directory, or a link to one")


def _room(path: Path, num_bytes: int) -> np.ndarray:
    try:
        return np.empty(num_bytes, np.uint8)
    except (MemoryError, ValueError) as error:
        raise DataError(f"{path}: a sample claims {num_bytes} bytes, more than there is memory") from error


def _read_index(file: _File, array: ArrayLayout) -> np.ndarray:
    """Return uint64 ``[slots, 2]``, each chunk's offset and length."""
    num_bytes = array.num_slots * _ENTRY_BYTES + _CRC_BYTES
    return file.read_checked(file.size - num_bytes, num_bytes).view("<u8").reshape(-1, 2)


def _read_chunk(file: _File, array: ArrayLayout, offset: int, length: int) -> np.ndarray:
    """Return a chunk's rows as uint8."""
    if (offset, length) == (_ABSENT, _ABSENT):
        raise DataError(f"{file.path}: a chunk that a sample needs is not there")
    # No compressor makes more of what it cannot compress.
    if not _CRC_BYTES < length <= array.chunk_bytes + (array.chunk_bytes >> 8) + 1024:
        raise DataError(f"{file.path}: a chunk of {array.chunk_bytes} bytes claims to be stored in {length}")
    content = file.read_checked(offset, length)
    chunk = _COMPRESSORS[array.compressor].decompress(content, array.chunk_bytes)
    if chunk is None:
        raise DataError(f"{file.path}: {length} bytes at {offset} do not decompress to {array.chunk_bytes}")
    return chunk


def digest_tree(path: Path, max_bytes: int | None = None) -> tuple[str, int]:
    """Return the digest of a shard's directory, and the size of its files together.

    The digest is xxh3_128, hexadecimal, over every file in ascending order of its path: path below ``path``, size
    (uint64, little-endian), content.

    Args:
        path: the directory.
        max_bytes: give up where the files have more than this together.

    Raises:
        DataError: it cannot be read, is too large, or has anything in it but plain files and directories.
    """
    digest, num_bytes = xxhash.xxh3_128(), 0
    for name in sorted(_file_names(path)):
        with _opened(path / name) as file:
            num_bytes += file.size
            if max_bytes is not None and num_bytes > max_bytes:
                raise DataError(f"{path}: its files have more than {max_bytes} bytes")
            digest.update(os.fsencode(name))
            digest.update(file.size.to_bytes(8, "little"))
            for start in range(0, file.size, _READ_BYTES):
                digest.update(file.read(start, min(_READ_BYTES, file.size - start)).data)
    return digest.hexdigest(), num_bytes


def _file_names(path: Path) -> Iterator[str]:
    """Yield the paths of all files below ``path``, with slashes."""
    directories = [""]
    while directories:
        parent = directories.pop()
        for entry in _entries(path / parent):
            name = f"{parent}/{entry.name}" if parent else entry.name
            if entry.is_dir(follow_symlinks=False):
                directories.append(name)
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise DataError(f"{path / name}: neither a plain file nor a directory")


def _entries(path: Path) -> list[os.DirEntry[str]]:
    _check_directory(path)
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise unreadable(path, "cannot be read", error) from error
