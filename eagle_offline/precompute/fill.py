"""Writes the manifest and what comes with it, then makes the missing shards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eagle_offline.cache.companions import embeddings_bytes, head_bytes, vocab_bytes, vocab_file
from eagle_offline.cache.formats import frames_columns
from eagle_offline.cache.layout import (
    EMBEDDINGS_FILE,
    HEAD_FILE,
    TARGET_DIRECTORY,
    TOKENS_DIRECTORY,
    LostSample,
    record_file,
)
from eagle_offline.cache.manifest import (
    CompanionFile,
    Defaults,
    DraftVocabulary,
    Identity,
    Manifest,
    read_manifest,
    refuse_drift,
    write_manifest,
)
from eagle_offline.cache.samples import EncodingErrors, StoredSample, encode_fields
from eagle_offline.cache.writer import committed_shards, ensure_index, read_record, write_shard
from eagle_offline.config import PrecomputeSettings
from eagle_offline.durable import make_directory, remove_abandoned, write_bytes
from eagle_offline.errors import DataError, EagleOfflineError, SpaceError, StoppedEarly, UsageError
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute.plan import Plan
from eagle_offline.progress import Progress
from eagle_offline.provenance import describe_environment, digest_bytes, digest_file
from eagle_offline.target.capture import Capture, CapturedSample, TokenSample, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import input_embeddings, read_head
from eagle_offline.target.load import (
    DTYPES,
    load_model,
)
from eagle_offline.text.token_table import META_FILE, QUARANTINE_FILE, TOKENS_FILE, TokenTable

_TARGET_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


def own_shards(settings: PrecomputeSettings, identity: Identity, *, begun: bool) -> list[int]:
    """Return the shards that fall to this process and are not committed yet.

    Args:
        begun: whether the cache was there when this run began; else another process has begun it meanwhile, and
            whether it is the same one is settled when the manifest is written.

    Raises:
        UsageError: the process number is out of range. DataError: a committed shard is not there in full.
    """
    if settings.process_index >= settings.process_count:
        raise UsageError(
            f"--process-index {settings.process_index}: expected less than --process-count {settings.process_count}"
        )
    done = set(committed_shards(settings.output_dir))
    mine = range(settings.process_index, identity.num_shards, settings.process_count)
    for shard in done.intersection(mine) if begun else ():
        _check_committed(settings.output_dir, identity, shard)
    return [shard for shard in mine if shard not in done]


def _check_committed(directory: Path, identity: Identity, shard: int) -> None:
    """Refuse to count a shard as done that is not there in full.

    Raises:
        DataError: names the record to delete.
    """
    record = read_record(directory, shard)
    again = f"delete {directory / record_file(shard)} and run again with --resume to make the shard again"
    if record.identity_digest != identity.digest:
        raise DataError(f"{directory}: shard {shard} was made under another manifest; {again}")
    file = directory / record.file
    found = file.stat().st_size if file.is_file() else None
    if found != record.file_bytes:
        state = "is missing" if found is None else f"has {found} bytes, expected {record.file_bytes}"
        raise DataError(f"{file} {state}; {again}")


def check_free_space(plan: Plan, num_shards: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        SpaceError: the missing shards need more than is free.
    """
    needed = plan.estimated_bytes() * num_shards // max(plan.identity.num_shards, 1)
    free = shutil.disk_usage(plan.settings.output_dir).free
    if needed > free:
        raise SpaceError(
            f"{plan.settings.output_dir}: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "free some space, choose another --output-dir, or store less (--aux-layer-ids, --split)"
        )


