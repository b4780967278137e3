"""Is a cache what it was when it was written? Files against the manifest, shards against their records."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eagle_offline.cache.formats import shard_reader
from eagle_offline.cache.index import SampleIndex, index_names, index_of, read_index
from eagle_offline.cache.layout import (
    MANIFEST_FILE,
    CommitRecord,
    record_file,
    repair_way_out,
    shard_file,
    shard_of_record,
)
from eagle_offline.cache.manifest import Manifest, read_json_object, read_manifest
from eagle_offline.cache.samples import StoredSample, decode_fields
from eagle_offline.cache.writer import committed_shards, read_record
from eagle_offline.config import ConvertSettings, PrecomputeSettings, build
from eagle_offline.durable import TEMPORARY_MARK, create_exclusively
from eagle_offline.errors import DataError, StoppedEarly, UsageError, one_line
from eagle_offline.provenance import digest_file

CONFIG_FILE = "config.json"
ASIDE_DIRECTORY = "aside"

_SHARD_NAME = re.compile(r"shard-(\d{6,})-[0-9a-f]{32}\.(arrow|zarr)")
_STATUS_NAME = re.compile(r"status(-\d+)?\.json")
MAX_CONFIG_BYTES = 1 << 20
_MAX_WORKERS = 8

# As far as record columns count.
_MAX_SAMPLES = 1 << 31


@dataclass(frozen=True)
class Problem:
    """Something in a cache that is not as it was written: where, what, and the way out; of a shard, its number."""

    where: str
    what: str
    way_out: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.way_out}"


@dataclass(frozen=True)
class Note:
    """Something beside a cache that does it no harm."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What was found in a cache, and how much was read for it.

    Attributes:
        problems: in the order of files, then of shards.
        notes: what does no harm.
        num_shards, num_samples: that are sound.
        num_bytes: read, of files and shards.
        seconds: it took.
    """

    problems: list[Problem]
    notes: list[Note]
    num_shards: int
    num_samples: int
    num_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as `verify --json` prints it."""
        problems = [{"where": p.where, "what": p.what, "way_out": p.way_out} for p in self.problems]
        return {**asdict(self), "problems": problems}

    def render_text(self) -> str:
        """Return it as lines to read: problems, notes, and what was read."""
        found = f"{len(self.problems)} problems" if self.problems else "no problems"
        read = f"{self.num_bytes / 1e6:.1f} MB read in {self.seconds:.1f} s"
        return "\n".join(
            [
                *map(str, self.problems),
                *(f"note: {note}" for note in self.notes),
                f"{found}; {self.num_shards} shards with {self.num_samples} samples are sound; {read}",
            ]
        )


def maker(manifest: Manifest) -> str:
    """Return the command that makes such a cache."""
    return "precompute" if manifest.identity.converted_from is None else "convert"


