"""Frees a cache of everything damaged: sets it aside, and says which command makes again exactly what is then missing.

Nothing is deleted but what is derived. A kill at any moment leaves a cache that is refused, or one that is whole: a
record goes before its shard, so that what is committed is always there.
"""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from eagle_offline.cache.index import drop_indexes
from eagle_offline.cache.layout import EXACT_MANTISSA_BITS, Frozen, shard_of_record
from eagle_offline.cache.manifest import Manifest, read_json_object, read_manifest
from eagle_offline.cache.verify import (
    ASIDE_DIRECTORY,
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    Verification,
    check_cache,
    maker,
    shard_of_file,
    write_config,
)
from eagle_offline.cache.writer import committed_shards, ensure_index
from eagle_offline.durable import (
    ABANDONED_SECONDS,
    TEMPORARY_MARK,
    exclusive,
    explained_os_errors,
    fsync_directory,
    is_alive,
    write_bytes,
)
from eagle_offline.errors import DataError, EagleOfflineError

REASONS_FILE = "reasons.json"

# Where a file stands, what it is and when it was written: the same file, or one that a live writer put there.
_Seen = dict[str, tuple[int, int, int]]


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
        seen = dict(_look(path))
        found = check_cache(path, num_workers=num_workers, report=report, stopped=stopped)
        chosen = dict(_chosen(path, found, seen))
        if dry_run:
            gone = {shard for name in chosen if (shard := shard_of_record(name)) is not None}
            files = [_set_aside(name, reason) for name, reason in chosen.items()]
            return _result(path, manifest, None, files, gone)
        aside = None
        files = []
        with explained_os_errors(path):
            if chosen:
                aside, files = _move(path, manifest, chosen, seen)
            _write_derived(path, manifest, files)
        return _result(path, manifest, aside, files)


def _manifest(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except DataError as error:
        said = str(error).removesuffix("; restore it from a copy")
        raise DataError(f"{said}; a manifest cannot be made again: restore it from a copy") from error


def _look(path: Path) -> Iterator[tuple[str, tuple[int, int, int]]]:
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


def _chosen(path: Path, found: Verification, seen: _Seen) -> Iterator[tuple[str, str]]:
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
        if unclaimed and _age_seconds(path / note.where) > ABANDONED_SECONDS:
            yield note.where, note.what
    for name in sorted(seen):
        if _is_abandoned(path / name):
            yield name, "unfinished work of a process that is gone"


def _is_abandoned(path: Path) -> bool:
    """Say whether a name is of unfinished work whose writer is gone: dead on this host, or a day old."""
    if not path.name.startswith(".") or TEMPORARY_MARK not in path.name:
        return False
    host, _, process = path.name.rpartition(TEMPORARY_MARK)[2].rpartition("-")[0].rpartition("-")
    if host == socket.gethostname() and process.isdigit():
        return not is_alive(int(process))
    return _age_seconds(path) > ABANDONED_SECONDS


def _age_seconds(path: Path) -> float:
    """Return how long ago anything of a file or directory was written."""
    written = [entry.lstat().st_mtime for entry in (path, *path.rglob("*")) if os.path.lexists(entry)]
    return time.time() - max(written, default=time.time())


def _require_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):  # also says no to root, on a read-only mount
        raise EagleOfflineError(
            f"{path}: cannot be written, nothing was changed; mount it for writing or repair a copy"
        )


def _set_aside(name: str, reason: str) -> SetAside:
    # Without its dot, or it would be cleared away with unfinished work.
    folder, slash, base = name.rpartition("/")
    return SetAside(path=name, kept_as=f"{folder}{slash}{base.lstrip('.') or base}", reason=reason)


def _move(path: Path, manifest: Manifest, chosen: dict[str, str], seen: _Seen) -> tuple[Path, list[SetAside]]:
    """Move what was chosen, unless a live writer has put another in its place; return where to and what was moved."""
    now = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    aside = path / ASIDE_DIRECTORY / now
    aside.mkdir(parents=True)
    for directory in (aside.parent, path):
        fsync_directory(directory)
    planned = [_set_aside(name, reason) for name, reason in chosen.items()]
    _write_reasons(aside, now, manifest, planned)
    records = [file for file in planned if shard_of_record(file.path) is not None]
    moved = _move_each(path, aside, records, seen)
    moved += _move_each(path, aside, [file for file in planned if file not in records], seen)
    if moved != planned:
        _write_reasons(aside, now, manifest, moved)
    return aside, moved


def _write_reasons(aside: Path, now: str, manifest: Manifest, files: list[SetAside]) -> None:
    reasons = AsideReasons(utc=now, identity_digest=manifest.identity.digest, files=files)
    write_bytes(aside / REASONS_FILE, (reasons.model_dump_json(indent=2) + "\n").encode())


def _move_each(path: Path, aside: Path, files: list[SetAside], seen: _Seen) -> list[SetAside]:
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
    companions = [name for name in manifest.files if name in taken or not (path / name).is_file()]
    command = _command(path, manifest) if shards or companions else None
    return Repair(path, gone is not None, aside, files, shards, companions, command)


def _command(path: Path, manifest: Manifest) -> str:
    """Return the command that makes again what is missing."""
    config = path / CONFIG_FILE
    try:
        read_json_object(config, MAX_CONFIG_BYTES)
    except DataError:  # as it is named in the manifest, then
        given = [*_recorded_flags(manifest), "--output-dir", str(path)]
    else:
        given = ["--config", str(config)]
    return shlex.join(["eagle-offline", maker(manifest), *given, "--resume"])


def _recorded_flags(manifest: Manifest) -> list[str]:
    """Return the inputs and settings that the manifest records, as flags."""
    inputs = manifest.environment.get("inputs")
    inputs = inputs if isinstance(inputs, dict) else {}
    if manifest.identity.converted_from is not None:
        return [str(inputs.get("cache", "CACHE"))]
    identity, capture = manifest.identity, manifest.identity.capture
    bits = min(layout.mantissa_bits for layout in capture.fields)
    values = {
        "target_model": inputs.get("target_model", identity.target.id),
        "revision": identity.target.revision,
        "input_data": inputs.get("input_data", "DATA"),
        "split": identity.dataset.split,
        "seq_length": identity.text.seq_length,
        "draft_vocab_size": manifest.defaults.draft_vocabulary.size,
        "batch_size": identity.batch_plan.batch_size,
        "shard_size": capture.shard_size,
        "dtype": capture.dtype,
        "compute_dtype": None if capture.compute_dtype == "checkpoint" else capture.compute_dtype,
        "aux_layer_ids": ",".join(map(str, capture.aux_layer_ids)),
        "state_encoding": capture.state_encoding,
        "mantissa_bits": None if bits == EXACT_MANTISSA_BITS else bits,
        "target_encoding": capture.target_encoding,
        "top_k": capture.fields[-1].top_k,
        "format": capture.format,
        "compressor": capture.compressor,
        "shuffle_seed": identity.dataset.shuffle_seed,
        "device": identity.batch_plan.device_kind,
    }
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value is not None]
    return [text for pair in given for text in pair]


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