def fill(plan: Plan, recorded: Manifest | None, stop: StopRequest) -> int:
    """Make every missing shard of this process; return how many were made.

    Raises:
        StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: see `eagle_offline.errors`.
    """
    settings, directory = plan.settings, plan.settings.output_dir
    remove_abandoned(directory)
    missing = own_shards(settings, plan.identity, begun=recorded is not None)
    check_free_space(plan, len(missing))
    companions_there = recorded is not None and all((directory / name).is_file() for name in recorded.files)
    if not missing and companions_there:
        ensure_index(directory, plan.identity)
        return 0
    model = load_model(plan.source, plan.device, settings.compute_dtype)
    target = HFEagle3TargetModel(model, plan.identity.capture.aux_layer_ids)
    check_capture(target, read_head(model), _token_sample(plan.table, 0))
    head = read_head(model).to(plan.device, DTYPES[settings.dtype])
    environment = describe_environment(plan.device)
    _write_companions(plan, model, head, environment)

    selected = torch.from_numpy(plan.vocab.selected_token_ids)
    with_probs = settings.target_encoding != "factored"
    capture = Capture(target, head, DTYPES[settings.dtype], selected, with_probs=with_probs)
    order = plan.sample_order()
    size = settings.shard_size
    rows = {shard: order[shard * size : (shard + 1) * size] for shard in missing}
    total = int(sum(plan.table.lengths[ids].sum() for ids in rows.values()))
    with Progress("precompute", total, unit="tok", enabled=settings.process_index == 0) as progress:
        tracker = _Tracker(
            progress, stop, total_bytes=plan.estimated_bytes() * len(missing) // max(plan.identity.num_shards, 1)
        )
        for shard, ids in rows.items():
            samples = [_token_sample(plan.table, int(row)) for row in ids]
            tracker.begin_shard(samples)
            errors = EncodingErrors()
            captured = capture.run(samples, settings.batch_size)
            stored = (tracker.track(_store(plan, sample, errors)) for sample in captured)
            record = write_shard(directory, plan.identity, shard, stored, environment, errors)
            tracker.end_shard(record.file_bytes)
    ensure_index(directory, plan.identity)
    return len(missing)


class _Tracker:
    """Shows progress and gives up a shard that would outlast the grace period."""

    def __init__(self, progress: Progress, stop: StopRequest, total_bytes: int):
        self._progress, self._stop, self._total_bytes = progress, stop, total_bytes
        self._started = time.monotonic()
        self._tokens = self._written = self._shard_left = 0

    def begin_shard(self, samples: Sequence[TokenSample]) -> None:
        self._shard_left = sum(len(sample.input_ids) for sample in samples)
        if self._stop.requested:
            raise StoppedEarly("stopped by a signal between two shards; go on with --resume")

    def track(self, sample: StoredSample | LostSample) -> StoredSample | LostSample:
        count = len(sample.input_ids) if isinstance(sample, StoredSample) else 0
        self._tokens += count
        self._shard_left -= count
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        if not self._stop.leaves_time_for(self._shard_left / max(rate, 1e-9)):
            raise StoppedEarly("stopped by a signal, the shard in hand was dropped; go on with --resume")
        self._progress.advance(count)
        return sample

    def end_shard(self, file_bytes: int) -> None:
        self._written += file_bytes
        written = f"{self._written / 1e6:.1f} of about {self._total_bytes / 1e6:.1f} MB"
        self._progress.advance(0, {"written": written})


def _token_sample(table: TokenTable, row: int) -> TokenSample:
    tokens = table[row]
    return TokenSample(row, tokens.input_ids, tokens.loss_mask)


