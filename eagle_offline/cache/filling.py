"""What all ways of filling a cache have in common: whose shards, is there room, one after another, and when to stop."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_offline.amounts import size
from eagle_offline.cache.layout import MANIFEST_FILE, CommitRecord, LostSample, repair_way_out
from eagle_offline.cache.manifest import Identity, Manifest, read_manifest, refuse_drift, write_manifest
from eagle_offline.cache.samples import EncodingErrors, StoredSample
from eagle_offline.cache.writer import committed_shards, read_record, write_shard
from eagle_offline.durable import TEMPORARY_MARK
from eagle_offline.errors import DataError, MismatchError, SpaceError, StoppedEarly, UsageError
from eagle_offline.interrupts import StopRequest
from eagle_offline.progress import Progress


@dataclass(frozen=True)
class ShardLog:
    """What is known of a shard while it is made.

    Attributes:
        errors: what encoding has cost so far.
        environment: where it is made; goes into its record.
    """

    errors: EncodingErrors
    environment: dict[str, Any]


@dataclass(frozen=True)
class ShardWork:
    """A shard to make.

    Attributes:
        shard: its number.
        num_tokens: of all its samples; lost ones may be left out.
        estimated_bytes: about what it takes on disk.
        samples: makes its samples, one by one, and keeps the log.
    """

    shard: int
    num_tokens: int
    estimated_bytes: int
    samples: Callable[[ShardLog], Iterable[StoredSample | LostSample]]


def begun_cache(directory: Path, *, resume: bool, own_entries: Collection[str]) -> Manifest | None:
    """Return the manifest of the cache that was begun in a directory, None if there is none.

    Args:
        own_entries: what may stand there before the manifest does.

    Raises:
        UsageError: a cache is there and ``--resume`` was not given. MismatchError: something else is there.
    """
    if (directory / MANIFEST_FILE).exists():
        if not resume:
            raise UsageError(f"{directory} already holds a cache: add --resume to go on with it")
        return read_manifest(directory)
    around = next((parent for parent in directory.absolute().parents if (parent / MANIFEST_FILE).is_file()), None)
    if around is not None:
        raise UsageError(f"{directory} lies inside the cache {around}: choose another --output-dir")
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    foreign = sorted(name for name in names if name not in own_entries and not _is_left_over(name))
    if foreign:
        raise MismatchError(
            f"{directory} holds something else ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}): "
            "choose an empty or new --output-dir"
        )
    return None


def _is_left_over(name: str) -> bool:
    of_one_process = name.startswith("status-") and name.endswith(".json")
    return of_one_process or (name.startswith(".") and TEMPORARY_MARK in name)


def ensure_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest unless one that says the same is there; return the one that stands there.

    Raises:
        MismatchError: another process began another cache here. DataError: a file would come out other than recorded.
    """
    if write_manifest(directory, manifest):
        return manifest
    standing, files = read_manifest(directory), manifest.files
    refuse_drift(directory, standing.identity, manifest.identity)
    if standing.files != files:
        changed = sorted(name for name in {*files, *standing.files} if standing.files.get(name) != files.get(name))
        raise DataError(f"{directory}: {', '.join(changed)} would come out other than the manifest records")
    return standing


def own_shards(
    directory: Path, identity: Identity, process_index: int, process_count: int, *, begun: bool
) -> list[int]:
    """Return the shards that fall to this process and are not committed yet.

    Args:
        begun: whether the cache was there when this run began; else another process has begun it meanwhile, and
            whether it is the same one is settled when the manifest is written.

    Raises:
        UsageError: the process number is out of range. DataError: a committed shard is not there in full.
    """
    if process_index >= process_count:
        raise UsageError(f"--process-index {process_index}: expected less than --process-count {process_count}")
    done = set(committed_shards(directory))
    mine = range(process_index, identity.num_shards, process_count)
    for shard in done.intersection(mine) if begun else ():
        _check_committed(directory, identity, shard)
    return [shard for shard in mine if shard not in done]


