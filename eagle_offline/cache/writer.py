"""Shards come into being: written beside, made durable, named by content, committed by a record if none is there."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eagle_offline.cache.formats import ShardWriter, digest_shard, shard_writer
from eagle_offline.cache.index import drop_indexes, index_of, read_index, write_index
from eagle_offline.cache.layout import (
    FORMAT_NAME,
    FORMAT_VERSION,
    CommitRecord,
    LostSample,
    record_file,
    repair_way_out,
    shard_file,
    shard_of_record,
)
from eagle_offline.cache.manifest import SEAL, Identity, check_seal, first_problem, read_json_object, sealed
from eagle_offline.cache.samples import EncodingErrors, StoredSample
from eagle_offline.durable import (
    create_exclusively,
    explained_os_errors,
    fsync_directory,
    put_in_place,
    remove,
    temporary_sibling,
)
from eagle_offline.errors import DataError, unreadable

# A record holds a few dozen bytes a sample; nothing larger than this is ever parsed.
_MAX_RECORD_BYTES = 256 << 20


def committed_shards(directory: Path) -> list[int]:
    """Return the numbers of the shards that have a commit record, in order.

    Raises:
        DataError: the directory cannot be read.
    """
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise unreadable(directory, "cannot be read", error) from error
    return sorted(shard for name in names if (shard := shard_of_record(name)) is not None)


def read_record(directory: Path, shard: int) -> CommitRecord:
    """Read and validate a shard's commit record.

    Raises:
        DataError: missing, or not following the schema; names `precompute --resume` as the way out.
    """
    path = directory / record_file(shard)
    raw = read_json_object(path, _MAX_RECORD_BYTES)
    seal = raw.pop(SEAL, None)
    try:
        record = CommitRecord.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}; {repair_way_out(directory)}") from error
    lengths = {len(column) for column in record.samples.model_dump().values()}
    if record.shard != shard or len(lengths) != 1:
        raise DataError(f"{path}: the record of another shard, or of columns of unequal length")
    check_seal(path, raw, seal, repair_way_out(directory))
    return record


@contextmanager
def _shard_writer(path: Path, shard: int, identity: Identity) -> Iterator[ShardWriter]:
    try:
        writer = shard_writer(path, identity, shard)
        try:
            yield writer
        except BaseException:
            # On a full disk closing fails again, for what is still buffered.
            with suppress(OSError):
                writer.abort()
            raise
    except BaseException:
        remove(path)
        raise


def _put_in_place(sibling: Path, final: Path, digest: str) -> None:
    """Give a finished shard its name; a directory of that name and content stays, for whoever reads it."""
    if final.is_dir() and digest_shard(final)[0] == digest:
        remove(sibling)
    else:
        put_in_place(sibling, final)


def write_shard(
    directory: Path,
    identity: Identity,
    shard: int,
    samples: Iterable[StoredSample | LostSample],
    environment: dict[str, Any],
    errors: EncodingErrors | None = None,
) -> CommitRecord:
    """Write and commit one shard; the record that stands afterwards is returned, this call's or another writer's.

    Samples are streamed: what is held in memory is one record batch. Whatever interrupts it leaves no record,
    so the shard does not exist. When another process committed the same shard meanwhile, this call's file goes.

    Args:
        errors: what encoding costs, complete once ``samples`` are through.

    Raises:
        SpaceError: the disk is full; EagleOfflineError: not permitted to write.
    """
    sibling = temporary_sibling(directory / f"shard-{shard:06d}")
    lost: list[LostSample] = []
    with explained_os_errors(directory):
        with _shard_writer(sibling, shard, identity) as writer:
            for sample in samples:
                if isinstance(sample, LostSample):
                    lost.append(sample)
                else:
                    writer.append(sample)
            table, digest, file_bytes = writer.close()
            final = directory / shard_file(shard, digest, identity.capture.format)
            _put_in_place(sibling, final, digest)
        fsync_directory(directory)
    record = CommitRecord(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        identity_digest=identity.digest,
        shard=shard,
        file=final.name,
        file_bytes=file_bytes,
        digest=digest,
        samples=table,
        lost=lost,
        column_bytes=writer.column_bytes,
        encoding_errors={} if errors is None else errors.record(),
        finite=True,
        environment=environment,
    )
    content = json.dumps(sealed(record.model_dump(mode="json")), separators=(",", ":"), ensure_ascii=False)
    # Before there is another record: an index may name a file of the same number that is still there.
    with explained_os_errors(directory):
        drop_indexes(directory)
    if create_exclusively(directory / record_file(shard), content.encode()):
        return record
    standing = read_record(directory, shard)
    if standing.file != final.name:
        remove(final)
    return standing


def lost_samples(directory: Path, identity: Identity) -> dict[str, int]:
    """Return how many samples the committed shards account for without holding them, by reason.

    Raises:
        DataError: a record cannot be read.
    """
    committed = committed_shards(directory)
    index = read_index(directory, None, committed, identity.digest)
    entries = (read_record(directory, shard) for shard in committed) if index is None else index.entries
    return dict(Counter(item.reason for entry in entries for item in entry.lost))


def ensure_index(directory: Path, identity: Identity, *, shards_here: bool = True) -> None:
    """Write the index of a cache whose shards are all committed, unless it is there; any process may.

    Args:
        shards_here: the shards lie in the directory, too; else in the store that it mirrors.
    """
    names = os.listdir(directory) if shards_here else None
    committed = committed_shards(directory)
    if len(committed) == identity.num_shards and read_index(directory, names, committed, identity.digest) is None:
        write_index(directory, index_of(read_record(directory, shard) for shard in committed), identity.digest)
