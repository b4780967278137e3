"""Damaged files are moved out of a cache's way, into a directory of their own with a page that says why.

A record goes before its shard: what is committed is always there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from eagle_offline.cache.layout import ASIDE_DIRECTORY, Frozen, shard_of_file, shard_of_record
from eagle_offline.cache.manifest import Manifest
from eagle_offline.durable import TEMPORARY_MARK, fsync_directory, write_bytes

REASONS_FILE = "reasons.json"

# Where a file stands, what it is and when it was written: the same file, or one that a live writer put there.
Seen = dict[str, tuple[int, int, int]]


class SetAside(Frozen):
    """A file or directory that was set aside: where it was, where beside ``reasons.json`` it is now, and why."""

    path: str
    kept_as: str
    reason: str


class AsideReasons(Frozen):
    """The whole of ``aside/<UTC time>/reasons.json``; ``identity_digest`` is the cache's."""

    format: Literal["eagle-offline-aside"] = "eagle-offline-aside"
    version: Literal[1] = 1
    utc: str
    identity_digest: str
    files: list[SetAside]


def look_at(path: Path) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yield what stands in a cache, by path inside it: files, and shards and unfinished work as one."""
    for entry in os.scandir(path):
        folder = entry.is_dir(follow_symlinks=False) and entry.name != ASIDE_DIRECTORY
        whole = shard_of_file(entry.name) is not None or TEMPORARY_MARK in entry.name
        if entry.name != ASIDE_DIRECTORY:
            yield entry.name, _identity(Path(entry.path))
        if folder and not whole:
            for inner in sorted(Path(entry.path).rglob("*")):
                yield inner.relative_to(path).as_posix(), _identity(inner)


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def planned(name: str, reason: str) -> SetAside:
    """Return where a file or directory of a cache goes, by its path inside it."""
    # Without its dot, or it would be cleared away with unfinished work.
    folder, slash, base = name.rpartition("/")
    return SetAside(path=name, kept_as=f"{folder}{slash}{base.lstrip('.') or base}", reason=reason)


def move_aside(path: Path, manifest: Manifest, chosen: dict[str, str], seen: Seen) -> tuple[Path, list[SetAside]]:
    """Move what was chosen, unless a live writer has put another in its place; return where to and what was moved."""
    now = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    aside = path / ASIDE_DIRECTORY / now
    aside.mkdir(parents=True)
    for directory in (aside.parent, path):
        fsync_directory(directory)
    plan = [planned(name, reason) for name, reason in chosen.items()]
    _write_reasons(aside, now, manifest, plan)
    records = [file for file in plan if shard_of_record(file.path) is not None]
    moved = _move_each(path, aside, records, seen)
    moved += _move_each(path, aside, [file for file in plan if file not in records], seen)
    if moved != plan:
        _write_reasons(aside, now, manifest, moved)
    return aside, moved


def _write_reasons(aside: Path, now: str, manifest: Manifest, files: list[SetAside]) -> None:
    reasons = AsideReasons(utc=now, identity_digest=manifest.identity.digest, files=files)
    write_bytes(aside / REASONS_FILE, (reasons.model_dump_json(indent=2) + "\n").encode())


def _move_each(path: Path, aside: Path, files: list[SetAside], seen: Seen) -> list[SetAside]:
    moved = []
    for file in files:
        source, place = path / file.path, aside / file.kept_as
        if os.path.lexists(source) and _identity(source) == seen[file.path]:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, place)
            moved.append(file)
    for directory in {(root / file.path).parent for file in moved for root in (path, aside)}:
        fsync_directory(directory)
    return moved