def _check_committed(directory: Path, identity: Identity, shard: int) -> None:
    """Refuse to count a shard as done that is not there in full.

    Raises:
        DataError: names the record to delete.
    """
    record = read_record(directory, shard)
    again = repair_way_out(directory)
    if record.identity_digest != identity.digest:
        raise DataError(f"{directory}: shard {shard} was made under another manifest; {again}")
    file = directory / record.file
    found = _num_bytes(file)
    if found != record.file_bytes:
        state = "is missing" if found is None else f"has {found} bytes, expected {record.file_bytes}"
        raise DataError(f"{file} {state}; {again}")


def _num_bytes(path: Path) -> int | None:
    """Return the size of a file, or of all files below a directory together; None where nothing is."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else None


def check_free_space(directory: Path, needed_bytes: int, store_less: str) -> None:
    """Refuse to begin what cannot end.

    Args:
        store_less: flags that make it smaller.

    Raises:
        SpaceError: more is needed than is free.
    """
    free = shutil.disk_usage(directory).free
    if needed_bytes > free:
        raise SpaceError(
            f"{directory}: about {needed_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            f"free some space, choose another --output-dir, or store less ({store_less})"
        )


def fill_shards(
    directory: Path,
    identity: Identity,
    work: Sequence[ShardWork],
    stop: StopRequest,
    progress: Progress,
    environment: dict[str, Any],
    store_less: str,
    commit: Callable[[CommitRecord], CommitRecord] | None = None,
    waited_share: Callable[[], float] | None = None,
) -> None:
    """Make shards one after another.

    Args:
        progress: counts tokens.
        environment: goes into the records.
        store_less: as for `check_free_space`.
        commit: what else makes a shard stand, once it is committed in the directory; returns the record that stands.
        waited_share: which share of its time what makes samples has waited for what stores them.

    Raises:
        StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
    """
    tracker = _Tracker(progress, stop, identity, work, waited_share)
    for item in work:
        tracker.begin_shard(item.num_tokens)
        # Others may fill the disk meanwhile: what does not fit is not begun.
        check_free_space(directory, item.estimated_bytes, store_less)
        log = ShardLog(EncodingErrors(), dict(environment))
        samples = (tracker.track(sample) for sample in item.samples(log))
        record = write_shard(directory, identity, item.shard, samples, log.environment, log.errors)
        tracker.end_shard((record if commit is None else commit(record)).file_bytes)


class _Tracker:
    """Shows progress and gives up a shard that would outlast the grace period."""

    def __init__(
        self,
        progress: Progress,
        stop: StopRequest,
        identity: Identity,
        work: Sequence[ShardWork],
        waited_share: Callable[[], float] | None,
    ):
        self._progress, self._stop, self._waited_share = progress, stop, waited_share
        self._total_tokens = sum(item.num_tokens for item in work)
        self._estimated_bytes = sum(item.estimated_bytes for item in work)
        self._started = time.monotonic()
        self._num_samples = sum(identity.shard_samples(item.shard) for item in work)
        self._samples = self._tokens = self._tokens_written = self._written = self._shard_left = 0

    def begin_shard(self, num_tokens: int) -> None:
        self._shard_left = num_tokens
        if self._stop.requested:
            raise StoppedEarly("stopped by a signal between two shards; go on with --resume")

    def track(self, sample: StoredSample | LostSample) -> StoredSample | LostSample:
        count = len(sample.input_ids) if isinstance(sample, StoredSample) else 0
        self._samples += 1
        self._tokens += count
        self._shard_left -= count
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        if not self._stop.leaves_time_for(self._shard_left / max(rate, 1e-9)):
            raise StoppedEarly("stopped by a signal, the shard in hand was dropped; go on with --resume")
        self._progress.advance(count, self._values())
        return sample

    def end_shard(self, file_bytes: int) -> None:
        self._written += file_bytes
        self._tokens_written = self._tokens
        self._progress.advance(0, self._values())

    def _values(self) -> dict[str, str]:
        projected = self._estimated_bytes
        if self._tokens_written:
            projected = self._written * self._total_tokens // self._tokens_written
        rate = self._written / max(time.monotonic() - self._started, 1e-9)
        values = {"samples": f"{self._samples}/{self._num_samples}"}
        values |= {"written": f"{size(self._written)} of about {size(projected)}", "at": f"{size(rate)}/s"}
        if self._waited_share is not None:
            values["waiting on disk"] = f"{self._waited_share():.0%}"
        return values
