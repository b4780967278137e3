"""Another encoding, format, shard size or part of a complete cache, made from that cache alone.

Losses may be added and are recorded; nothing that was lost is made up. A shard of the result is a function of the
source, the settings and its number only, so any number of processes may make them, in any order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from eagle_offline.cache.changes import FieldChange, SampleConverter, choice_of, field_changes, layers_of, range_of
from eagle_offline.cache.codec import estimated_row_bytes, losses_of
from eagle_offline.cache.entries import CacheEntries
from eagle_offline.cache.filling import (
    ShardLog,
    ShardWork,
    begun_cache,
    check_free_space,
    ensure_manifest,
    fill_shards,
    own_shards,
)
from eagle_offline.cache.layout import ASIDE_DIRECTORY, CONFIG_FILE, STATUS_FILE, LostSample, repair_way_out
from eagle_offline.cache.manifest import (
    CaptureIdentity,
    CompanionFile,
    Conversion,
    Identity,
    Manifest,
    first_problem,
    refuse_drift,
)
from eagle_offline.cache.reader import Cache, open_cache
from eagle_offline.cache.samples import StoredSample
from eagle_offline.cache.saved_settings import config_bytes
from eagle_offline.cache.writer import committed_shards, ensure_index
from eagle_offline.config import ConvertSettings
from eagle_offline.durable import create_exclusively, make_directory, remove_abandoned, replacing
from eagle_offline.errors import DataError, UsageError
from eagle_offline.interrupts import StopRequest
from eagle_offline.progress import Progress
from eagle_offline.provenance import describe_environment, digest_file

# Whatever else stands in an output directory belongs to somebody else.
_OWN_ENTRIES = {STATUS_FILE, CONFIG_FILE, ASIDE_DIRECTORY}

_COPIED_BYTES = 4 << 20

_STORE_LESS = "--aux-layer-ids, --samples, --state-encoding fp8"

# Settings of a run; what it makes does not depend on them.
_OF_A_RUN = {"output_dir", "process_index", "process_count", "grace_seconds", "resume", "dry_run"}


def check_output_directory(settings: ConvertSettings) -> Manifest | None:
    """Return the manifest of the conversion that was begun there, None if there is none.

    Raises:
        UsageError: the cache itself, inside it or around it; or a cache is there and ``--resume`` was not given.
        MismatchError: something else is there. EagleOfflineError: it cannot be written to.
    """
    source, result = settings.cache.resolve(), settings.output_dir.resolve()
    if source == result or source in result.parents or result in source.parents:
        raise UsageError(
            f"--output-dir {settings.output_dir}: is, holds or lies in the cache to convert, {settings.cache}; "
            "choose another directory"
        )
    if not settings.dry_run:
        make_directory(settings.output_dir)
    return begun_cache(settings.output_dir, resume=settings.resume, own_entries=_OWN_ENTRIES)


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion is about, settled before anything is written.

    Attributes:
        settings: what was asked for, with what was left out filled in from the source.
        source: the cache to convert; entries: what it accounts for.
        first: entry of the source that the result begins with.
        identity: what the result is.
        changes: of every float field of the result.
    """

    settings: ConvertSettings
    source: Cache
    entries: CacheEntries
    first: int
    identity: Identity
    changes: list[FieldChange]

    def samples(self, shard: int) -> range:
        """Return the source's entries that a shard of the result accounts for."""
        begin = self.first + shard * self.identity.capture.shard_size
        return range(begin, begin + self.identity.shard_samples(shard))

    def num_tokens(self, shard: int) -> int:
        """Return the tokens of a shard of the result."""
        return self._rows(shard)["tokens"]

    def estimated_bytes(self, shard: int) -> int:
        """Return about how many bytes a shard of the result takes."""
        rows = self._rows(shard)
        return int(sum(estimated_row_bytes(field) * rows[field.rows] for field in self.identity.capture.fields))

    def _rows(self, shard: int) -> dict[str, int]:
        stored = self.entries.stored(self.samples(shard))
        tokens, positions = self._rows_before
        return {
            "tokens": int(tokens[stored.stop] - tokens[stored.start]),
            "supervised_positions": int(positions[stored.stop] - positions[stored.start]),
        }

    @cached_property
    def _rows_before(self) -> tuple[np.ndarray, np.ndarray]:
        counts = (self.source.lengths, self.source.num_target_positions)
        tokens, positions = (np.concatenate([[0], np.cumsum(count, dtype=np.int64)]) for count in counts)
        return tokens, positions


