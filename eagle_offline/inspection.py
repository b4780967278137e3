"""What `inspect-manifest` shows: what a cache is, how complete, how large, and, when asked, what is wrong with it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from eagle_offline.cache.index import SampleIndex, index_of, read_index
from eagle_offline.cache.layout import (
    MANIFEST_FILE,
    TOKENS_DIRECTORY,
    CommitRecord,
    record_file,
    repair_way_out,
    runs_of,
    shard_of_record,
)
from eagle_offline.cache.manifest import Manifest, first_problem, read_json_object, read_manifest
from eagle_offline.cache.remote import Mirror, RemoteCache, is_url, mirror_directory
from eagle_offline.cache.saved_settings import maker
from eagle_offline.cache.writer import read_record
from eagle_offline.config import require_path
from eagle_offline.errors import DataError, UsageError
from eagle_offline.inspection_example import TOKENIZER_FILE, choose_sample, read_example, sample_facts
from eagle_offline.inspection_record import (
    Extremes,
    Inspection,
    LengthBar,
    RunStatus,
    ShardRange,
    Shards,
    VocabularyFacts,
)
from eagle_offline.inspection_rows import file_size, lost_examples, most_common, quarantine, read_meta
from eagle_offline.inspection_sizes import known, size_facts, total
from eagle_offline.progress import Progress
from eagle_offline.provenance import user_cache_directory
from eagle_offline.text.token_table import META_FILE, QUARANTINE_FILE, TOKENS_FILE

_HISTOGRAM_BARS = 8
_STATUS_NAME = re.compile(r"status(-\d{4})?\.json")

# A cache may be a stranger's: what is taken from it is bounded.
_MAX_STATUS_BYTES = 64 << 10
_MAX_LISTED = 100
# Of the tokens of a cache in an object store, which are fetched to show one sample.
_MAX_TOKENS_BYTES = 64 << 20


def describe_cache(cache: Path | str, *, verify: bool = False, sample: int | None = None) -> dict[str, Any]:
    """Return everything `inspect-manifest --json` prints, an `Inspection` as JSON values.

    Args:
        cache: its directory, or the URL of one in an object store: then only what describes it comes down.
        verify: also read the whole cache; what is wrong stands under ``problems``.
        sample: the one to decode, by its number in the cache; one of moderate length when None.

    Raises:
        DataError: no cache there. MismatchError: of another version. UsageError: no such sample.
    """
    if is_url(cache):
        if verify:
            require_path("--verify", cache)
        path, begun_at, sizes, companions = _brought_here(str(cache), with_tokens=sample is not None)
        manifest = read_manifest(path)
    else:
        path = Path(cache)
        manifest = read_manifest(path)
        begun_at, sizes = (path / MANIFEST_FILE).stat().st_mtime, _top_level_sizes(path)
        companions = {name: file_size(path / name) for name in manifest.files}
    index, problems = _committed(path, sizes, manifest)
    if sample is not None and not 0 <= sample < len(index):
        raise UsageError(f"--sample {sample}: {cache} holds {f'0 to {len(index) - 1}' if len(index) else 'no sample'}")
    problems += [*_missing_companions(cache, companions, manifest), *_missing_shards(sizes, index, manifest)]
    meta, unreadable = read_meta(path)
    problems += [] if unreadable is None else [unreadable]
    number = choose_sample(index) if sample is None else sample
    if is_url(cache) and file_size(path / TOKENS_DIRECTORY / TOKENS_FILE) is None:
        number = None
    if verify:
        problems = _verified(path, len(index.entries))
    lost = [item for entry in index.entries for item in entry.lost]
    inspection = Inspection(
        path=str(cache),
        identity_digest=manifest.identity.digest,
        begun_at=datetime.fromtimestamp(int(begun_at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        manifest=manifest,
        complete=len(index.entries) == manifest.identity.num_shards,
        shards=_shards(manifest, index),
        last_runs=_last_runs(path, sizes),
        quarantine=quarantine(path, meta),
        lost_in_capture=most_common(Counter(item.reason for item in lost)),
        lost_examples=lost_examples(path, lost, meta),
        draft_vocabulary=_vocabulary(manifest, index),
        example=None if number is None else read_example(path, index, number, meta),
        problems=_bounded(problems),
        **_samples(index),
        **(size_facts(path, manifest, index, sizes) | ({"free_bytes": None} if is_url(cache) else {})),
    )
    # A manifest's environment may hold what Python calls NaN and JSON does not know.
    return json.loads(json.dumps(inspection.model_dump(by_alias=True)), parse_constant=lambda _: None)


def _brought_here(url: str, *, with_tokens: bool) -> tuple[Path, float, dict[str, int | None], dict[str, int | None]]:
    """Bring what describes a cache in an object store to this machine.

    Args:
        with_tokens: the tokens too, however many; else only few.

    Returns:
        The directory it is in; when the cache was begun, in seconds; the sizes of what stands in the store, None for
        directories; those of the files that come with it, None for missing ones.
    """
    remote = RemoteCache(url)
    mirror = Mirror(remote, mirror_directory(user_cache_directory() / "shards", url))
    listed = mirror.pull(records=False)
    if MANIFEST_FILE not in listed:
        raise DataError(f"{url}: no cache there: {MANIFEST_FILE} is missing")
    manifest = read_manifest(mirror.directory)
    committed = sorted(shard for name in listed if (shard := shard_of_record(name)) is not None)
    if read_index(mirror.directory, listed, committed, manifest.identity.digest) is None:
        listed = mirror.pull()
    for name in filter(_STATUS_NAME.fullmatch, listed):
        mirror.ensure(name, again=True)
    entries = {name: remote.entry(name) for name in manifest.files}
    tokens = f"{TOKENS_DIRECTORY}/{TOKENS_FILE}"
    shown = (TOKENIZER_FILE, tokens, *(f"{TOKENS_DIRECTORY}/{name}" for name in (META_FILE, QUARANTINE_FILE)))
    for name in shown:
        entry = entries.get(name)
        if entry is not None and (name != tokens or with_tokens or entry.num_bytes <= _MAX_TOKENS_BYTES):
            mirror.ensure(name, entry.num_bytes)
    sizes = {name: None if entry.is_directory else entry.num_bytes for name, entry in listed.items()}
    companions = {name: None if entry is None else entry.num_bytes for name, entry in entries.items()}
    return mirror.directory, remote.modified(MANIFEST_FILE).timestamp(), sizes, companions


def _top_level_sizes(path: Path) -> dict[str, int | None]:
    """Return what stands in the cache, with sizes; None for what is no regular file."""
    try:
        return {name: file_size(path / name) for name in os.listdir(path)}
    except OSError as error:
        raise DataError(f"{path}: cannot be listed: {error.strerror}") from error


def _committed(path: Path, names: Collection[str], manifest: Manifest) -> tuple[SampleIndex, list[str]]:
    """Return the index of the committed shards, and what is wrong with records that do not count."""
    committed = sorted(shard for name in names if (shard := shard_of_record(name)) is not None)
    index = read_index(path, names, committed, manifest.identity.digest)
    problems: list[str] = []
    return (index_of(_records(path, committed, manifest, problems)) if index is None else index), problems


def _records(path: Path, committed: list[int], manifest: Manifest, problems: list[str]) -> Iterator[CommitRecord]:
    identity_digest, num_shards = manifest.identity.digest, manifest.identity.num_shards
    for shard in committed:
        try:
            record = read_record(path, shard)
        except DataError as error:
            problems.append(str(error))
            continue
        if record.identity_digest != identity_digest:
            problems.append(f"{record_file(shard)}: was made under another manifest")
        elif shard >= num_shards:
            problems.append(f"{record_file(shard)}: is beyond the manifest's {num_shards} shards")
        else:
            yield record


def _missing_companions(cache: Path | str, sizes: dict[str, int | None], manifest: Manifest) -> Iterator[str]:
    for name, recorded in manifest.files.items():
        size = sizes[name]
        if size is None:
            yield f"{name}: missing; run {maker(manifest)} --resume to write it again"
        elif size != recorded.num_bytes:
            yield f"{name}: {size} bytes, expected {recorded.num_bytes}; {repair_way_out(cache)}"


def _missing_shards(sizes: dict[str, int | None], index: SampleIndex, manifest: Manifest) -> Iterator[str]:
    for entry in index.entries:
        again = f"delete {record_file(entry.shard)} and run {maker(manifest)} --resume to make it again"
        if entry.file not in sizes:
            yield f"{entry.file}: missing; {again}"
        elif sizes[entry.file] not in (None, entry.file_bytes):
            yield f"{entry.file}: {sizes[entry.file]} bytes, expected {entry.file_bytes}; {again}"


def _verified(path: Path, num_shards: int) -> list[str]:
    from eagle_offline.cache.verify import verify_cache

    with Progress("verify", num_shards, unit="shards") as progress:
        return [str(problem) for problem in verify_cache(path, lambda done, _: progress.reach(done))]


def _bounded(problems: list[str]) -> list[str]:
    """Return the first problems and how many more there are."""
    more = len(problems) - _MAX_LISTED
    return [*problems[:_MAX_LISTED], *([f"and {more} more"] if more > 0 else [])]


def _shards(manifest: Manifest, index: SampleIndex) -> Shards:
    num_shards = manifest.identity.num_shards
    present = {entry.shard for entry in index.entries}
    runs = islice(runs_of(shard for shard in range(num_shards) if shard not in present), _MAX_LISTED)
    ranges = [ShardRange(first=first, last=last) for first, last in runs]
    return Shards(total=num_shards, committed=len(present), missing_ranges=ranges)


def _last_runs(path: Path, names: Iterable[str]) -> list[RunStatus]:
    files = sorted(name for name in names if _STATUS_NAME.fullmatch(name))[:_MAX_LISTED]
    return [_run_status(path, name) for name in files]


def _run_status(path: Path, name: str) -> RunStatus:
    try:
        said = read_json_object(path / name, _MAX_STATUS_BYTES)
        return RunStatus.model_validate({"file": name, **{key: said.get(key) for key in ("state", "exit_code", "why")}})
    except (DataError, ValidationError) as error:
        why = str(error) if isinstance(error, DataError) else f"{name}: {first_problem(error)}"
        return RunStatus(file=name, state="unreadable", exit_code=None, why=why)


def _samples(index: SampleIndex) -> dict[str, Any]:
    """Return the facts of samples: how many, how long, how much of them is supervised."""
    extremes = None
    if len(index):
        extremes = Extremes(
            longest=sample_facts(index, int(index.num_tokens.argmax())),
            shortest=sample_facts(index, int(index.num_tokens.argmin())),
            most_supervised=sample_facts(index, int(index.num_supervised.argmax())),
            least_supervised=sample_facts(index, int(index.num_supervised.argmin())),
        )
    return {
        "samples": len(index),
        "tokens": total(index.num_tokens),
        "supervised_tokens": total(index.num_supervised),
        "target_positions": total(index.num_target_positions),
        "extremes": extremes,
        "length_histogram": _histogram(index.num_tokens),
    }


def _histogram(lengths: np.ndarray) -> list[LengthBar]:
    if not len(lengths):
        return []
    width = max(1, -(-int(lengths.max()) // _HISTOGRAM_BARS))
    counts = np.bincount(np.maximum(lengths - 1, 0) // width).tolist()
    return [
        LengthBar.model_validate({"from": bar * width + 1, "to": (bar + 1) * width, "samples": count})
        for bar, count in enumerate(counts)
    ]


def _vocabulary(manifest: Manifest, index: SampleIndex) -> VocabularyFacts:
    vocabulary = manifest.defaults.draft_vocabulary
    supervised, in_vocab = total(index.num_supervised), total(index.num_in_vocab)
    mass = float(index.vocab_mass.sum(dtype=np.float64))
    note = None
    if supervised <= 0:
        note = "no supervised token is stored"
    elif not in_vocab and not mass:
        note = "the shards do not record it"
    mass_known = note is None and manifest.identity.capture.target_statistics == "full"
    return VocabularyFacts(
        size=vocabulary.size,
        digest=vocabulary.digest,
        supervised_tokens_share=vocabulary.coverage,
        argmax_share=None if note else in_vocab / supervised,
        mass_share=known(mass / supervised) if mass_known else None,
        note=note if note or mass_known else "the states were imported without it",
    )
