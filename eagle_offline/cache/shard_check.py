"""Is a shard what its record says of it? The record itself, the shard's bytes, and every sample in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eagle_offline.cache.formats import digest_shard, shard_reader
from eagle_offline.cache.layout import CommitRecord, shard_file
from eagle_offline.cache.manifest import Identity
from eagle_offline.cache.samples import StoredSample, decode_fields, names_tokens
from eagle_offline.errors import DataError

# As far as record columns count.
MAX_SAMPLES = 1 << 31


def named_samples(record: CommitRecord) -> list[int]:
    """Return the numbers of all samples that a record accounts for, stored and lost."""
    return [*record.samples.sample_id, *(lost.sample_id for lost in record.lost)]


def check_record(record: CommitRecord, identity: Identity) -> None:
    """Refuse a record that is not one of a cache, or that does not account for its samples."""
    if record.identity_digest != identity.digest:
        raise DataError("was made under another manifest")
    if record.shard >= identity.num_shards:
        raise DataError(f"is beyond the manifest's {identity.num_shards} shards")
    named = named_samples(record)
    if len(named) != identity.shard_samples(record.shard):
        raise DataError(f"accounts for {len(named)} samples, expected {identity.shard_samples(record.shard)}")
    if len(set(named)) != len(named):
        raise DataError("names a sample twice")
    if not all(0 <= sample_id < MAX_SAMPLES for sample_id in named):
        raise DataError("names a sample by a number that none can have")
    expected = shard_file(record.shard, record.digest, identity.capture.format)
    if record.file != expected:
        raise DataError(f"names {record.file}, expected {expected}")


def check_bytes(cache: Path, record: CommitRecord) -> None:
    """Refuse a shard that is missing, or is not byte for byte what its record says."""
    path = cache / record.file
    if not path.exists():
        raise DataError(f"{record.file} is missing")
    digest, num_bytes = digest_shard(path, record.file_bytes)
    if num_bytes != record.file_bytes:
        raise DataError(f"{record.file} has {num_bytes} bytes, expected {record.file_bytes}")
    if digest != record.digest:
        raise DataError(f"{record.file} was damaged after it was written: its digest differs")


def check_samples(cache: Path, identity: Identity, record: CommitRecord, go_on: Callable[[], None]) -> None:
    """Decode every sample of a shard that is byte for byte what its record says; ``go_on`` is called before each."""
    reader = shard_reader(cache / record.file, identity, record.shard)
    for number, place in enumerate(zip(record.samples.record_batch, record.samples.row, strict=True)):
        go_on()
        stored = reader.read(*place)
        _check_sample(stored, record, number)
        if not names_tokens(stored, identity):
            raise DataError(f"{record.file}: sample {stored.sample_id} names tokens that the target does not have")
        decode_fields(identity.capture.fields, stored)


def _check_sample(stored: StoredSample, record: CommitRecord, number: int) -> None:
    """Refuse a sample that is not the one which the record names in its place."""
    import torch

    from eagle_offline.supervision import supervised_positions

    table = record.samples
    num_positions = int(supervised_positions(torch.from_numpy(stored.loss_mask).bool()).sum())
    found = (
        stored.sample_id, len(stored.input_ids), len(stored.loss_mask), int(stored.loss_mask.sum()),
        len(stored.target_argmax), num_positions, stored.digest(),
    )  # fmt: skip
    recorded = (
        table.sample_id[number], table.num_tokens[number], table.num_tokens[number], table.num_supervised[number],
        table.num_target_positions[number], table.num_target_positions[number], table.digest[number],
    )  # fmt: skip
    if found != recorded:
        raise DataError(f"{record.file}: sample {table.sample_id[number]} is not what the record says of it")