def plan_conversion(settings: ConvertSettings, recorded: Manifest | None) -> ConversionPlan:
    """Settle what the result is; refuse what cannot be, and what differs from a conversion that was begun.

    Raises:
        UsageError, DataError, MismatchError: see `eagle_offline.errors`.
    """
    source = open_cache(settings.cache)
    entries = CacheEntries(source)
    chosen = range_of(settings, len(entries))
    origin = source.manifest.identity
    choice = choice_of(settings, origin.capture)
    layer_ids = layers_of(settings, origin.capture)
    changes = field_changes(choice, layer_ids, source.manifest)
    keeps_states = choice.target_encoding == "factored"
    vocab_digest = origin.capture.draft_vocab_digest or source.manifest.defaults.draft_vocabulary.digest
    samples = None if len(chosen) == len(entries) else f"{chosen.start}:{chosen.stop}"
    shard_size = settings.shard_size or origin.capture.shard_size
    try:
        identity = Identity(
            target=origin.target,
            text=origin.text,
            dataset=origin.dataset.model_copy(update={"num_samples": len(chosen)}),
            capture=CaptureIdentity(
                aux_layer_ids=layer_ids,
                dtype=choice.dtype,
                compute_dtype=origin.capture.compute_dtype,
                state_encoding=choice.state_encoding,
                target_encoding=choice.target_encoding,
                target_statistics=origin.capture.target_statistics,
                draft_vocab_digest=None if keeps_states else vocab_digest,
                shard_size=shard_size,
                format=choice.format,
                compressor=choice.zarr_compressor,
                fields=[change.result for change in changes],
            ),
            batch_plan=origin.batch_plan,
            imported_from=origin.imported_from,
            converted_from=Conversion(identity_digest=origin.digest, samples=samples, earlier=origin.converted_from),
        )
    except ValidationError as error:
        raise UsageError(f"--shard-size {shard_size}: {first_problem(error)}") from error
    if recorded is not None:
        refuse_drift(settings.output_dir, recorded.identity, identity)
    resolved = settings.model_copy(
        update={
            "cache": settings.cache.absolute(),
            "state_encoding": choice.state_encoding,
            "mantissa_bits": choice.mantissa_bits,
            "target_encoding": choice.target_encoding,
            "top_k": choice.top_k,
            "dtype": choice.dtype,
            "format": choice.format,
            "compressor": choice.zarr_compressor,
            "shard_size": shard_size,
            "aux_layer_ids": tuple(layer_ids),
            "samples": samples,
        }
    )
    return ConversionPlan(resolved, source, entries, chosen.start, identity, changes)


def convert_cache(plan: ConversionPlan, recorded: Manifest | None, stop: StopRequest) -> None:
    """Make every missing shard of this process.

    Raises:
        StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
    """
    settings, directory = plan.settings, plan.settings.output_dir
    remove_abandoned(directory)
    missing = own_shards(
        directory, plan.identity, settings.process_index, settings.process_count, begun=recorded is not None
    )
    needed = sum(plan.estimated_bytes(shard) for shard in missing)
    companions = _missing_companions(plan)
    if recorded is not None and not missing and not companions:
        ensure_index(directory, plan.identity)
        return
    check_free_space(directory, needed + sum(file.num_bytes for file in companions.values()), _STORE_LESS)
    environment = describe_environment("cpu")
    _begin(plan, companions, environment)
    converter = SampleConverter(plan.source, plan.changes, plan.identity.capture.format)

    def samples(shard: int, log: ShardLog) -> Iterator[StoredSample | LostSample]:
        for entry in plan.entries.walk(plan.samples(shard)):
            yield entry if isinstance(entry, LostSample) else converter.convert(entry, log.errors)

    work = [
        ShardWork(shard, plan.num_tokens(shard), plan.estimated_bytes(shard), partial(samples, shard))
        for shard in missing
    ]
    total = sum(item.num_tokens for item in work)
    with Progress("convert", total, unit="tok", enabled=settings.process_index == 0) as progress:
        fill_shards(directory, plan.identity, work, stop, progress, environment, _STORE_LESS)
    ensure_index(directory, plan.identity)


def _missing_companions(plan: ConversionPlan) -> dict[str, CompanionFile]:
    directory = plan.settings.output_dir
    return {name: file for name, file in plan.source.manifest.files.items() if not (directory / name).is_file()}


def _begin(plan: ConversionPlan, companions: dict[str, CompanionFile], environment: dict[str, Any]) -> None:
    """Write the manifest and the settings unless they are there, then the files that come along.

    Raises:
        MismatchError: another process began another cache here. DataError: a file of the source is not as recorded.
    """
    directory, source = plan.settings.output_dir, plan.source.manifest
    inputs = plan.settings.model_dump(mode="json", exclude=_OF_A_RUN)
    ensure_manifest(
        directory,
        Manifest(
            identity=plan.identity,
            defaults=source.defaults,
            files=source.files,
            environment={**environment, "inputs": inputs},
        ),
    )
    create_exclusively(directory / CONFIG_FILE, config_bytes({**inputs, "output_dir": str(directory.absolute())}))
    for name, recorded in companions.items():
        _copy_companion(plan.source.path, name, recorded, directory / name)


def _copy_companion(cache: Path, name: str, recorded: CompanionFile, destination: Path) -> None:
    make_directory(destination.parent)
    try:
        file = (cache / name).open("rb")
    except OSError as error:
        raise DataError(f"{cache / name}: {error.strerror}; a cache is converted when it is whole") from error
    with file, replacing(destination) as sibling:
        with sibling.open("wb") as copy:
            shutil.copyfileobj(file, copy, _COPIED_BYTES)
        if sibling.stat().st_size != recorded.num_bytes or digest_file(sibling) != recorded.digest:
            raise DataError(f"{cache / name}: differs from what the manifest records; {repair_way_out(cache)}")


def summarize(plan: ConversionPlan) -> dict[str, Any]:
    """Return what stands in the result, in numbers."""
    directory, identity = plan.settings.output_dir, plan.identity
    shards = range(identity.num_shards)
    return {
        "cache": str(directory),
        "converted_from": str(plan.settings.cache),
        "samples": identity.dataset.num_samples,
        "tokens": sum(plan.num_tokens(shard) for shard in shards),
        "shards": identity.num_shards,
        "shards_committed": len(committed_shards(directory)) if directory.is_dir() else 0,
        "estimated_bytes": sum(plan.estimated_bytes(shard) for shard in shards),
        "lost_in_encoding": {field.name: list(losses_of(field)) for field in identity.capture.fields},
    }
