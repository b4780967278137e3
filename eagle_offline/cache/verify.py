"""Is a cache what it was when it was written? Files against the manifest, shards against their records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eagle_offline.cache.layout import CommitRecord, record_file
from eagle_offline.cache.manifest import Manifest, read_manifest
from eagle_offline.cache.reader import Cache
from eagle_offline.cache.writer import committed_shards, read_record
from eagle_offline.errors import DataError, EagleOfflineError
from eagle_offline.provenance import digest_file

_AGAIN = "run precompute --resume to make it again"


@dataclass(frozen=True)
class Problem:
    """Something in a cache that is not as it was written: where, what, and the way out."""

    where: str
    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.way_out}"


def verify_cache(path: Path, report: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Read a whole cache and return everything that is wrong with it, nothing when all is well.

    Checks companion files, records, shard sizes and digests, each sample's place, digest and decodability, and
    that samples do not repeat.

    Args:
        path: the cache's directory.
        report: called with shards done and shards in all.

    Raises:
        DataError, MismatchError: there is no readable manifest.
    """
    manifest = read_manifest(path)
    problems = _check_files(path, manifest)
    shards = committed_shards(path)
    problems += [
        Problem(f"shard {shard}", "not committed", "run precompute --resume to make it")
        for shard in sorted(set(range(manifest.identity.num_shards)) - set(shards))
    ]
    owners: dict[int, int] = {}
    for done, shard in enumerate(shards, start=1):
        problems += _check_shard(path, manifest, shard, owners)
        if report is not None:
            report(done, len(shards))
    if not problems:
        problems = _check_samples(path)
    return problems


def _check_files(path: Path, manifest: Manifest) -> list[Problem]:
    problems = []
    for name, recorded in manifest.files.items():
        file = path / name
        if not file.is_file():
            problems.append(Problem(name, "missing", "run precompute --resume to write it again"))
        elif file.stat().st_size != recorded.num_bytes or digest_file(file) != recorded.digest:
            problems.append(
                Problem(name, "differs from what the manifest records", "delete it and run precompute --resume")
            )
    return problems


def _check_shard(path: Path, manifest: Manifest, shard: int, owners: dict[int, int]) -> list[Problem]:
    where = record_file(shard)
    try:
        record = read_record(path, shard)
    except DataError as error:
        return [Problem(where, str(error), f"delete it and {_AGAIN}")]
    wrong = _record_problem(path, manifest, record, owners)
    return [Problem(where, wrong, f"delete it and {_AGAIN}")] if wrong else []


def _record_problem(path: Path, manifest: Manifest, record: CommitRecord, owners: dict[int, int]) -> str | None:
    if record.identity_digest != manifest.identity.digest:
        return "was made under another manifest"
    if record.shard >= manifest.identity.num_shards:
        return f"is beyond the manifest's {manifest.identity.num_shards} shards"
    size = manifest.identity.capture.shard_size
    expected = min(size, manifest.identity.dataset.num_samples - record.shard * size)
    if len(record.samples) + len(record.lost) != expected:
        return f"accounts for {len(record.samples) + len(record.lost)} samples, expected {expected}"
    named = [*record.samples.sample_id, *(lost.sample_id for lost in record.lost)]
    if len(set(named)) != len(named):
        return "names a sample twice"
    for sample_id in [*record.samples.sample_id, *(lost.sample_id for lost in record.lost)]:
        if owners.setdefault(sample_id, record.shard) != record.shard:
            return f"holds sample {sample_id}, which shard {owners[sample_id]} holds too"
    file = path / record.file
    if not file.is_file():
        return f"{record.file} is missing"
    if file.stat().st_size != record.file_bytes:
        return f"{record.file} has {file.stat().st_size} bytes, expected {record.file_bytes}"
    if digest_file(file) != record.digest:
        return f"{record.file} was damaged after it was written: its digest differs"
    return None


def _check_samples(path: Path) -> list[Problem]:
    """Decode every sample; only reached when all shards are byte for byte what their records say."""
    problems = []
    cache = Cache(path)
    for index in range(len(cache)):
        try:
            cache[index]
        except EagleOfflineError as error:
            where = record_file(int(cache.shards[index]))
            problems.append(Problem(where, str(error), f"delete it and {_AGAIN}"))
    return problems
