"""Frees a cache of everything damaged: sets it aside, and says which command makes again exactly what is then missing.

Nothing is deleted but what is derived. A kill at any moment leaves a cache that is refused, or one that is whole: a
record goes before its shard, so that what is committed is always there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle_offline.cache.aside import Seen, SetAside, look_at, move_aside, planned
from eagle_offline.cache.findings import Verification
from eagle_offline.cache.index import drop_indexes
from eagle_offline.cache.layout import CONFIG_FILE, shard_of_file, shard_of_record
from eagle_offline.cache.manifest import Manifest, read_manifest
from eagle_offline.cache.saved_settings import making_command, write_config
from eagle_offline.cache.verify import check_cache
from eagle_offline.cache.writer import committed_shards, ensure_index
from eagle_offline.durable import ABANDONED_SECONDS, age_seconds, exclusive, explained_os_errors, is_abandoned
from eagle_offline.errors import DataError, EagleOfflineError


@dataclass(frozen=True)
class Repair:
    """What a repair did, or would do, and what remains to be done.

    Attributes:
        cache: its directory.
        dry_run: nothing was changed.
        aside: where the damaged files are now, None when there are none.
        files: that were set aside.
        shards, companions: that are to be made again.
        command: makes them, None when nothing is missing.
    """

    cache: Path
    dry_run: bool
    aside: Path | None
    files: list[SetAside] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    companions: list[str] = field(default_factory=list)
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as `repair --json` prints it."""
        return {
            "cache": str(self.cache),
            "dry_run": self.dry_run,
            "aside": None if self.aside is None else str(self.aside),
            "set_aside": [file.model_dump() for file in self.files],
            "shards_to_make_again": self.shards,
            "companions_to_make_again": self.companions,
            "command": self.command,
        }

    def render_text(self) -> str:
        """Return it as lines to read; the last one is the command, when there is one."""
        done = "would set aside" if self.dry_run else "set aside"
        lines = [f"{done} {file.path}: {file.reason}" for file in self.files]
        if not self.files:
            lines.append(f"{self.cache}: nothing is damaged")
        if self.aside is not None:
            lines.append(f"what was set aside is in {self.aside}")
        if self.command is not None:
            missing = [f"shards {_ranges(self.shards)}"] if self.shards else []
            lines += [f"to be made again: {', '.join([*missing, *self.companions])}", self.command]
        return "\n".join(lines)


def repair_cache(
    path: Path,
    *,
    dry_run: bool = False,
    num_workers: int | None = None,
    report: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Repair:
    """Set everything damaged in a cache aside, and write its index and its ``config.json`` anew where that needs it.

    Args:
        path: the cache's directory.
        dry_run: change nothing.
        num_workers, report, stopped: see `check_cache`.

    Raises:
        DataError, MismatchError: there is no readable manifest, and without one nothing can be made again.
        UsageError: another repair is at work. StoppedEarly: asked to stop, before anything was changed.
        SpaceError, EagleOfflineError: it cannot be written.
    """
    manifest = _manifest(path)
    if not dry_run:
        _require_writable(path)
    with exclusive(path, "repairing"):
        seen = dict(look_at(path))
        found = check_cache(path, num_workers=num_workers, report=report, stopped=stopped)
        chosen = dict(_chosen(path, found, seen))
        if dry_run:
            gone = {shard for name in chosen if (shard := shard_of_record(name)) is not None}
            files = [planned(name, reason) for name, reason in chosen.items()]
            return _result(path, manifest, None, files, gone)
        aside = None
        files = []
        with explained_os_errors(path):
            if chosen:
                aside, files = move_aside(path, manifest, chosen, seen)
            _write_derived(path, manifest, files)
        return _result(path, manifest, aside, files)


def _manifest(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except DataError as error:
        said = str(error).removesuffix("; restore it from a copy")
        raise DataError(f"{said}; a manifest cannot be made again: restore it from a copy") from error


def _chosen(path: Path, found: Verification, seen: Seen) -> Iterator[tuple[str, str]]:
    """Yield what is to be set aside and why: records first, then everything else."""
    broken = {p.shard: p.what for p in found.problems if p.shard is not None and p.where in seen}
    records = {name: broken[shard] for name in seen if (shard := shard_of_record(name)) in broken and shard is not None}
    yield from sorted(records.items())
    for name in sorted(seen):
        shard = shard_of_file(name)
        if shard in broken and shard is not None:
            yield name, broken[shard]
    files = {p.where: p.what for p in found.problems if p.shard is None}
    files |= {note.where: note.what for note in found.notes if note.where == CONFIG_FILE}
    yield from sorted((name, what) for name, what in files.items() if name in seen)
    for note in found.notes:
        unclaimed = shard_of_file(note.where) is not None and shard_of_file(note.where) not in broken
        if unclaimed and age_seconds(path / note.where) > ABANDONED_SECONDS:
            yield note.where, note.what
    for name in sorted(seen):
        if is_abandoned(path / name):
            yield name, "unfinished work of a process that is gone"


def _require_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):  # also says no to root, on a read-only mount
        raise EagleOfflineError(
            f"{path}: cannot be written, nothing was changed; mount it for writing or repair a copy"
        )


def _write_derived(path: Path, manifest: Manifest, files: list[SetAside]) -> None:
    """Bring the index and ``config.json`` up to date."""
    if any(shard_of_record(file.path) is not None for file in files):
        drop_indexes(path)
    write_config(path, manifest)
    ensure_index(path, manifest.identity)


def _result(
    path: Path, manifest: Manifest, aside: Path | None, files: list[SetAside], gone: set[int] | None = None
) -> Repair:
    """Return what was done; ``gone`` are shards that would be set aside by more than a dry run."""
    there = set(committed_shards(path)) - (gone or set())
    shards = sorted(set(range(manifest.identity.num_shards)) - there)
    taken = {file.path for file in files}
    companions = [name for name in manifest.files if name in taken or not os.path.isfile(path / name)]
    command = making_command(path, manifest) if shards or companions else None
    return Repair(path, gone is not None, aside, files, shards, companions, command)


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers as text.

    Example:
        >>> _ranges([1, 2, 3, 7])
        '1-3, 7'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