def _store(plan: Plan, captured: CapturedSample, errors: EncodingErrors) -> StoredSample | LostSample:
    """Return a captured sample encoded, or what is recorded in its stead.

    Raises:
        EagleOfflineError: values are not finite, and the settings say to stop.
    """
    tokens = captured.tokens
    if not captured.finite:
        row = plan.table[tokens.sample_id]
        place = f"{plan.table.meta.sources[row.source].name}, row {row.row}"
        if plan.settings.on_nonfinite == "stop":
            raise EagleOfflineError(
                f"sample {tokens.sample_id} ({place}): the target's states have NaN or infinite values as "
                f"{plan.settings.dtype}; try --dtype bf16 or another --compute-dtype, or leave such samples out "
                "with --on-nonfinite drop"
            )
        return LostSample(sample_id=tokens.sample_id, reason="non-finite states")
    target = captured.last_hidden_state if captured.target_probs is None else captured.target_probs
    capture = plan.identity.capture
    framed = frames_columns(capture.format)
    return StoredSample(
        sample_id=tokens.sample_id,
        input_ids=tokens.input_ids,
        loss_mask=tokens.loss_mask,
        target_argmax=captured.target_argmax,
        target_log_normalizer=captured.target_log_normalizer,
        columns=encode_fields(capture.fields, [*captured.aux_hidden_states, target], errors, framed=framed),
        framed=framed,
        num_in_vocab=captured.num_in_vocab,
        vocab_mass=captured.vocab_mass,
    )


def _write_companions(plan: Plan, model: torch.nn.Module, head: Any, environment: dict[str, Any]) -> None:
    """Write the manifest unless it is there, then the files it names.

    Raises:
        MismatchError: another process began another cache here. DataError: a file came out other than recorded.
    """
    directory = plan.settings.output_dir
    contents = _companions(plan, model, head)
    files = {
        name: CompanionFile(num_bytes=len(content), digest=digest_bytes(content)) for name, content in contents.items()
    }
    for path in (directory / TOKENS_DIRECTORY / name for name in (TOKENS_FILE, QUARANTINE_FILE, META_FILE)):
        name = f"{TOKENS_DIRECTORY}/{path.name}"
        files[name] = CompanionFile(num_bytes=path.stat().st_size, digest=digest_file(path))
    vocabulary = DraftVocabulary(size=plan.vocab.size, digest=plan.vocab.digest, coverage=plan.vocab.coverage)
    inputs = {"target_model": plan.settings.target_model, "input_data": plan.settings.input_data}
    manifest = Manifest(
        identity=plan.identity,
        defaults=Defaults(draft_vocabulary=vocabulary),
        files=files,
        environment={**environment, "inputs": inputs},
    )
    if not write_manifest(directory, manifest):
        standing = read_manifest(directory)
        refuse_drift(directory, standing.identity, plan.identity)
        if standing.files != files:
            changed = sorted(name for name in files if standing.files.get(name) != files[name])
            raise DataError(f"{directory}: {', '.join(changed)} would come out other than the manifest records")
    for name, content in contents.items():
        path = directory / name
        if not path.is_file():
            make_directory(path.parent)
            write_bytes(path, content)


def _companions(plan: Plan, model: torch.nn.Module, head: Any) -> dict[str, bytes]:
    """Return the content of every file that comes with the cache, by its path inside it."""
    weight = input_embeddings(model).weight
    # A checkpoint that was widened for a CPU goes back to its own dtype, exactly.
    stored_dtype = plan.config.dtype if isinstance(plan.config.dtype, torch.dtype) else weight.dtype
    embeddings = weight.detach().to(stored_dtype)
    shared = read_head(model).weight.data_ptr() == weight.data_ptr()
    tied = shared and embeddings.dtype == head.weight.dtype
    contents = {
        HEAD_FILE: head_bytes(head, tied=tied),
        EMBEDDINGS_FILE: embeddings_bytes(embeddings),
        vocab_file(plan.vocab.digest): vocab_bytes(plan.vocab.selected_token_ids),
    }
    for pattern in _TARGET_FILES:
        for path in sorted(plan.source.directory.glob(pattern)):
            if not path.name.endswith(".index.json"):
                contents[f"{TARGET_DIRECTORY}/{path.name}"] = path.read_bytes()
    if plan.settings.chat_template is not None:
        contents[f"{TARGET_DIRECTORY}/chat_template.jinja"] = plan.settings.chat_template.read_bytes()
    return contents
