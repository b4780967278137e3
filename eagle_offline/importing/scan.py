"""Reads a dump through once: which samples it holds, and a digest of all its bytes; remembered by file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from eagle_offline.durable import temporary_sibling
from eagle_offline.errors import DataError, unreadable
from eagle_offline.importing.dumps import Dump, DumpedSample, FileScan
from eagle_offline.importing.loss_masks import LossMasks
from eagle_offline.prefetch import prefetch
from eagle_offline.provenance import digest_bytes, digest_json, file_key, user_cache_directory

_MAX_WORKERS = 8

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("num_tokens", pa.list_(pa.int32())),
        pa.field("ids", pa.list_(pa.uint64())),
        pa.field("masks", pa.list_(pa.uint64())),
    ]
)


@dataclass(frozen=True)
class DumpIndex:
    """The samples of a dump, ``N`` of them, in the order of its files.

    Attributes:
        dump: what they are read from.
        keys: of each file, its path, size, time and inode when it was scanned; digests: of its bytes then.
        file, row, num_tokens: int32 ``[N]``.
        ids: uint64 ``[N]``: what a sample is known by, see `FileScan`.
        masks: uint64 ``[N]``, None where nothing is known of them.
        agrees: bool ``[N]``: a sample has the token ids that the loss masks were made for.
        digest: of the whole dump, loss masks included.
    """

    dump: Dump
    keys: Sequence[str]
    digests: Sequence[str]
    file: np.ndarray
    row: np.ndarray
    num_tokens: np.ndarray
    ids: np.ndarray
    masks: np.ndarray | None
    agrees: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.file)

    def name_of(self, number: int) -> str:
        """Return what a user may look for."""
        return self.dump.name_of(self.dump.files[self.file[number]], int(self.row[number]))

    def read(self, number: int, num_tokens: int, positions: torch.Tensor) -> DumpedSample:
        """Return the first positions of a sample, and the target at some of them; see `Dump.read`.

        Raises:
            DataError: its file cannot be read, or is not what it was when it was scanned.
        """
        place = int(self.file[number])
        file = self.dump.files[place]
        self._check_unchanged(file, self.keys[place])
        sample = self.dump.read(file, int(self.row[number]), num_tokens, positions, self.digests[place])
        self._check_unchanged(file, self.keys[place])
        return sample

    def _check_unchanged(self, file: Path, key: str) -> None:
        if _key_of(file) != key:
            raise DataError(f"{file}: was changed after it was matched with the corpus; run the same command again")


def scan_dump(
    dump: Dump,
    loss_masks: LossMasks | None,
    seq_length: int,
    report: Callable[[int], None],
    *,
    rehash: bool = False,
) -> DumpIndex:
    """Read a dump through, in parallel; what was read before and has not changed is not read again.

    Args:
        loss_masks: of a dump whose files have none, where they are.
        seq_length: of the corpus; no more tokens of a sample are looked at.
        report: called with the bytes read so far; what it raises ends the scan, and what was read is remembered.
        rehash: read every file again.

    Raises:
        DataError: a file is not in the tool's layout.
    """
    memory = _Memory(dump, seq_length)
    keys = [_key_of(file) for file in dump.files]
    known = {} if rehash else memory.read()
    scan = partial(_scan, dump, seq_length, known)
    scans: list[FileScan] = []
    read_bytes = 0
    try:
        workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        items = zip(dump.files, keys, strict=True)
        for found, key in zip(prefetch(scan, items, num_workers=workers, computes_alone=False), keys, strict=True):
            scans.append(found)
            read_bytes += int(key.split("|")[-3])
            report(read_bytes)
    finally:
        memory.write(keys[: len(scans)], scans)
    return _index(dump, keys, scans, loss_masks)


def _scan(dump: Dump, seq_length: int, known: dict[str, FileScan], item: tuple[Path, str]) -> FileScan:
    file, key = item
    found = known.get(key)
    if found is None:
        found = dump.scan(file, seq_length)
        if _key_of(file) != key:
            raise DataError(f"{file}: was changed while it was read; run the same command again when it is done")
    return found


def _key_of(file: Path) -> str:
    try:
        return file_key(file)
    except OSError as error:
        raise unreadable(file, "cannot be read", error) from error


def _index(dump: Dump, keys: list[str], scans: list[FileScan], loss_masks: LossMasks | None) -> DumpIndex:
    counts = [len(scan.ids) for scan in scans]
    ids = np.concatenate([scan.ids for scan in scans])
    found = [scan.masks for scan in scans if scan.masks is not None]
    masks = np.concatenate(found) if found else None
    agrees = np.ones(len(ids), bool)
    if loss_masks is not None:
        masks, agrees = loss_masks.of(dump.files, ids)
    content: dict[str, Any] = {file.name: scan.digest for file, scan in zip(dump.files, scans, strict=True)}
    return DumpIndex(
        dump=dump,
        keys=keys,
        digests=[scan.digest for scan in scans],
        file=np.repeat(np.arange(len(scans), dtype=np.int32), counts),
        row=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        num_tokens=np.concatenate([scan.num_tokens for scan in scans]),
        ids=ids,
        masks=masks,
        agrees=agrees,
        digest=digest_json({"files": content, "loss_masks": None if loss_masks is None else loss_masks.digest}),
    )


class _Memory:
    """What was found in a dump's files, kept in the user's cache directory."""

    def __init__(self, dump: Dump, seq_length: int):
        name = digest_bytes(f"{dump.tool}|{dump.directory.resolve()}|{seq_length}".encode(errors="surrogateescape"))
        self._path = user_cache_directory() / "imports" / f"{name}.arrow"

    def read(self) -> dict[str, FileScan]:
        """Return what is remembered, by a file's key."""
        try:
            with pa.memory_map(str(self._path)) as file:
                table = pa.ipc.open_file(file).read_all()
            if table.schema != _SCHEMA:
                return {}
            return {row["key"]: _scan_of(row) for row in table.to_pylist()}
        except (OSError, pa.ArrowException, UnicodeError):  # no memory, or a torn one: the files are read again
            return {}

    def write(self, keys: Sequence[str], scans: Sequence[FileScan]) -> None:
        """Remember what was found."""
        columns = [
            pa.array(keys, pa.string()),
            pa.array([scan.digest for scan in scans], pa.string()),
            pa.array([scan.num_tokens for scan in scans], pa.list_(pa.int32())),
            pa.array([scan.ids for scan in scans], pa.list_(pa.uint64())),
            pa.array([scan.masks for scan in scans], pa.list_(pa.uint64())),
        ]
        sibling = temporary_sibling(self._path)
        with suppress(OSError):  # only a memory: without it the files are read again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with pa.ipc.new_file(str(sibling), _SCHEMA) as writer:
                    writer.write_table(pa.table(columns, schema=_SCHEMA))
                os.replace(sibling, self._path)
            finally:
                sibling.unlink(missing_ok=True)


def _scan_of(row: dict[str, Any]) -> FileScan:
    masks = row["masks"]
    return FileScan(
        digest=row["digest"],
        num_tokens=np.array(row["num_tokens"], np.int32),
        ids=np.array(row["ids"], np.uint64),
        masks=None if masks is None else np.array(masks, np.uint64),
    )
