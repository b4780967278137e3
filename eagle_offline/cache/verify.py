"""Is a cache what it was when it was written? Files against the manifest, shards against their records."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np

from eagle_offline.cache.findings import Note, Problem, Verification
from eagle_offline.cache.index import SampleIndex, index_names, index_of, read_index
from eagle_offline.cache.layout import (
    ASIDE_DIRECTORY,
    CONFIG_FILE,
    MANIFEST_FILE,
    CommitRecord,
    record_file,
    repair_way_out,
    runs_of,
    shard_of_file,
    shard_of_record,
)
from eagle_offline.cache.manifest import Manifest, read_json_object, read_manifest
from eagle_offline.cache.saved_settings import MAX_CONFIG_BYTES, config_bytes, maker, saved_settings
from eagle_offline.cache.shard_check import MAX_SAMPLES, check_bytes, check_record, check_samples, named_samples
from eagle_offline.cache.writer import committed_shards, read_record
from eagle_offline.durable import TEMPORARY_MARK
from eagle_offline.errors import DataError, StoppedEarly, unreadable
from eagle_offline.provenance import digest_file

_STATUS_NAME = re.compile(r"status(-\d+)?\.json")
_MAX_WORKERS = 8


def _in_words(first: int, last: int) -> str:
    return f"shard {first}" if first == last else f"shards {first} to {last}"


def verify_cache(path: Path, report: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Read a whole cache and return everything that is wrong with it, nothing when all is well; see `check_cache`."""
    return check_cache(path, report=report).problems