def shard_of_file(name: str) -> int | None:
    """Return the shard number in a shard's name, None for any other name."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match else None


def saved_settings(directory: Path, manifest: Manifest) -> dict[str, Any] | None:
    """Return what ``config.json`` says, None where the manifest does not name all of it."""
    inputs = manifest.environment.get("inputs")
    if not isinstance(inputs, dict):
        return None
    settings = {**inputs, "output_dir": str(directory.absolute())}
    captured = manifest.identity.converted_from is None
    try:
        build(PrecomputeSettings if captured else ConvertSettings, settings)
    except UsageError:  # of a program whose settings were other ones
        return None
    return settings if inputs.keys() > ({"target_model", "input_data"} if captured else {"cache"}) else None


def config_bytes(settings: dict[str, Any]) -> bytes:
    """Return the content of ``config.json``."""
    return (json.dumps(settings, indent=2) + "\n").encode()


def write_config(directory: Path, manifest: Manifest) -> None:
    """Write the settings that a cache is made from as ``config.json``, unless it is there; it is never changed."""
    settings = saved_settings(directory, manifest)
    if settings is not None and not (directory / CONFIG_FILE).exists():
        create_exclusively(directory / CONFIG_FILE, config_bytes(settings))


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
                Problem(f"shard {shard}", "not committed", f"{maker(check.manifest)} --resume makes it", shard)
                for shard in missing
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
        self._seen = np.zeros(_MAX_SAMPLES // 8, np.uint8)
        self._indexes = {name: self._read_index(name) for name in index_names(self._names)}

    def _problem(self, where: str, what: str, shard: int | None = None) -> Problem:
        return Problem(where, what.removeprefix(f"{self.path / where}: "), repair_way_out(self.path), shard)

    def file(self, name: str) -> _Checked:
        """Check a file that the cache brings along."""
        recorded, path = self.manifest.files[name], self.path / name
        self._go_on()
        if not os.path.lexists(path):
            return _Checked(Problem(name, "missing", f"{maker(self.manifest)} --resume writes it again"), 0)
        try:
            sound = path.stat().st_size == recorded.num_bytes and digest_file(path) == recorded.digest
        except OSError as error:
            return _Checked(self._problem(name, f"cannot be read: {error.strerror}"), 0)
        problem = None if sound else self._problem(name, "differs from what the manifest records")
        return _Checked(problem, recorded.num_bytes)

    def shard(self, shard: int) -> _Checked:
        """Check a shard's record, its bytes, and every sample in it."""
        where, num_bytes = record_file(shard), 0
        try:
            record = read_record(self.path, shard)
            self._check_record(record)
            num_bytes = record.file_bytes
            self._check_bytes(record)
            self._check_samples(record)
        except DataError as error:
            return _Checked(self._problem(where, str(error), shard), num_bytes)
        except OSError as error:
            return _Checked(self._problem(where, f"cannot be read: {one_line(error)}", shard), num_bytes)
        return _Checked(None, num_bytes, shard, len(record.samples))

    def _check_record(self, record: CommitRecord) -> None:
        identity = self.manifest.identity
        if record.identity_digest != identity.digest:
            raise DataError("was made under another manifest")
        if record.shard >= identity.num_shards:
            raise DataError(f"is beyond the manifest's {identity.num_shards} shards")
        named = _named_samples(record)
        if len(named) != identity.shard_samples(record.shard):
            raise DataError(f"accounts for {len(named)} samples, expected {identity.shard_samples(record.shard)}")
        if len(set(named)) != len(named):
            raise DataError("names a sample twice")
        if not all(0 <= sample_id < _MAX_SAMPLES for sample_id in named):
            raise DataError("names a sample by a number that none can have")
        expected = shard_file(record.shard, record.digest, identity.capture.format)
        if record.file != expected:
            raise DataError(f"names {record.file}, expected {expected}")
        with self._lock:
            self._claimed.add(record.file)
            self._see(named)
            self._compare_indexes(record)

    def _see(self, sample_ids: list[int]) -> None:
        ids = np.array(sample_ids, np.int64)
        byte, bit = ids >> 3, (1 << (ids & 7)).astype(np.uint8)
        self._repeated.update(ids[self._seen[byte] & bit != 0].tolist())
        np.bitwise_or.at(self._seen, byte, bit)

    def _check_bytes(self, record: CommitRecord) -> None:
        path = self.path / record.file
        if not path.exists():
            raise DataError(f"{record.file} is missing")
        digest, num_bytes = _digest_shard(path)
        if num_bytes != record.file_bytes:
            raise DataError(f"{record.file} has {num_bytes} bytes, expected {record.file_bytes}")
        if digest != record.digest:
            raise DataError(f"{record.file} was damaged after it was written: its digest differs")

    def _check_samples(self, record: CommitRecord) -> None:
        """Decode every sample of a shard that is byte for byte what its record says."""
        reader = shard_reader(self.path / record.file, self.manifest.identity, record.shard)
        for number, place in enumerate(zip(record.samples.record_batch, record.samples.row, strict=True)):
            self._go_on()
            stored = reader.read(*place)
            _check_sample(stored, record, number)
            decode_fields(self.manifest.identity.capture.fields, stored)

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
            for sample_id in self._repeated.intersection(_named_samples(read_record(self.path, shard))):
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
        try:
            found = read_json_object(self.path / CONFIG_FILE, MAX_CONFIG_BYTES)
            content = (self.path / CONFIG_FILE).read_bytes()
        except DataError as error:
            return [self._problem(CONFIG_FILE, str(error))], []
        place = found.get("output_dir")
        if content != config_bytes({**expected, "output_dir": place}):
            return [self._problem(CONFIG_FILE, "differs from what the manifest records")], []
        if Path(str(place)).resolve() != self.path.resolve():
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


def _named_samples(record: CommitRecord) -> list[int]:
    return [*record.samples.sample_id, *(lost.sample_id for lost in record.lost)]


def _digest_shard(path: Path) -> tuple[str, int]:
    """Return a shard's digest and size."""
    if path.suffix == ".zarr":
        from eagle_offline.cache.zarr_shards import digest_tree

        return digest_tree(path)
    return digest_file(path), path.stat().st_size


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