def check_cache(
    path: Path,
    *,
    num_workers: int | None = None,
    report: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Verification:
    """Read a whole cache, several shards at a time; memory does not grow with it but for a bit a sample.

    Checks companion files, the index, records, shard sizes and digests, each sample's place, digest and decodability,
    and that samples do not repeat.

    Args:
        path: the cache's directory.
        num_workers: threads; default one a CPU, at most 8.
        report: called with shards done and shards in all.
        stopped: says that the answer is no longer wanted.

    Raises:
        DataError, MismatchError: there is no readable manifest. StoppedEarly: asked to stop.
    """
    started = time.monotonic()
    check = _Check(path, read_manifest(path), stopped)
    tasks: list[Callable[[], _Checked]] = [partial(check.file, name) for name in check.manifest.files]
    tasks += [partial(check.shard, shard) for shard in check.shards]
    all_checked = []
    for number, checked in enumerate(_on_threads(tasks, num_workers), start=1 - len(check.manifest.files)):
        all_checked.append(checked)
        if report is not None and number > 0:
            report(number, len(check.shards))
    sound = [checked for checked in all_checked if checked.problem is None]
    missing = sorted(set(range(check.manifest.identity.num_shards)) - set(check.shards))
    problems = [checked.problem for checked in all_checked if checked.problem is not None]
    config_problems, config_notes = check.config()
    return Verification(
        problems=[
            *config_problems,
            *check.indexes(),
            *problems,
            *check.repeated_samples([checked.shard for checked in sound if checked.shard is not None]),
            *(
                Problem(_in_words(first, last), "not committed", f"{maker(check.manifest)} --resume makes it", first)
                for first, last in runs_of(missing)
            ),
        ],
        notes=[*config_notes, *check.strays()],
        num_shards=sum(checked.shard is not None for checked in sound),
        num_samples=sum(checked.num_samples for checked in sound),
        num_bytes=sum(checked.num_bytes for checked in all_checked),
        seconds=time.monotonic() - started,
    )


def _on_threads(tasks: list[Callable[[], _Checked]], num_workers: int | None) -> Iterator[_Checked]:
    """Yield the results of tasks in order; what was not begun is dropped when the iteration ends."""
    import torch

    num_threads = torch.get_num_threads()
    workers = num_workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    # Each worker computes alone: teams of threads on the same cores wait for one another.
    with ThreadPoolExecutor(workers, "verify", torch.set_num_threads, (1,)) as pool:
        try:
            yield from pool.map(lambda task: task(), tasks)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class _Checked:
    """What one file or shard came to."""

    problem: Problem | None
    num_bytes: int
    shard: int | None = None
    num_samples: int = 0


@dataclass
class _Check:
    """One look at a cache; its parts may be checked on several threads."""

    path: Path
    manifest: Manifest
    stopped: Callable[[], bool]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._names = set(os.listdir(self.path))
        self.shards = committed_shards(self.path)
        self._claimed: set[str] = set()
        self._repeated: set[int] = set()
        # A bit for every number that a sample can have; pages that no sample touches take no memory.
        self._seen = np.zeros(MAX_SAMPLES // 8, np.uint8)
        self._indexes = {name: self._read_index(name) for name in index_names(self._names)}

    def _problem(self, where: str, what: str, shard: int | None = None) -> Problem:
        return Problem(where, what.removeprefix(f"{self.path / where}: "), repair_way_out(self.path), shard)

    def _unreadable(self, where: str, error: OSError, shard: int | None = None) -> Problem:
        """Return the problem of what cannot be read.

        Raises:
            EagleOfflineError: it is no problem of the cache.
        """
        explained = unreadable(self.path / where, "cannot be read", error)
        if not isinstance(explained, DataError):
            raise explained from error
        return self._problem(where, str(explained), shard)

    def file(self, name: str) -> _Checked:
        """Check a file that the cache brings along."""
        recorded, path = self.manifest.files[name], self.path / name
        self._go_on()
        if not os.path.lexists(path):
            return _Checked(Problem(name, "missing", f"{maker(self.manifest)} --resume writes it again"), 0)
        try:
            sound = path.stat().st_size == recorded.num_bytes and digest_file(path) == recorded.digest
        except OSError as error:
            return _Checked(self._unreadable(name, error), 0)
        problem = None if sound else self._problem(name, "differs from what the manifest records")
        return _Checked(problem, recorded.num_bytes)

    def shard(self, shard: int) -> _Checked:
        """Check a shard's record, its bytes, and every sample in it."""
        where, num_bytes = record_file(shard), 0
        try:
            record = read_record(self.path, shard)
            check_record(record, self.manifest.identity)
            self._take_in(record)
            num_bytes = record.file_bytes
            check_bytes(self.path, record)
            check_samples(self.path, self.manifest.identity, record, self._go_on)
        except DataError as error:
            return _Checked(self._problem(where, str(error), shard), num_bytes)
        except OSError as error:
            return _Checked(self._unreadable(where, error, shard), num_bytes)
        return _Checked(None, num_bytes, shard, len(record.samples))

    def _take_in(self, record: CommitRecord) -> None:
        """Remember what a sound record claims, and compare the indexes with it."""
        with self._lock:
            self._claimed.add(record.file)
            self._see(named_samples(record))
            self._compare_indexes(record)

    def _see(self, sample_ids: list[int]) -> None:
        ids = np.array(sample_ids, np.int64)
        byte, bit = ids >> 3, (1 << (ids & 7)).astype(np.uint8)
        self._repeated.update(ids[self._seen[byte] & bit != 0].tolist())
        np.bitwise_or.at(self._seen, byte, bit)

    def _go_on(self) -> None:
        if self.stopped():
            raise StoppedEarly(f"{self.path}: stopped by a signal, nothing was changed; run the same command again")

    def _read_index(self, name: str) -> _PlacedIndex | None:
        names = self._names.difference(index_names(self._names)) | {name}
        index = read_index(self.path, names, self.shards, self.manifest.identity.digest)
        return None if index is None else _PlacedIndex(index)

    def _compare_indexes(self, record: CommitRecord) -> None:
        """Forget an index that says something else of a shard than its record."""
        for name, index in self._indexes.items():
            if index is not None and not index.agrees(record):
                self._indexes[name] = None

    def indexes(self) -> list[Problem]:
        """Return the indexes that do not say what the records say; after all shards were checked."""
        return [
            self._problem(name, "damaged, or not of the shards that stand here")
            for name, index in self._indexes.items()
            if index is None
        ]

    def repeated_samples(self, sound: list[int]) -> list[Problem]:
        """Return those of some sound shards that hold a sample which another holds too: which is right, none can tell.

        To be called after all shards were checked.
        """
        holders: dict[int, list[int]] = {}
        for shard in sound if self._repeated else ():
            for sample_id in self._repeated.intersection(named_samples(read_record(self.path, shard))):
                holders.setdefault(sample_id, []).append(shard)
        first = {
            shard: (sample_id, next(other for other in shards if other != shard))
            for sample_id, shards in sorted(holders.items(), reverse=True)
            for shard in shards
            if len(shards) > 1
        }
        return [
            self._problem(record_file(shard), f"holds sample {sample_id}, which shard {other} holds too", shard)
            for shard, (sample_id, other) in sorted(first.items())
        ]

    def config(self) -> tuple[list[Problem], list[Note]]:
        """Compare ``config.json`` with the settings that the manifest names."""
        expected = saved_settings(self.path, self.manifest)
        if expected is None:
            return [], []
        if CONFIG_FILE not in self._names:
            return [Problem(CONFIG_FILE, "missing", f"eagle-offline repair {self.path} writes it again")], []
        try:
            found = read_json_object(self.path / CONFIG_FILE, MAX_CONFIG_BYTES)
            content = (self.path / CONFIG_FILE).read_bytes()
        except DataError as error:
            return [self._problem(CONFIG_FILE, str(error))], []
        place = found.get("output_dir")
        if content != config_bytes({**expected, "output_dir": place}):
            return [self._problem(CONFIG_FILE, "differs from what the manifest records")], []
        try:
            elsewhere = Path(str(place)).resolve() != self.path.resolve()
        except (OSError, ValueError, RuntimeError):  # what no path can be
            elsewhere = True
        if elsewhere:
            return [], [Note(CONFIG_FILE, f"names another place, {place}; eagle-offline repair {self.path} names this")]
        return [], []

    def strays(self) -> list[Note]:
        """Return what stands in the directory and is not part of the cache; after all shards were checked."""
        notes = []
        for name in sorted(self._names):
            if (self.path / name).is_dir() and shard_of_file(name) is None and name != ASIDE_DIRECTORY:
                below = (path for path in sorted((self.path / name).rglob("*")) if not path.is_dir())
                notes += [self._stray(path.relative_to(self.path).as_posix()) for path in below]
            elif name not in self._claimed:
                notes.append(self._stray(name))
        return [note for note in notes if note is not None]

    def _stray(self, name: str) -> Note | None:
        base = name.rpartition("/")[2]
        if base.startswith(".") and TEMPORARY_MARK in base:
            return Note(name, "unfinished work of some process")
        if name == ASIDE_DIRECTORY:
            return Note(name, "what repair set aside; delete it when nothing in it is missed")
        if shard_of_file(name) is not None:
            return Note(name, "a shard that no record names")
        own = name in self.manifest.files or name in (MANIFEST_FILE, CONFIG_FILE) or _STATUS_NAME.fullmatch(name)
        if own or name in self._indexes or shard_of_record(name) is not None:
            return None
        return Note(name, "does not belong to the cache")


class _PlacedIndex:
    """An index, and where each shard's samples begin in it."""

    def __init__(self, index: SampleIndex):
        self._index = index
        starts = np.cumsum([0, *(entry.num_samples for entry in index.entries)])
        self._places = {entry.shard: (place, int(starts[place])) for place, entry in enumerate(index.entries)}

    def agrees(self, record: CommitRecord) -> bool:
        """Say whether the index says of a shard what its record says."""
        expected = index_of([record])
        place, start = self._places[record.shard]
        ours = slice(start, start + len(expected))
        return self._index.entries[place] == expected.entries[0] and all(
            np.array_equal(getattr(self._index, column.name)[ours], getattr(expected, column.name))
            for column in fields(SampleIndex)
            if column.name != "entries"
        )
